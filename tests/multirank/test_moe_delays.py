"""No operation overwrites what a slow peer still reads: each rank in turn is slow at each step of dispatch and of
combine.

The proofs are in `xccl.comm.moe_pull`, `moe_push` and `moe_direct`; this is the experiment. All operations follow one
another without a barrier, every one has other data, and all results are checked bit for bit. While one rank sleeps
before a step, the others run ahead as far as the protocol lets them, since a step takes them microseconds. (Without the
wait for peers that still pull, or the round before an operation that comes out of turn, these tests fail: the next
operation's rows arrive in the place of this one's.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import xccl
from tests.multirank.support import Round, Shape, assert_same, launch

RANKS = 3
#: A hundred times what an operation of this size takes.
DELAY_S = 0.004
PULL = ("await-pulled", "write", "announce", "await-fields", "pull", "release")
STEPS = {
    ("pull", "dispatch"): PULL,
    ("pull", "combine"): PULL,
    ("push", "dispatch"): ("send", "notify", "await-flags", "assemble"),
    ("push", "combine"): ("send", "flag", "await-flags", "reduce"),
    ("direct", "dispatch"): ("count", "announce", "await-counts", "plan", "write", "notify", "await-rows"),
    ("direct", "combine"): ("return", "announce", "await-ready", "reduce", "release", "await-read"),
}
#: Besides, in a push operation that comes out of turn.
ROUND = ("release", "await-taken")
#: Operations between two delays, and at the end: enough for a fast rank to come around to the same memory twice.
BACK_TO_BACK = 4

SHAPES = {
    protocol: Shape(num_experts=7, hidden=130, top_k=4, max_tokens=16, quant="int8", protocol=protocol)
    for protocol in ("pull", "push", "direct")
}
SHAPE = SHAPES["pull"]
#: Dense ones, and sparse ones, in which some ranks have nothing for each other and so wait for each other less.
ROUNDS = [
    SHAPE.round(i, [(7 * i + 5) % 17, 16, (3 * i) % 17], no_expert=0.05 if i % 2 else 0.9, hot=i == 4) for i in range(8)
]


class Sleeper:
    """The `on_step` hook of a rank: sleeps before one step of one operation, when it is this rank's turn."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._at: tuple[str, str] | None = None
        self.seen: list[tuple[str, str]] = []

    def __call__(self, operation: str, step: str) -> None:
        self.seen.append((operation, step))
        if self._at == (operation, step):
            time.sleep(DELAY_S)

    def slow(self, rank: int, operation: str, step: str) -> None:
        """From now on, rank `rank` is slow at this step."""
        self._at = (operation, step) if rank == self._rank else None


def steps_of(protocol: str, operation: str, out_of_turn: str | None, kind: Any) -> tuple[str, ...]:
    """The steps of an operation, if the one of that name comes out of turn."""
    before = ROUND if (protocol, operation) == ("push", out_of_turn) else ()
    after = ("await-read",) if (protocol, operation, kind) == ("pull", "combine", in_place) else ()
    return before + STEPS[protocol, operation] + after


def delays(
    protocol: str, operations: tuple[str, ...], out_of_turn: str | None, kind: Any
) -> Iterator[tuple[int, str, str]]:
    """Every rank at every step."""
    for operation in operations:
        for step in steps_of(protocol, operation, out_of_turn, kind):
            for rank in range(RANKS):
                yield rank, operation, step


def dispatch_only(comm: xccl.Communicator, ep: xccl.ExpertParallel) -> Callable[[int, Round, str], None]:
    """Nothing but dispatches."""
    return lambda i, r, what: r.check_dispatched(comm.rank, r.dispatch(comm.rank, ep, what), what)


def combine_only(comm: xccl.Communicator, ep: xccl.ExpertParallel) -> Callable[[int, Round, str], None]:
    """Nothing but combines, of handles that were all made at the start."""
    handles = {id(r): r.dispatch(comm.rank, ep) for r in ROUNDS}

    def operate(i: int, r: Round, what: str) -> None:
        r.combine(comm.rank, ep, handles[id(r)], what)

    return operate


def in_turn(comm: xccl.Communicator, ep: xccl.ExpertParallel) -> Callable[[int, Round, str], None]:
    """Dispatch and combine, as a layer does."""
    return lambda i, r, what: r.run(comm.rank, ep, what)


def in_place(comm: xccl.Communicator, ep: xccl.ExpertParallel) -> Callable[[int, Round, str], None]:
    """Dispatch and combine, of outputs that lie where peers read them, at some of the ranks."""
    return lambda i, r, what: assert_same(
        r.combine(comm.rank, ep, r.dispatch(comm.rank, ep, what), what, lent=comm.rank != i % 5), r.ys[comm.rank]
    )


def mixed(comm: xccl.Communicator, ep: xccl.ExpertParallel) -> Callable[[int, Round, str], None]:
    """Two dispatches for each combine, and the combine is that of the dispatch before."""

    def operate(i: int, r: Round, what: str) -> None:
        first = r.dispatch(comm.rank, ep, what)
        other = ROUNDS[(i + 1) % len(ROUNDS)]
        other.dispatch(comm.rank, ep, what)
        r.combine(comm.rank, ep, first, what)

    return operate


@pytest.mark.parametrize(
    ("kind", "slow_in", "out_of_turn"),
    [
        (dispatch_only, ("dispatch",), "dispatch"),
        (combine_only, ("combine",), "combine"),
        (in_turn, ("dispatch", "combine"), None),
        (in_place, ("dispatch", "combine"), None),
        (mixed, ("dispatch", "combine"), "dispatch"),
    ],
    ids=["dispatch_only", "combine_only", "in_turn", "in_place", "mixed"],
)
def test_a_slow_rank_reads_what_was_meant_for_it(
    fabric: str, protocol: str, kind: Any, slow_in: tuple[str, ...], out_of_turn: str | None
) -> None:
    def main(comm: xccl.Communicator) -> set[tuple[str, str]]:
        ep = SHAPES[protocol].expert_parallel(comm)
        operate = kind(comm, ep)
        sleeper = Sleeper(comm.rank)
        ep.on_step = sleeper
        i = 0
        for rank, operation, step in delays(protocol, slow_in, out_of_turn, kind):
            # Slow in the middle of operations that go on before and after.
            for n in range(BACK_TO_BACK):
                if n == 1:
                    sleeper.slow(rank, operation, step)
                elif n == 3:
                    sleeper.slow(-1, operation, step)
                what = f"rank {rank} slow at {step} of {operation}, operation {n} ({i}): "
                operate(i, ROUNDS[i % len(ROUNDS)], what)
                i += 1
        return set(sleeper.seen)

    every_step = {
        (operation, step) for operation in slow_in for step in steps_of(protocol, operation, out_of_turn, kind)
    }
    for seen in launch(main, RANKS, fabric):
        assert seen >= every_step, "a step was renamed, and its delay never happened"
        if out_of_turn is None:
            assert seen == every_step, "operations in turn have a round"


def test_two_slow_ranks_and_a_fast_one(fabric: str, protocol: str) -> None:
    """One rank is slow to read and another slow to write, all the time: the fast one is held back by both."""
    reading, writing = {
        "pull": ("pull", "write"),
        "push": ("assemble", "send"),
        "direct": ("plan", "write"),
    }[protocol]
    slow_at = {0: ("dispatch", reading), 1: ("dispatch", writing), 2: None}

    def main(comm: xccl.Communicator) -> None:
        ep = SHAPES[protocol].expert_parallel(comm)
        sleeper = Sleeper(comm.rank)
        at = slow_at[comm.rank]
        if at is not None:
            sleeper.slow(comm.rank, *at)
        ep.on_step = sleeper
        for i in range(12):
            ROUNDS[i % len(ROUNDS)].run(comm.rank, ep, f"operation {i}, ")

    launch(main, RANKS, fabric)


@pytest.mark.parametrize("number", range(max(map(len, STEPS.values()))))
def test_a_rank_that_stops_at_a_step_is_waited_for(fabric: str, protocol: str, number: int) -> None:
    """A long stop, much longer than the time in which a rank goes from spinning to sleeping."""

    def main(comm: xccl.Communicator) -> None:
        ep = SHAPES[protocol].expert_parallel(comm)
        stopped: list[str] = []

        def stop_once(operation: str, at: str) -> None:
            steps = STEPS[protocol, operation]
            if comm.rank == 1 and at == steps[number % len(steps)] and operation not in stopped:
                stopped.append(operation)
                time.sleep(0.08)

        ep.on_step = stop_once
        for i in range(4):
            ROUNDS[i].run(comm.rank, ep, f"operation {i}, ")

    launch(main, RANKS, fabric)
