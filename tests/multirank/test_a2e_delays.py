"""No A2E or E2A overwrites what a slow die still reads: each die in turn is slow at each of its steps.

The proof is in `xccl.comm.a2e`; this is the experiment, as in test_moe_delays. All operations follow one another without a
barrier, every one has other data, and all results are checked bit for bit.
"""

from __future__ import annotations

import time

import pytest

import xccl
from tests.multirank.a2e_support import Layout, Round, run_turns
from tests.multirank.support import launch

#: A hundred times what an operation of this size takes.
DELAY_S = 0.004

LAYOUTS = [
    Layout(attention=2, experts=3, route="direct", hidden=130, microbatches=2),
    Layout(attention=3, experts=3, route="trampoline", trampolines=2, hidden=130, microbatches=2),
    Layout(attention=2, experts=3, route="direct", domains=2, hidden=130),
    Layout(attention=1, experts=2, route="trampoline", domains=3, hidden=130, microbatches=2),
]


class Sleeper:
    """The `on_step` hook of a die: sleeps before one step, every other time it comes."""

    def __init__(self) -> None:
        self.at: tuple[str, str] | None = None
        self.seen: list[tuple[str, str]] = []
        self._times = 0

    def __call__(self, operation: str, step: str) -> None:
        if (operation, step) not in self.seen:
            self.seen.append((operation, step))
        if self.at == (operation, step):
            self._times += 1
            if self._times % 2:
                time.sleep(DELAY_S)


def steps_of(layout: Layout, rank: int) -> list[tuple[str, str]]:
    """All steps of a die, in order."""
    bounced = layout.route == "trampoline"
    pull = ["await-fields", "pull", "release"]
    write = ["await-pulled", "write", "announce"]
    if rank < layout.attention * layout.domains:
        return [("a2e", s) for s in write] + [("e2a", f"forward-{s}" if bounced else s) for s in pull]
    there = [f"forward-{s}" for s in pull] if bounced else pull
    back = write
    trampolines = min(layout.attention, layout.experts) if layout.trampolines is None else layout.trampolines
    if bounced and rank < layout.attention * layout.domains + trampolines:
        there = ["forward-await-pulled", *pull, "forward-announce", *there]
        back = ["forward-await-pulled", *back, *pull, "forward-announce"]
    return [("a2e", s) for s in there] + [("e2a", s) for s in back]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["direct", "trampolines", "direct, domains", "trampoline, domains"])
def test_a_slow_die_reads_what_was_meant_for_it(fabric: str, layout: Layout) -> None:
    turns = [
        [[layout.round(d, 100 * t + 10 * d + m) for m in range(layout.microbatches)] for d in range(layout.domains)]
        for t in range(3)
    ]
    slow = [(rank, *step) for rank in range(layout.ranks) for step in steps_of(layout, rank)]

    def main(comm: xccl.Communicator) -> list[tuple[str, str]]:
        dis = layout.make(comm)
        dis.on_step = sleeper = Sleeper()
        for n, (rank, operation, step) in enumerate(slow):
            sleeper.at = (operation, step) if rank == comm.rank else None
            what = f"rank {rank} slow at {step} of {operation}: "
            run_turns(comm.rank, dis, turns, what, done=n * len(turns))
        return sleeper.seen

    for rank, seen in enumerate(launch(main, layout.ranks, fabric)):
        assert sorted(seen) == sorted(steps_of(layout, rank)), "a step was renamed, and its delay never happened"


@pytest.mark.parametrize("route", ["direct", "trampoline"])
def test_a_slow_attention_die_in_overlapping_streams(fabric: str, route: str) -> None:
    """Expert dies receive ahead while outputs of earlier batches wait to be pulled."""
    layout = Layout(attention=2, experts=2, route=route, domains=2, microbatches=2)
    turns = [[[layout.round(d, 100 * t + 10 * d + m) for m in range(2)] for d in range(2)] for t in range(6)]

    def main(comm: xccl.Communicator) -> None:
        dis = layout.make(comm)
        if dis.role == "attention":
            dis.on_step = sleeper = Sleeper()
            sleeper.at = ("e2a", "pull" if route == "direct" else "forward-pull") if comm.rank == 0 else None
            run_turns(comm.rank, dis, turns)
            return

        def experts(batch: xccl.ExpertBatch) -> object:
            r: Round = turns[batch.turn][batch.domain][batch.microbatch]
            r.check(comm.rank, batch)
            return r.outs[layout.expert_ranks.index(comm.rank)]

        xccl.ExpertLoop(dis, experts, ahead=2).run()  # type: ignore[arg-type]

    launch(main, layout.ranks, fabric)
