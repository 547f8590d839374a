"""A deterministic discrete-event simulation of a description on a machine.

Each rank goes through the stages. In a stage it polls until the awaited signals have arrived, moves its bytes (a flow
that shares resources with all other flows of that moment, see `fairshare`) while its vector cores work, writes its
signals, and, if the stage says so, waits for its lanes. Events are the ends of flows and of fixed delays; those of the
same nanosecond are one event, and ranks are always looked at in their order, so a result is the same bits on every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..protocol.stage import Description
from .costs import StageCost, awaited_senders, cost_stages, stage_end_us
from .fairshare import max_min_rates
from .topology import Topology

Floats = npt.NDArray[np.float64]

#: Ends of flows that are nearer than this are one event.
_QUANTUM_US = 1e-3


class _Phase(IntEnum):
    WAITING = 0
    MOVING = 1
    DRAINING = 2  # a streamed stage whose bytes have moved, but whose last signals are not there yet
    DONE = 3


@dataclass(frozen=True, eq=False)
class Timeline:
    """What a simulation says.

    Attributes:
        stages: names.
        begin_us: [stages, ranks] when each rank began each stage.
        moving_us: [stages, ranks] when what it waited for was there, and it began to move bytes.
        end_us: [stages, ranks] when it ended the stage.
        limits: [stages] what limited the flows of most ranks: a kind of resource, "lanes", "vector", or "latency".
    """

    stages: tuple[str, ...]
    begin_us: Floats
    moving_us: Floats
    end_us: Floats
    limits: tuple[str, ...]

    @property
    def total_us(self) -> float:
        """When the last rank has ended the last stage."""
        return float(self.end_us[-1].max()) if len(self.stages) else 0.0

    def stage_us(self) -> dict[str, float]:
        """Time of each stage: from when the last rank began it to when the last rank ended it."""
        return {
            name: float(self.end_us[k].max() - self.begin_us[k].max()) for k, name in enumerate(self.stages)
        }  # fmt: skip


class _Signals:
    """Arrival of one kind of signal at each destination."""

    def __init__(self, ranks: int) -> None:
        self.n_first = np.zeros(ranks, np.int64)
        self.first_us = np.zeros(ranks)
        self.n_last = np.zeros(ranks, np.int64)
        self.last_us = np.zeros(ranks)

    def sent(self, destination: npt.NDArray[np.int64], arrival_us: Floats, *, is_last: bool) -> None:
        """A source has sent the first, or the last, of its signals to these destinations."""
        number, when = (self.n_last, self.last_us) if is_last else (self.n_first, self.first_us)
        number[destination] += 1
        when[destination] = np.maximum(when[destination], arrival_us)


def simulate(description: Description, topology: Topology, start_us: Floats | None = None) -> Timeline:
    """Run a description on a machine.

    Args:
        description: what happens.
        topology: the machine, with the ranks placed.
        start_us: [ranks] when each rank calls the operation; all at 0 if None.

    Raises:
        ModelError: the description has more ranks than the topology, or waits for what never comes.
    """
    if description.ranks != topology.ranks:
        raise ModelError(f"the description has {description.ranks} ranks, the placement {topology.ranks}")
    return _Simulation(cost_stages(description, topology), topology, start_us).run()


class _Simulation:
    def __init__(self, stages: list[StageCost], topology: Topology, start_us: Floats | None) -> None:
        ranks, n = topology.ranks, len(stages)
        self._stages = stages
        self._topology = topology
        self._capacity = topology.capacities()
        self._begin = np.zeros((n, ranks))
        self._moving = np.zeros((n, ranks))
        self._end = np.zeros((n, ranks))
        self._limit = [dict[str, int]() for _ in stages]
        self._stage = np.zeros(ranks, np.int64)
        self._phase = np.full(ranks, _Phase.WAITING)
        self._remaining = np.zeros(ranks)
        self._wake = np.full(ranks, np.inf)
        self._rate = np.zeros(ranks)
        self._flow_end = np.zeros(ranks)
        self._stopped_by = np.full(ranks, -1, np.int64)
        self._signals = {arrivals.what: _Signals(ranks) for stage in stages for arrivals in stage.arrivals}
        self._awaited = awaited_senders(stages, ranks)
        if n:
            self._begin[0] = 0.0 if start_us is None else start_us

    def run(self) -> Timeline:
        now = 0.0
        for rank in range(self._topology.ranks):
            self._look(rank)
        while not (self._phase == _Phase.DONE).all():
            moving = self._phase == _Phase.MOVING
            with np.errstate(divide="ignore", invalid="ignore"):
                ends = np.where(moving, now + self._remaining / self._rate, np.inf)
            ends[moving & (self._remaining <= 0)] = now
            at = min(float(ends.min()), float(self._wake.min()))
            if not np.isfinite(at):
                raise self._stuck()
            self._remaining[moving] -= self._rate[moving] * (at - now)
            now = at
            ended = np.flatnonzero(moving & (ends <= at + _QUANTUM_US))
            woken = np.flatnonzero(self._wake <= at + _QUANTUM_US)
            for rank in woken.tolist():
                self._start_moving(rank)
            for rank in ended.tolist():
                self._finish(rank, float(ends[rank]))
            self._share()
        names = tuple(stage.name for stage in self._stages)
        limits = tuple(max(sorted(found), key=lambda k: found[k]) if found else "latency" for found in self._limit)
        return Timeline(names, self._begin, self._moving, self._end, limits)

    def _look(self, rank: int) -> None:
        """If all that a rank waits for is known to arrive, set its alarm."""
        k = int(self._stage[rank])
        stage = self._stages[k]
        ready = self._begin[k, rank]
        for what, expected in self._awaited[k]:
            signals = self._signals[what]
            number, when = (signals.n_first, signals.first_us) if stage.streamed else (signals.n_last, signals.last_us)
            if number[rank] < expected[rank]:
                return
            if expected[rank]:
                ready = max(ready, when[rank])
        ready += stage.poll_us[rank]
        self._moving[k, rank] = ready
        self._wake[rank] = ready + (stage.latency_us[rank] if stage.pulls else 0.0)

    def _start_moving(self, rank: int) -> None:
        stage = self._stages[int(self._stage[rank])]
        start = float(self._wake[rank])
        self._wake[rank] = np.inf
        if stage.n_bytes[rank] > 0:
            self._phase[rank] = _Phase.MOVING
            self._remaining[rank] = stage.n_bytes[rank]
            self._rate[rank] = 0.0
            self._send_first(rank, start)
        else:
            self._finish(rank, start)

    def _send_first(self, rank: int, start: float) -> None:
        """Bytes begin to move: after a unit of them, the signals that follow piece by piece begin to go out."""
        k = int(self._stage[rank])
        after_us = start + float(self._stages[k].unit_us[rank])
        for j in range(k, len(self._stages)):
            stage = self._stages[j]
            if j > k and (not stage.streamed or stage.waits):
                break
            for arrivals in stage.arrivals:
                mine = arrivals.source == rank
                at_us = after_us + float(stage.signal_us[rank]) + arrivals.latency_us[mine]
                self._deliver(arrivals.what, arrivals.destination[mine], at_us, is_last=False)

    def _finish(self, rank: int, flow_end: float) -> None:
        """The bytes are moved: add what follows, send the signals, go on to the next stage."""
        k = int(self._stage[rank])
        stage = self._stages[k]
        if stage.streamed and any(self._signals[w].n_last[rank] < n[rank] for w, n in self._awaited[k]):
            self._phase[rank] = _Phase.DRAINING
            self._flow_end[rank] = flow_end
            return
        moving = float(self._moving[k, rank])
        last = 0.0
        if stage.streamed:
            last = max((float(self._signals[w].last_us[rank]) for w, n in self._awaited[k] if n[rank]), default=0.0)
        end = float(stage_end_us(stage, rank, moving, flow_end, last))
        self._note_limit(k, rank, is_work=moving + stage.work_us[rank] > flow_end)
        self._end[k, rank] = end
        for arrivals in stage.arrivals:
            mine = arrivals.source == rank
            to, at_us = arrivals.destination[mine], end + arrivals.latency_us[mine]
            if not self._has_sent_first(k, rank):
                self._deliver(arrivals.what, to, at_us, is_last=False)
            self._deliver(arrivals.what, to, at_us, is_last=True)
        if k + 1 < len(self._stages):
            self._stage[rank] = k + 1
            self._phase[rank] = _Phase.WAITING
            self._begin[k + 1, rank] = end
            self._look(rank)
        else:
            self._phase[rank] = _Phase.DONE

    def _has_sent_first(self, k: int, rank: int) -> bool:
        """Did the signals of this stage begin while bytes moved, in it or in the one that it follows piece by piece?"""
        while self._stages[k].n_bytes[rank] == 0 and self._stages[k].streamed and not self._stages[k].waits and k > 0:
            k -= 1
        return bool(self._stages[k].n_bytes[rank] > 0)

    def _deliver(self, what: str, to: npt.NDArray[np.int64], at_us: Floats, *, is_last: bool) -> None:
        self._signals[what].sent(to, at_us, is_last=is_last)
        for other in to.tolist():
            if not any(w == what for w, _ in self._awaited[int(self._stage[other])]):
                continue
            if self._phase[other] == _Phase.WAITING and not np.isfinite(self._wake[other]):
                self._look(other)
            elif is_last and self._phase[other] == _Phase.DRAINING:
                self._finish(other, float(self._flow_end[other]))

    def _share(self) -> None:
        """Fair rates for the flows of this moment, which may belong to different stages."""
        active = self._phase == _Phase.MOVING
        self._rate[:] = 0.0
        for_stage = self._stage[active]
        if not for_stage.size:
            return
        ranks = self._topology.ranks
        stages = np.unique(for_stage)
        if len(stages) == 1:
            stage = self._stages[int(stages[0])]
            first, resource, coefficient, cap = stage.first, stage.resource, stage.coefficient, _caps(stage)
        else:
            rows = [self._flow(rank) if active[rank] else _NOTHING for rank in range(ranks)]
            first = np.concatenate([[0], np.cumsum([len(r[0]) for r in rows])]).astype(np.int64)
            resource, coefficient = (np.concatenate([r[i] for r in rows]) for i in (0, 1))
            cap = np.zeros(ranks)
            for k in stages.tolist():
                here = active & (self._stage == k)
                cap[here] = _caps(self._stages[k])[here]
        self._rate, self._stopped_by = max_min_rates(first, resource, coefficient, self._capacity, cap, active)

    def _flow(self, rank: int) -> tuple[npt.NDArray[np.int64], Floats]:
        stage = self._stages[int(self._stage[rank])]
        own = slice(int(stage.first[rank]), int(stage.first[rank + 1]))
        return stage.resource[own], stage.coefficient[own]

    def _note_limit(self, k: int, rank: int, *, is_work: bool) -> None:
        stage = self._stages[k]
        if is_work:
            limit = "vector"
        elif stage.n_bytes[rank] == 0:
            return
        elif self._stopped_by[rank] < 0:
            limit = "lanes"
        else:
            limit = self._topology.resource_name(int(self._stopped_by[rank])).split(" of ")[0]
        self._limit[k][limit] = self._limit[k].get(limit, 0) + 1

    def _stuck(self) -> ModelError:
        rank = int(np.flatnonzero(self._phase != _Phase.DONE)[0])
        stage = self._stages[int(self._stage[rank])].name
        return ModelError(
            f"the description never ends: rank {rank} waits in stage {stage} for signals that nobody sends"
        )


_NOTHING: tuple[npt.NDArray[np.int64], Floats] = (np.zeros(0, np.int64), np.zeros(0))


def _caps(stage: StageCost) -> Floats:
    """[ranks] the most that each flow can do by its own lanes and engines, in bytes per microsecond."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(stage.alone_us > 0, stage.n_bytes / stage.alone_us, np.inf)
