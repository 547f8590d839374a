"""`xccl trace`, and `xccl bench --project`: real runs beside the model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xccl.cli.described import describe_step
from xccl.cli.main import main
from xccl.cli.options import BenchOptions, Case
from xccl.cli.projector import require_same
from xccl.cli.results import Measurement
from xccl.errors import ModelError

MOE = ["--ranks", "4", "--tokens", "6", "--hidden", "96", "--experts", "8", "--topk", "3", "--routing", "zipf"]
APART = ["--attention", "2", "--experts", "3", "--tokens", "4", "--hidden", "32", "--topk", "2"]
OPERATIONS = [
    ["put", "-e", "4K", "-f", "512"],
    ["get", "-e", "4K", "-f", "512"],
    ["put-signal", "-e", "8"],
    ["sendrecv", "--ranks", "3", "-e", "128K", "-f", "128", "--lanes", "5"],
    ["barrier", "--ranks", "3"],
    ["moe", *MOE],
    ["dispatch", *MOE, "--quant", "none"],
    ["combine", *MOE],
    ["a2e", *APART],
    ["e2a", *APART, "--route", "direct"],
]


@pytest.mark.parametrize("fabric", ["shm", "local"])
@pytest.mark.parametrize("words", OPERATIONS, ids=lambda words: words[0])
def test_bench_projects_the_stages_that_ran(words: list[str], fabric: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every operation runs as it is described, or this ends with an error."""
    assert main(["bench", *words, "--fabric", fabric, "-n", "2", "--project", "cm384", "--json", "-"]) == 0
    for row in json.loads(capsys.readouterr().out)["results"]:
        assert row["wrong"] == 0
        found = row["projected"]
        assert found["machine"] == "cm384"
        assert found["ranks"] == row["ranks"]
        assert 0 < found["low_us"] < found["time_us"] < found["high_us"]
        assert found["stages"]
        assert found["bottleneck"]


def test_the_same_work_on_more_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    assert main(["bench", "moe", *MOE, "-n", "2", "--project", "cm384@32", "--csv", str(path)]) == 0
    out = capsys.readouterr().out
    assert "projected" in out
    assert "cm384@32" in out
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["projected_ranks"] for row in rows] == ["32"] * 3
    times = [float(row["projected_time_us"]) for row in rows]
    assert times[2] == pytest.approx(times[0] + times[1])


def test_without_project_there_is_no_such_column(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "barrier", "--ranks", "2", "-n", "2"]) == 0
    assert "projected" not in capsys.readouterr().out


@pytest.mark.parametrize("target", ["cm385", "cm384@0", "cm384@769", "@8"])
def test_impossible_targets(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "barrier", "--ranks", "2", "-n", "1", "--project", target]) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


def test_what_ran_otherwise_is_not_projected() -> None:
    """A trace that lacks an entry of the description."""
    measurement = Measurement("barrier", Case(), np.zeros(1), 0, None, None, [])
    described = describe_step(BenchOptions(op="barrier", ranks=2), Case(), "barrier", 2)
    with pytest.raises(ModelError, match="0 entries traced"):
        require_same([measurement, measurement], described)


# -- trace ------------------------------------------------------------------------------------------------------------


def traced(path: Path, *words: str) -> list[dict[str, Any]]:
    assert main(["trace", *words, "-o", str(path)]) == 0
    document = json.loads(path.read_text())
    return [event for event in document["traceEvents"] if event["ph"] == "X"]


@pytest.mark.parametrize("fabric", ["shm", "local"])
@pytest.mark.parametrize("words", OPERATIONS, ids=lambda words: words[0])
def test_a_timeline(words: list[str], fabric: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = traced(tmp_path / "t.json", *words, "--fabric", fabric)
    assert {event["cat"] for event in events} == {"emulated"}
    ranks = 5 if "--attention" in words else int(words[words.index("--ranks") + 1]) if "--ranks" in words else 2
    assert {event["pid"] for event in events} == set(range(ranks))
    out = capsys.readouterr().out
    assert "emulated times" in out
    assert "projected" not in out


@pytest.mark.parametrize("words", OPERATIONS, ids=lambda words: words[0])
def test_a_modelled_timeline(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = traced(tmp_path / "t.json", *words, "--model")
    assert {event["cat"] for event in events} == {"projected"}
    assert "nothing ran" in capsys.readouterr().out


def test_stages_are_the_same_in_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        {event["name"] for event in traced(tmp_path / "t.json", "dispatch", *MOE, *more)} - {"dispatch"}
        for more in ([], ["--model", "cm384"])
    ]
    assert {"write", "announce", "await-fields", "pull", "release"} <= names[0] & names[1]


@pytest.mark.parametrize(
    "words", [["moe", "--json", "x"], ["moe", "-n", "3"], ["nothing"], [], ["put", "-o", "/no/such/folder/t.json"]]
)
def test_mistakes_are_one_line(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = [] if "-o" in words else ["-o", str(tmp_path / "t.json")]
    assert main(["trace", *words, *output, "--ranks", "2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
