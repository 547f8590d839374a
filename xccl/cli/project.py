"""`xccl project`: what an operation would cost on a modelled machine. Nothing runs; every figure is a projection."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xccl._version import __version__
from xccl.cli.options import check_writable
from xccl.cli.parsing import int_list, parse_bytes, refuse_given, whole_number
from xccl.errors import ModelError, UsageError
from xccl.layout.ring import MAX_LANES
from xccl.model.skew import DISTRIBUTIONS
from xccl.protocol.collective_cuts import FLOWS

if TYPE_CHECKING:
    from xccl.model.machine import Machine
    from xccl.model.project import Projection
    from xccl.protocol.stage import Description

#: Names of collectives, as those of `xccl bench`.
COLLECTIVES: Final = tuple(kind.replace("_", "-") for kind in FLOWS if kind != "agreement")
_MOE: Final = ("tokens", "hidden", "topk", "experts", "quant", "routing")
#: By operation: the options that say what it is. All others are for every operation.
_OPTIONS_OF: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("dispatch", "combine", "moe"), ("ep", "protocol", *_MOE)),
    **dict.fromkeys(("a2e", "e2a"), ("attention", "shared", "trampolines", *_MOE)),
    "sendrecv": ("bytes", "lanes", "engine"),
    **dict.fromkeys(("put", "get"), ("bytes", "engine")),
    "kv": ("bytes", "blocks", "layers", "engine"),
    "barrier": ("ep",),
    **dict.fromkeys(COLLECTIVES, ("ep", "bytes", "algorithm")),
}
_SCHEMA: Final = 1
#: A routing of no imbalance, which nobody draws.
EVEN: Final = "even"
_SHOWN_SENSITIVITIES: Final = 8
#: Far beyond what a die holds; what comes of larger numbers would no longer fit into 64 bits.
_MOST_BYTES: Final = 1 << 50
_MOST_TOKENS: Final = 10**7
_MOST_SKEW_US: Final = 1e9


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    positive = whole_number(1)
    parser.description = "Project an operation onto a machine: modelled times, calibrated on published figures."
    parser.usage = "xccl project OP [options]"
    parser.add_argument("op", metavar="OP", choices=tuple(_OPTIONS_OF), help=", ".join(_OPTIONS_OF))
    machine = parser.add_argument_group("machine").add_argument
    machine("--machine", default="cm384", help="profile, or path of one (default: cm384)")
    machine("--set", action="append", default=[], metavar="NAME=VALUE", help="another figure of the machine")
    machine("--placement", choices=("packed", "by-node"), default="packed", help="of ranks on dies (default: packed)")
    machine("--skew-us", type=_microseconds, metavar="US",
            help="stragglers: mean of an exponential, deviation of a normal distribution of starts")  # fmt: skip
    machine("--skew", choices=DISTRIBUTIONS, default=DISTRIBUTIONS[0], help="distribution (default: exponential)")
    machine("--seed", type=whole_number(0), default=0, metavar="N", help="of skew and routing (default: 0)")

    experts = parser.add_argument_group("mixture of experts (dispatch combine moe a2e e2a)").add_argument
    experts(
        "--ep",
        type=int_list(1),
        default=(8, 32, 256),
        metavar="N[,N...]",
        help="ranks; of barrier and collectives, too (default: 8,32,256)",
    )
    experts(
        "--tokens",
        type=int_list(0, _MOST_TOKENS),
        default=(128,),
        metavar="N[,N...]",
        help="of each rank (default: 128)",
    )
    experts(
        "--hidden", type=whole_number(1, 10**6), default=7168, metavar="N", help="elements of a token (default: 7168)"
    )
    experts("--topk", type=positive, default=8, metavar="N", help="experts of a token (default: 8)")
    experts("--experts", type=positive, metavar="N",
            help="in all (default: 256, or more: a multiple of ranks); a2e, e2a: dies (default: 288)")  # fmt: skip
    experts("--quant", choices=("int8", "none"), default="int8", help="what dispatch sends (default: int8)")
    experts("--protocol", choices=("push", "pull", "direct", "deepep"), default="push",
            help="CANN's fused push, XCCL's pull, direct, or DeepEP's low-latency kernels (default: push)")  # fmt: skip
    experts("--routing", default=EVEN, metavar="SPEC",
            help="even (default: no imbalance), uniform, zipf[:S], hot[:K], skew or file:PATH")  # fmt: skip
    experts("--attention", type=positive, default=160, metavar="N", help="a2e, e2a: attention dies (default: 160)")
    experts("--shared", type=whole_number(0), metavar="N",
            help="a2e, e2a: expert dies with a shared expert (default: all beyond 256)")  # fmt: skip
    experts("--trampolines", type=whole_number(0), metavar="N",
            help="a2e, e2a: 0 is direct (default: attention dies, if there are enough expert dies)")  # fmt: skip

    sized = parser.add_argument_group("bytes (sendrecv put get kv barrier, collectives)").add_argument
    sized(
        "--bytes",
        type=_sizes,
        default=(1 << 20,),
        metavar="SIZE[,SIZE...]",
        help="of a message, of a block of kv, of the larger buffer of a collective (default: 1M)",
    )
    sized(
        "--lanes", type=int_list(1, MAX_LANES), default=(2, 48), metavar="N[,N...]", help="of sendrecv (default: 2,48)"
    )
    sized("--engine", choices=("mte", "dma"), help="what moves the bytes (default: mte, but dma for kv)")
    sized("--algorithm", choices=("auto", "mesh", "two-step"), default="auto", help="of a collective (default: auto)")
    sized("--blocks", type=whole_number(0, 10**6), default=16, metavar="N", help="kv: of a request (default: 16)")
    sized("--layers", type=whole_number(1, 10**4), default=61, metavar="N", help="kv: of the pools (default: 61)")

    output = parser.add_argument_group("output").add_argument
    output("--stages", action="store_true", help="show the time of each stage")
    output("--sensitivity", action="store_true", help="show which figures of the machine move the result most")
    output("--plot", metavar="FILE", help="draw the stages: .png or .svg (needs matplotlib: pip install 'xccl[plot]')")
    output("--json", metavar="FILE", help="write the projections to a file, - for standard output")
    parser.set_defaults(run=partial(run, parser))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    every = dict.fromkeys(name for names in _OPTIONS_OF.values() for name in names)
    refuse_given(parser, args, every.keys() - _OPTIONS_OF[args.op], f"means nothing to {args.op}")
    if args.skew_us is None:
        refuse_given(parser, args, ["skew"], "needs --skew-us")
    if args.json and args.json != "-":
        check_writable(args.json)
    if args.plot:
        from xccl.cli.plot import require_plot

        require_plot(args.plot)
    try:
        title, rows = _projected(args)
    except ModelError as error:  # whatever has no answer here was asked for by an option
        raise UsageError(str(error)) from error
    if args.json != "-":
        _print_table(args, title, rows)
    if args.json:
        from xccl.cli.environment import environment

        document = {"schema": _SCHEMA, "version": __version__, "command": args.command}
        document |= {"environment": environment(), "results": rows}
        text = json.dumps(document, indent=2)
        if args.json == "-":
            print(text)
        else:
            try:
                Path(args.json).write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                raise UsageError(f"cannot write {args.json}: {error.strerror}") from error
    if args.plot:
        from xccl.cli.plot import draw

        draw(args.plot, f"{args.op} on {title}, projected", rows)
    return 0


def _projected(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """The machine in words, and the results."""
    from xccl.cli.project_work import described_work
    from xccl.model.machine import load_machine
    from xccl.model.whatif import what_if

    machine = what_if(load_machine(args.machine), args.set)
    return machine.title, [_row(args, machine, shape, parts) for shape, parts in described_work(args, machine)]


# -- what it costs ----------------------------------------------------------------------------------------------------


def _row(args: argparse.Namespace, machine: Machine, shape: dict[str, Any], parts: list[Description]) -> dict[str, Any]:
    from xccl.model.project import in_a_row, project, together
    from xccl.model.sensitivity import sensitivities
    from xccl.model.skew import start_skew_us

    start_us = None
    if args.skew_us is not None:
        start_us = start_skew_us(parts[0].ranks, args.skew_us, distribution=args.skew, seed=args.seed)
        whole = in_a_row(args.op, parts, machine, args.placement, start_us)
    else:
        projections = [project(part, machine, args.placement) for part in parts]
        whole = projections[0] if len(projections) == 1 else together(args.op, projections)
    row = {"op": args.op, "ranks": whole.ranks, "protocol": whole.protocol, **shape, "projected": as_json(whole)}
    if start_us is not None:
        row |= {"skew_us": args.skew_us, "skew": args.skew, "last_start_us": float(start_us.max())}
    if args.sensitivity:
        row["sensitivities"] = [asdict(item) for item in sensitivities(parts, machine, args.placement)]
    return row


def as_json(projection: Projection) -> dict[str, Any]:
    """The object "projected" of a result."""
    names = ("machine", "time_us", "low_us", "high_us", "rank_us", "stages", "bottleneck", "bottleneck_share")
    return {name: getattr(projection, name) for name in names}


# -- what is shown ----------------------------------------------------------------------------------------------------


def _print_table(args: argparse.Namespace, title: str, rows: list[dict[str, Any]]) -> None:
    print(f"# xccl {__version__} project: {title}; projected times in us, nothing was run")
    if assumed := _assumed(rows):
        print(f"# {assumed}")
    width = max(18, *(len(_size(row)) for row in rows))
    print(f"# {'op':>9} {'ranks':>6} {'size':>{width}} {'projected':>10} {'low':>8} {'high':>8}  bottleneck")
    for row in rows:
        projected = row["projected"]
        share = f"{projected['bottleneck']} ({projected['bottleneck_share']:.0%})"
        times = f"{projected['time_us']:>10.1f} {projected['low_us']:>8.1f} {projected['high_us']:>8.1f}"
        print(f"  {row['op']:>9} {row['ranks']:>6} {_size(row):>{width}} {times}  {share}")
        if "skew_us" in row:
            by_rank = ", ".join(f"{name} {us:.1f}" for name, us in projected["rank_us"].items())
            print(f"    the last rank starts at {row['last_start_us']:.1f}; a rank, from its own call: {by_rank}")
        if args.stages:
            for name, us in projected["stages"].items():
                print(f"    {name:<32} {us:>8.1f} {us / (projected['time_us'] or 1.0):>5.0%}")
        for item in row.get("sensitivities", ())[:_SHOWN_SENSITIVITIES]:
            print(f"    {item['parameter']:<32} {item['value']:>8g} 1% more: {item['elasticity']:+.2f}% of the time")
    sys.stdout.flush()


def _assumed(rows: list[dict[str, Any]]) -> str:
    """What was projected besides the sizes, defaults included: they decide the figures, and differ between commands."""
    row = rows[0]
    if "attention" in row:
        route = f"{row['trampolines']} trampolines" if row["trampolines"] else "direct"
        dies = f"{row['attention']} attention dies, {row['experts']} expert dies ({row['shared']} shared), {route}"
    elif "hidden" in row:
        dies = f"{' or '.join(str(experts) for experts in dict.fromkeys(row['experts'] for row in rows))} experts"
    else:
        return f"between dies of neighbouring nodes, engine {row['engine']}" if "engine" in row else ""
    quant = "fp8" if (row["protocol"], row["quant"]) == ("deepep", "int8") else row["quant"]
    shape = f"hidden {row['hidden']}, {dies}, top-{row['topk']}, bf16, quant {quant}"
    protocol = "" if "attention" in row else f", {row['protocol']}"
    return f"{shape}{protocol}, routing {row['routing']}"


def _size(row: dict[str, Any]) -> str:
    if "lanes" in row:
        return f"{row['bytes']} B, {row['lanes']} lanes"
    if "blocks" in row:
        return f"{row['layers']} x {row['blocks']} x {row['block_bytes']} B"
    if "bytes" in row:
        return f"{row['bytes']} B"
    return f"{row['tokens']} tokens" if "tokens" in row else "-"


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(parse_bytes(part) for part in text.split(","))
    if max(sizes) > _MOST_BYTES:
        raise argparse.ArgumentTypeError(f"{text} must be at most {_MOST_BYTES >> 40}T")
    return sizes


def _microseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MOST_SKEW_US:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number of microseconds above 0, at most {_MOST_SKEW_US:g}"
        )
    return value
