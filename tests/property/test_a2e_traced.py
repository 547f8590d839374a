"""What was traced of A2E and E2A is what is described, at every die; and trampolines save attention dies small writes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given, settings, strategies as st

import xccl
from tests.multirank.a2e_support import Layout, run_turns
from tests.multirank.support import launch
from tests.property.test_a2e_oracle import layouts
from tests.property.test_traced_is_described import CASES, entries_of
from xccl.protocol import a2e
from xccl.protocol.counts import RoutingCounts
from xccl.protocol.stage import Description
from xccl.trace.record import Recorder


def rounds_of(layout: Layout, seed: int, turns: int) -> list[list[list[Any]]]:
    """Inputs by turn, domain and microbatch."""
    return [
        [
            [layout.round(d, seed + 100 * t + 10 * d + m, no_expert=0.3) for m in range(layout.microbatches)]
            for d in range(layout.domains)
        ]
        for t in range(turns)
    ]


def traces(cases: list[tuple[Layout, list[list[list[Any]]]]], fabric: str) -> list[list[Recorder]]:
    """Run deployments one after the other in one session: recorders by rank and case."""

    def run(comm: xccl.Communicator, layout: Layout, rounds: list[list[list[Any]]]) -> Recorder:
        dis = layout.make(comm)
        with comm.trace() as recorder:
            run_turns(comm.rank, dis, rounds)
        dis.free()
        return recorder

    return launch(lambda comm: [run(comm, *case) for case in cases], max(layout.ranks for layout, _ in cases), fabric)


def described(layout: Layout, rounds: list[list[list[Any]]]) -> list[tuple[int, Description, Description]]:
    """Domain, A2E and E2A of every round, in the order in which expert dies do them."""
    found = []
    before = None
    for turn in rounds:
        for d, domain in enumerate(turn):
            for r in domain:
                idxs = [
                    xccl.reference.with_shared(idx, d * layout.attention + i, layout.routed, layout.shared)
                    for i, idx in enumerate(r.topk_idxs)
                ]
                counts = RoutingCounts.from_topk(idxs, layout.routed + layout.shared, destinations=layout.experts)
                common: dict[str, Any] = {
                    "hidden": layout.hidden,
                    "item_bytes": layout.dtype.itemsize,
                    "trampolines": 0
                    if layout.route == "direct"
                    else layout.trampolines or a2e.default_trampolines(layout.attention, layout.experts),
                    "domains": layout.domains,
                    "domain": d,
                }
                there = a2e.a2e(counts, quant=layout.quant, **common)
                found.append((d, there, a2e.e2a(counts, before=before, **common)))
                before = d
    return found


@settings(max_examples=50 // CASES)
@given(
    cases=st.lists(
        st.tuples(layouts().filter(lambda layout: layout.places is None), st.integers(0, 1 << 30), st.integers(1, 2)),
        min_size=CASES,
        max_size=CASES,
    )
)
def test_traced_is_described(fabric: str, cases: list[tuple[Layout, int, int]]) -> None:
    ran = [(layout, rounds_of(layout, seed, turns)) for layout, seed, turns in cases]
    found = traces(ran, fabric)
    for number, (layout, rounds) in enumerate(ran):
        require_described(layout, [recorders[number] for recorders in found], described(layout, rounds))


def require_described(
    layout: Layout, recorders: list[Recorder], expected: list[tuple[int, Description, Description]]
) -> None:
    """Each die has done what is described of its domain, or of all; ranks without a role have done nothing."""
    for rank, recorder in enumerate(recorders):
        is_attention = rank < layout.attention * layout.domains
        mine = [e for e in expected if not is_attention or e[0] == rank // layout.attention]
        if rank >= layout.ranks:
            mine = []
        for name, column in (("a2e", 1), ("e2a", 2)):
            operations = recorder.named(name)
            assert len(operations) == len(mine)
            for operation, each in zip(operations, mine, strict=True):
                description = each[column]
                assert operation.entries == description.entries(rank)
                stages = [stage.name for stage in operation.stages]
                order = [stage.name for stage in description.stages if stage.name in stages]
                assert stages == order
        entries_of(recorder)


def small_writes(layout: Layout) -> list[Counter[str]]:
    """What each attention die has signalled in one A2E: number of writes by name."""
    found = []
    for (recorder,) in traces([(layout, rounds_of(layout, 1, 1))], "local")[: layout.attention]:
        (operation,) = recorder.named("a2e")
        writes: Counter[str] = Counter()
        for entry in operation.entries:
            if entry.kind == "signal":
                writes[entry.what] += entry.units
        found.append(writes)
    return found


def test_metadata_writes_of_an_attention_die() -> None:
    """One for each expert die falls to one: the stage by way of the trampoline."""
    assert small_writes(Layout(attention=3, experts=9, route="direct")) == [{"field": 9}] * 3
    assert small_writes(Layout(attention=3, experts=9, route="trampoline")) == [{"field": 1}] * 3
