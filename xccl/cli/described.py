"""What a benchmark's step is, as descriptions: for comparison with its trace, and for the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from xccl.cli.deployment import Deployment
from xccl.cli.options import BenchOptions, Case
from xccl.comm import reference
from xccl.errors import UsageError
from xccl.layout.dtypes import CODE_BY_NAME, DTYPE_OF
from xccl.layout.ring import REACH_NONE
from xccl.model.project import describe_collective, whole_experts
from xccl.protocol import a2e, kv, moe, moe_direct, moe_push, onesided, p2p
from xccl.protocol.collective_cuts import FLOWS, Kind
from xccl.protocol.counts import RoutingCounts
from xccl.protocol.routing import make_routing
from xccl.protocol.stage import Description

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def describe_step(
    options: BenchOptions,
    case: Case,
    op: str,
    ranks: int,
    releasing: int | None = None,
    pushed: Sequence[int] | None = None,
    reach: int = REACH_NONE,
) -> list[Description]:
    """The descriptions of one iteration of a row, one after the other.

    Args:
        options: of the run.
        case: its size.
        op: name of the row.
        ranks: the same work on so many ranks.
        releasing: of a barrier, the rank that came last and released the others; the highest one if None.
        pushed: of zero-copy messages, the pieces that each rank has pushed; none if None.
        reach: of collectives, how ranks reach the inputs of others: one of the REACH_ codes.

    Raises:
        UsageError: the work has no description on so many ranks.
    """
    if case.size_bytes is not None:
        kind = op.replace("-", "_")
        if kind in FLOWS:
            return [_collective(options, kind, case.size_bytes, ranks, reach)]
        if op == "kv":
            return [_kv(options, case.size_bytes, ranks)]
        return _between_neighbours(options, op, case.size_bytes, ranks, pushed)
    if case.tokens is None:
        return [onesided.barrier(ranks, releasing)]
    if options.deployment is not None:
        return [_apart(options, case.tokens, op, ranks)]
    # On other ranks than those that ran, as many experts more as make all ranks equal.
    experts = options.experts if ranks == options.ranks else whole_experts(options.experts, ranks)
    choices = [_choices(options, case.tokens, rank, ranks, experts) for rank in range(ranks)]
    routing = RoutingCounts.from_topk(choices, experts)
    common: dict[str, Any] = {
        "hidden": options.hidden,
        "item_bytes": DTYPE_OF[CODE_BY_NAME[options.dtype]].itemsize,
        "rows": "dedup" if options.rows == "dedup" else "expanded",
    }
    # Own rows stay where they are; outputs lie where peers read them only with direct.
    protocol: Any = moe
    quant = _quant(options)
    of_dispatch, of_combine = {"loopback": quant == "int8"}, {}
    if options.protocol == "direct":
        protocol, of_dispatch, of_combine = moe_direct, {}, {"in_place": True}
    if options.protocol == "push":
        protocol, of_combine = moe_push, {"loopback": False}
        # Dispatch after dispatch, or combine after combine, is out of turn; a round trip is not.
        common["in_turn"] = op == "moe"
    make: dict[str, Callable[[], Description]] = {
        "dispatch": lambda: protocol.dispatch(routing, quant=quant, **common, **of_dispatch),
        "combine": lambda: protocol.combine(routing, **common, **of_combine),
    }
    return [make[name]() for name in (("dispatch", "combine") if op == "moe" else (op,))]


def require_described(options: BenchOptions, ranks: int) -> None:
    """Found out before anything runs.

    Raises:
        UsageError: the work has no description on so many ranks.
    """
    if options.op == "kv" and ranks % 2:
        raise UsageError(f"kv is projected on pairs of ranks, not on {ranks}", value=ranks)
    deployment = options.deployment
    if deployment is None:
        return
    if deployment.domains > 1 or deployment.microbatches > 1:
        raise UsageError(
            f"the model knows one microbatch of one domain: --domains is {deployment.domains}, "
            f"--microbatches {deployment.microbatches}", value=(deployment.domains, deployment.microbatches), bound=1,
        )  # fmt: skip
    if ranks != options.ranks:
        raise UsageError(
            f"{options.op} is projected on the {options.ranks} ranks that run it, not on {ranks}; "
            "xccl project takes other numbers", value=ranks, bound=options.ranks,
        )  # fmt: skip


def _between_neighbours(
    options: BenchOptions, op: str, n_bytes: int, ranks: int, pushed: Sequence[int] | None
) -> list[Description]:
    here = np.arange(ranks)
    following = (here + 1) % ranks
    if op == "put":
        return [onesided.put(ranks, here, following, n_bytes, engine=options.engine)]
    if op == "get":
        return [onesided.get(ranks, following, here, n_bytes)]
    if op == "put-signal":
        return [onesided.put_signal(ranks, here, following, n_bytes), onesided.wait_until(ranks, here)]
    if op != "sendrecv":
        raise UsageError(f"there is no description of {op} yet", value=op)
    lanes, engine = options.lanes, options.engine
    if p2p.is_zero_copy(n_bytes, options.mode):
        return [p2p.zero_copy(ranks, here, following, n_bytes, lanes=lanes, engine=engine, pushed=pushed or 0)]
    return [p2p.send_recv(ranks, here, following, n_bytes, lanes=lanes, engine=engine)]


def _kv(options: BenchOptions, page_bytes: int, ranks: int) -> Description:
    prefill = np.arange(ranks // 2)
    return kv.kv_transfer(
        ranks, prefill, prefill + ranks // 2, options.blocks, layers=options.layers, page_bytes=page_bytes,
        engine=options.engine,
    )  # fmt: skip


def _collective(options: BenchOptions, kind: Kind, size_bytes: int, ranks: int, reach: int) -> Description:
    """A collective of that size; as in dispatch and combine, all lanes of a die take part."""
    item_bytes = DTYPE_OF[CODE_BY_NAME[options.dtype]].itemsize
    return describe_collective(kind, ranks, size_bytes, item_bytes=item_bytes, algorithm=options.algorithm, reach=reach)


def _apart(options: BenchOptions, tokens: int, op: str, ranks: int) -> Description:
    require_described(options, ranks)
    deployment = options.deployment or Deployment()
    attention, dies = deployment.attention, options.ranks - deployment.attention
    routed, shared = options.experts - deployment.shared, deployment.shared
    choices = [
        reference.with_shared(_choices(options, tokens, rank, attention, routed), rank, routed, shared)
        for rank in range(attention)
    ]
    routing = RoutingCounts.from_topk(choices, options.experts, dies)
    item_bytes = DTYPE_OF[CODE_BY_NAME[options.dtype]].itemsize
    trampolines = 0
    if deployment.route == "trampoline":
        trampolines = deployment.trampolines or a2e.default_trampolines(attention, dies)
    if op == "a2e":
        return a2e.a2e(
            routing, hidden=options.hidden, item_bytes=item_bytes, quant=_quant(options), trampolines=trampolines
        )
    return a2e.e2a(routing, hidden=options.hidden, item_bytes=item_bytes, trampolines=trampolines)


def _choices(options: BenchOptions, tokens: int, rank: int, ranks: int, experts: int) -> np.ndarray:
    return make_routing(
        options.routing, tokens=tokens, experts=experts, topk=options.topk, seed=options.seed, rank=rank, ranks=ranks
    )


def _quant(options: BenchOptions) -> moe.Quant:
    return "int8" if options.quant == "int8" else "none"
