"""What a collective did, as entries of its trace: read off the kernel's meter, never off its description."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..layout import collectives as layout
from ..layout.collectives import METER_KINDS
from ..trace.entry import Entry

if TYPE_CHECKING:
    from .exchange import Exchange
    from .plans import Plan

Ints = npt.NDArray[np.int64]

_MESH = ("stage", "announce", "await-records", "read")
_COUNTED = ("stage", "arrive", "await-arrivals", "release", "await-release", "read")
#: Stage, kind of entry, and payload of what the meter counts by peer: where each rank writes to each, and where
#: arrivals are counted.
_BY_PEER = {
    "record": ("announce", "signal", "record"),
    "payload": ("announce", "transfer", "payload"),
    "await": ("await-records", "wait", "record"),
    "pull": ("read", "transfer", "parts"),
    "gather": ("read", "transfer", "results"),
    "stage": ("stage", "transfer", "parts"),
    "own": ("read", "transfer", "own part"),
    "result": ("read", "transfer", "results"),
}
_BY_PEER_COUNTED = _BY_PEER | {
    "record": ("read", "transfer", "record"),
    "payload": ("arrive", "transfer", "payload"),
    "arrival": ("arrive", "signal", "arrival"),
    "release": ("release", "signal", "release"),
}


@contextmanager
def metered(exchange: Exchange, plan: Plan) -> Iterator[None]:
    """Record the call that is made inside, if operations are recorded, with what the kernel counts meanwhile."""
    core = exchange.core
    if core.trace is None:
        yield
        return
    operation = core.trace.start(plan.kind, int(exchange.state[layout.CS_STEP // 8]) + 1)
    meter = np.zeros((len(METER_KINDS), core.size, 2), np.int64)
    exchange.state[layout.CS_METER // 8] = meter.ctypes.data
    try:
        yield
    finally:
        exchange.state[layout.CS_METER // 8] = 0
    counted = bool(exchange.state[layout.CS_COUNTS // 8])
    operation.overlap(*(_COUNTED if counted else _MESH))
    operation.finish(partial(_entries, meter, core.rank, counted))


def _entries(meter: Ints, rank: int, counted: bool) -> list[Entry]:
    counts = dict(zip(METER_KINDS, meter, strict=True))
    found: list[Entry] = []
    for kind, (stage, entry, what) in (_BY_PEER_COUNTED if counted else _BY_PEER).items():
        if counted and kind == "await":
            continue
        for peer in np.flatnonzero(counts[kind][:, 0]).tolist():
            units, n_bytes = counts[kind][peer].tolist()
            found.append(Entry(stage, entry, what, peer, -1, units, n_bytes))
    if counted:
        units = int(counts["await"][0, 0])
        if rank == 0:
            found.append(Entry("await-arrivals", "wait", "arrival", -1, -1, units, 0))
        else:
            found.append(Entry("await-release", "wait", "release", 0, -1, units, 0))
    units, n_bytes = counts["unpack"].sum(axis=0).tolist()
    if units:
        found.append(Entry("read", "transfer", "payload", rank, -1, units, n_bytes))
    units, n_bytes = counts["fold"][rank].tolist()
    if units:
        # The own operand is read, and the result written.
        found.append(Entry("read", "work", "reduce", rank, -1, units, 2 * n_bytes))
    return found
