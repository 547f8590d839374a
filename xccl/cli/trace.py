"""`xccl trace`: the timeline of a benchmark's operations, as it ran here or as a model has it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Final, NamedTuple

from xccl._version import __version__
from xccl.cli.options import BenchOptions, add_bench_options, bench_options
from xccl.errors import UsageError

if TYPE_CHECKING:
    from xccl.cli.results import Measurement
    from xccl.trace.record import Operation

_RUN_TIMEOUT_S: Final = 24 * 3600.0
#: Options of `bench` that mean nothing here.
_FOREIGN: Final = ("json", "csv", "project", "iters")


class _Line(NamedTuple):
    """One stage of one operation, over all ranks."""

    operation: str
    stage: str
    p50_us: float
    max_us: float
    peers: int
    n_bytes: int


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.description = (
        "Run one iteration of a benchmark and write its timeline for Chrome (chrome://tracing) or Perfetto "
        "(ui.perfetto.dev): a track for each rank and lane. Options as for `xccl bench`."
    )
    add_bench_options(parser)
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="where to write the timeline (JSON)")
    parser.add_argument(
        "--model", metavar="MACHINE[@RANKS]", nargs="?", const="cm384",
        help="write the projected timeline instead; nothing runs (default: cm384)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from xccl.cli.bench_ops import BENCHMARKS
    from xccl.trace.chrome import write_chrome_trace

    foreign = [f"--{name}" for name in _FOREIGN if getattr(args, name) is not None]
    if foreign:
        raise UsageError(f"{foreign[0]} is an option of xccl bench, not of xccl trace", value=foreign[0])
    if args.op not in BENCHMARKS:
        asked = "no operation given" if args.op is None else f"unknown operation {args.op!r}"
        raise UsageError(f"{asked}: one of {', '.join(BENCHMARKS)}")
    options = bench_options(args, BENCHMARKS[args.op])
    ranks = options.ranks
    emulated: list[Operation]
    projected: list[Operation]
    if args.model is None:
        emulated, projected = _emulated(options), []
    else:
        emulated = []
        projected, ranks = _projected(options, args.model)
    try:
        write_chrome_trace(args.output, emulated, projected)
    except OSError as error:
        raise UsageError(f"cannot write {args.output}: {error.strerror}") from error
    kind = "emulated times, measured here" if args.model is None else f"projected times on {args.model}; nothing ran"
    print(f"# xccl {__version__} trace {options.op}: {ranks} ranks, {kind}")
    _print_summary(emulated or projected)
    print(f"# {args.output}: open it in ui.perfetto.dev or chrome://tracing")
    sys.stdout.flush()
    return 0


def _emulated(options: BenchOptions) -> list[Operation]:
    """One traced iteration of every row."""
    from dataclasses import replace

    from xccl.cli.bench_rank import run_rank
    from xccl.runtime import launch

    found: list[Operation] = []

    def on_report(rank: int, measurement: Measurement) -> None:
        found.extend(measurement.traced or ())

    options = replace(options, iters=1, traced=True)
    launch(
        run_rank, options.ranks, args=(options,), fabric=options.fabric, timeout_s=_RUN_TIMEOUT_S,
        op_timeout_s=options.timeout_s, on_report=on_report,
    )  # fmt: skip
    return found


def _projected(options: BenchOptions, target: str) -> tuple[list[Operation], int]:
    """The modelled timeline of every row, one after the other, and on how many ranks."""
    from xccl.cli.bench_ops import BENCHMARKS
    from xccl.cli.described import describe_step
    from xccl.cli.projector import Projector
    from xccl.model.project import timeline
    from xccl.model.tracks import operations

    projector = Projector(options, target)
    benchmark = BENCHMARKS[options.op]
    found: list[Operation] = []
    after_us = 0.0
    for case in benchmark.cases(options):
        for row in benchmark.rows:
            for described in describe_step(options, case, row, projector.ranks):
                times = timeline(described, projector.machine)
                found += operations(described, times, after_us)
                after_us += times.total_us
    return found, projector.ranks


def _print_summary(operations: Sequence[Operation]) -> None:
    print(f"# {'operation':>12} {'stage':<24} {'p50 us':>10} {'max us':>10} {'peers':>6} {'bytes of a rank':>16}")
    for line in _summary(operations):
        figures = f"{line.p50_us:>10.1f} {line.max_us:>10.1f} {line.peers:>6} {line.n_bytes:>16}"
        print(f"  {line.operation:>12} {line.stage:<24} {figures}")


def _summary(operations: Sequence[Operation]) -> list[_Line]:
    """By operation and stage, in order: median and longest time, and the most peers and bytes of a rank."""
    times: dict[tuple[str, str], list[float]] = {}
    peers: dict[tuple[str, str], int] = {}
    n_bytes: dict[tuple[str, str], int] = {}
    for operation in operations:
        for stage in operation.stages:
            times.setdefault((operation.name, stage.name), []).append((stage.end_ns - stage.begin_ns) / 1e3)
        for name in {stage.name for stage in operation.stages}:
            mine = [entry for entry in operation.entries if entry.stage == name]
            key = (operation.name, name)
            peers[key] = max(peers.get(key, 0), len({entry.peer for entry in mine}))
            moved = sum(entry.n_bytes for entry in mine if entry.kind == "transfer")
            n_bytes[key] = max(n_bytes.get(key, 0), moved)
    return [_Line(*key, median(found), max(found), peers[key], n_bytes[key]) for key, found in times.items()]
