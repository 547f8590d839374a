"""A2E and E2A equal the oracle bit for bit, for any deployment, routing and numbers, directly and by trampolines."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings, strategies as st

import xccl
from tests.multirank.a2e_support import Layout, Round, run_turns
from tests.multirank.support import BF16, FLOATS, FP16, FP32, KINDS, launch

#: Seed, kind of numbers, part of slots without expert, few experts only; one for each turn.
Turn = tuple[int, str, float, bool]


#: Deployments of one session: to start ranks takes longer than what they do then.
DEPLOYMENTS = 4
#: A deployment, and what it does.
Case = tuple[Layout, list[Turn]]


def rounds_of(layout: Layout, turns: list[Turn], tokens: list[list[int]] | None = None) -> list[list[list[Round]]]:
    """Inputs by turn, domain and microbatch. `tokens` are those of each attention die, by domain; any number if None."""
    return [
        [
            [
                layout.round(d, seed + 100 * d + m, None if tokens is None else tokens[d], kind, no_expert=p, hot=hot)
                for m in range(layout.microbatches)
            ]
            for d in range(layout.domains)
        ]
        for seed, kind, p, hot in turns
    ]


def run(fabric: str, cases: list[tuple[Layout, list[list[list[Round]]]]]) -> None:
    """Run and check deployments one after the other; ranks that one does not need have no part in it."""

    def main(comm: xccl.Communicator) -> None:
        for layout, rounds in cases:
            dis = layout.make(comm)
            run_turns(comm.rank, dis, rounds)
            dis.free()

    launch(main, max(layout.ranks for layout, _ in cases), fabric)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any deployment of up to about ten dies."""
    attention, experts = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    local = draw(st.integers(1, 3))
    route = draw(st.sampled_from(["direct", "trampoline"]))
    most = min(attention, experts)
    layout = Layout(
        attention=attention,
        experts=experts,
        local_experts=local,
        hidden=draw(st.one_of(st.integers(1, 200), st.sampled_from([63, 64, 65, 255, 1024, 7168]))),
        top_k=draw(st.integers(1, 8)),
        max_tokens=draw(st.integers(0, 12)),
        dtype=draw(st.sampled_from(FLOATS)),
        quant=draw(st.sampled_from(["int8", "none"])),
        shared=draw(st.integers(0, experts * local - 1)),
        route=route,
        trampolines=draw(st.one_of(st.none(), st.integers(1, most))) if route == "trampoline" else None,
        domains=draw(st.integers(1, 3)),
        microbatches=draw(st.integers(1, 3)),
    )
    if not draw(st.booleans()):
        return layout
    order = draw(st.permutations(range(layout.ranks)))
    cut = layout.attention * layout.domains
    return replace(layout, places=(tuple(sorted(order[:cut])), tuple(sorted(order[cut:]))))


turns = st.lists(
    st.tuples(st.integers(0, 1 << 30), st.sampled_from(KINDS), st.sampled_from([0.0, 0.1, 0.6, 1.1]), st.booleans()),
    min_size=1,
    max_size=3,
)


deployments = st.lists(st.tuples(layouts(), turns), min_size=DEPLOYMENTS, max_size=DEPLOYMENTS)


@given(cases=deployments)
@example(
    cases=[
        (Layout(3, 1, 4, 33, 3, 8, FP32, "none", 0, "direct"), [(1, "any bits", 0.1, False)]),
        (Layout(5, 2, 2, 65, 4, 8, FP16, "int8", 1), [(2, "specials", 0.0, True)] * 2),
        (Layout(1, 6, 1, 17, 8, 8, BF16, "int8", 2), [(3, "wide", 0.0, False)]),
    ]
)
@example(cases=[(Layout(2, 4, 1, 8, 2, 0, BF16, "int8"), [(4, "normal", 0.0, False)] * 2)])
@example(cases=[(Layout(5, 3, 1, 8, 2, 9, BF16, "none", trampolines=2), [(5, "normal", 1.1, False)] * 2)])
@example(cases=[(Layout(2, 3, 1, 8, 2, 9, domains=3, microbatches=2), [(6, "normal", 0.1, False)] * 3)])
@settings(max_examples=100 // DEPLOYMENTS)
@pytest.mark.timeout(110)
def test_any_deployment(fabric: str, cases: list[Case]) -> None:
    run(fabric, [(layout, rounds_of(layout, turns)) for layout, turns in cases])


@pytest.mark.parametrize("route", ["direct", "trampoline"])
def test_dies_and_domains_without_tokens(fabric: str, route: str) -> None:
    layout = Layout(attention=3, experts=2, route=route, domains=2)
    run(fabric, [(layout, rounds_of(layout, [(7, "normal", 0.0, False)] * 2, [[0, 0, 0], [5, 0, 16]]))])


def test_both_routes_give_the_same_bits() -> None:
    """They do, since each equals the oracle; here once more with everything at once."""
    for route in ("direct", "trampoline"):
        layout = Layout(4, 6, 2, 100, 6, 16, FP16, "int8", 2, route, domains=2, microbatches=2)
        run("local", [(layout, rounds_of(layout, [(8, "any bits", 0.2, False)]))])
