"""What the stages of a description cost each rank by itself, and what they ask of shared resources.

Equations, for a rank and a stage (parameters in the profile's names):

    time of a unit   u = startup + bytes / rate, in pieces of at most lane.buffer_bytes; lane.local_* within a die, and
                     lane.lookup for a row whose place follows from counts
    lanes            T_lane = ceil(units / lanes) * mean u; with named lanes, the sum of the busiest
    DMA engine       T_dma = units * dma.startup + bytes / dma.rate
    transfers        a flow of all bytes, at most bytes / max(T_lane, T_dma) fast; all share ports, chips, uplinks, HBM
    vector work      T_work = ceil(units / lanes) * (elements / rate of the kind + bytes / lane.local_rate) of a unit,
                     overlapping the transfers
    signals          T_signal = ceil(signals / lanes) * sync.signal; when streamed, those of the last pieces only
    waits            T_poll = ceil(words / lanes) * sync.poll

Reading and writing a unit overlap through the ping-pong pair of unified buffers, so a unit costs the slower of the two
once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..protocol.stage import Description, Stage, Transfers, Work
from .machine import Machine
from .topology import Tier, Topology

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: A rank that talks to more peers than this in a stage is part of a mesh.
_PAIR_PEERS = 2


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Signals of one kind: when a rank has sent them, they are at their destinations after a latency.

    Attributes:
        what: which signals.
        source: [n] ranks.
        destination: [n] ranks.
        latency_us: [n] one way.
    """

    what: str
    source: Ints
    destination: Ints
    latency_us: Floats


@dataclass(frozen=True, eq=False)
class StageCost:
    """One stage, costed.

    Attributes:
        name: of the stage.
        n_bytes: [ranks] bytes of each rank's flow.
        alone_us: [ranks] least time of its flow, by its lanes and DMA engine.
        unit_us: [ranks] time of one unit: how far a streamed stage is behind.
        first: [ranks + 1] where each flow's entries start in the next two.
        resource: [entries] resource used.
        coefficient: [entries] bytes of it for each byte of the flow.
        latency_us: [ranks] before the first byte of a pull is there; for a push, until the last byte is.
        pulls: whether the latency comes before the flow.
        work_us: [ranks] vector work.
        signal_us: [ranks] issuing the signals.
        arrivals: what the signals set off.
        poll_us: [ranks] looking at the awaited words.
        waits: `what`, rank and peer columns of what is awaited.
        barrier_us: of the lanes.
        streamed: see `Stage`.
    """

    name: str
    n_bytes: Floats
    alone_us: Floats
    unit_us: Floats
    first: Ints
    resource: Ints
    coefficient: Floats
    latency_us: Floats
    pulls: bool
    work_us: Floats
    signal_us: Floats
    arrivals: tuple[Arrivals, ...]
    poll_us: Floats
    waits: tuple[tuple[str, Ints, Ints], ...]
    barrier_us: float
    streamed: bool


def cost_stages(description: Description, topology: Topology) -> list[StageCost]:
    """Every stage of a description, costed on a machine."""
    is_streamed = any(stage.streamed for stage in description.stages)
    stages = [_cost_stage(stage, description.lanes, topology, is_streamed) for stage in description.stages]
    if stages:  # the launch comes before everything, at every rank
        stages[0] = replace(stages[0], poll_us=stages[0].poll_us + topology.machine["kernel.launch_us"])
    return stages


def _cost_stage(stage: Stage, lanes: int, topology: Topology, is_streamed: bool) -> StageCost:
    machine, ranks = topology.machine, topology.ranks
    n_bytes = np.zeros(ranks)
    alone, unit, latency = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
    usages = []
    pulls = False
    for transfers in stage.transfers:
        mover = transfers.source if transfers.mover == "source" else transfers.destination
        n_bytes += np.bincount(mover, transfers.n_bytes, ranks)
        each_us = _unit_us(transfers, topology)
        alone_us, unit_us = _alone_us(transfers, mover, each_us, lanes, ranks, machine)
        alone, unit = alone + alone_us, np.maximum(unit, unit_us)
        moving = transfers.units > 0
        away = topology.latency_us(transfers.source, transfers.destination) * moving
        pulls |= transfers.mover == "destination" and bool(away.any())
        np.maximum.at(latency, mover, away)
        going = moving & (transfers.source != transfers.destination)
        pairs = np.unique(transfers.source[going] * ranks + transfers.destination[going])
        peers = np.bincount(pairs // ranks if transfers.mover == "source" else pairs % ranks, minlength=ranks)
        row, resource, amount = topology.usage(
            transfers.source, transfers.destination, transfers.n_bytes, is_mesh=bool(peers.max() > _PAIR_PEERS)
        )
        usages.append((mover[row], resource, amount))
    first, resource, coefficient = _sparse(usages, n_bytes)
    work = np.zeros(ranks)
    for item in stage.work:
        work += np.bincount(item.rank, _work_us(item, lanes, machine), ranks)
    signal, arrivals = np.zeros(ranks), []
    for signals in stage.signals:
        count = np.bincount(signals.source, signals.count * (signals.source != signals.destination), ranks)
        if is_streamed:  # those of all pieces but the last overlap the transfers
            count = np.minimum(count, lanes)
        signal += np.ceil(count / lanes) * machine["sync.signal_us"]
        sent = signals.count > 0
        source, destination = signals.source[sent], signals.destination[sent]
        arrivals.append(Arrivals(signals.what, source, destination, topology.latency_us(source, destination) / 2))
    poll = np.zeros(ranks)
    waits = []
    for wait in stage.waits:
        named = (wait.count > 0) & (wait.peer >= 0)  # of signals of any rank, no single one is worth waiting for
        waits.append((wait.what, wait.rank[named], wait.peer[named]))
        words = np.bincount(wait.rank, wait.count, ranks)
        if is_streamed:  # as for signals
            words = np.minimum(words, lanes)
        poll += np.ceil(words / lanes) * machine["sync.poll_us"]
    return StageCost(
        stage.name, n_bytes, alone, unit, first, resource, coefficient, latency if pulls else latency / 2, pulls, work,
        signal, tuple(arrivals), poll, tuple(waits), machine["sync.lane_barrier_us"] if stage.lane_barrier else 0.0,
        stage.streamed,
    )  # fmt: skip


def _unit_us(transfers: Transfers, topology: Topology) -> Floats:
    """[n] time of one unit of each row, by the engine that moves it."""
    machine = topology.machine
    size = transfers.n_bytes / np.maximum(transfers.units, 1)
    if transfers.engine == "dma":
        return machine["dma.startup_us"] + size / (machine["dma.rate_gbps"] * 1e3)
    local = topology.tier(transfers.source, transfers.destination) == Tier.SELF
    # Rows that any lane may take have places that follow from counts; named lanes work through what lies side by side.
    lookup_us = machine["lane.lookup_us"] if transfers.lane is None else 0.0
    startup = np.where(local, machine["lane.local_startup_us"] + lookup_us, machine["lane.startup_us"])
    rate = np.where(local, machine["lane.local_rate_gbps"], machine["lane.rate_gbps"]) * 1e3
    pieces = np.maximum(np.ceil(size / machine["lane.buffer_bytes"]), 1)
    return np.asarray(pieces * startup + size / rate, np.float64)


def _alone_us(
    transfers: Transfers, mover: Ints, each_us: Floats, lanes: int, ranks: int, machine: Machine
) -> tuple[Floats, Floats]:
    """[ranks] least time of the mover's transfers, and the time of one unit."""
    total = transfers.units * each_us
    units = np.bincount(mover, transfers.units, ranks)
    busy = np.bincount(mover, total, ranks)
    mean = busy / np.maximum(units, 1)
    if transfers.engine == "dma":
        return np.asarray(busy, np.float64), np.minimum(
            mean, machine["lane.buffer_bytes"] / (machine["dma.rate_gbps"] * 1e3)
        )
    if transfers.lane is None:
        return np.asarray(np.ceil(units / lanes) * mean, np.float64), mean
    by_lane = np.zeros((ranks, lanes))
    np.add.at(by_lane, (mover, transfers.lane), total)
    return by_lane.max(axis=1), mean


def _work_us(work: Work, lanes: int, machine: Machine) -> Floats:
    """[n] time of each row of work; the units are dealt to the lanes."""
    kind = "quantise" if work.kind == "dequantise" else work.kind
    units = np.maximum(work.units, 1)
    each = work.elements / units / (machine[f"vector.{kind}_gelements"] * 1e3)
    each += work.n_bytes / units / (machine["lane.local_rate_gbps"] * 1e3)
    return np.asarray(np.ceil(work.units / lanes) * each, np.float64)


def _sparse(usages: list[tuple[Ints, Ints, Floats]], n_bytes: Floats) -> tuple[Ints, Ints, Floats]:
    """Join what the rows of each flow use, in compressed form, for each byte of the flow."""
    ranks = len(n_bytes)
    if not usages:
        return np.zeros(ranks + 1, np.int64), np.zeros(0, np.int64), np.zeros(0)
    flow, resource, amount = (np.concatenate(column) for column in zip(*usages, strict=True))
    n_resources = int(resource.max(initial=0)) + 1
    key, place = np.unique(flow * n_resources + resource, return_inverse=True)
    total = np.bincount(place, amount, len(key))
    flow, resource = np.divmod(key, n_resources)
    used = total > 0
    flow, resource, total = flow[used], resource[used], total[used]
    first = np.concatenate([[0], np.cumsum(np.bincount(flow, minlength=ranks))]).astype(np.int64)
    return first, resource.astype(np.int64), total / np.maximum(n_bytes, 1.0)[flow]
