"""What `xccl project` projects: descriptions of the work that its options ask for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from xccl.cli.project import COLLECTIVES, EVEN
from xccl.errors import UsageError
from xccl.model.project import (
    ROUTED_EXPERTS,
    describe_a2e,
    describe_collective,
    describe_kv,
    describe_moe,
    describe_send,
    whole_experts,
)
from xccl.model.topology import place
from xccl.protocol.a2e import default_trampolines

if TYPE_CHECKING:
    from xccl.model.machine import Machine
    from xccl.protocol.collective_cuts import Kind
    from xccl.protocol.counts import RoutingCounts
    from xccl.protocol.stage import Description, Engine

EXPERT_OPERATIONS: Final = ("dispatch", "combine", "moe")
APART: Final = ("a2e", "e2a")
#: Tokens x experts of a rank that are drawn at once, some tens of bytes each.
_MOST_CHOICES: Final = 1 << 26

#: What a projection is of, for the table and the JSON, and what happens in it, one after the other.
Work = tuple[dict[str, Any], list["Description"]]


def described_work(args: argparse.Namespace, machine: Machine) -> Iterator[Work]:
    """The work that the options ask for, one projection after the other.

    Raises:
        UsageError: the numbers do not fit.
        ModelError: the machine has no room for them, or the model no description.
    """
    if args.op in EXPERT_OPERATIONS:
        for ranks in args.ep:
            place(machine, ranks)  # before all its pairs are described
            for tokens in args.tokens:
                yield _expert_work(args, machine, ranks, tokens)
    elif args.op in APART:
        for tokens in args.tokens:
            yield _apart_work(args, machine, tokens)
    elif args.op == "barrier":
        from xccl.protocol.onesided import barrier

        for ranks in args.ep:
            place(machine, ranks)
            yield {}, [barrier(ranks)]
    elif args.op in COLLECTIVES:
        kind: Kind = args.op.replace("-", "_")
        for ranks in args.ep:
            place(machine, ranks)
            for n_bytes in args.bytes:
                yield {"bytes": n_bytes}, [describe_collective(kind, ranks, n_bytes, algorithm=args.algorithm)]
    else:
        yield from _sized_work(args, machine)


def _expert_work(args: argparse.Namespace, machine: Machine, ranks: int, tokens: int) -> Work:
    experts = args.experts or whole_experts(ROUTED_EXPERTS, ranks)
    routing = None
    if args.routing != EVEN:
        routing = _routing(args, ranks, tokens, experts, ranks)
    parts = [
        describe_moe(
            op, ranks=ranks, tokens=tokens, hidden=args.hidden, top_k=args.topk, experts=experts, quant=args.quant,
            protocol=args.protocol, machine=machine, routing=routing,
        )
        for op in (("dispatch", "combine") if args.op == "moe" else (args.op,))
    ]  # fmt: skip
    shape = {"protocol": args.protocol, "tokens": tokens, "hidden": args.hidden, "experts": experts}
    return {**shape, "topk": args.topk, "quant": args.quant, "routing": args.routing}, parts


def _apart_work(args: argparse.Namespace, machine: Machine, tokens: int) -> Work:
    dies = args.experts or 288
    place(machine, args.attention + dies)
    shared = max(0, dies - ROUTED_EXPERTS) if args.shared is None else args.shared
    routing = None
    if args.routing != EVEN:
        routing = _routing(args, args.attention, tokens, dies - shared, dies, shared)
    described = describe_a2e(
        args.op, attention=args.attention, experts=dies, tokens=tokens, hidden=args.hidden, top_k=args.topk,
        shared=shared, quant=args.quant, trampolines=args.trampolines, machine=machine, routing=routing,
    )  # fmt: skip
    trampolines = default_trampolines(args.attention, dies) if args.trampolines is None else args.trampolines
    shape = {"tokens": tokens, "hidden": args.hidden, "attention": args.attention, "experts": dies, "shared": shared}
    shape |= {"trampolines": trampolines, "topk": args.topk, "quant": args.quant}
    return {**shape, "routing": args.routing}, [described]


def _routing(
    args: argparse.Namespace, sources: int, tokens: int, experts: int, destinations: int, shared: int = 0
) -> RoutingCounts:
    """Choices by chance, as `xccl bench` makes them; the shared expert's replicas take turns."""
    import numpy as np

    from xccl.protocol.counts import RoutingCounts
    from xccl.protocol.routing import make_routing

    if tokens * experts > _MOST_CHOICES:
        raise UsageError(
            f"{tokens} tokens with {experts} experts are too many choices to draw; --routing even has no limit",
            value=tokens * experts, bound=_MOST_CHOICES,
        )  # fmt: skip
    choices = []
    for rank in range(sources):
        idx = make_routing(
            args.routing, tokens=tokens, experts=experts, topk=args.topk, seed=args.seed, rank=rank, ranks=sources
        )
        if shared:
            replica = experts + (rank + np.arange(tokens)) % shared
            idx = np.concatenate([idx, replica[:, None]], axis=1)
        choices.append(idx)
    return RoutingCounts.from_topk(choices, experts + shared, destinations)


def _sized_work(args: argparse.Namespace, machine: Machine) -> Iterator[Work]:
    from xccl.protocol.onesided import get, put

    engine: Engine = args.engine or ("dma" if args.op == "kv" else "mte")
    for n_bytes in args.bytes:
        if args.op == "sendrecv":
            for lanes in args.lanes:
                shape = {"bytes": n_bytes, "lanes": lanes, "engine": engine}
                yield shape, [describe_send(machine, n_bytes=n_bytes, lanes=lanes, engine=engine)]
        elif args.op == "kv":
            blocks, layers = args.blocks, args.layers
            shape = {"bytes": layers * blocks * n_bytes, "block_bytes": n_bytes, "blocks": blocks, "layers": layers}
            described = describe_kv(machine, page_bytes=n_bytes, blocks=blocks, layers=layers, engine=engine)
            yield {**shape, "engine": engine}, [described]
        else:
            neighbour = int(machine["topology.dies_per_chip"] * machine["topology.chips_per_node"])
            ends = (0, neighbour) if args.op == "put" else (neighbour, 0)
            describe = put if args.op == "put" else get
            yield (
                {"bytes": n_bytes, "engine": engine},
                [describe(neighbour + 1, *ends, n_bytes, engine=engine)],
            )
