"""The fast path: a description's times without a simulation, for regular cases.

All flows of a stage are taken to move together from its beginning to its end. Then none of them is faster than its
lanes and engines, nor than the fullest resource that it uses: a resource needs load / capacity for what all flows of
the stage put on it. Where ranks do the same work at the same time (evenly loaded experts, no stragglers) that is what
max-min fair sharing comes to, and the result is within 3% of `simulate` (tests/unit/test_model_analytic.py). Elsewhere
it may be off either way: ranks that are ahead do leave room to the others, and those behind do need it later.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..protocol.stage import Description
from .costs import StageCost, awaited_senders, cost_stages, stage_end_us
from .simulate import Timeline
from .topology import Topology

Floats = npt.NDArray[np.float64]

#: A case is regular if no flow of a stage needs this many times as long as another one.
_REGULAR = 1.1


def estimate(description: Description, topology: Topology, start_us: Floats | None = None) -> Timeline:
    """Times of a description on a machine, by formula; arguments and result as for `simulate`.

    Raises:
        ModelError: the description has more ranks than the topology.
    """
    ranks = topology.ranks
    if description.ranks != ranks:
        raise ModelError(f"the description has {description.ranks} ranks, the placement {ranks}")
    stages = cost_stages(description, topology)
    n = len(stages)
    begin, moving, end = (np.zeros((n, ranks)) for _ in range(3))
    awaited = awaited_senders(stages, ranks)
    first: dict[str, Floats] = {}
    last: dict[str, Floats] = {}
    first_us = np.zeros(ranks)
    limits = []
    for k, stage in enumerate(stages):
        begin[k] = end[k - 1] if k else (0.0 if start_us is None else start_us)
        ready = begin[k].copy()
        last_us = np.zeros(ranks)
        for what, senders in awaited[k]:
            arrival = first[what] if stage.streamed else last[what]
            ready = np.where(senders > 0, np.maximum(ready, arrival), ready)
            last_us = np.where(senders > 0, np.maximum(last_us, last[what]), last_us)
        moving[k] = ready + stage.poll_us
        go = moving[k] + (stage.latency_us if stage.pulls else 0.0)
        flow_us, limit = _flow_us(stage, topology)
        limits.append(limit)
        end[k] = stage_end_us(stage, slice(None), moving[k], go + flow_us, last_us)
        # The first signals of pieces go out a unit after the first byte; so do those of a stage that follows pieces.
        if not (stage.streamed and not stage.waits and not stage.n_bytes.any()):
            first_us = np.where(stage.n_bytes > 0, go + stage.unit_us, end[k])
        for arrivals in stage.arrivals:
            begun = np.where(first_us < end[k], first_us + stage.signal_us, end[k])
            for found, when in ((first, begun), (last, end[k])):
                times = found.setdefault(arrivals.what, np.zeros(ranks))
                np.maximum.at(times, arrivals.destination, when[arrivals.source] + arrivals.latency_us)
    names = tuple(stage.name for stage in stages)
    return Timeline(names, begin, moving, end, tuple(limits))


def is_regular(description: Description, topology: Topology) -> bool:
    """Does the fast path apply: do all flows of each stage take about as long?"""
    for stage in cost_stages(description, topology):
        flow_us, _ = _flow_us(stage, topology)
        busy = flow_us[stage.n_bytes > 0]
        if busy.size and busy.max() > _REGULAR * busy.min():
            return False
    return True


def _flow_us(stage: StageCost, topology: Topology) -> tuple[Floats, str]:
    """[ranks] time of each rank's flow, and what limits most of them."""
    capacity = topology.capacities()
    flow = np.repeat(np.arange(topology.ranks), np.diff(stage.first))
    load = np.bincount(stage.resource, stage.coefficient * stage.n_bytes[flow], len(capacity))
    needs_us = load / capacity
    shared_us = np.zeros(topology.ranks)
    np.maximum.at(shared_us, flow, needs_us[stage.resource])
    busy = stage.n_bytes > 0
    if not busy.any():
        return shared_us, "vector" if stage.work_us.any() else "latency"
    flow_us = np.where(busy, np.maximum(stage.alone_us, shared_us), 0.0)
    slowest = int(flow_us.argmax())
    if stage.work_us[slowest] > flow_us[slowest]:
        return flow_us, "vector"
    if stage.alone_us[slowest] >= shared_us[slowest]:
        return flow_us, "lanes"
    own = stage.resource[stage.first[slowest] : stage.first[slowest + 1]]
    return flow_us, topology.resource_name(int(own[needs_us[own].argmax()])).split(" of ")[0]
