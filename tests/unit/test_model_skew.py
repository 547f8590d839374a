"""Stragglers are drawn, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from xccl.model.machine import load_machine
from xccl.model.project import describe_moe, in_a_row, project, together
from xccl.model.skew import DISTRIBUTIONS, Distribution, start_skew_us


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_starts_follow_from_the_seed(distribution: Distribution) -> None:
    one, same, other = (start_skew_us(64, 5.0, distribution=distribution, seed=seed) for seed in (1, 1, 2))
    assert one.shape == (64,)
    assert (one >= 0).all()
    assert (one == same).all()
    assert (one != other).any()


def test_their_shape() -> None:
    exponential = start_skew_us(100_000, 7.0)
    assert exponential.mean() == pytest.approx(7.0, rel=0.02)
    assert np.median(exponential) == pytest.approx(7.0 * np.log(2), rel=0.03)
    normal = start_skew_us(100_000, 7.0, distribution="normal")
    assert normal.std() == pytest.approx(7.0, rel=0.02)
    assert normal.min() == 0
    assert np.median(normal) == pytest.approx(normal.mean(), rel=0.02)


def test_a_row_of_operations_without_stragglers_is_their_sum() -> None:
    machine = load_machine("cm384")
    parts = [describe_moe(op, ranks=16, tokens=32) for op in ("dispatch", "combine")]
    whole = together("moe", [project(part, machine) for part in parts])
    row = in_a_row("moe", parts, machine)
    assert row.time_us == pytest.approx(whole.time_us, rel=0.02)
    assert row.stages.keys() == whole.stages.keys()
    assert row.rank_us["max"] <= row.time_us
    assert in_a_row("dispatch", parts[:1], machine) == project(parts[0], machine)


def test_a_row_of_operations_ends_after_the_last_to_start() -> None:
    machine = load_machine("cm384")
    parts = [describe_moe(op, ranks=16, tokens=32) for op in ("dispatch", "combine")]
    start_us = np.zeros(16)
    start_us[5] = 1000.0
    row, even = in_a_row("moe", parts, machine, start_us=start_us), in_a_row("moe", parts, machine)
    assert 1000.0 < row.time_us < 1000.0 + 1.05 * even.time_us  # once, not once for each half
    assert row.rank_us["min"] < row.rank_us["max"] <= row.time_us
    assert row.low_us < row.time_us < row.high_us
    assert 0 < row.bottleneck_share < 1
