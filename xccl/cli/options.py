"""The options of `xccl bench`: parsed, completed with defaults, and checked before any rank starts."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

from xccl.cli.deployment import (
    DEFAULT_EXPERTS,
    Deployment,
    add_deployment_options,
    check_deployment,
    deployment_of,
)
from xccl.cli.parsing import parse_bytes, parse_int_list, parse_seconds, whole_number
from xccl.errors import UsageError
from xccl.layout.collectives import OPERATORS
from xccl.protocol.collective_cuts import ALGORITHMS, FLOWS
from xccl.runtime.launch import MAX_RANKS

_LARGE_BYTES: Final = 64 * 1024
_ITERS_SMALL: Final = 100
_ITERS_LARGE: Final = 20
#: From so many ranks on a few iterations take as long as many of a few ranks, and say as much.
_MANY_RANKS: Final = 100
_ITERS_MANY_RANKS: Final = 3
_WARMUP_MANY_RANKS: Final = 1
#: Without --max-bytes, messages of all ranks take at most so much.
_MESSAGES_BYTES: Final = 1 << 30
_MAX_LANES: Final = 48  # AIV cores of a die
_ITERS_HELP: Final = "timed iterations (default: 100; MoE, above 64K: 20; from 100 ranks on: 3)"


@dataclass(frozen=True)
class Case:
    """One size of a sweep. `size_bytes` is None for MoE, `tokens` (of each rank) is None for everything else."""

    size_bytes: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class BenchOptions:
    """Everything that decides what a benchmark run does; it pickles, and every rank gets the same."""

    op: str
    ranks: int
    fabric: str = "shm"
    min_bytes: int = 8
    max_bytes: int = 4 * 1024 * 1024
    factor: int = 2
    iters: int | None = None
    warmup: int = 5
    tokens: tuple[int, ...] = (128,)
    hidden: int = 7168
    experts: int = 256
    topk: int = 8
    dtype: str = "bf16"
    quant: str = "int8"
    protocol: str = "pull"
    rows: str = "expanded"
    routing: str = "uniform"
    seed: int = 0
    lanes: int = 2
    mode: Literal["auto", "ring", "zero_copy"] = "auto"
    engine: Literal["mte", "dma"] = "mte"
    check: bool = True
    timeout_s: float = 30.0
    back_to_back: bool = False
    project: str | None = None
    traced: int = 0
    deployment: Deployment | None = None
    algorithm: str = "auto"
    reduction: str = "sum"
    blocks: int = 16
    layers: int = 4

    def iterations(self, case: Case) -> int:
        """Timed iterations: as asked, or 3 with 100 ranks or more, 20 for MoE and large messages, 100 for all else."""
        if self.iters is not None:
            return self.iters
        if self.ranks >= _MANY_RANKS:
            return _ITERS_MANY_RANKS
        large = case.tokens is not None or (case.size_bytes or 0) > _LARGE_BYTES
        return _ITERS_LARGE if large else _ITERS_SMALL

    @property
    def batches(self) -> int:
        """Batches of `tokens` tokens that go out in an iteration, from all ranks together."""
        if self.deployment is None:
            return self.ranks
        return self.deployment.attention_dies * self.deployment.microbatches

    def sizes(self, itemsize: int) -> list[int]:
        """Message sizes in bytes, from min_bytes to max_bytes by factor, rounded down to elements (but not to none)."""
        sizes = []
        size = self.min_bytes
        while size <= self.max_bytes:
            sizes.append(max(size // itemsize, min(size, 1)) * itemsize)
            size = max(size * self.factor, itemsize)
        return list(dict.fromkeys(sizes))


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a benchmark; their defaults are those of `BenchOptions`."""
    parser.add_argument("--list", action="store_true", help="list the operations and exit")
    add_work_options(parser)
    parser.add_argument("--back-to-back", action="store_true", help="no barrier between iterations; report their mean")
    parser.add_argument(
        "--no-memory-check", dest="memory_check", action="store_false", help="run even if memory seems not to suffice"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write results as JSON; - prints them instead of the table")
    output.add_argument("--csv", metavar="FILE", help="the same as CSV")
    output.add_argument(
        "--project", metavar="MACHINE[@RANKS]", help="add what the model says of the same work: cm384, cm384@320"
    )


def add_work_options(parser: argparse.ArgumentParser, iters_help: str = _ITERS_HELP) -> None:
    """Declare the options that say what runs, and on what."""
    default = BenchOptions(op="", ranks=0)
    natural, positive = whole_number(0), whole_number(1)
    parser.add_argument("op", nargs="?", metavar="OP", help="the operation; see xccl bench --list")

    run = parser.add_argument_group("run").add_argument
    run("--ranks", type=positive, metavar="N", help="emulated dies (default: 2 between neighbours, else 8)")
    run("--fabric", choices=("shm", "local"), default=default.fabric, help="ranks are processes (default) or threads")
    run("-n", "--iters", type=positive, metavar="N", help=iters_help)
    run("-w", "--warmup", type=natural, metavar="N", help="iterations before (default: 5; from 100 ranks on: 1)")
    run("--no-check", dest="check", action="store_false", help="do not compare results with the oracle")
    run("--seed", type=natural, metavar="N", default=default.seed, help="of data and routing (default: 0)")
    run("--timeout", dest="timeout_s", type=parse_seconds, metavar="S", default=default.timeout_s,
        help="deadline of each wait in seconds (default: 30)")  # fmt: skip

    sized = parser.add_argument_group("sizes (put get put-signal sendrecv kv, collectives)").add_argument
    sized("-b", "--min-bytes", type=parse_bytes, metavar="SIZE", default=default.min_bytes,
          help="smallest (default: 8)")  # fmt: skip
    sized("-e", "--max-bytes", type=parse_bytes, metavar="SIZE",
          help="largest (default: 4M, but 1G in all ranks together)")  # fmt: skip
    sized("-f", "--factor", type=whole_number(2), metavar="N", default=default.factor,
          help="from size to size (default: 2)")  # fmt: skip
    sized("--lanes", type=whole_number(1, _MAX_LANES), metavar="N", default=default.lanes,
          help="of a send (default: 2)")  # fmt: skip
    sized("--mode", choices=("auto", "ring", "zero_copy"), default=default.mode, help="way of a send (default: auto)")
    sized("--engine", choices=("mte", "dma"), help="what moves sends, puts and kv (default: mte, but dma for kv)")
    sized("--dtype", choices=("bf16", "fp16", "fp32"), default=default.dtype, help="of all data (default: bf16)")
    sized("--algorithm", choices=("auto", *ALGORITHMS), default=default.algorithm,
          help="of a collective (default: auto)")  # fmt: skip
    sized("--reduction", choices=OPERATORS, default=default.reduction, help="of collectives that reduce (default: sum)")

    moe = parser.add_argument_group("mixture of experts (dispatch combine moe a2e e2a)").add_argument
    moe("--tokens", type=parse_int_list, metavar="N[,N...]", default=default.tokens, help="of a rank (default: 128)")
    moe("--hidden", type=positive, metavar="N", default=default.hidden, help="elements of a token (default: 7168)")
    moe("--experts", type=positive, metavar="N", help="in all (default: 256; a2e, e2a: one for each expert die)")
    moe("--topk", type=positive, metavar="N", default=default.topk, help="experts of a token (default: 8)")
    moe("--quant", choices=("int8", "none"), default=default.quant, help="of dispatched tokens (default: int8)")
    moe("--protocol", choices=("pull", "push", "direct"), default=default.protocol,
        help="of dispatch and combine (default: pull)")  # fmt: skip
    moe("--rows", choices=("expanded", "dedup"), default=default.rows,
        help="a row for each expert of a token (default), or for each rank that has any")  # fmt: skip
    moe("--routing", metavar="SPEC", default=default.routing,
        help="uniform (default), zipf[:S], hot[:K], skew or file:PATH")  # fmt: skip

    kv = parser.add_argument_group("KV cache (kv), where sizes are those of a block in one layer").add_argument
    kv("--blocks", type=positive, metavar="N", default=default.blocks, help="of a request (default: 16)")
    kv("--layers", type=positive, metavar="N", default=default.layers, help="of the pools (default: 4)")

    add_deployment_options(parser)


class Needs(Protocol):
    """What a benchmark asks of the options."""

    @property
    def sweep(self) -> str:
        """Over what: "bytes", "tokens" or "nothing"."""

    @property
    def default_ranks(self) -> int:
        """Ranks if none are asked for."""

    @property
    def min_ranks(self) -> int:
        """Ranks needed."""

    @property
    def is_deployed(self) -> bool:
        """Has it the options of a deployment?"""

    @property
    def in_pairs(self) -> bool:
        """Does half of the ranks send to the other half?"""

    @property
    def default_engine(self) -> str:
        """What moves bytes if nothing is asked for."""


#: Options that mean something to some operations only.
_SIZED: Final = ("min_bytes", "max_bytes", "factor")
_EXPERTS: Final = ("tokens", "hidden", "experts", "topk", "quant", "protocol", "rows", "routing")
_KV: Final = ("blocks", "layers")
_APART: Final = tuple(Deployment.__dataclass_fields__)
_WITH_ENGINE: Final = ("put", "sendrecv", "kv")


def foreign_options(op: str, benchmark: Needs) -> tuple[str, ...]:
    """The options that mean nothing to an operation, by the attribute that they set."""
    flow = {str(kind).replace("_", "-"): flow for kind, flow in FLOWS.items()}.get(op)
    foreign: tuple[str, ...] = () if op == "sendrecv" else ("lanes", "mode")
    if op not in _WITH_ENGINE:
        foreign += ("engine",)
    if flow is None or op == "alltoallv":
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
    return foreign


def bench_options(args: argparse.Namespace, benchmark: Needs) -> BenchOptions:
    """Complete and check parsed arguments; UsageError says the option, the value and its bound."""
    default_ranks, min_ranks = benchmark.default_ranks, benchmark.min_ranks
    uses_experts, is_deployed = benchmark.sweep == "tokens", benchmark.is_deployed
    names = BenchOptions.__dataclass_fields__.keys() - {"deployment", "traced"}
    values = {name: getattr(args, name) for name in names}
    values["deployment"] = deployment = deployment_of(args) if is_deployed else None
    experts = args.experts or (BenchOptions.experts if deployment is None else DEFAULT_EXPERTS)
    ranks = args.ranks or (default_ranks if deployment is None else deployment.attention_dies + experts)
    if deployment is not None and args.ranks and not args.experts:
        experts = max(ranks - deployment.attention_dies, 1)
    values |= {"ranks": ranks, "experts": experts, "traced": int(args.project is not None)}
    if args.warmup is None:
        values["warmup"] = BenchOptions.warmup if ranks < _MANY_RANKS else _WARMUP_MANY_RANKS
    values["engine"] = args.engine or benchmark.default_engine
    if args.max_bytes is None:
        messages = ranks * args.blocks * args.layers if benchmark.in_pairs else ranks
        values["max_bytes"] = max(args.min_bytes, _default_max_bytes(messages))
    options = BenchOptions(**values)
    if options.ranks > MAX_RANKS:
        raise UsageError(f"--ranks is {options.ranks}: at most {MAX_RANKS}", value=options.ranks, bound=MAX_RANKS)
    if options.ranks < min_ranks:
        raise UsageError(f"--ranks is {options.ranks}: {options.op} needs at least {min_ranks}", bound=min_ranks)
    if benchmark.in_pairs and options.ranks % 2:
        raise UsageError(
            f"--ranks is {options.ranks}: {options.op} needs pairs, so an even number", value=options.ranks
        )
    if benchmark.in_pairs and options.min_bytes < 1:
        raise UsageError(f"--min-bytes is {options.min_bytes}: a block has 1 byte or more", value=options.min_bytes)
    if options.min_bytes > options.max_bytes:
        raise UsageError(f"--min-bytes is {options.min_bytes}, more than --max-bytes ({options.max_bytes})")
    if uses_experts:
        _check_experts(options)
    if args.json == args.csv == "-":
        raise UsageError("--json - and --csv -: one of them can go to standard output, not both")
    for path in (args.json, args.csv):
        if path and path != "-":
            check_writable(path)
    return options


def _default_max_bytes(messages: int) -> int:
    most: int = BenchOptions.max_bytes
    while most > 1 and most * messages > _MESSAGES_BYTES:
        most //= 2
    return most


def _check_experts(options: BenchOptions) -> None:
    from xccl.protocol.routing import make_routing

    if options.deployment is not None:
        check_deployment(options.deployment, ranks=options.ranks, experts=options.experts, topk=options.topk)
    if options.topk > options.experts:
        raise UsageError(f"--topk is {options.topk}: more than --experts ({options.experts})")
    routed = options.experts - (options.deployment.shared if options.deployment else 0)
    make_routing(  # a bad --routing is found here, not by every rank
        options.routing, tokens=1, experts=routed, topk=options.topk, seed=0, rank=0, ranks=options.ranks
    )


def check_writable(path: str) -> None:
    """Found out now, rather than when the results of an hour are lost; UsageError if not."""
    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        raise UsageError(f"cannot write {path}: it is a folder", value=path)
    if not folder.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {folder}", value=path)
    if not os.access(path if Path(path).exists() else folder, os.W_OK):
        raise UsageError(f"cannot write {path}: no permission", value=path)
