"""`xccl trace`, and `xccl bench --project`: real runs beside the model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xccl.cli.bench_collectives import Collective
from xccl.cli.bench_ops import BENCHMARKS
from xccl.cli.described import describe_step
from xccl.cli.main import main
from xccl.cli.options import BenchOptions, Case
from xccl.cli.projector import require_same
from xccl.cli.results import Measurement
from xccl.comm import reference
from xccl.errors import ModelError, UsageError

MOE = ["--ranks", "4", "--tokens", "6", "--hidden", "96", "--experts", "8", "--topk", "3", "--routing", "zipf"]
APART = ["--attention", "2", "--experts", "3", "--tokens", "4", "--hidden", "32", "--topk", "2"]
COLLECTIVES = [name for name, benchmark in BENCHMARKS.items() if benchmark.make is Collective]
OPERATIONS = [
    ["put", "-e", "4K", "-f", "512"],
    ["get", "-e", "4K", "-f", "512"],
    ["put-signal", "-e", "8"],
    ["kv", "--ranks", "4", "-b", "64", "-e", "4K", "-f", "64", "--blocks", "5", "--layers", "2"],
    ["sendrecv", "--ranks", "3", "-e", "128K", "-f", "128", "--lanes", "5"],
    ["barrier", "--ranks", "3"],
    ["moe", *MOE],
    ["dispatch", *MOE, "--quant", "none"],
    ["combine", *MOE],
    ["a2e", *APART],
    ["e2a", *APART, "--route", "direct"],
    # Parts in records, and in several steps; two steps where there are.
    *([kind, "--ranks", "3", "-b", "48", "-e", "4M", "-f", "87381"] for kind in COLLECTIVES),
    *(
        [kind, "--ranks", "3", "-e", "256K", "-f", "32768", "--algorithm", "two-step"]
        for kind in ("allreduce", "broadcast")
    ),
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
    assert "with 32 experts (8 are no multiple of 32 ranks)" in out
    assert [row["projected_ranks"] for row in rows] == ["32"] * 3
    for row in rows:
        assert float(row["projected_low_us"]) < float(row["projected_time_us"]) < float(row["projected_high_us"])
        assert row["projected_bottleneck"]
    times = [float(row["projected_time_us"]) for row in rows]
    assert times[2] == pytest.approx(times[0] + times[1])


def test_without_project_there_is_no_such_column(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "barrier", "--ranks", "2", "-n", "2"]) == 0
    assert "projected" not in capsys.readouterr().out


@pytest.mark.parametrize("target", ["cm385", "cm384@0", "cm384@769", "@8"])
def test_impossible_targets(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "barrier", "--ranks", "2", "-n", "1", "--project", target]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"--project {target}" in err


@pytest.mark.parametrize("words", [["--project", "cm384@32"], ["--project", "cm384", "--domains", "2"]], ids=" ".join)
def test_what_has_no_description_is_found_before_it_runs(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("xccl.runtime.launch", lambda *_, **__: pytest.fail("it ran"))
    assert main(["bench", "a2e", *APART, *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_projection_that_fails_loses_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What ran otherwise than described is an error, after what was measured is shown and written."""

    def of_one_more_byte(options: BenchOptions, case: Case, *more: Any) -> Any:
        return describe_step(options, Case(size_bytes=(case.size_bytes or 0) + 1), *more)

    monkeypatch.setattr("xccl.cli.projector.describe_step", of_one_more_byte)
    path = tmp_path / "rows.json"
    words = ["put", "-b", "8", "-e", "8", "-n", "2", "--project", "cm384", "--json", str(path)]
    assert main(["bench", *words]) == 1
    out, err = capsys.readouterr()
    assert "put at rank 0 did not run as it is described" in err
    assert err.count("\n") == 1
    (row,) = json.loads(path.read_text())["results"]
    assert (row["wrong"], row["projected"]) == (0, None)
    assert out.splitlines()[-1].split()[:3] == ["put", "2", "8"]


def test_every_operation_is_tried_here() -> None:
    assert {words[0] for words in OPERATIONS} == set(BENCHMARKS)


@pytest.mark.parametrize("op", ["allreduce", "alltoall"])
def test_collectives_whose_arrivals_are_counted(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On more ranks than write to each other, where something ran, and where it is projected."""
    words = ["--fabric", "local", "-n", "1", "-w", "0", "-b", "1K", "-e", "1K", "--json", "-"]
    for ranks, target in (("40", "cm384"), ("4", "cm384@40")):
        assert main(["bench", op, "--ranks", ranks, "--project", target, *words]) == 0
        (row,) = json.loads(capsys.readouterr().out)["results"]
        assert row["projected"]["ranks"] == 40
        assert "await-arrivals" in row["projected"]["stages"]


def test_what_has_no_description_is_not_taken_for_something_else() -> None:
    with pytest.raises(UsageError, match="no description of teleport"):
        describe_step(BenchOptions(op="teleport", ranks=2), Case(size_bytes=8), "teleport", 2)


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


def test_a_run_and_its_model_in_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.json"
    events = traced(path, "dispatch", *MOE, "--model", "cm384@16", "--both")
    assert {event["pid"] for event in events if event["cat"] == "emulated"} == set(range(4))
    assert len({event["pid"] for event in events if event["cat"] == "projected"}) == 16
    names = [e["args"]["name"] for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "process_name"]
    assert sum(name.endswith("(projected)") for name in names) == 16
    assert len(names) == 4 + 16
    out = capsys.readouterr().out
    assert "emulated times, measured here" in out
    assert "projected times on cm384@16" in out
    assert "nothing ran" not in out


def test_several_iterations_and_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = traced(tmp_path / "t.json", "put", "-b", "8", "-e", "512", "-f", "64", "-n", "3")
    stages = [event for event in events if "transfer data" in event["args"]]
    assert sorted(event["args"]["transfer data"]["bytes"] for event in stages) == [8] * 6 + [512] * 6
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert [(*row[:4], row[-2], row[-1]) for row in rows] == [
        ("put", "8", "B", "put", "1", "8"),
        ("put", "512", "B", "put", "1", "512"),
    ]


def test_a_round_trip_is_traced_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not once more for each of the rows that its halves have in a benchmark."""
    events = traced(tmp_path / "t.json", "moe", *MOE)
    for name in ("dispatch", "combine"):
        assert len([event for event in events if event["name"].split()[0] == name]) == 4
    stages = [line.split()[3] for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert stages == ["await-pulled", "write", "announce", "await-fields", "pull", "release"] * 2


def test_a_run_that_went_wrong_is_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = reference.weighted_sum
    monkeypatch.setattr(reference, "weighted_sum", lambda *args: original(*args) + 1)
    path = tmp_path / "t.json"
    words = ["combine", *MOE, "--fabric", "local", "-o", str(path)]
    assert main(["trace", *words]) == 1
    assert f"{4 * 6 * 96} wrong elements" in capsys.readouterr().out
    assert path.exists()
    assert main(["trace", *words, "--no-check"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["moe", "--json", "x"], "unrecognized arguments: --json"),
        (["put", "--back-to-back"], "unrecognized arguments: --back-to-back"),
        (["nothing"], "unknown operation 'nothing'"),
        ([], "no operation given"),
        (["put", "-o", "/no/such/folder/t.json"], "cannot write /no/such/folder/t.json"),
        (["put", "--both"], "--both needs --model"),
        (["put", "--model", "cm384@769"], "--model cm384@769: cm384 has 768 dies"),
        (["put", "--model", "abacus"], "there is no machine 'abacus'"),
        (["put", "--model", "--iters", "3"], "--iters is for a run"),
        (["put", "--model", "--no-check"], "--no-check is for a run"),
        (["put", "--model", "--timeout", "3"], "--timeout is for a run"),
        (["put", "--tokens", "3"], "--tokens means nothing to put"),
        (["put", "--lanes", "3"], "--lanes means nothing to put"),
        (["moe", "--max-bytes", "8"], "--max-bytes means nothing to moe"),
        (["moe", "--attention", "1"], "--attention means nothing to moe"),
        (["put", "--algorithm", "mesh"], "--algorithm means nothing to put"),
        (["alltoallv", "--algorithm", "mesh"], "--algorithm means nothing to alltoallv"),
        (["allgather", "--reduction", "max"], "--reduction means nothing to allgather"),
        (["allgather", "--model", "--algorithm", "two-step"], "algorithm of allgather must be one of auto, mesh"),
        (["barrier", "--dtype", "fp16"], "--dtype means nothing to barrier"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_found_before_it_runs(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("xccl.runtime.launch", lambda *_, **__: pytest.fail("it ran"))
    output = [] if "-o" in words else ["-o", str(tmp_path / "t.json")]
    try:
        status: Any = main(["trace", *words, *output, "--ranks", "2"])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
