"""`xccl project`: what an operation would cost on a modelled machine. Nothing runs; every figure is a projection."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xccl._version import __version__
from xccl.cli.parsing import parse_bytes, parse_int_list, parse_seconds, whole_number
from xccl.errors import UsageError

if TYPE_CHECKING:
    from xccl.model.machine import Machine
    from xccl.model.project import Projection
    from xccl.protocol.counts import RoutingCounts
    from xccl.protocol.stage import Description

_EXPERT_OPERATIONS: Final = ("dispatch", "combine", "moe")
_APART: Final = ("a2e", "e2a")
_OPERATIONS: Final = (*_EXPERT_OPERATIONS, *_APART, "sendrecv", "put", "get", "barrier")
_SCHEMA: Final = 1
_EVEN: Final = "even"
_SHOWN_SENSITIVITIES: Final = 8

#: What a projection is of, for the table and the JSON, and what happens in it, one after the other.
Work = tuple[dict[str, Any], list["Description"]]


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    positive = whole_number(1)
    parser.description = "Project an operation onto a machine: modelled times, calibrated on published figures."
    parser.add_argument("op", metavar="OP", choices=_OPERATIONS, help=", ".join(_OPERATIONS))
    machine = parser.add_argument_group("machine").add_argument
    machine("--machine", default="cm384", help="profile, or path of one (default: cm384)")
    machine("--set", action="append", default=[], metavar="NAME=VALUE", help="another figure of the machine")
    machine("--placement", choices=("packed", "by-node"), default="packed", help="of ranks on dies (default: packed)")
    machine("--skew-us", type=parse_seconds, metavar="US",
            help="stragglers: ranks start late by an exponential distribution of this mean")  # fmt: skip
    machine("--seed", type=whole_number(0), default=0, metavar="N", help="of skew and routing (default: 0)")

    experts = parser.add_argument_group("mixture of experts (dispatch combine moe a2e e2a)").add_argument
    experts("--ep", type=parse_int_list, default=(8, 32, 256), metavar="N[,N...]", help="ranks (default: 8,32,256)")
    experts("--tokens", type=parse_int_list, default=(128,), metavar="N[,N...]", help="of each rank (default: 128)")
    experts("--hidden", type=positive, default=7168, metavar="N", help="elements of a token (default: 7168)")
    experts("--topk", type=positive, default=8, metavar="N", help="experts of a token (default: 8)")
    experts("--experts", type=positive, metavar="N",
            help="in all (default: 256, or more: a multiple of ranks); a2e, e2a: dies (default: 288)")  # fmt: skip
    experts("--quant", choices=("int8", "none"), default="int8", help="what dispatch sends (default: int8)")
    experts("--protocol", choices=("push", "pull", "deepep"), default="push",
            help="CANN's fused push, XCCL's pull, or DeepEP's low-latency kernels (default: push)")  # fmt: skip
    experts("--routing", default=_EVEN, metavar="SPEC",
            help="even (default: no imbalance), uniform, zipf[:S], hot[:K], skew or file:PATH")  # fmt: skip
    experts("--attention", type=positive, default=160, metavar="N", help="a2e, e2a: attention dies (default: 160)")
    experts("--shared", type=whole_number(0), metavar="N",
            help="a2e, e2a: expert dies with a shared expert (default: all beyond 256)")  # fmt: skip
    experts("--trampolines", type=whole_number(0), metavar="N",
            help="a2e, e2a: 0 is direct (default: attention dies, if there are enough expert dies)")  # fmt: skip

    sized = parser.add_argument_group("bytes (sendrecv put get barrier)").add_argument
    sized("--bytes", type=_sizes, default=(1 << 20,), metavar="SIZE[,SIZE...]", help="of a message (default: 1M)")
    sized("--lanes", type=parse_int_list, default=(2, 48), metavar="N[,N...]", help="of sendrecv (default: 2,48)")
    sized("--engine", choices=("mte", "dma"), default="mte", help="what moves the bytes (default: mte)")

    output = parser.add_argument_group("output").add_argument
    output("--stages", action="store_true", help="show the time of each stage")
    output("--sensitivity", action="store_true", help="show which figures of the machine move the result most")
    output("--plot", metavar="FILE", help="draw the stages: .png or .svg (needs matplotlib: pip install 'xccl[plot]')")
    output("--json", metavar="FILE", help="write the projections to a file, - for standard output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from xccl.model.machine import load_machine

    if args.plot:
        from xccl.cli.plot import require_plot

        require_plot(args.plot)
    machine = load_machine(args.machine).with_values(dict(map(_setting, args.set)))
    rows = [_row(args, machine, shape, parts) for shape, parts in _work(args, machine)]
    if args.json != "-":
        _print_table(args, machine.title, rows)
    if args.json:
        document = {"schema": _SCHEMA, "version": __version__, "command": args.command, "results": rows}
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

        draw(args.plot, f"{args.op} on {machine.title}, projected", rows)
    return 0


# -- what is projected ------------------------------------------------------------------------------------------------


def _work(args: argparse.Namespace, machine: Machine) -> Iterator[Work]:
    if args.op in _EXPERT_OPERATIONS:
        for ranks in args.ep:
            if ranks < 1:
                raise UsageError(f"--ep is {ranks}, must be at least 1", value=ranks, bound=1)
            for tokens in args.tokens:
                yield _expert_work(args, machine, ranks, tokens)
    elif args.op in _APART:
        for tokens in args.tokens:
            yield _apart_work(args, machine, tokens)
    elif args.op == "barrier":
        from xccl.protocol.onesided import barrier

        for ranks in args.ep:
            if ranks < 1:
                raise UsageError(f"--ep is {ranks}, must be at least 1", value=ranks, bound=1)
            yield {}, [barrier(ranks)]
    else:
        yield from _sized_work(args, machine)


def _expert_work(args: argparse.Namespace, machine: Machine, ranks: int, tokens: int) -> Work:
    from xccl.model.project import ROUTED_EXPERTS, describe_moe, whole_experts

    experts = args.experts or whole_experts(ROUTED_EXPERTS, ranks)
    routing = None
    if args.routing != _EVEN:
        routing = _routing(args, ranks, tokens, experts, ranks)
    parts = [
        describe_moe(
            op, ranks=ranks, tokens=tokens, hidden=args.hidden, top_k=args.topk, experts=experts, quant=args.quant,
            protocol=args.protocol, machine=machine, routing=routing,
        )
        for op in (("dispatch", "combine") if args.op == "moe" else (args.op,))
    ]  # fmt: skip
    return {"tokens": tokens, "hidden": args.hidden, "experts": experts, "routing": args.routing}, parts


def _apart_work(args: argparse.Namespace, machine: Machine, tokens: int) -> Work:
    from xccl.model.project import ROUTED_EXPERTS, describe_a2e

    dies = args.experts or 288
    shared = max(0, dies - ROUTED_EXPERTS) if args.shared is None else args.shared
    routing = None
    if args.routing != _EVEN:
        routing = _routing(args, args.attention, tokens, dies - shared, dies, shared)
    described = describe_a2e(
        args.op, attention=args.attention, experts=dies, tokens=tokens, hidden=args.hidden, top_k=args.topk,
        shared=shared, quant=args.quant, trampolines=args.trampolines, machine=machine, routing=routing,
    )  # fmt: skip
    shape = {"tokens": tokens, "hidden": args.hidden, "attention": args.attention, "experts": dies}
    return {**shape, "routing": args.routing}, [described]


def _routing(
    args: argparse.Namespace, sources: int, tokens: int, experts: int, destinations: int, shared: int = 0
) -> RoutingCounts:
    """Choices by chance, as `xccl bench` makes them; the shared expert's replicas take turns."""
    import numpy as np

    from xccl.protocol.counts import RoutingCounts
    from xccl.protocol.routing import make_routing

    choices = []
    for rank in range(sources):
        idx = make_routing(
            args.routing, tokens=tokens, experts=experts, topk=args.topk, seed=args.seed, rank=rank, ranks=sources
        )
        if shared:
            replica = experts + (rank + np.arange(tokens)) % shared
            idx = np.concatenate([idx, replica[:, None]], axis=1)
        choices.append(idx)
    if (experts + shared) % destinations:
        raise UsageError(f"--experts is {experts + shared}: not a multiple of {destinations} ranks", value=experts)
    return RoutingCounts.from_topk(choices, experts + shared, destinations)


def _sized_work(args: argparse.Namespace, machine: Machine) -> Iterator[Work]:
    from xccl.model.project import describe_send
    from xccl.protocol.onesided import get, put

    for n_bytes in args.bytes:
        if args.op == "sendrecv":
            for lanes in args.lanes:
                shape = {"bytes": n_bytes, "lanes": lanes, "engine": args.engine}
                yield shape, [describe_send(machine, n_bytes=n_bytes, lanes=lanes, engine=args.engine)]
        else:
            neighbour = int(machine["topology.dies_per_chip"] * machine["topology.chips_per_node"])
            ends = (0, neighbour) if args.op == "put" else (neighbour, 0)
            describe = put if args.op == "put" else get
            yield (
                {"bytes": n_bytes, "engine": args.engine},
                [describe(neighbour + 1, *ends, n_bytes, engine=args.engine)],
            )


# -- what it costs ----------------------------------------------------------------------------------------------------


def _row(args: argparse.Namespace, machine: Machine, shape: dict[str, Any], parts: list[Description]) -> dict[str, Any]:
    from xccl.model.project import project, together
    from xccl.model.sensitivity import sensitivities

    projections = []
    for part in parts:
        start_us = None
        if args.skew_us:
            import numpy as np

            start_us = np.random.default_rng(args.seed).exponential(args.skew_us, part.ranks)
        projections.append(project(part, machine, args.placement, start_us))
    whole = projections[0] if len(projections) == 1 else together(args.op, projections)
    row = {"op": args.op, "ranks": whole.ranks, **shape, "protocol": whole.protocol, "projected": as_json(whole)}
    if args.skew_us:
        row["skew_us"] = args.skew_us
    if args.sensitivity:
        row["sensitivities"] = [asdict(item) for part in parts for item in sensitivities(part, machine, args.placement)]
    return row


def as_json(projection: Projection) -> dict[str, Any]:
    """The object "projected" of a result."""
    names = ("machine", "time_us", "low_us", "high_us", "rank_us", "stages", "bottleneck", "bottleneck_share")
    return {name: getattr(projection, name) for name in names}


# -- what is shown ----------------------------------------------------------------------------------------------------


def _print_table(args: argparse.Namespace, title: str, rows: list[dict[str, Any]]) -> None:
    print(f"# xccl {__version__} project: {title}; projected times in us, nothing was run")
    print(f"# {'op':>9} {'ranks':>6} {'size':>18} {'projected':>10} {'low':>8} {'high':>8}  bottleneck")
    for row in rows:
        projected = row["projected"]
        share = f"{projected['bottleneck']} ({projected['bottleneck_share']:.0%})"
        times = f"{projected['time_us']:>10.1f} {projected['low_us']:>8.1f} {projected['high_us']:>8.1f}"
        print(f"  {row['op']:>9} {row['ranks']:>6} {_size(row):>18} {times}  {share}")
        if args.skew_us:
            by_rank = ", ".join(f"{name} {us:.1f}" for name, us in projected["rank_us"].items())
            print(f"    a rank, from its own call: {by_rank}")
        if args.stages:
            for name, us in projected["stages"].items():
                print(f"    {name:<32} {us:>8.1f} {us / projected['time_us']:>5.0%}")
        for item in row.get("sensitivities", ())[:_SHOWN_SENSITIVITIES]:
            print(f"    {item['parameter']:<32} {item['value']:>8g} 1% more: {item['elasticity']:+.2f}% of the time")
    sys.stdout.flush()


def _size(row: dict[str, Any]) -> str:
    if "lanes" in row:
        return f"{row['bytes']} B, {row['lanes']} lanes"
    if "bytes" in row:
        return f"{row['bytes']} B"
    return f"{row['tokens']} tokens" if "tokens" in row else "-"


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(parse_bytes(part) for part in text.split(","))


def _setting(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UsageError(f"--set {text}: must be NAME=NUMBER", value=text + equals) from None
