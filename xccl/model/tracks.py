"""A modelled run in the form in which a real one is recorded, for the same export."""

from __future__ import annotations

from functools import partial

from ..protocol.stage import Description
from ..trace.record import Operation
from .simulate import Timeline


def operations(description: Description, times: Timeline, after_us: float = 0.0) -> list[Operation]:
    """One operation for each rank, with the stages of the timeline, beginning at `after_us`."""
    found = []
    for rank in range(description.ranks):
        begin_ns = _ns(after_us + times.begin_us[0, rank])
        operation = Operation(rank, description.operation, begin_ns=begin_ns)
        for k, name in enumerate(times.stages):
            operation.add_stage(name, _ns(after_us + times.begin_us[k, rank]), _ns(after_us + times.end_us[k, rank]))
        operation.finish(partial(description.entries, rank), _ns(after_us + times.end_us[-1, rank]))
        found.append(operation)
    return found


def _ns(time_us: float) -> int:
    return round(time_us * 1e3)
