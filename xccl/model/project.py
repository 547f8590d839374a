"""Projections: what an operation would cost on a machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..layout.ring import MAX_LANES, REACH_NONE
from ..protocol import a2e, collectives, kv, moe, moe_direct, moe_push, p2p
from ..protocol.collective_cuts import Kind, part_elements
from ..protocol.counts import RoutingCounts
from ..protocol.stage import Description, Engine
from .machine import Machine
from .simulate import Timeline, simulate
from .topology import place

#: Routed experts of DeepSeek-R1, which the published deployments serve.
ROUTED_EXPERTS = 256

#: Far beyond what a die holds.
_MOST_BYTES = 1 << 50

PROTOCOLS = ("push", "pull", "direct", "deepep")
#: DeepEP: elements that share a scale, and bytes in front of a row that name its source (its README, low-latency mode).
_FP8_BLOCK = 128
_DEEPEP_HEADER_BYTES = 16
_DESCRIBED: dict[str, tuple[Callable[..., Description], Callable[..., Description]]] = {
    "push": (moe_push.dispatch, moe_push.combine),
    "pull": (moe.dispatch, moe.combine),
    "direct": (moe_direct.dispatch, moe_direct.combine),
}


@dataclass(frozen=True)
class Projection:
    """A modelled time; never to be mixed with measured ones.

    Attributes:
        machine: name of the profile.
        operation: what was projected.
        protocol: by which protocol.
        ranks: on how many dies.
        time_us: when the last rank is done.
        low_us: lower end of the interval that the calibration's leave-one-out errors suggest.
        high_us: upper end.
        rank_us: least, mean and largest time that a rank spends in it, from its own call.
        stages: microseconds by stage.
        bottleneck: stage and resource that take most of the time.
        bottleneck_share: their share of it.
    """

    machine: str
    operation: str
    protocol: str
    ranks: int
    time_us: float
    low_us: float
    high_us: float
    rank_us: dict[str, float]
    stages: dict[str, float]
    bottleneck: str
    bottleneck_share: float


def whole_experts(experts: int, ranks: int) -> int:
    """The next number of experts that the ranks divide; those beyond are redundant ones."""
    return -(-experts // ranks) * ranks


def describe_moe(
    operation: str,
    *,
    ranks: int,
    tokens: int,
    hidden: int = 7168,
    top_k: int = 8,
    experts: int | None = None,
    quant: str = "int8",
    protocol: str = "push",
    machine: Machine | None = None,
    routing: RoutingCounts | None = None,
) -> Description:
    """A dispatch or combine.

    Args:
        operation: "dispatch" or "combine".
        ranks: dies.
        tokens: of each rank.
        hidden: elements of a token.
        top_k: experts of a token.
        experts: in all; by default 256, or as many more as the ranks divide (redundant ones).
        quant: "int8" or "none", for dispatch.
        protocol: "push" (CANN's fused operators), "pull" (XCCL), "direct" (`xccl.protocol.moe_direct`, outputs
            copied once), or "deepep": DeepEP's low-latency kernels, which push, too, FP8 with a float32 scale for every
            128 elements instead of INT8.
        machine: whose lanes take part; those of a die of CloudMatrix384 if None.
        routing: what goes where; evenly loaded experts if None.

    Raises:
        ModelError: there is no such operation or protocol, or there are fewer experts than slots.
    """
    if operation not in ("dispatch", "combine") or protocol not in PROTOCOLS or quant not in ("int8", "none"):
        raise ModelError(f"no model of {operation!r} by protocol {protocol!r} with quant {quant!r}")
    if routing is None:
        experts = experts or whole_experts(ROUTED_EXPERTS, ranks)
        if top_k > experts:
            raise ModelError(f"{experts} experts are fewer than top_k {top_k}")
        routing = RoutingCounts.uniform(ranks, experts=experts, tokens=tokens, top_k=top_k)
    how: moe.Quant = "int8" if quant == "int8" else "none"
    lanes = MAX_LANES if machine is None else int(machine["lane.count"])
    if protocol == "deepep":
        scale_bytes = -(-hidden // _FP8_BLOCK) * 4
        if operation == "dispatch":
            return moe_push.dispatch(
                routing, hidden=hidden, quant=how, lanes=lanes, header_bytes=_DEEPEP_HEADER_BYTES,
                scale_bytes=scale_bytes, flags_per="expert",
            )  # fmt: skip
        return moe_push.combine(routing, hidden=hidden, lanes=lanes, header_bytes=0)
    dispatch, combine = _DESCRIBED[protocol]
    if operation == "dispatch":
        return dispatch(routing, hidden=hidden, quant=how, lanes=lanes)
    return combine(routing, hidden=hidden, lanes=lanes)


def describe_a2e(
    operation: str,
    *,
    attention: int,
    experts: int,
    tokens: int,
    hidden: int = 7168,
    top_k: int = 8,
    shared: int | None = None,
    quant: str = "int8",
    trampolines: int | None = None,
    machine: Machine | None = None,
    routing: RoutingCounts | None = None,
) -> Description:
    """A2E or E2A with one expert on each expert die (XDS §3.3).

    Args:
        operation: "a2e" or "e2a".
        attention: attention dies.
        experts: expert dies, those of the shared expert's replicas included.
        tokens: of each attention die.
        hidden: elements of a token.
        top_k: routed experts of a token.
        shared: replicas of a shared expert among the expert dies, to one of which each token goes besides; by default
            all beyond 256 dies.
        quant: "int8" or "none", for A2E.
        trampolines: expert dies that forward; 0 is direct; None is as many as there are attention dies, if there are.
        machine: whose lanes take part; those of a die of CloudMatrix384 if None.
        routing: what goes where; evenly loaded experts if None.

    Raises:
        ModelError: there is no such operation, or the numbers do not fit.
    """
    if operation not in ("a2e", "e2a") or quant not in ("int8", "none"):
        raise ModelError(f"no model of {operation!r} with quant {quant!r}")
    if shared is None:
        shared = max(0, experts - ROUTED_EXPERTS)
    routed = experts - shared
    if attention < 1 or tokens < 0 or not 0 <= shared < max(experts, 1) or not 1 <= top_k <= routed:
        raise ModelError(
            f"{attention} attention dies with {tokens} tokens, top-{top_k} of {routed} routed and {shared} shared of "
            f"{experts} expert dies: each must be at least 1, tokens and shared at least 0, and top-k at most routed"
        )
    if trampolines is None:
        trampolines = a2e.default_trampolines(attention, experts)
    if not 0 <= trampolines <= experts:
        raise ModelError(f"{trampolines} trampolines of {experts} expert dies: 0 to {experts} are possible")
    routing = routing or RoutingCounts.uniform(
        attention, experts=routed, tokens=tokens, top_k=top_k, shared=shared, destinations=experts
    )
    lanes = MAX_LANES if machine is None else int(machine["lane.count"])
    if operation == "a2e":
        how: moe.Quant = "int8" if quant == "int8" else "none"
        return a2e.a2e(routing, hidden=hidden, quant=how, lanes=lanes, trampolines=trampolines)
    return a2e.e2a(routing, hidden=hidden, lanes=lanes, trampolines=trampolines)


def describe_send(machine: Machine, *, n_bytes: int, lanes: int, engine: Engine = "mte") -> Description:
    """A message between two dies of neighbouring nodes.

    Raises:
        ModelError: lanes or size is out of range.
    """
    if not 1 <= lanes <= MAX_LANES or n_bytes < 0:
        raise ModelError(f"{n_bytes} bytes on {lanes} lanes: a message has 0 bytes or more, on 1 to {MAX_LANES} lanes")
    dies_per_node = int(machine["topology.dies_per_chip"] * machine["topology.chips_per_node"])
    slot_bytes = int(machine["lane.buffer_bytes"])
    return p2p.send_recv(
        2 * dies_per_node, [0], [dies_per_node], [n_bytes], lanes=lanes, engine=engine, slot_bytes=slot_bytes
    )


def describe_collective(
    kind: Kind, ranks: int, size_bytes: int, *, item_bytes: int = 2, algorithm: str = "auto", reach: int = REACH_NONE
) -> Description:
    """A collective of all ranks; all lanes of a die take part.

    Args:
        kind: which; alltoallv with parts of one size.
        ranks: number of ranks.
        size_bytes: of the larger of a rank's two buffers, as nccl-tests counts.
        item_bytes: size of an element.
        algorithm: as for `xccl.protocol.collective_cuts.cut`.
        reach: how ranks read each other's inputs where they lie, one of the REACH_ codes; by default they stage them.

    Raises:
        UsageError: there is no such algorithm.
    """
    n_bytes = part_elements(kind, size_bytes, item_bytes, ranks) * item_bytes
    if kind == "alltoallv":
        return collectives.alltoallv(np.full((ranks, ranks), n_bytes), reach=reach, lanes=MAX_LANES)
    return collectives.describe(
        kind, ranks, n_bytes, item_bytes=item_bytes, algorithm=algorithm, reach=reach, lanes=MAX_LANES
    )


def describe_kv(machine: Machine, *, page_bytes: int, blocks: int, layers: int, engine: Engine = "dma") -> Description:
    """A request of a KV cache between two dies of neighbouring nodes, whose layers are all ready.

    Raises:
        ModelError: sizes are out of range.
    """
    if not (page_bytes >= 1 and blocks >= 0 and layers >= 1 and page_bytes * blocks * layers <= _MOST_BYTES):
        raise ModelError(
            f"{layers} layers of {blocks} blocks of {page_bytes} bytes: layers have 1 byte or more, and at most "
            f"{_MOST_BYTES} in all"
        )
    neighbour = int(machine["topology.dies_per_chip"] * machine["topology.chips_per_node"])
    return kv.kv_transfer(
        2 * neighbour, 0, neighbour, blocks, layers=layers, page_bytes=page_bytes,
        lanes=int(machine["lane.count"]), engine=engine,
    )  # fmt: skip


def project(
    description: Description,
    machine: Machine,
    placement: str | Sequence[int] = "packed",
    start_us: npt.NDArray[np.float64] | None = None,
) -> Projection:
    """What the description costs.

    Args:
        description: what happens.
        machine: on which machine.
        placement: of the ranks on its dies, as `topology.place` has it.
        start_us: [ranks] when each rank calls the operation; all at 0 if None.

    Raises:
        ModelError: it does not fit on the machine.
    """
    return summary(description, machine, timeline(description, machine, placement, start_us))


def timeline(
    description: Description,
    machine: Machine,
    placement: str | Sequence[int] = "packed",
    start_us: npt.NDArray[np.float64] | None = None,
) -> Timeline:
    """When each rank is in which stage; arguments and errors as for `project`."""
    return simulate(description, place(machine, description.ranks, placement), start_us)


def summary(description: Description, machine: Machine, times: Timeline) -> Projection:
    """The projection that a timeline of this description makes."""
    stages = times.stage_us()
    total_us = times.total_us
    name = max(stages, key=lambda stage: stages[stage])
    limit = times.limits[times.stages.index(name)]
    spread = 2 * float(machine.calibration.get("leave_one_out_rms", 0.0))
    rank_us = times.end_us[-1] - times.begin_us[0]
    return Projection(
        machine=machine.name,
        operation=description.operation,
        protocol=description.protocol,
        ranks=description.ranks,
        time_us=total_us,
        low_us=total_us * (1 - spread),
        high_us=total_us * (1 + spread),
        rank_us={"min": float(rank_us.min()), "mean": float(rank_us.mean()), "max": float(rank_us.max())},
        stages=stages,
        bottleneck=f"{name}: {limit}",
        bottleneck_share=stages[name] / total_us if total_us else 0.0,
    )


def in_a_row(
    operation: str,
    descriptions: Sequence[Description],
    machine: Machine,
    placement: str | Sequence[int] = "packed",
    start_us: npt.NDArray[np.float64] | None = None,
) -> Projection:
    """Operations of which each rank calls the next one as soon as it has ended the one before: stragglers stay behind.

    Without stragglers it takes about as long as `together`, where all ranks wait for the last one in between.

    Args:
        operation: name of the whole.
        descriptions: what happens, in order; at least one.
        machine: on which machine.
        placement: of the ranks on its dies, as `topology.place` has it.
        start_us: [ranks] when each rank calls the first operation; all at 0 if None.

    Raises:
        ModelError: it does not fit on the machine.
    """
    first = times = timeline(descriptions[0], machine, placement, start_us)
    parts = [summary(descriptions[0], machine, times)]
    for description in descriptions[1:]:
        times = timeline(description, machine, placement, times.end_us[-1])
        parts.append(summary(description, machine, times))
    last, spent_us = parts[-1], times.end_us[-1] - first.begin_us[0]
    if len(parts) == 1:
        return last
    whole = together(operation, parts)  # whose times would count the stragglers' start once for each part
    return replace(
        whole,
        time_us=last.time_us,
        low_us=last.low_us,
        high_us=last.high_us,
        rank_us={"min": float(spent_us.min()), "mean": float(spent_us.mean()), "max": float(spent_us.max())},
        bottleneck_share=whole.bottleneck_share * whole.time_us / last.time_us if last.time_us else 0.0,
    )


def together(operation: str, parts: Sequence[Projection]) -> Projection:
    """Operations one after the other, as one: a round trip."""
    first, total_us = parts[0], sum(part.time_us for part in parts)
    longest = max(parts, key=lambda part: part.bottleneck_share * part.time_us)
    return Projection(
        machine=first.machine,
        operation=operation,
        protocol=first.protocol,
        ranks=first.ranks,
        time_us=total_us,
        low_us=sum(part.low_us for part in parts),
        high_us=sum(part.high_us for part in parts),
        rank_us={key: sum(part.rank_us[key] for part in parts) for key in first.rank_us},
        stages={f"{part.operation} {name}": us for part in parts for name, us in part.stages.items()},
        bottleneck=f"{longest.operation} {longest.bottleneck}",
        bottleneck_share=longest.bottleneck_share * longest.time_us / total_us if total_us else 0.0,
    )
