"""The calibrated model and the commands that show it."""

from __future__ import annotations

import json

import pytest

from xccl.cli.main import main
from xccl.errors import ModelError
from xccl.model.calibrate import compare
from xccl.model.machine import load_machine
from xccl.model.project import describe_moe, describe_send, project
from xccl.model.published import published_rows


@pytest.fixture(scope="module")
def errors() -> list[float]:
    return [comparison.error for comparison in compare(load_machine("cm384"))]


def test_each_published_row_is_within_its_bound(errors: list[float]) -> None:
    assert len(errors) == 6
    assert max(map(abs, errors)) <= 0.04
    assert sum(map(abs, errors)) / len(errors) <= 0.02


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
@pytest.mark.parametrize("protocol", ["push", "pull"])
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


def test_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate"]) == 0
    assert "ok" in capsys.readouterr().out
    assert main(["project", "dispatch", "--ep", "8,16", "--tokens", "32", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == 1
    assert [row["ranks"] for row in report["results"]] == [8, 16]
    assert all("time_us" not in row and row["projected"]["time_us"] > 0 for row in report["results"])
    assert main(["project", "combine", "--ep", "8", "--set", "link.bandwidth_gbps=400"]) == 0
    assert "projected" in capsys.readouterr().out
    for wrong in (["--set", "no.such=1"], ["--set", "link.bandwidth_gbps"], ["--ep", "0"], ["--ep", "1000"]):
        assert main(["project", "dispatch", *wrong]) in (1, 2)
        assert capsys.readouterr().err.count("\n") == 1
