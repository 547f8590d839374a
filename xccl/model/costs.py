"""What the stages of a description cost each rank by itself, and what they ask of shared resources.

Equations, for a rank and a stage (parameters in the profile's names):

    time of a unit   u = startup + bytes / rate, in pieces of at most lane.buffer_bytes; lane.local_* within a die, and
                     lane.header where a unit's place stands in the unit itself
    lanes            T_lane = ceil(units / lanes) * mean u; with named lanes, the sum of the busiest
    DMA engines      T_dma = dma.startup * max(1, units / dma.outstanding) + bytes / dma.rate
    transfers        a flow of all bytes, at most bytes / (T_lane + T_dma) fast; all share ports, chips, uplinks, HBM
    vector work      T_work = ceil(units / lanes) * (elements * instructions / vector.rate + bytes / rate) of a unit,
                     at lane.fused_local_rate, overlapping the transfers if vector.overlaps; a sum is cut across the
                     lanes, whatever its units; a scan is scalar: elements / vector.scan
    signals          T_signal = sync.post + (ceil(signals / lanes) - 1) * sync.signal, and a round trip if a value is
                     fetched; when streamed, those of the last pieces only
    waits            T_poll = ceil(words / lanes) * sync.poll
    lane barrier     sync.lane_barrier, after what the lanes wrote has arrived
    calls            kernel.launch before the first stage; kernel.stage before each, and kernel.record if it moves more
                     than one kind of payload

Rates of lanes: lane.rate for what is pushed, lane.pull_rate for what is pulled, lane.fused_rate for what is summed as
it comes; local ones within a rank, and lane.local_repeat_rate for rows that go to several places. Each may be a curve
over the bytes that the rank moves in the stage. What a profile leaves out is the same as another figure, or nothing
(see `machine`).

Reading and writing a unit overlap through the ping-pong pair of unified buffers, so a unit costs the slower of the two
once. The first signal of a lane is posted behind its data; each further one, to another peer, waits until the one
before has left the unified buffer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..protocol.stage import Description, Signals, Stage, Transfers, Work
from .machine import Machine
from .topology import Tier, Topology

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: Vector instructions for each element of one operand. reduce: widen, multiply, add. quantise: widen, absolute value,
#: maximum, scale, three conversions (there is none from float32 to int8). dequantise: two conversions, scale, narrow.
_INSTRUCTIONS = {"reduce": 3, "quantise": 7, "dequantise": 4}

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
        work_unit_us: [ranks] that of the first unit, which no transfer overlaps.
        signal_us: [ranks] issuing the signals.
        arrivals: what the signals set off.
        poll_us: [ranks] looking at the awaited words.
        waits: what is awaited, and [ranks] of how many senders.
        barrier_us: of the lanes.
        streamed: see `Stage`.
        overlaps: vector work and transfers go on at the same time.
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
    work_unit_us: Floats
    signal_us: Floats
    arrivals: tuple[Arrivals, ...]
    poll_us: Floats
    waits: tuple[tuple[str, Ints], ...]
    barrier_us: float
    streamed: bool
    overlaps: bool


def cost_stages(description: Description, topology: Topology) -> list[StageCost]:
    """Every stage of a description, costed on a machine."""
    is_streamed = any(stage.streamed for stage in description.stages)
    machine = topology.machine
    lanes = min(description.lanes, int(machine["lane.count"]))
    each = {s.what: int(s.count.max(initial=1)) for stage in description.stages for s in stage.signals}
    stages = [_cost_stage(stage, lanes, topology, is_streamed, each) for stage in description.stages]
    if not stages:
        return []
    calls_us = _calls_us(description, np.max([cost.n_bytes for cost in stages], axis=0), machine)
    return [replace(cost, poll_us=cost.poll_us + us) for cost, us in zip(stages, calls_us, strict=True)]


def _calls_us(description: Description, moved_bytes: Floats, machine: Machine) -> list[Floats]:
    """By stage: [ranks] what its call costs.

    The launch comes before everything. Where stages are calls of their own, each has a launch more, and one that moves
    more than one kind of payload keeps a record of what goes where. `moved_bytes`, [ranks], is the working set.
    """
    stage_us, record_us = machine.at("kernel.stage_us", moved_bytes), machine.at("kernel.record_us", moved_bytes)
    calls_us = [stage_us + record_us * (len(stage.transfers) > 1) for stage in description.stages]
    calls_us[0] = calls_us[0] + machine.at("kernel.launch_us", moved_bytes)
    return calls_us


def stage_end_us(
    stage: StageCost, at: int | slice, moving_us: float | Floats, flow_end_us: float | Floats, last_us: float | Floats
) -> Floats:
    """When ranks end a stage.

    Args:
        stage: the stage.
        at: a rank, or those of all arrays.
        moving_us: when what it waits for was there.
        flow_end_us: when its bytes have moved.
        last_us: when the last signal is there that a streamed stage works along with; 0 if there is none.
    """
    if stage.overlaps:
        # Work and transfers are a pipeline of two steps: of the shorter one, a unit sticks out.
        end = flow_end_us + stage.work_unit_us[at]
        end = np.where(stage.work_us[at] > 0, np.maximum(end, moving_us + stage.work_us[at] + stage.unit_us[at]), end)
    else:
        end = flow_end_us + stage.work_us[at]
    if stage.streamed:
        end = np.maximum(end, last_us + np.where(np.asarray(last_us) > 0, stage.unit_us[at], 0.0))
    if stage.barrier_us:
        end = end + stage.barrier_us + (0.0 if stage.pulls else stage.latency_us[at])
    return np.asarray(end + stage.signal_us[at], np.float64)


def awaited_senders(stages: list[StageCost], ranks: int) -> list[list[tuple[str, Ints]]]:
    """By stage: what it awaits of this operation (an earlier one has sent the rest), and [ranks] from how many."""
    sent: set[str] = set()
    found = []
    for stage in stages:
        found.append([(what, senders) for what, senders in stage.waits if what in sent])
        sent |= {arrivals.what for arrivals in stage.arrivals}
    return found


def _cost_stage(stage: Stage, lanes: int, topology: Topology, is_streamed: bool, each: dict[str, int]) -> StageCost:
    machine, ranks = topology.machine, topology.ranks
    n_bytes = np.zeros(ranks)
    alone, unit, latency = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
    usages = []
    pulls = False
    for transfers in stage.transfers:
        mover = transfers.source if transfers.mover == "source" else transfers.destination
        n_bytes += np.bincount(mover, transfers.n_bytes, ranks)
        each_us = _unit_us(transfers, mover, topology)
        alone_us, unit_us = _alone_us(transfers, mover, each_us, lanes, ranks, machine)
        alone, unit = alone + alone_us, np.maximum(unit, unit_us)
        moving = transfers.units > 0
        away = topology.latency_us(transfers.source, transfers.destination) * moving
        pulls |= transfers.mover == "destination" and bool(away.any())
        np.maximum.at(latency, mover, away)
        going = moving & (transfers.source != transfers.destination)
        is_pair = np.zeros((ranks, ranks), bool)
        is_pair[transfers.source[going], transfers.destination[going]] = True
        peers = is_pair.sum(axis=1 if transfers.mover == "source" else 0)
        row, resource, amount = topology.usage(
            transfers.source, transfers.destination, transfers.n_bytes, is_mesh=bool(peers.max() > _PAIR_PEERS)
        )
        usages.append((mover[row], resource, amount))
    first, resource, coefficient = _sparse(usages, n_bytes)
    work, work_unit = np.zeros(ranks), np.zeros(ranks)
    is_fused = any(not transfers.is_stored for transfers in stage.transfers)
    for item in stage.work:
        if is_fused and item.kind == "reduce" and not machine["vector.sums_apart"]:
            continue  # the rate of the transfers is that of summing them
        work_us, work_unit_us = _work_us(item, n_bytes[item.rank], lanes, machine)
        work += np.bincount(item.rank, work_us, ranks)
        work_unit += np.bincount(item.rank, work_unit_us, ranks)
    signal, arrivals = np.zeros(ranks), []
    for signals in stage.signals:
        signal += _signal_us(signals, lanes, topology, is_streamed)
        sent = signals.count > 0
        source, destination = signals.source[sent], signals.destination[sent]
        arrivals.append(Arrivals(signals.what, source, destination, topology.latency_us(source, destination) / 2))
    poll = np.zeros(ranks)
    waits = []
    for wait in stage.waits:
        # Of each peer named, all its signals; of any peer, as many senders as send so many: each sends `each` of them.
        senders = np.where(wait.peer >= 0, wait.count > 0, -(-wait.count // max(each.get(wait.what, 1), 1)))
        waits.append((wait.what, np.bincount(wait.rank, senders, ranks).astype(np.int64)))
        words = np.bincount(wait.rank, wait.count, ranks)
        if is_streamed:  # as for signals
            words = np.minimum(words, lanes)
        poll += np.ceil(words / lanes) * machine["sync.poll_us"]
    barrier_us = machine["sync.lane_barrier_us"] if stage.lane_barrier else 0.0
    return StageCost(
        stage.name, n_bytes, alone, unit, first, resource, coefficient, latency if pulls else latency / 2, pulls, work,
        work_unit, signal, tuple(arrivals), poll, tuple(waits), barrier_us, stage.streamed,
        machine["vector.overlaps"] > 0,
    )  # fmt: skip


def _signal_us(signals: Signals, lanes: int, topology: Topology, is_streamed: bool) -> Floats:
    """[ranks] issuing the signals."""
    machine, ranks = topology.machine, topology.ranks
    away = signals.count * (signals.source != signals.destination)
    count = np.bincount(signals.source, away, ranks)
    if is_streamed:  # those of all pieces but the last overlap the transfers
        count = np.minimum(count, lanes)
    rounds = np.ceil(count / lanes)
    issue = np.where(count > 0, machine["sync.post_us"] + (rounds - 1) * machine["sync.signal_us"], 0.0)
    if signals.fetches:
        trip = np.zeros(ranks)
        np.maximum.at(trip, signals.source, topology.latency_us(signals.source, signals.destination) * (away > 0))
        issue += trip
    return np.asarray(issue, np.float64)


def _unit_us(transfers: Transfers, mover: Ints, topology: Topology) -> Floats:
    """[n] time of one unit of each row, by the engine that moves it."""
    machine = topology.machine
    size = transfers.n_bytes / np.maximum(transfers.units, 1)
    if transfers.engine == "dma":
        return machine["dma.startup_us"] + size / (machine["dma.rate_gbps"] * 1e3)
    local = topology.tier(transfers.source, transfers.destination) == Tier.SELF
    startup = np.where(local, machine["lane.local_startup_us"], machine["lane.startup_us"])
    if transfers.has_header:
        startup = startup + machine["lane.header_us"]
    working_set = np.bincount(mover, transfers.n_bytes, topology.ranks)[mover]
    rate = np.where(local, *(machine.at(name, working_set) for name in _rates(transfers))) * 1e3
    pieces = np.maximum(np.ceil(size / machine["lane.buffer_bytes"]), 1)
    return np.asarray(pieces * startup + size / rate, np.float64)


def _rates(transfers: Transfers) -> tuple[str, str]:
    """Names of the rates within the mover's own memory, and to or from another's."""
    if not transfers.is_stored:
        return "lane.fused_local_rate_gbps", "lane.fused_rate_gbps"
    if transfers.is_repeated:
        return "lane.local_repeat_rate_gbps", "lane.rate_gbps"
    if transfers.mover == "source":
        return "lane.local_rate_gbps", "lane.rate_gbps"
    return "lane.local_pull_rate_gbps", "lane.pull_rate_gbps"


def _alone_us(
    transfers: Transfers, mover: Ints, each_us: Floats, lanes: int, ranks: int, machine: Machine
) -> tuple[Floats, Floats]:
    """[ranks] least time of the mover's transfers, and the time of one unit."""
    total = transfers.units * each_us
    units = np.bincount(mover, transfers.units, ranks)
    busy = np.bincount(mover, total, ranks)
    mean = busy / np.maximum(units, 1)
    if transfers.engine == "dma":
        n_bytes = np.bincount(mover, transfers.n_bytes, ranks)
        queued = np.where(units > 0, np.maximum(units / machine["dma.outstanding"], 1), 0)
        piece_us = machine["lane.buffer_bytes"] / (machine["dma.rate_gbps"] * 1e3)
        alone = queued * machine["dma.startup_us"] + n_bytes / (machine["dma.rate_gbps"] * 1e3)
        return np.asarray(alone, np.float64), np.minimum(mean, piece_us)
    if transfers.lane is None:
        return np.asarray(np.ceil(units / lanes) * mean, np.float64), mean
    by_lane = np.zeros((ranks, lanes))
    np.add.at(by_lane, (mover, transfers.lane), total)
    return by_lane.max(axis=1), mean


def _work_us(work: Work, moved_bytes: Floats, lanes: int, machine: Machine) -> tuple[Floats, Floats]:
    """[n] time of each row of work, and of its first unit.

    The units are dealt to the lanes; sums are cut across all of them. A scan is over before its results are of use.
    `moved_bytes`, [n], is what the transfers of the stage move: its working set.
    """
    copied = work.n_bytes / (machine.at("lane.fused_local_rate_gbps", np.maximum(moved_bytes, work.n_bytes)) * 1e3)
    units = np.maximum(work.units, 1)
    if work.kind == "scan":
        total = copied + work.elements / (machine["vector.scan_gelements"] * 1e3)
        return total, total
    total = copied + work.elements * _INSTRUCTIONS[work.kind] / (machine["vector.rate_gelements"] * 1e3)
    if work.kind == "reduce":
        return total / lanes, total / lanes / units
    return np.ceil(work.units / lanes) * total / units, total / units


def _sparse(usages: list[tuple[Ints, Ints, Floats]], n_bytes: Floats) -> tuple[Ints, Ints, Floats]:
    """Join what the rows of each flow use, in compressed form, for each byte of the flow."""
    ranks = len(n_bytes)
    if not usages:
        return np.zeros(ranks + 1, np.int64), np.zeros(0, np.int64), np.zeros(0)
    flow, resource, amount = (np.concatenate(column) for column in zip(*usages, strict=True))
    n_resources = int(resource.max(initial=0)) + 1
    # A table of all flows and resources is full of zeros, but much faster to fill than it is to sort what is used.
    total = np.bincount(flow * n_resources + resource, amount)
    key = np.flatnonzero(total > 0)
    flow, resource = np.divmod(key, n_resources)
    first = np.concatenate([[0], np.cumsum(np.bincount(flow, minlength=ranks))]).astype(np.int64)
    return first, resource.astype(np.int64), total[key] / np.maximum(n_bytes, 1.0)[flow]
