"""`xccl bench`: check the options, launch ranks, show and write what they report."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Final

from xccl._version import __version__
from xccl.cli import report
from xccl.cli.bench_peer import PEERS, check_peer, run_peer
from xccl.cli.options import BenchOptions, add_bench_options, bench_options, foreign_options
from xccl.cli.parsing import given, require_operation
from xccl.errors import ModelError, UsageError

#: The waits inside have deadlines of their own; this only ends a run that nobody waits for any more.
_RUN_TIMEOUT_S: Final = 24 * 3600.0


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.description = (
        "Run a microbenchmark on emulated ranks, and check its results. Times are emulated: measured on this machine, "
        "the slowest rank of each iteration. bytes is the mean payload that a rank sends; algbw is bytes / p50, and "
        "busbw the part of it that leaves the rank, as in nccl-tests. Sizes are written 8, 64K, 4M or 1G. Exit status: "
        "1 if any element is wrong or the run failed, 2 for a usage error."
    )
    parser.usage = "xccl bench OP [options]"
    add_bench_options(parser)
    parser.add_argument(
        "--peer", choices=PEERS, help="instead, measure xccl and this library in turns; needs the source tree"
    )
    parser.set_defaults(run=partial(run, parser))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from xccl.cli.bench_ops import BENCHMARKS
    from xccl.cli.memory import available_bytes, require_memory

    if args.list:
        width = max(map(len, BENCHMARKS))
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:{width}} {benchmark.summary}")
        return 0
    benchmark = BENCHMARKS[require_operation(args.op, BENCHMARKS)]
    if args.peer is not None:
        check_peer(args)
        return run_peer(args, bench_options(args, benchmark), benchmark)
    moe = benchmark.sweep == "tokens"
    options = bench_options(args, benchmark)
    for option in given(parser, args, foreign_options(args.op, benchmark)):
        print(f"xccl bench: note: {option} means nothing to {args.op}", file=sys.stderr)
    if args.memory_check:
        require_memory(options, benchmark.sweep, available_bytes())
    return _run(args, options, rows_expected=len(benchmark.cases(options)) * len(benchmark.rows), moe=moe)


def _run(args: argparse.Namespace, options: BenchOptions, *, rows_expected: int, moe: bool) -> int:
    from xccl.cli.bench_kernels import not_needed
    from xccl.cli.bench_rank import run_rank
    from xccl.cli.results import Collector, Row
    from xccl.cli.screen import make_screen, progress_bar
    from xccl.kernels import leave_out
    from xccl.runtime import launch

    projector = None
    if options.project is not None:
        from xccl.cli.projector import Projector

        projector = Projector(options, options.project)
    title = None if projector is None else projector.title
    screen = make_screen(options, __version__, moe=moe, quiet="-" in (args.json, args.csv), projected=title)
    with progress_bar(rows_expected, f"{options.op} on {options.ranks} ranks") as bar:

        def on_row(row: Row) -> None:
            bar.advance(row)
            if projector is None:
                screen.row(row)

        collector = Collector(options, on_row)
        leave_out(not_needed(options))
        launch(
            run_rank,
            options.ranks,
            args=(options,),
            fabric=options.fabric,
            timeout_s=_RUN_TIMEOUT_S,
            op_timeout_s=options.timeout_s,
            on_report=collector.on_report,
        )
    failed = None
    if projector is not None:
        try:
            collector.project(projector.of)
        except ModelError as error:  # what was measured is not lost
            failed = error
        for row in collector.rows:
            screen.row(row)
    screen.finish(collector.rows)
    _write(args.json, report.to_json(collector.rows, args.command, __version__))
    _write(args.csv, report.to_csv(collector.rows))
    if failed is not None:
        raise failed
    return 1 if collector.wrong else 0


def _write(path: str | None, text: str) -> None:
    if path == "-":
        print(text, end="")
    elif path:
        try:
            Path(path).write_text(text)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from error
