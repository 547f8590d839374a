"""Max-min fair rates: against linear programs, and by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import linprog

from xccl.model.fairshare import max_min_rates

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NETWORKS = 200


@dataclass(frozen=True, eq=False)
class Network:
    """Coefficients [resources, flows], and what limits the flows."""

    coefficient: Floats
    capacity: Floats
    cap: Floats
    active: npt.NDArray[np.bool_]


def random_network(seed: int) -> Network:
    rng = np.random.default_rng(seed)
    flows, resources = int(rng.integers(1, 9)), int(rng.integers(1, 7))
    coefficient = rng.uniform(0.2, 3.0, (resources, flows)) * (rng.random((resources, flows)) < 0.5)
    if rng.random() < 0.3:  # ties: several flows and resources stop at once
        coefficient = np.ceil(coefficient)
    capacity = rng.uniform(0.5, 10.0, resources)
    cap = np.where(rng.random(flows) < 0.5, np.inf, rng.uniform(0.05, 5.0, flows))
    return Network(coefficient, capacity, cap, rng.random(flows) < 0.8)


def solve(network: Network, *, with_zeros: bool = True) -> tuple[Floats, Ints]:
    """By the code under test, with or without entries that are zero."""
    rows = [np.arange(len(network.capacity)) if with_zeros else np.flatnonzero(c) for c in network.coefficient.T]
    first = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    resource = np.concatenate(rows).astype(np.int64)
    flow = np.repeat(np.arange(len(rows)), np.diff(first))
    rate, limit = max_min_rates(
        first, resource, network.coefficient[resource, flow], network.capacity, network.cap, network.active
    )
    return rate, limit


def by_linear_programs(network: Network) -> Floats:
    """Maximise the least rate; fix the flows that cannot grow, which are those whose bound has a price; repeat."""
    flows = len(network.cap)
    used = network.coefficient.any(axis=0)
    rate = np.where(network.active & ~used, network.cap, 0.0)
    fixed = ~network.active | ~used
    while not fixed.all():
        growing = np.flatnonzero(~fixed)
        # Columns: the rates of the growing flows, and the least of them.
        n = len(growing)
        full = np.concatenate([network.coefficient[:, growing], np.zeros((len(network.capacity), 1))], axis=1)
        least = np.concatenate([-np.eye(n), np.ones((n, 1))], axis=1)
        left = np.maximum(network.capacity - network.coefficient @ np.where(fixed & used, rate, 0.0), 0.0)
        found: Any = linprog(
            np.append(np.zeros(n), -1.0),
            A_ub=np.concatenate([full, least]),
            b_ub=np.concatenate([left, np.zeros(n)]),
            bounds=[*((0.0, cap if np.isfinite(cap) else None) for cap in network.cap[growing]), (0.0, None)],
            method="highs-ds",
        )
        assert found.status == 0, found.message
        stopped = growing[found.ineqlin.marginals[len(left) :] < -1e-9]
        assert stopped.size
        rate[stopped] = found.x[-1]
        fixed[stopped] = True
    assert rate.shape == (flows,)
    return rate


@pytest.fixture(scope="module")
def networks() -> list[tuple[Network, Floats, Ints]]:
    """Random ones, solved."""
    return [(network, *solve(network)) for network in map(random_network, range(NETWORKS))]


def test_rates_are_those_of_linear_programs(networks: list[tuple[Network, Floats, Ints]]) -> None:
    for seed, (network, rate, _) in enumerate(networks):
        np.testing.assert_allclose(rate, by_linear_programs(network), rtol=1e-9, atol=0, err_msg=f"network {seed}")


def test_no_resource_over_capacity_and_limits_are_full(networks: list[tuple[Network, Floats, Ints]]) -> None:
    for network, rate, limit in networks:
        finite = np.where(np.isfinite(rate), rate, 0.0)
        used = network.coefficient @ finite
        assert (used <= network.capacity * (1 + 1e-9)).all()
        assert (rate <= network.cap * (1 + 1e-9)).all()
        assert not rate[~network.active].any()
        for f in range(len(rate)):
            if limit[f] >= 0:
                assert network.active[f]
                assert network.coefficient[limit[f], f] > 0
                assert used[limit[f]] == pytest.approx(network.capacity[limit[f]], rel=1e-9)
            elif network.active[f]:
                assert rate[f] == pytest.approx(network.cap[f], rel=1e-9)


def test_entries_that_are_zero_change_nothing(networks: list[tuple[Network, Floats, Ints]]) -> None:
    for network, rate, limit in networks:
        without_rate, without_limit = solve(network, with_zeros=False)
        np.testing.assert_array_equal(without_rate, rate)
        np.testing.assert_array_equal(without_limit, limit)


def test_rates_scale_with_what_there_is(networks: list[tuple[Network, Floats, Ints]]) -> None:
    for network, rate, _ in networks:
        scaled = Network(network.coefficient, network.capacity * 196e3, network.cap * 196e3, network.active)
        np.testing.assert_allclose(solve(scaled)[0], rate * 196e3, rtol=1e-9)


def test_a_flow_without_cap_goes_on_when_another_is_stopped() -> None:
    network = Network(np.eye(2), np.array([1.0, 2.0]), np.full(2, np.inf), np.ones(2, bool))
    rate, limit = solve(network)
    assert rate.tolist() == [1.0, 2.0]
    assert limit.tolist() == [0, 1]


def test_a_full_resource_that_a_flow_does_not_need_does_not_stop_it() -> None:
    """Three flows fill resource 0; what subtracting their shares leaves of its demand is not quite 0."""
    coefficient = np.array([[0.1, 0.2, 0.3, 0.0], [0.0, 0.0, 0.0, 1.0]])
    network = Network(coefficient, np.array([0.6, 5.0]), np.full(4, 10.0), np.ones(4, bool))
    rate, limit = solve(network)
    np.testing.assert_allclose(rate, [1.0, 1.0, 1.0, 5.0], rtol=1e-12)
    assert limit.tolist() == [0, 0, 0, 1]


def test_nothing_to_share() -> None:
    network = Network(np.ones((1, 3)), np.ones(1), np.array([0.0, np.inf, np.inf]), np.array([True, False, True]))
    rate, limit = solve(network)
    assert rate.tolist() == [0.0, 0.0, 1.0]
    assert limit.tolist() == [-1, -1, 0]
    unlimited = Network(np.zeros((1, 2)), np.ones(1), np.array([np.inf, 3.0]), np.ones(2, bool))
    assert solve(unlimited)[0].tolist() == [np.inf, 3.0]
