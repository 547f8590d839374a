"""Expert maps and load balancing, against brute force on small cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import xccl
from xccl.errors import CapacityError, UsageError
from xccl.protocol.placement import ExpertMap, choose_replicas, place_replicas
from xccl.protocol.routing import expert_shares

loads = st.integers(1, 3).flatmap(
    lambda slices: st.integers(1, 5).flatmap(
        lambda experts: st.lists(
            st.lists(st.integers(0, 50), min_size=experts, max_size=experts), min_size=slices, max_size=slices
        )
    )
)


def peak(load: np.ndarray, replicas: np.ndarray) -> float:
    """The largest load per replica in one slice."""
    return float((np.asarray(load) / replicas).max())


def total(load: np.ndarray, replicas: np.ndarray) -> float:
    return float((np.asarray(load) / replicas).max(axis=1).sum())


def all_choices(experts: int, budget: int) -> list[np.ndarray]:
    """Every way to deal a budget among experts."""
    bars = itertools.combinations(range(budget + experts - 1), experts - 1)
    return [np.diff([-1, *bar, budget + experts - 1]) for bar in bars]


@settings(deadline=None, max_examples=150)
@given(load=loads, budget=st.integers(0, 5))
def test_the_largest_load_per_replica_is_the_least_possible(load: list[list[int]], budget: int) -> None:
    table = np.array(load)
    replicas = choose_replicas(table, budget)
    assert replicas.min() >= 1
    assert replicas.sum() == table.shape[1] + budget
    best = min(peak(table, choice) for choice in all_choices(table.shape[1], budget))
    assert peak(table, replicas) == pytest.approx(best, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(load=loads, by=st.sampled_from(["peak", "total"]))
def test_more_budget_is_never_worse(load: list[list[int]], by: str) -> None:
    table = np.array(load)
    choices = [choose_replicas(table, budget, by=by) for budget in range(8)]  # type: ignore[arg-type]
    for fewer, more in itertools.pairwise(choices):
        assert (more >= fewer).all()
        assert peak(table, more) <= peak(table, fewer)
        assert total(table, more) <= total(table, fewer)


@settings(deadline=None, max_examples=100)
@given(load=loads)
def test_by_total_takes_the_replica_that_lowers_it_most(load: list[list[int]]) -> None:
    table = np.array(load)
    chosen = choose_replicas(table, 1, by="total")
    options = [total(table, 1 + np.eye(table.shape[1], dtype=int)[e]) for e in range(table.shape[1])]
    assert total(table, chosen) == pytest.approx(min(options))


def test_where_the_total_stands_still() -> None:
    """Two experts equally hot in the one slice: neither alone lowers the total, both do."""
    table = np.array([[60, 60, 10]])
    assert total(table, choose_replicas(table, 1, by="total")) == 60
    for by in ("peak", "total"):
        assert choose_replicas(table, 2, by=by).tolist() == [2, 2, 1]  # type: ignore[arg-type]


def rank_peak(table: np.ndarray, replicas: np.ndarray, rank: np.ndarray, ranks: int) -> float:
    each = np.repeat(table / replicas, replicas, axis=1)
    return max(float(np.bincount(rank, row, ranks).max()) for row in each)


@settings(deadline=None, max_examples=150)
@given(load=loads, budget=st.integers(0, 3), ranks=st.integers(1, 4), spare=st.integers(0, 1))
def test_the_placement_is_within_four_thirds_of_the_best(
    load: list[list[int]], budget: int, ranks: int, spare: int
) -> None:
    table = np.array(load)
    replicas = choose_replicas(table, budget)
    n = int(replicas.sum())
    slots = np.full(ranks, -(-n // ranks) + spare)
    rank = place_replicas(table, replicas, slots)
    assert (np.bincount(rank, minlength=ranks) <= slots).all()
    if n > 6:
        return  # brute force takes too long
    places = [np.array(p) for p in itertools.product(range(ranks), repeat=n)]
    allowed = [p for p in places if (np.bincount(p, minlength=ranks) <= slots).all()]
    best = min(rank_peak(table, replicas, p, ranks) for p in allowed)
    assert rank_peak(table, replicas, rank, ranks) <= best * 4 / 3 + 1e-9


def test_a_skewed_load_as_measured() -> None:
    """256 experts, the hottest 30 times the mean (XDS): 32 replicas cut the largest load per replica by 80%."""
    shares = expert_shares("skew", experts=256, topk=8)
    rng = np.random.default_rng(7)
    base = shares / shares.mean()
    assert base.max() == pytest.approx(30, rel=0.1)
    slices = np.stack([base, base * rng.uniform(0.8, 1.2, 256)])
    before, after = peak(slices, np.ones(256)), peak(slices, choose_replicas(slices, 32))
    assert after <= 0.2 * before
    plain, balanced = ExpertMap.plain(256, 32), ExpertMap.balanced(slices, 32, redundant=32)
    assert balanced.rank_load(slices).max() < 0.4 * plain.rank_load(slices).max()
    assert balanced.rank_load(slices).sum() == pytest.approx(slices.sum())


# -- maps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("routed", "ranks", "sizes"), [(8, 4, [2, 2, 2, 2]), (10, 4, [3, 3, 2, 2]), (3, 5, [1, 1, 1, 0, 0])]
)
def test_ranks_that_do_not_divide_the_experts(routed: int, ranks: int, sizes: list[int]) -> None:
    plain = ExpertMap.plain(routed, ranks)
    assert np.diff(plain.first).tolist() == sizes
    assert plain.rank_of(np.arange(routed)).tolist() == np.repeat(np.arange(ranks), sizes).tolist()
    idx = np.arange(routed)[:, None]
    assert plain.to_physical(idx).tolist() == idx.tolist()


def test_the_published_deployment() -> None:
    """EP320: 32 replicas of a shared expert, 256 routed and 32 redundant experts, one for each rank (CM384 §4.2.1)."""
    load = np.ones(256)
    load[3] = 40
    deployed = ExpertMap.balanced(load, 320, redundant=32, shared_ranks=32)
    assert (deployed.physical, deployed.ranks, deployed.shared) == (320, 320, 1)
    assert np.diff(deployed.first).tolist() == [1] * 320
    assert deployed.replicas[3] == 33
    assert deployed.replicas[256] == 32
    assert (deployed.rank_of(np.flatnonzero(deployed.logical == 256)) >= 288).all()


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_replicas_take_turns(data: st.DataObject) -> None:
    routed, ranks = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    redundant, shared = data.draw(st.integers(0, 6)), data.draw(st.integers(0, ranks - 1))
    load = data.draw(st.lists(st.integers(0, 9), min_size=routed, max_size=routed))
    found = ExpertMap.balanced(load, ranks, redundant=redundant, shared_ranks=shared)
    tokens, top_k, position = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 99))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    idx = rng.integers(-1, routed, (tokens, top_k))
    physical = found.to_physical(idx, position)
    assert physical.shape == (tokens, top_k + found.shared)
    copies = {e: np.flatnonzero(found.logical == e) for e in range(routed + found.shared)}
    for t, k in itertools.product(range(tokens), range(top_k)):  # the rule, one by one
        e = idx[t, k]
        assert physical[t, k] == (-1 if e < 0 else copies[e][(position + t) % len(copies[e])])
    for t in range(tokens):
        if found.shared:
            assert physical[t, top_k] == copies[routed][(position + t) % shared]
    assert (found.to_logical(physical)[:, :top_k] == idx).all()
    local = [found.local_experts(rank) for rank in range(ranks)]
    assert np.concatenate(local).tolist() == list(range(found.physical))
    for rank, ids in enumerate(local):
        assert (found.rank_of(ids) == rank).all()
        assert found.local(rank).tolist() == found.logical[ids].tolist()
    assert found.rank_of([-1]).tolist() == [-1]


def test_the_published_rule_may_leave_the_peak_where_it_is() -> None:
    """Why "peak" is the default: the largest gain lies in the second slice, the peak in the first."""
    table = np.array([[100, 99, 0], [0, 0, 50]])
    by_total, by_peak = choose_replicas(table, 2, by="total"), choose_replicas(table, 2, by="peak")
    assert (by_total.tolist(), by_peak.tolist()) == ([1, 1, 3], [2, 2, 1])
    assert (peak(table, by_total), peak(table, by_peak)) == (100, 50)


def test_a_few_replicas_are_placed_as_well_as_they_can_be() -> None:
    """Where heaviest-first and exchanges stop at 18, the best is 13."""
    table = np.array([[6, 12, 5, 2, 1], [0, 8, 1, 11, 3]])
    slots = [3, 2]
    rank = place_replicas(table, np.ones(5, int), slots)
    assert np.bincount(rank, minlength=2).tolist() == slots
    assert rank_peak(table, np.ones(5, int), rank, 2) == 13


def test_impossible_arguments() -> None:
    for wrong in (
        lambda: ExpertMap.plain(0, 2),
        lambda: ExpertMap.plain(2, 0),
        lambda: ExpertMap.balanced([1, 2], 2, shared_ranks=2),
        lambda: ExpertMap.balanced([1, 2], 2, redundant=-1),
        lambda: ExpertMap(3, np.array([0, 1]), np.array([0, 2])),
        lambda: ExpertMap(2, np.array([0, 1]), np.array([0, 1])),
        lambda: ExpertMap.plain(4, 2).to_physical([[4]]),
        lambda: ExpertMap.plain(4, 2).to_physical([[0.5]]),
        lambda: ExpertMap.plain(4, 2).to_physical([[0]], position=-1),
        lambda: ExpertMap.plain(4, 2).to_logical([4]),
        lambda: ExpertMap.plain(4, 2).to_logical([0.5]),
        lambda: ExpertMap.plain(4, 2).rank_of([-2]),
        lambda: ExpertMap.plain(4, 2).local_experts(2),
        lambda: ExpertMap.plain(4, 2).local(-1),
        lambda: choose_replicas([-1.0], 1),
        lambda: choose_replicas([np.nan], 1),
        lambda: choose_replicas([], 1),
        lambda: choose_replicas([1.0], -1),
    ):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(CapacityError, match="3 replicas"):
        place_replicas([1, 1, 1], [1, 1, 1], [1, 1])


def test_it_is_public() -> None:
    assert xccl.ExpertMap is ExpertMap
    assert xccl.placement.choose_replicas is choose_replicas
