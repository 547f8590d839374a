"""`xccl bench` for real: small runs, within this process but for what only a process of its own can show."""

from __future__ import annotations

import csv
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.multirank.support import Array
from xccl.cli.main import main
from xccl.comm import reference
from xccl.comm.reference import quantise, weighted_sum
from xccl.kernels import _jit, warm

PROGRAM = [sys.executable, "-c", "import sys; from xccl.cli.main import main; sys.exit(main())"]
TIMEOUT_S = 100
SMALL_MOE = ["--tokens", "5", "--hidden", "48", "--experts", "8", "--topk", "3", "-n", "3", "-w", "1"]
SMALL = ["-b", "8", "-e", "64K", "-f", "64", "-n", "3", "-w", "1"]


class Done(NamedTuple):
    """How a command line ended, and what it and its ranks wrote."""

    status: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in this process, whose kernels are warm."""
    warm()
    monkeypatch.setattr(_jit, "_LEFT_OUT", set())  # what a benchmark can do without, later tests cannot

    def run(*words: str) -> Done:
        return Done(main(words), *capfd.readouterr())

    return run


def run_apart(*words: str) -> Done:
    """Run a command line in a process of its own."""
    done = subprocess.run(
        [*PROGRAM, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def results_of(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["results"]
    return found


@pytest.mark.parametrize("fabric", ["shm", "local"])
@pytest.mark.parametrize("op", ["put", "get", "put-signal", "sendrecv"])
def test_bytes_between_neighbours(run: Run, op: str, fabric: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    done = run("bench", op, "--ranks", "3", "--fabric", fabric, *SMALL, "--json", str(path))
    assert (done.status, done.err) == (0, "")
    rows = [line.split() for line in done.out.splitlines() if not line.startswith("#")]
    assert [row[:3] for row in rows] == [[op, "3", "8"], [op, "3", "512"], [op, "3", "32768"]]
    assert [row[-1] for row in rows] == ["0"] * 3
    for result, size in zip(results_of(path), (8, 512, 32768), strict=True):
        assert (result["op"], result["fabric"], result["bytes"], result["iters"]) == (op, fabric, size, 3)
        assert result["time_us"]["min"] > 0
        assert result["algbw_gbps"] == pytest.approx(size / result["time_us"]["p50"] / 1e3)


@pytest.mark.parametrize("engine", ["dma", "mte"])
@pytest.mark.parametrize("fabric", ["shm", "local"])
def test_kv(run: Run, fabric: str, engine: str, tmp_path: Path) -> None:
    """The bytes of a row are those of a pair; what ran is what is described."""
    path = tmp_path / "results.json"
    options = ["--blocks", "5", "--layers", "3", "--engine", engine, "--fabric", fabric, "--project", "cm384@64"]
    done = run("bench", "kv", "--ranks", "4", *options, *SMALL, "--json", str(path))
    assert (done.status, done.err) == (0, "")
    for result, size in zip(results_of(path), (8, 512, 32768), strict=True):
        assert (result["op"], result["ranks"], result["bytes"], result["wrong"]) == ("kv", 4, 15 * size, 0)
        assert result["projected"]["ranks"] == 64
        assert list(result["projected"]["stages"]) == ["announce", "push", "notify", "await-layers"]


@pytest.mark.parametrize("fabric", ["shm", "local"])
def test_barrier_in_a_process_of_its_own(fabric: str) -> None:
    done = run_apart("bench", "barrier", "--ranks", "3", "--fabric", fabric, "-n", "5")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[-1].split()[:3] == ["barrier", "3", "0"]
    assert done.out.split()[-1] == "0"


@pytest.mark.parametrize("quant", ["int8", "none"])
@pytest.mark.parametrize(("fabric", "dtype"), [("shm", "bf16"), ("shm", "fp32"), ("local", "fp16")])
def test_moe_prints_three_rows(run: Run, fabric: str, dtype: str, quant: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    options = ["--ranks", "4", "--fabric", fabric, "--dtype", dtype, "--quant", quant, "--json", str(path)]
    done = run("bench", "moe", *options, *SMALL_MOE)
    assert (done.status, done.err) == (0, "")
    assert "round trip" in done.out
    results = results_of(path)
    assert [result["op"] for result in results] == ["dispatch", "combine", "moe"]
    for result in results:
        assert result["wrong"] == 0
        assert (result["tokens"], result["hidden"], result["experts"], result["topk"]) == (5, 48, 8, 3)
        assert (result["quant"], result["dtype"]) == (quant, dtype)
    itemsize = 4 if dtype == "fp32" else 2
    assert results[0]["bytes"] == 15 * (48 + 4 if quant == "int8" else 48 * itemsize)
    assert results[1]["bytes"] == 15 * 48 * itemsize  # 15 rows come to a rank on average
    assert results[2]["bytes"] == results[0]["bytes"] + results[1]["bytes"]


@pytest.mark.parametrize("routing", ["zipf:1.2", "hot:1", "skew", "file"])
def test_routings(run: Run, routing: str, tmp_path: Path) -> None:
    if routing == "file":
        ids = np.full((7, 3), -1)
        ids[::2, 0] = 7  # many tokens without an expert, one rank with all the rest
        np.save(tmp_path / "ids.npy", ids)
        routing = f"file:{tmp_path / 'ids.npy'}"
    done = run("bench", "moe", "--ranks", "2", "--routing", routing, *SMALL_MOE)
    assert (done.status, done.err) == (0, "")


@pytest.mark.parametrize("rows", ["expanded", "dedup"])
@pytest.mark.parametrize("protocol", ["pull", "push", "direct"])
def test_moe_of_experts_that_ranks_do_not_divide(run: Run, protocol: str, rows: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    options = ["--ranks", "3", "--protocol", protocol, "--rows", rows, "--json", str(path)]
    done = run("bench", "moe", *options, *SMALL_MOE)  # 8 experts
    assert (done.status, done.err) == (0, "")
    for result in results_of(path):
        assert (result["wrong"], result["protocol"], result["rows"]) == (0, protocol, rows)
    # 5 tokens have 15 choices, of which a deduplicated row may stand for several.
    sent = results_of(path)[0]["bytes"] / (48 + 4)
    assert 5 <= sent < 15 if rows == "dedup" else sent == 15


@pytest.mark.parametrize("op", ["dispatch", "combine"])
def test_one_half_alone_over_several_batches(run: Run, op: str, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    done = run("bench", op, "--ranks", "2", *SMALL_MOE, "--tokens", "0,1,9", "--csv", str(path))
    assert (done.status, done.err) == (0, "")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["op"], row["tokens"], row["wrong"]) for row in rows] == [
        (op, "0", "0"),
        (op, "1", "0"),
        (op, "9", "0"),
    ]


def test_back_to_back_reports_the_mean(run: Run, tmp_path: Path) -> None:
    done = run("bench", "moe", "--ranks", "2", "--back-to-back", *SMALL_MOE, "--json", "-")
    assert (done.status, done.err) == (0, "")
    for result in json.loads(done.out)["results"]:
        assert result["back_to_back"] is True
        assert result["time_us"]["p50"] == result["time_us"]["mean"] == result["time_us"]["max"]


def test_no_check_says_so(run: Run) -> None:
    done = run("bench", "put", *SMALL, "--no-check")
    assert done.status == 0
    assert {line.split()[-1] for line in done.out.splitlines() if not line.startswith("#")} == {"-"}


def flip(x: Array) -> tuple[Array, Array]:
    """Each element of the quantised rows is wrong."""
    rows, scales = quantise(x)
    return rows ^ 1, scales


def off_by_one(*arguments: Any) -> Array:
    """Each element of the sums is wrong."""
    return weighted_sum(*arguments) + 1


@pytest.mark.parametrize(
    ("op", "name", "fault"), [("combine", "weighted_sum", off_by_one), ("dispatch", "quantise", flip)]
)
def test_wrong_elements_are_counted_and_status_1(
    run: Run, op: str, name: str, fault: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    monkeypatch.setattr(reference, name, fault)  # ranks are forked with it
    assert run("bench", op, "--ranks", "2", *SMALL_MOE, "--json", str(path)).status == 1
    assert results_of(path)[0]["wrong"] == 2 * 5 * 48 * (3 if op == "dispatch" else 1)


def test_what_does_not_fit_is_one_line_and_status_2() -> None:
    done = run_apart("bench", "put", "-b", "100T", "-e", "100T")
    assert done.status == 2
    assert (done.out, done.err.count("\n")) == ("", 1)
    assert "Traceback" not in done.err


@pytest.mark.parametrize("fabric", ["shm", "local"])
def test_ctrl_c_ends_it_promptly_and_quietly(fabric: str) -> None:
    process = subprocess.Popen(
        [*PROGRAM, "bench", "sendrecv", "--ranks", "3", "--fabric", fabric, "-e", "1K", "-n", "2000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        while process.stdout.readline().startswith("#"):
            pass  # until the first row is there
        start = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        _, err = process.communicate(timeout=TIMEOUT_S)
        assert time.monotonic() - start < 5  # 1 s on an idle machine
        assert (process.returncode, err) == (130, "")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_closed_pipe_is_quiet() -> None:
    command = shlex.join([*PROGRAM, "bench", "put", "-n", "2", "-w", "0"]) + " | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.stderr == ""
    assert done.stdout.startswith("#")


def test_a_terminal_gets_a_table() -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "bench", "moe", "--ranks", "2", *SMALL_MOE],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "140"},
    )
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(controller, 65536):
            shown += chunk
    except OSError:
        pass  # how Linux says that the other end is closed
    os.close(controller)
    assert process.wait(timeout=TIMEOUT_S) == 0
    text = shown.decode()
    assert "emulated" in text
    assert "╭" in text
    assert "round trip" in text
    assert "3/3" in text or "starting" in text  # the progress bar was there


@pytest.mark.parametrize("route", ["direct", "trampoline"])
@pytest.mark.parametrize("op", ["a2e", "e2a"])
def test_attention_and_experts_apart(run: Run, op: str, route: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    words = [
        "--attention",
        "2",
        "--experts",
        "6",
        "--ranks",
        "7",
        "--topk",
        "3",
        "--shared",
        "1",
        "--domains",
        "2",
        "--microbatches",
        "2",
        "--fabric",
        "local",
    ]
    done = run("bench", op, "--route", route, *words, *SMALL_MOE[:4], "-n", "2", "-w", "1", "--json", str(path))
    assert (done.status, done.err) == (0, "")
    assert f"2 domains of 2 attention dies, 3 expert dies, {route}, 2 microbatches" in done.out
    (result,) = results_of(path)
    assert (result["op"], result["ranks"], result["wrong"], result["protocol"]) == (op, 7, 0, route)
    # Four attention dies send 2 * 5 tokens of 4 rows each; the mean is over all ranks.
    row_bytes = 48 + 4 if op == "a2e" else 2 * 48
    assert result["bytes"] == round(4 * 10 * 4 * row_bytes / 7)
    assert result["tokens_per_s"] == pytest.approx(4 * 10 / result["time_us"]["p50"] * 1e6)


@pytest.mark.parametrize(
    ("op", "name", "fault", "wrong"),
    [
        ("e2a", "weighted_sum", off_by_one, 2 * 5 * 48),
        ("a2e", "quantise", flip, 2 * 5 * 3 * 48),
        ("a2e", "with_shared", lambda idx, *_: idx ^ 1, None),
    ],
)
def test_wrong_elements_of_a_deployment_are_counted(
    run: Run, op: str, name: str, fault: Callable[..., Any], wrong: int | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "results.json"
    monkeypatch.setattr(reference, name, fault)
    assert run("bench", op, "--attention", "2", *SMALL_MOE, "--json", str(path)).status == 1
    found = results_of(path)[0]["wrong"]
    assert found == wrong if wrong is not None else found > 0
