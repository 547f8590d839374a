"""`xccl project`: what an operation would cost on a modelled machine. Nothing runs; every figure is a projection."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

from xccl._version import __version__
from xccl.cli.parsing import parse_bytes, parse_int_list, whole_number
from xccl.errors import UsageError

_OPERATIONS: Final = ("dispatch", "combine", "sendrecv")
_SCHEMA: Final = 1


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.description = "Project an operation onto a machine: modelled times, calibrated on published figures."
    parser.add_argument("op", metavar="OP", choices=_OPERATIONS, help=", ".join(_OPERATIONS))
    parser.add_argument("--machine", default="cm384", help="profile, or path of one (default: cm384)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another figure of the machine"
    )
    parser.add_argument("--ep", type=parse_int_list, default=(8, 32, 256), help="numbers of ranks (default: 8,32,256)")
    parser.add_argument("--tokens", type=parse_int_list, default=(128,), help="tokens of each rank (default: 128)")
    parser.add_argument("--hidden", type=whole_number(1), default=7168, help="elements of a token (default: 7168)")
    parser.add_argument("--topk", type=whole_number(1), default=8, help="experts of a token (default: 8)")
    parser.add_argument("--experts", type=whole_number(1), help="experts in all (default: 256, or a little more)")
    parser.add_argument("--quant", choices=("int8", "none"), default="int8", help="what dispatch sends (default: int8)")
    parser.add_argument("--protocol", choices=("push", "pull"), default="push", help="CANN fused push, or XCCL pull")
    parser.add_argument(
        "--bytes", type=parse_bytes, default=1 << 20, help="sendrecv: size of the message (default: 1M)"
    )
    parser.add_argument("--lanes", type=parse_int_list, default=(2, 48), help="sendrecv: lanes (default: 2,48)")
    parser.add_argument("--json", metavar="FILE", help="write the projections to a file, - for standard output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from xccl.model.machine import load_machine
    from xccl.model.project import describe_moe, describe_send, project

    machine = load_machine(args.machine).with_values(dict(map(_setting, args.set)))
    results = []
    if args.op == "sendrecv":
        for lanes in args.lanes:
            description = describe_send(machine, n_bytes=args.bytes, lanes=lanes)
            results.append(({"bytes": args.bytes, "lanes": lanes}, project(description, machine)))
    else:
        for ranks in args.ep:
            if ranks < 1:
                raise UsageError(f"--ep is {ranks}, must be at least 1", value=ranks, bound=1)
            for tokens in args.tokens:
                description = describe_moe(
                    args.op, ranks=ranks, tokens=tokens, hidden=args.hidden, top_k=args.topk, experts=args.experts,
                    quant=args.quant, protocol=args.protocol,
                )  # fmt: skip
                results.append(({"tokens": tokens, "hidden": args.hidden}, project(description, machine)))
    rows = [_row(args.op, machine.name, shape, projection) for shape, projection in results]
    if args.json != "-":
        _print_table(machine.title, rows)
    if args.json:
        text = json.dumps(
            {"schema": _SCHEMA, "version": __version__, "command": args.command, "results": rows}, indent=2
        )
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 0


def _setting(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UsageError(f"--set {text}: must be NAME=NUMBER", value=text + equals) from None


def _row(op: str, machine: str, shape: dict[str, int], projection: Any) -> dict[str, Any]:
    return {
        "op": op,
        "ranks": projection.ranks,
        **shape,
        "protocol": projection.protocol,
        "projected": {
            "machine": machine,
            "time_us": projection.time_us,
            "low_us": projection.low_us,
            "high_us": projection.high_us,
            "stages": projection.stages,
            "bottleneck": projection.bottleneck,
            "bottleneck_share": projection.bottleneck_share,
        },
    }


def _print_table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"# xccl {__version__} project: {title}; projected times, nothing was run")
    print(f"# {'op':>9} {'ranks':>6} {'size':>14} {'projected':>10} {'low':>8} {'high':>8}  bottleneck")
    for row in rows:
        projected = row["projected"]
        size = f"{row['bytes']} B, {row['lanes']} lanes" if "bytes" in row else f"{row['tokens']} tokens"
        share = f"{projected['bottleneck']} ({projected['bottleneck_share']:.0%})"
        times = f"{projected['time_us']:>10.1f} {projected['low_us']:>8.1f} {projected['high_us']:>8.1f}"
        print(f"  {row['op']:>9} {row['ranks']:>6} {size:>14} {times}  {share}")
    sys.stdout.flush()
