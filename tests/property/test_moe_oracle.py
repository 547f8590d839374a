"""Dispatch and combine equal the oracle bit for bit, for any shape, routing and numbers.

An example is a session: some ranks, one ExpertParallel object after the other, and several rounds of dispatch and combine
with each. To start ranks takes longer than what they do then, so that one session serves several cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings, strategies as st

import xccl
from tests.multirank.support import BF16, FLOATS, FP16, FP32, KINDS, Round, Shape, launch

#: Elements of all rows of a round, so that an example takes tens of milliseconds.
BUDGET = 1_500_000


#: Objects of an example.
OBJECTS = 4


@dataclass(frozen=True)
class Case:
    """What is done with one object."""

    shape: Shape
    #: For each round: seed, tokens of each rank, kind of numbers, part of slots without expert, few experts only.
    rounds: list[tuple[int, list[int], str, float, bool]]
    #: Dispatches that are under way before the first combine.
    depth: int = 1

    def rounds_of_all(self) -> list[Round]:
        """Inputs of each round, and what the oracle says of them."""
        return [self.shape.round(seed, t, kind, no_expert=p, hot=hot) for seed, t, kind, p, hot in self.rounds]

    def run(self, comm: xccl.Communicator, rounds: list[Round]) -> None:
        """Run and check it at a rank."""
        ep = self.shape.expert_parallel(comm)
        under_way: list[tuple[Round, xccl.Dispatched]] = []
        for number, r in enumerate(rounds):
            under_way.append((r, r.dispatch(comm.rank, ep)))
            if len(under_way) >= self.depth:
                first, d = under_way.pop(0)
                first.combine(comm.rank, ep, d, lent=bool((number + comm.rank) % 2))
        for r, d in under_way:
            r.combine(comm.rank, ep, d)
        ep.free()


def run(fabric: str, ranks: int, cases: list[Case]) -> None:
    """Run and check a session."""
    rounds = [case.rounds_of_all() for case in cases]

    def main(comm: xccl.Communicator) -> None:
        for case, inputs in zip(cases, rounds, strict=True):
            case.run(comm, inputs)

    launch(main, ranks, fabric)


@st.composite
def cases(draw: st.DrawFn, ranks: int) -> Case:
    """Any object: tokens 0-200 ragged, hidden 1-7168, top-k 1-16, experts 1-512, any protocol and rows."""
    # Sizes around those where loops change their step, and any other.
    hidden = draw(
        st.one_of(
            st.integers(1, 300),
            st.integers(1, 7168),
            st.sampled_from([15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 1023, 1024, 7167, 7168]),
        )
    )
    top_k = draw(st.integers(1, 16))
    experts = draw(st.one_of(st.integers(1, 4 * ranks), st.integers(1, 512), st.just(ranks), st.just(2 * ranks)))
    most = max(1, min(200, BUDGET // (ranks * hidden * top_k)))
    tokens = st.one_of(st.integers(0, most), st.sampled_from([0, 1, most]))
    rounds = draw(
        st.lists(
            st.tuples(
                st.integers(0, 2**32 - 1),
                st.lists(tokens, min_size=ranks, max_size=ranks),
                st.sampled_from(KINDS),
                st.sampled_from([0.0, 0.1, 0.6, 1.1]),
                st.booleans(),
            ),
            min_size=1,
            max_size=4,
        )
    )
    needed = max(max(t) for _, t, _, _, _ in rounds)
    shape = Shape(
        num_experts=experts,
        hidden=hidden,
        top_k=top_k,
        max_tokens=draw(st.sampled_from([needed, max(needed, most)])),
        dtype=draw(st.sampled_from(FLOATS)),
        quant=draw(st.sampled_from(["int8", "none"])),
        protocol=draw(st.sampled_from(["pull", "push", "direct"])),
        rows=draw(st.sampled_from(["expanded", "dedup"])),
        shared=draw(st.booleans()),
    )
    return Case(shape, rounds, depth=draw(st.integers(1, 3)))


#: Ranks, and what they do one after the other.
sessions = st.integers(1, 8).flatmap(
    lambda ranks: st.tuples(st.just(ranks), st.lists(cases(ranks), min_size=OBJECTS, max_size=OBJECTS))
)


@given(session=sessions)
@example(
    # The corners of the issue, as far as they go together in a second.
    session=(
        8,
        [
            Case(Shape(512, 7168, 16, 200, BF16, "int8"), [(1, [2] * 8, "wide", 0.0, False)]),
            Case(Shape(512, 1, 16, 200, FP32, "int8"), [(2, [200] * 8, "any bits", 0.1, False)]),
            Case(Shape(8, 3, 16, 200, FP16, "none"), [(3, [0, 200] * 4, "any bits", 0.0, True)] * 3),
        ],
    )
)
@example(
    session=(
        1,
        [
            Case(Shape(1, 7168, 1, 200, BF16, "int8"), [(4, [200], "specials", 0.0, False)]),
            Case(Shape(512, 7167, 16, 1, FP32, "none"), [(5, [1], "specials", 0.0, False)]),
        ],
    )
)
@example(session=(7, [Case(Shape(7, 5, 1, 0, BF16, "int8"), [(6, [0] * 7, "normal", 0.0, False)] * 2)]))
@example(
    session=(
        5,
        [
            Case(Shape(3, 9, 4, 20, BF16, "int8", "push"), [(7, [20, 0, 7, 1, 20], "wide", 0.1, True)] * 3),
            Case(
                Shape(7, 66, 8, 9, FP16, "int8", "direct", "dedup", True),
                [(9, [9, 0, 4, 9, 1], "any bits", 0.1, True)] * 5,
                depth=5,
            ),
        ],
    )
)
@example(
    session=(
        4,
        [
            Case(
                Shape(10, 65, 16, 9, FP16, "int8", "push", "dedup", True),
                [(8, [9, 0, 4, 9], "any bits", 0.1, False)] * 2,
            ),
            Case(
                Shape(10, 65, 16, 9, FP32, "none", "pull", "dedup", True),
                [(8, [9, 0, 4, 9], "any bits", 0.1, False)] * 2,
            ),
        ],
    )
)
@example(session=(3, [Case(Shape(4, 33, 5, 20, FP32, "none", "direct"), [(10, [20, 0, 7], "wide", 0.1, True)] * 3)]))
@settings(max_examples=200 // OBJECTS)
@pytest.mark.timeout(110)
def test_any_session(fabric: str, session: tuple[int, list[Case]]) -> None:
    run(fabric, *session)
