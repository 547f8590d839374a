"""Counts of routings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from xccl.errors import UsageError
from xccl.protocol.counts import RoutingCounts
from xccl.protocol.routing import make_routing


def test_real_choices_are_counted_by_hand() -> None:
    """Two ranks, four experts; rank 1 has a token that goes nowhere, and one that names an expert twice."""
    idxs = [np.array([[0, 3], [-1, 2]]), np.array([[-1, -1], [1, 1], [0, -1]])]
    routing = RoutingCounts.from_topk(idxs, 4)
    assert routing.counts.tolist() == [[1, 0, 1, 1], [1, 2, 0, 0]]
    assert routing.tokens.tolist() == [2, 3]
    assert routing.sending.tolist() == [2, 2]
    assert routing.rows.tolist() == [[1, 2], [3, 0]]
    assert routing.runs.tolist() == [[1, 2], [2, 0]]
    assert (routing.sent.tolist(), routing.received.tolist()) == ([3, 3], [4, 2])
    assert (routing.sources, routing.destinations, routing.experts, routing.local_experts) == (2, 2, 4, 2)


def test_experts_that_the_ranks_do_not_divide() -> None:
    """Five experts on three ranks: the first two have two each. Token 0 of rank 0 has two experts on rank 1."""
    idxs = [np.array([[2, 3, 4], [0, -1, 0]]), np.array([[-1, -1, -1]]), np.zeros((0, 3), np.int64)]
    routing = RoutingCounts.from_topk(idxs, 5)
    assert routing.local.tolist() == [2, 2, 1]
    assert routing.rows.tolist() == [[2, 2, 1], [0, 0, 0], [0, 0, 0]]
    assert routing.runs.tolist() == [[1, 2, 1], [0, 0, 0], [0, 0, 0]]
    assert routing.deduplicated is not None
    assert routing.deduplicated.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]


def test_fewer_experts_than_ranks() -> None:
    routing = RoutingCounts.from_topk([np.array([[0, 1]])] * 4, 2)
    assert routing.local.tolist() == [1, 1, 0, 0]
    assert routing.rows.tolist() == [[1, 1, 0, 0]] * 4


def test_one_array_for_all_ranks() -> None:
    idxs = np.arange(24).reshape(3, 4, 2) % 6
    assert RoutingCounts.from_topk(idxs, 6).counts.tolist() == [
        np.bincount(idx.ravel(), minlength=6).tolist() for idx in idxs
    ]


def test_no_tokens_at_all() -> None:
    routing = RoutingCounts.from_topk([np.zeros((0, 2), np.int64)] * 2, 4)
    assert routing.rows.tolist() == [[0, 0], [0, 0]]
    assert routing.sending.tolist() == [0, 0]


def test_a_matrix_of_rows() -> None:
    routing = RoutingCounts.from_counts([[1, 2], [0, 5]], tokens=4)
    assert routing.rows.tolist() == [[1, 2], [0, 5]]
    assert routing.sending.tolist() == [3, 4]
    assert RoutingCounts.from_counts([[1, 2, 3]], tokens=[6], destinations=3).destinations == 3


@given(
    sources=st.integers(1, 20),
    experts=st.integers(1, 40),
    tokens=st.integers(0, 50),
    top_k=st.integers(1, 9),
    shared=st.integers(0, 5),
)
def test_the_uniform_expectation(sources: int, experts: int, tokens: int, top_k: int, shared: int) -> None:
    """Every source sends what its tokens ask for, and no expert has two rows more than another."""
    top_k = min(top_k, experts)
    routing = RoutingCounts.uniform(
        sources, experts=experts, tokens=tokens, top_k=top_k, shared=shared, destinations=experts + shared
    )
    routed, of_shared = routing.counts[:, :experts], routing.counts[:, experts:]
    for part, rows in ((routed, tokens * top_k), (of_shared, tokens)):
        if part.size:
            assert (part.sum(axis=1) == rows).all()
            assert np.ptp(part, axis=1).max() <= 1
            assert np.ptp(part.sum(axis=0)) <= 1


def test_ragged_uniform_expectation() -> None:
    routing = RoutingCounts.uniform(4, experts=8, tokens=[0, 5, 9, 1], top_k=2)
    assert routing.sent.tolist() == [0, 10, 18, 2]
    assert routing.tokens.tolist() == routing.sending.tolist() == [0, 5, 9, 1]


def test_few_rows_are_spread_over_far_experts() -> None:
    """4 tokens x 8 at EP128 with 2 experts a die: chance would reach about 28 dies, and so does the expectation."""
    routing = RoutingCounts.uniform(128, experts=256, tokens=4, top_k=8)
    assert (routing.rows > 0).sum(axis=1).min() >= 24


def test_it_is_near_what_chance_gives() -> None:
    idxs = [make_routing("uniform", tokens=64, experts=64, topk=8, seed=1, rank=r, ranks=16) for r in range(16)]
    drawn = RoutingCounts.from_topk(idxs, 64)
    expected = RoutingCounts.uniform(16, experts=64, tokens=64, top_k=8)
    assert drawn.sent.tolist() == expected.sent.tolist()
    assert np.abs(drawn.received - expected.received).max() < 0.2 * expected.received.max()


@pytest.mark.parametrize(
    "make",
    [
        lambda: RoutingCounts.from_topk([np.array([[4]])], 4),
        lambda: RoutingCounts.from_topk([np.array([[-2]])], 4),
        lambda: RoutingCounts.from_topk([np.array([[0]])] * 3, 4).local_experts,
        lambda: RoutingCounts.from_counts([[1, -1]], 1, destinations=2),
        lambda: RoutingCounts.uniform(2, experts=4, tokens=1, top_k=5),
        lambda: RoutingCounts(np.ones(2, np.int64), np.ones(3, np.int64), np.ones((2, 2), np.int64), 2),
    ],
)
def test_what_does_not_fit(make: object) -> None:
    with pytest.raises(UsageError):
        make()  # type: ignore[operator]
