"""The command line reads what people write, and says in one line what is wrong with it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xccl._version import __version__
from xccl.cli import bench, bench_peer
from xccl.cli.bench_ops import BENCHMARKS
from xccl.cli.deployment import Deployment
from xccl.cli.main import main
from xccl.cli.options import BenchOptions, Case
from xccl.cli.parsing import parse_bytes, parse_int_list, parse_seconds, whole_number


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("8", 8),
        ("64K", 65536),
        ("64k", 65536),
        ("4M", 2**22),
        ("1G", 2**30),
        ("2KiB", 2048),
        ("3MB", 3 * 2**20),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "-1", "1.5M", "K", "1Q", "1 0", "0x10"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size such as"):
        parse_bytes(text)


def test_numbers() -> None:
    assert whole_number(1)("7") == 7
    assert parse_int_list("8,64,128") == (8, 64, 128)
    assert parse_seconds("0.5") == 0.5
    for parse, text in [
        (whole_number(1), "0"),
        (whole_number(1, 48), "49"),
        (whole_number(1), "x"),
        (parse_int_list, "1,,2"),
        (parse_seconds, "0"),
        (parse_seconds, "inf"),
        (parse_seconds, "nan"),
        (parse_seconds, "soon"),
    ]:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_sweep_of_sizes() -> None:
    def sizes(low: int, high: int, factor: int, itemsize: int) -> list[int]:
        return BenchOptions("put", 2, min_bytes=low, max_bytes=high, factor=factor).sizes(itemsize)

    assert sizes(8, 64, 2, 2) == [8, 16, 32, 64]
    assert sizes(8, 100, 4, 2) == [8, 32]
    assert sizes(0, 8, 2, 4) == [0, 4, 8]
    assert sizes(1, 12, 3, 4) == [4, 12]
    assert sizes(7, 7, 2, 2) == [6]
    assert sizes(0, 0, 2, 2) == [0]


def test_iterations() -> None:
    options = BenchOptions("put", 2)
    assert options.iterations(Case(size_bytes=8)) == options.iterations(Case()) == 100
    assert options.iterations(Case(size_bytes=2**20)) == options.iterations(Case(tokens=1)) == 20
    assert BenchOptions("put", 2, iters=3).iterations(Case(size_bytes=8)) == 3


def parsed(monkeypatch: pytest.MonkeyPatch, *words: str) -> BenchOptions:
    """The options that a command line comes to, without running it."""
    seen: list[BenchOptions] = []

    def run(args: argparse.Namespace, options: BenchOptions, **_: Any) -> int:
        seen.append(options)
        return 0

    monkeypatch.setattr(bench, "_run", run)
    assert main(["bench", *words]) == 0
    return seen[0]


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed(monkeypatch, "moe") == BenchOptions("moe", 8)
    assert parsed(monkeypatch, "put") == BenchOptions("put", 2)
    assert parsed(monkeypatch, "a2e") == BenchOptions("a2e", 12, experts=8, deployment=Deployment(attention=4))
    # Hundreds of ranks on a few cores: a few iterations.
    many = parsed(monkeypatch, "barrier", "--ranks", "300")
    assert (many.warmup, many.iterations(Case())) == (1, 3)


def test_all_options(monkeypatch: pytest.MonkeyPatch) -> None:
    line = (
        "dispatch --ranks 4 --fabric local -b 16 -e 1M -f 4 -n 7 -w 0 --tokens 8,16 --hidden 64 --experts 32 --topk 2 "
        "--dtype fp16 --quant none --protocol push --rows dedup --routing zipf:1.2 --seed 5 --lanes 3 --mode ring --engine dma "
        "--no-check --timeout 9 --back-to-back"
    )
    assert parsed(monkeypatch, *line.split()) == BenchOptions(
        "dispatch", 4, "local", 16, 2**20, 4, 7, 0, (8, 16), 64, 32, 2, "fp16", "none", "push", "dedup", "zipf:1.2", 5, 3,
        "ring", "dma", False, 9.0, True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "ranks", "experts"),
    [
        ("--attention 160 --experts 288", 448, 288),
        ("--attention 160 --experts 288 --domains 3", 768, 288),
        ("--attention 2 --ranks 5", 5, 3),
        ("--attention 2 --ranks 5 --experts 9", 5, 9),
    ],
)
def test_ranks_of_a_deployment(monkeypatch: pytest.MonkeyPatch, words: str, ranks: int, experts: int) -> None:
    options = parsed(monkeypatch, "e2a", "--topk", "2", "--no-memory-check", *words.split())
    assert (options.ranks, options.experts) == (ranks, experts)
    assert options.deployment is not None
    assert options.batches == options.deployment.attention_dies


def test_all_options_of_a_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "a2e --attention 3 --experts 8 --domains 2 --microbatches 3 --route trampoline --trampolines 2 --shared 4 --topk 4"
    assert parsed(monkeypatch, *line.split()) == BenchOptions(
        "a2e", 14, experts=8, topk=4, deployment=Deployment(3, 2, 3, "trampoline", 2, 4)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bench", "no operation given: one of put, get"),
        ("bench nope", "unknown operation 'nope'"),
        ("bench put --ranks 1", "--ranks is 1: put needs at least 2"),
        ("bench put --ranks 0", "0 must be at least 1"),
        ("bench put --ranks two", "'two' is not a whole number"),
        ("bench put -b 1M -e 1K", "--min-bytes is 1048576, more than --max-bytes (1024)"),
        ("bench put -b x", "'x' is not a size"),
        ("bench put -f 1", "1 must be at least 2"),
        ("bench sendrecv --lanes 49", "49 must be from 1 to 48"),
        ("bench kv --ranks 3", "--ranks is 3: kv needs pairs, so an even number"),
        ("bench kv -b 0", "--min-bytes is 0: a block has 1 byte or more"),
        ("bench kv --blocks 0", "0 must be at least 1"),
        ("bench kv --project cm384@3", "kv is projected on pairs of ranks, not on 3"),
        ("bench put --dtype int4", "invalid choice: 'int4'"),
        ("bench put --fabric mpi", "invalid choice: 'mpi'"),
        ("bench put --timeout 0", "0 must be a number of seconds above 0"),
        ("bench put --frobnicate", "xccl bench: error: unrecognized arguments: --frobnicate (see xccl bench --help)"),
        ("bench moe --token 8", "unrecognized arguments: --token 8; did you mean --tokens? (see xccl bench --help)"),
        ("bench moe --protocl=push", "unrecognized arguments: --protocl=push; did you mean --protocol?"),
        ("doctor --clear", "xccl doctor: error: unrecognized arguments: --clear; did you mean --clean?"),
        ("--frobnicate bench", "xccl: error: unrecognized arguments: --frobnicate (see xccl --help)"),
        ("bench dispach", "unknown operation 'dispach': one of put, get"),
        ("bench dispach", "scatter; did you mean dispatch?"),
        ("bench barrier --ranks 1025", "--ranks is 1025: at most 1024"),
        ("bench a2e --attention 1000 --experts 25", "--ranks is 1025: at most 1024"),
        ("bench put --project cm384@0", "--project cm384@0: must be MACHINE or MACHINE@RANKS, of 1 rank or more"),
        ("bench put --project cm384@", "--project cm384@: must be MACHINE or MACHINE@RANKS, of 1 rank or more"),
        ("bench moe --rows some", "invalid choice: 'some'"),
        ("bench moe --protocol shove", "invalid choice: 'shove'"),
        ("bench moe --experts 8 --topk 9", "--topk is 9: more than --experts (8)"),
        ("bench a2e --ranks 4", "--ranks is 4: 4 attention dies leave none for experts"),
        ("bench a2e --ranks 7 --experts 8", "--experts is 8: not a multiple of the 3 expert dies"),
        ("bench a2e --topk 9", "--topk is 9: more than --experts (8) without --shared (0)"),
        ("bench a2e --shared 8", "without --shared (8)"),
        ("bench a2e --trampolines 5", "--trampolines is 5: at most 4 have something to do"),
        ("bench e2a --trampolines 2 --route direct", "--trampolines is 2: --route direct has none"),
        ("bench e2a --microbatches 4", "4 must be from 1 to 3"),
        ("bench moe --tokens -1", "-1 must be at least 0"),
        ("bench moe --routing nope", "unknown routing 'nope'"),
        ("bench moe --routing file:absent.npy", "absent.npy: No such file"),
        ("bench moe --json /nonexistent/x.json", "cannot write /nonexistent/x.json: there is no folder /nonexistent"),
        ("bench moe --csv /", "cannot write /: it is a folder"),
        ("bench put --json - --csv -", "--json - and --csv -: one of them can go to standard output"),
        ("nope", "invalid choice: 'nope'"),
        ("", "the following arguments are required: COMMAND"),
    ],
)
def test_usage_errors_are_one_line_and_status_2(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: Any = main(words.split())
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert err.startswith("xccl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("get --peer openmpi", "get has no counterpart in other libraries"),
        ("put --peer gloo -n 3 --no-check", "--peer does not go with --iters, --no-check"),
        ("moe --peer mpich --protocol push --csv x", "--peer does not go with --csv, --protocol"),
        ("barrier --peer mpich --json -", "give --json a file"),
        ("barrier --peer lam", "invalid choice"),
    ],
)
def test_what_does_not_go_with_a_peer(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["bench", *words.split()])
    except SystemExit as leaving:
        status = int(str(leaving.code))
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    assert message in error


def test_a_peer_needs_the_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_peer, "_SOURCES", tmp_path)
    assert main(["bench", "barrier", "--peer", "openmpi"]) == 2
    assert "not beside this installation" in capsys.readouterr().err


def test_what_the_comparison_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            commands.append(command[3:])

        def __enter__(self) -> Process:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def wait(self) -> int:
            return 7

    monkeypatch.setattr(bench_peer.subprocess, "Popen", Process)
    assert main(["bench", "alltoall", "--peer", "mpich", "--ranks", "4", "-b", "8", "-e", "512", "-f", "8"]) == 7
    assert (
        main(["bench", "moe", "--peer", "gloo", "--ranks", "2", "--tokens", "3,5", "--hidden", "64", "--experts", "16"])
        == 7
    )
    common = "--hidden 7168 --experts 256 --minutes"
    assert " ".join(commands[0]) == f"--only alltoall --peer mpich --ranks 4 {common} 0.45 --sizes 4 16 128"
    assert " ".join(commands[1]) == (
        "--only moe --peer gloo --ranks 2 --hidden 64 --experts 16 --minutes 1.00 --sizes 3 5"
    )


def test_version_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"xccl {__version__}\n"
    assert main(["bench", "--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"put", "get", "put-signal", "sendrecv", "barrier", "dispatch", "combine", "moe", "a2e"} <= set(names)
    assert names == list(BENCHMARKS)


def test_the_list_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.index(BENCHMARKS[line.split()[0]].summary) for line in lines} == {len("reduce-scatter") + 1}


def test_options_that_mean_nothing_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody is to believe that they did something."""
    monkeypatch.setattr(bench, "_run", lambda *_, **__: 0)
    assert (
        main(
            [
                "bench",
                "put",
                "--tokens",
                "4",
                "--lanes",
                "8",
                "-b",
                "16",
                "--engine",
                "dma",
                "--routing",
                "skew",
                "--timeout",
                "5",
            ]
        )
        == 0
    )
    notes = [f"xccl bench: note: {option} means nothing to put" for option in ("--lanes", "--tokens", "--routing")]
    assert capsys.readouterr().err.splitlines() == notes
    assert (
        main(["bench", "allreduce", "--reduction", "max", "--algorithm", "mesh", "--dtype", "fp32", "--seed", "3"]) == 0
    )
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "xccl.cli.main", "bench", "--list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "xccl bench: error: cannot write to standard output: No space left on device\n"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0
    assert "--back-to-back" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["", "bench", "calibrate", "doctor", "project", "trace", "validate"])
@pytest.mark.parametrize("columns", [80, 100])
def test_help_is_short_and_fits(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A usage of one line or two, and no line beyond the terminal but for examples."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    text = capsys.readouterr().out.partition("\nexamples:")[0]
    usage = text.split("\n\n", 1)[0].splitlines()
    assert len(usage) <= 2
    assert max(map(len, text.splitlines())) <= columns


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "_run", run)
    assert main(["bench", "put"]) == 130
    assert capsys.readouterr() == ("", "")


def test_existing_output_file_may_be_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    parsed(monkeypatch, "put", "--json", str(path))
    assert path.read_text() == "old"
