"""`xccl trace`: the timeline of a benchmark's operations, as it ran here or as a model has it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Final, NamedTuple

from xccl._version import __version__
from xccl.cli.deployment import Deployment
from xccl.cli.options import BenchOptions, Case, add_work_options, bench_options, check_writable
from xccl.cli.parsing import refuse_given
from xccl.errors import UsageError
from xccl.protocol.collective_cuts import FLOWS

if TYPE_CHECKING:
    from xccl.cli.bench_ops import Benchmark
    from xccl.cli.projector import Projector
    from xccl.cli.results import Measurement
    from xccl.trace.record import Operation

_RUN_TIMEOUT_S: Final = 24 * 3600.0
#: Options that mean something to some operations only, or only where something runs.
_SIZED: Final = ("min_bytes", "max_bytes", "factor")
_EXPERTS: Final = ("tokens", "hidden", "experts", "topk", "quant", "protocol", "rows", "routing")
_KV: Final = ("blocks", "layers")
_APART: Final = tuple(Deployment.__dataclass_fields__)
_RUNNING: Final = ("iters", "warmup", "fabric", "check", "timeout_s")


class _Traced(NamedTuple):
    """An operation, and the size of the case that it belongs to."""

    size: str
    operation: Operation


class _Line(NamedTuple):
    """One stage of one operation of one size, over all ranks."""

    operation: str
    size: str
    stage: str
    p50_us: float
    max_us: float
    peers: int
    n_bytes: int


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.description = (
        "Run a benchmark's operation and write its timeline for Chrome (chrome://tracing) or Perfetto "
        "(ui.perfetto.dev): a track for each rank and lane. Options as for `xccl bench`. Exit status: 1 if any element "
        "is wrong or the run failed, 2 for a usage error."
    )
    add_work_options(parser, iters_help="traced iterations (default: 1)")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="where to write the timeline (JSON)")
    parser.add_argument(
        "--model", metavar="MACHINE[@RANKS]", nargs="?", const="cm384",
        help="write the projected timeline; nothing runs (default: cm384)",
    )  # fmt: skip
    parser.add_argument("--both", action="store_true", help="with --model: run, too, and write both timelines")
    parser.set_defaults(run=partial(run, parser), json=None, csv=None, project=None, back_to_back=False)


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from xccl.cli.bench_ops import BENCHMARKS
    from xccl.cli.projector import Projector
    from xccl.trace.chrome import write_chrome_trace

    if args.op not in BENCHMARKS:
        asked = "no operation given" if args.op is None else f"unknown operation {args.op!r}"
        raise UsageError(f"{asked}: one of {', '.join(BENCHMARKS)}")
    _refuse_foreign(parser, args, BENCHMARKS[args.op])
    options = bench_options(args, BENCHMARKS[args.op])
    check_writable(args.output)
    projector = Projector(options, args.model, "--model") if args.model is not None else None
    emulated, wrong = _emulated(options) if projector is None or args.both else ([], 0)
    projected = _projected(options, projector) if projector is not None else []
    try:
        write_chrome_trace(args.output, _operations(emulated), _operations(projected))
    except OSError as error:
        raise UsageError(f"cannot write {args.output}: {error.strerror}") from error
    if emulated:
        title = f"# xccl {__version__} trace {options.op}: {options.ranks} ranks, emulated times, measured here"
        _print_summary(title, emulated)
    if projector is not None:
        nothing = "" if args.both else "; nothing ran"
        title = f"# xccl {__version__} trace {options.op}: {projector.ranks} ranks, projected times on "
        _print_summary(f"{title}{projector.title}{nothing}", projected)
    if wrong:
        print(f"# {wrong} wrong elements: what was traced did not do what it should")
    print(f"# {args.output}: open it in ui.perfetto.dev or chrome://tracing")
    sys.stdout.flush()
    return 1 if wrong else 0


def _refuse_foreign(parser: argparse.ArgumentParser, args: argparse.Namespace, benchmark: Benchmark) -> None:
    """Options that would change nothing."""
    if args.both and args.model is None:
        raise UsageError("--both needs --model: the two are a run and what the model says of it")
    if args.model is not None and not args.both:
        refuse_given(parser, args, _RUNNING, "is for a run: with --model nothing runs, unless --both is given")
    foreign: tuple[str, ...] = () if args.op == "sendrecv" else ("lanes",)
    flow = FLOWS.get(args.op.replace("-", "_"))
    if flow is None or args.op == "alltoallv":
        foreign += ("algorithm",)
    if flow is None or not flow.reduces:
        foreign += ("reduction",)
    if benchmark.sweep != "bytes":
        foreign += _SIZED
    if benchmark.sweep != "tokens":
        foreign += _EXPERTS
    if benchmark.sweep == "nothing":
        foreign += ("dtype",)
    if not benchmark.in_pairs:
        foreign += _KV
    if not benchmark.is_deployed:
        foreign += _APART
    refuse_given(parser, args, foreign, f"means nothing to {args.op}")


def _operations(traced: Iterable[_Traced]) -> list[Operation]:
    return [item.operation for item in traced]


def _emulated(options: BenchOptions) -> tuple[list[_Traced], int]:
    """What ran, traced, and how many elements of its results were wrong."""
    from xccl.cli.bench_rank import run_rank
    from xccl.runtime import launch

    found: list[_Traced] = []
    wrong = 0

    def on_report(_: int, measurement: Measurement) -> None:
        nonlocal wrong
        if measurement.op == options.op:  # a round trip has all that the rows of its halves would show
            wrong += measurement.wrong or 0
            found.extend(_Traced(_size(measurement.case), operation) for operation in measurement.traced or ())

    launch(
        run_rank, options.ranks, args=(replace(options, iters=1, traced=options.iters or 1),), fabric=options.fabric,
        timeout_s=_RUN_TIMEOUT_S, op_timeout_s=options.timeout_s, on_report=on_report,
    )  # fmt: skip
    return found, wrong


def _projected(options: BenchOptions, projector: Projector) -> list[_Traced]:
    """The modelled timeline of every size, one after the other."""
    from xccl.cli.bench_ops import BENCHMARKS
    from xccl.cli.described import describe_step
    from xccl.model.project import timeline
    from xccl.model.tracks import operations

    found: list[_Traced] = []
    after_us = 0.0
    for case in BENCHMARKS[options.op].cases(options):
        for described in describe_step(options, case, options.op, projector.ranks):
            times = timeline(described, projector.machine)
            found += (_Traced(_size(case), operation) for operation in operations(described, times, after_us))
            after_us += times.total_us
    return found


def _size(case: Case) -> str:
    if case.tokens is not None:
        return f"{case.tokens} tokens"
    return "-" if case.size_bytes is None else f"{case.size_bytes} B"


def _print_summary(title: str, traced: Sequence[_Traced]) -> None:
    print(title)
    figures = f"{'p50 us':>10} {'max us':>10} {'peers':>6} {'bytes of a rank':>16}"
    print(f"# {'operation':>12} {'size':>12} {'stage':<24} {figures}")
    for line in _summary(traced):
        figures = f"{line.p50_us:>10.1f} {line.max_us:>10.1f} {line.peers:>6} {line.n_bytes:>16}"
        print(f"  {line.operation:>12} {line.size:>12} {line.stage:<24} {figures}")


def _summary(traced: Sequence[_Traced]) -> list[_Line]:
    """By operation, size and stage, in order: median and longest time, and the most peers and bytes of a rank."""
    times: dict[tuple[str, str, str], list[float]] = {}
    peers: dict[tuple[str, str, str], int] = {}
    n_bytes: dict[tuple[str, str, str], int] = {}
    for size, operation in traced:
        for stage in operation.stages:
            key = (operation.name, size, stage.name)
            times.setdefault(key, []).append((stage.end_ns - stage.begin_ns) / 1e3)
            mine = [entry for entry in operation.entries if entry.stage == stage.name]
            peers[key] = max(peers.get(key, 0), len({entry.peer for entry in mine}))
            moved = sum(entry.n_bytes for entry in mine if entry.kind == "transfer")
            n_bytes[key] = max(n_bytes.get(key, 0), moved)
    return [_Line(*key, median(found), max(found), peers[key], n_bytes[key]) for key, found in times.items()]
