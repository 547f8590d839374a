"""Projections: what an operation would cost on a machine."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ModelError
from ..layout.ring import MAX_LANES
from ..protocol import moe, moe_push, p2p
from ..protocol.counts import RoutingCounts
from ..protocol.stage import Description
from .machine import Machine
from .simulate import simulate
from .topology import place

#: Routed experts of DeepSeek-R1, which the published deployments serve.
ROUTED_EXPERTS = 256


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
    stages: dict[str, float]
    bottleneck: str
    bottleneck_share: float


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
) -> Description:
    """A dispatch or combine with evenly loaded experts.

    Args:
        operation: "dispatch" or "combine".
        ranks: dies.
        tokens: of each rank.
        hidden: elements of a token.
        top_k: experts of a token.
        experts: in all; by default 256, or as many more as the ranks divide (redundant ones).
        quant: "int8" or "none", for dispatch.
        protocol: "push" (CANN's fused operators) or "pull" (XCCL).

    Raises:
        ModelError: there is no such operation or protocol, or the ranks do not divide the experts.
    """
    if operation not in ("dispatch", "combine") or protocol not in ("push", "pull") or quant not in ("int8", "none"):
        raise ModelError(f"no model of {operation!r} by protocol {protocol!r} with quant {quant!r}")
    if experts is None:
        experts = -(-ROUTED_EXPERTS // ranks) * ranks
    if experts % ranks or top_k > experts:
        raise ModelError(f"{experts} experts are not a multiple of {ranks} ranks, or fewer than top_k {top_k}")
    routing = RoutingCounts.uniform(ranks, experts=experts, tokens=tokens, top_k=top_k)
    is_push = protocol == "push"
    if operation == "dispatch":
        how: moe.Quant = "int8" if quant == "int8" else "none"
        return (moe_push.dispatch if is_push else moe.dispatch)(routing, hidden=hidden, quant=how)
    return (moe_push.combine if is_push else moe.combine)(routing, hidden=hidden)


def describe_send(machine: Machine, *, n_bytes: int, lanes: int) -> Description:
    """A message between two dies of neighbouring nodes.

    Raises:
        ModelError: lanes or size is out of range.
    """
    if not 1 <= lanes <= MAX_LANES or n_bytes < 0:
        raise ModelError(f"{n_bytes} bytes on {lanes} lanes: a message has 0 bytes or more, on 1 to {MAX_LANES} lanes")
    dies_per_node = int(machine["topology.dies_per_chip"] * machine["topology.chips_per_node"])
    slot_bytes = int(machine["lane.buffer_bytes"])
    return p2p.send_recv(2 * dies_per_node, [0], [dies_per_node], [n_bytes], lanes=lanes, slot_bytes=slot_bytes)


def project(description: Description, machine: Machine) -> Projection:
    """What the description costs, with ranks packed on the machine's dies."""
    timeline = simulate(description, place(machine, description.ranks))
    stages = timeline.stage_us()
    total_us = timeline.total_us
    name = max(stages, key=lambda stage: stages[stage])
    limit = timeline.limits[timeline.stages.index(name)]
    spread = 2 * float(machine.calibration.get("leave_one_out_rms", 0.0))
    return Projection(
        machine=machine.name,
        operation=description.operation,
        protocol=description.protocol,
        ranks=description.ranks,
        time_us=total_us,
        low_us=total_us * (1 - spread),
        high_us=total_us * (1 + spread),
        stages=stages,
        bottleneck=f"{name}: {limit}",
        bottleneck_share=stages[name] / total_us if total_us else 0.0,
    )
