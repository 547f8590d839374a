"""The calibrated model and the commands that show it."""

from __future__ import annotations

import pytest

from xccl.errors import ModelError
from xccl.model.calibrate import compare, fit, model_us
from xccl.model.machine import load_machine
from xccl.model.project import describe_moe, describe_send, project
from xccl.model.published import published_rows
from xccl.model.ranges import Claim, claims


@pytest.mark.parametrize(("name", "rows", "each", "mean"), [("cm384", 6, 0.04, 0.02), ("h800-rdma", 4, 0.05, 0.05)])
def test_each_published_row_is_within_its_bound(name: str, rows: int, each: float, mean: float) -> None:
    errors = [comparison.error for comparison in compare(load_machine(name))]
    assert len(errors) == rows
    assert max(map(abs, errors)) <= each
    assert sum(map(abs, errors)) / len(errors) <= mean


@pytest.mark.parametrize("claim", claims(load_machine("cm384")), ids=lambda claim: claim.text)
def test_what_is_known_of_the_real_machine_holds(claim: Claim) -> None:
    assert claim.holds, claim


def test_claims_can_fail() -> None:
    machine = load_machine("cm384")
    slow = machine.with_values({"lane.startup_us": 4.0, "vector.rate_gelements": 1.0})
    assert sum(not claim.holds for claim in claims(slow)) >= 3


def test_the_fit_finds_its_way_back() -> None:
    """From other figures, on the same rows, to the same errors: the profile is where calibration ends."""
    machine = load_machine("cm384")
    rows = published_rows("CANN fused push")
    begin = {p.name: 0.7 * p.value for p in machine.free}
    found = fit(machine.with_values(begin), rows)
    errors = [comparison.error for comparison in compare(machine.with_values(found))]
    assert max(map(abs, errors)) <= 0.04


@pytest.mark.parametrize("left_out", range(6))
def test_a_row_is_predicted_from_the_others(left_out: int) -> None:
    """What the profile says of a row left out is what a fit on the others gives now."""
    machine = load_machine("cm384")
    rows = published_rows("CANN fused push")
    others = [row for i, row in enumerate(rows) if i != left_out]
    values = fit(machine, others)
    error = model_us(machine.with_values(values), rows[left_out]) / rows[left_out].latency_us - 1
    assert error == pytest.approx(machine.calibration["leave_one_out"][left_out], abs=0.01)
    assert abs(error) <= 0.08


def test_what_calibration_left_behind_is_within_its_bound() -> None:
    machine = load_machine("cm384")
    assert 1 <= len(machine.free) <= 8
    assert max(map(abs, machine.calibration["leave_one_out"])) <= 0.08


def test_published_rows_are_read_with_their_units() -> None:
    row = published_rows("CANN fused push")[0]
    assert (row.operation, row.ep, row.tokens, row.hidden, row.top_k) == ("dispatch", 8, 128, 7168, 8)
    assert row.latency_us == 116
    assert len(published_rows()) == 10


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
@pytest.mark.parametrize("protocol", ["push", "pull", "direct"])
def test_more_tokens_and_less_bandwidth_take_longer(operation: str, protocol: str) -> None:
    machine = load_machine("cm384")
    few, many = (describe_moe(operation, ranks=16, tokens=tokens, protocol=protocol) for tokens in (16, 128))
    slow = machine.with_values({"link.bandwidth_gbps": 98})
    times = [project(d, m).time_us for d, m in ((few, machine), (many, machine), (many, slow))]
    assert times == sorted(times)
    assert times[0] < times[2]


def test_a_projection_names_its_bottleneck_and_interval() -> None:
    projection = project(describe_moe("dispatch", ranks=32, tokens=128), load_machine("cm384"))
    assert projection.low_us < projection.time_us < projection.high_us
    assert projection.bottleneck == "send: port out"
    assert 0.4 < projection.bottleneck_share < 0.7
    assert sum(projection.stages.values()) == pytest.approx(projection.time_us, rel=1e-6)


def test_lanes_of_a_message() -> None:
    machine = load_machine("cm384")
    times = {
        lanes: project(describe_send(machine, n_bytes=9 << 20, lanes=lanes), machine).time_us for lanes in (2, 24, 48)
    }
    assert times[2] > 2 * times[48]
    assert times[24] < 1.05 * times[48]


@pytest.mark.parametrize(
    "words",
    [
        {"operation": "gather", "ranks": 8, "tokens": 8},
        {"operation": "dispatch", "ranks": 8, "tokens": 8, "experts": 12},
        {"operation": "dispatch", "ranks": 8, "tokens": 8, "protocol": "carrier pigeon"},
    ],
)
def test_what_has_no_model_says_so(words: dict[str, object]) -> None:
    with pytest.raises(ModelError):
        describe_moe(**words)  # type: ignore[arg-type]
