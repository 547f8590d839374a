"""What an A2E or an E2A did at one die, as entries of its trace; see `xccl.comm.traced`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..layout import moe as moe_layout
from ..layout.moe import EXPERT_FIELD_BYTES
from ..trace.entry import Entry
from .traced import signals, waits

if TYPE_CHECKING:
    from .a2e_experts import BatchRouting
    from .deployment import Deployment
    from .dispatched import Routing
    from .fields import Peers

_NO_LANE = -1
_FIRST_BYTES = 4
_PLACE_BYTES = 8
_FLOAT32_BYTES = 4


def sent(shape: Deployment, routing: Routing, rank: int, peers: Peers) -> list[Entry]:
    """A2E at an attention die."""
    rows = int(routing.part(moe_layout.RT_SENT_FIRST, shape.num_experts + 1)[-1])
    found = _moved("write", rank, "firsts", 1, _FIRST_BYTES * (shape.num_experts + 1))
    found += _rows(shape, "write", rank, rows, rows, min(rows, 1))
    if shape.is_int8:
        row_of = routing.part(moe_layout.RT_ROW_OF, routing.tokens * shape.slots).reshape(routing.tokens, shape.slots)
        tokens = int(np.count_nonzero((row_of >= 0).any(axis=1)))
        if tokens:
            read_bytes = tokens * shape.return_bytes
            found.append(Entry("write", "work", "quantise", rank, _NO_LANE, tokens, read_bytes))
    return [*found, *waits("await-pulled", "pulled", peers.others), *_fields("announce", "field", peers.others)]


def received(
    shape: Deployment,
    routing: BatchRouting,
    rank: int,
    holders: Peers,
    served: Peers | None,
    expert_dies: Peers | None,
) -> list[Entry]:
    """A2E at an expert die; the last two are None if it is no trampoline."""
    found: list[Entry] = []
    if served is not None and expert_dies is not None:
        found += waits("forward-await-pulled", "forward-pulled", expert_dies.others)
        found += waits("await-fields", "field", served.ranks)
        for peer, rows in zip(served.ranks, (routing.tables[:, -1] - routing.tables[:, 0]).tolist(), strict=True):
            found += _moved("pull", peer, "firsts", 1, _FIRST_BYTES * (shape.num_experts + 1))
            found += _rows(shape, "pull", peer, min(rows, 1), rows, min(rows, 1))
        found += signals("release", "pulled", served.ranks)
        found += _fields("forward-announce", "forward-field", expert_dies.others)
    prefix = "forward-" if shape.trampolines else ""
    found += waits(f"{prefix}await-fields", f"{prefix}field", holders.others)
    counts = routing.counts(shape.domain_size)
    for h, peer in enumerate(holders.ranks):
        mine = counts[h :: len(holders)]
        rows, runs = int(mine.sum()), int(np.count_nonzero(mine))
        table_bytes = _FIRST_BYTES * (shape.local_experts + 1)
        found += _moved(f"{prefix}pull", peer, "firsts", len(mine), len(mine) * table_bytes)
        found += _rows(shape, f"{prefix}pull", peer, runs, rows, runs)
    return found + signals(f"{prefix}release", f"{prefix}pulled", holders.others)


def returned(
    shape: Deployment,
    routing: BatchRouting,
    rank: int,
    holders: Peers,
    returned_to: Peers,
    served: Peers | None,
    handed_to: Peers | None,
    expert_dies: Peers | None,
) -> list[Entry]:
    """E2A at an expert die; the last three are None if it is no trampoline."""
    rows = int(routing.counts(shape.domain_size).sum())
    found = waits("await-pulled", "pulled", returned_to.others)
    found += _moved("write", rank, "rows", rows, rows * shape.return_bytes)
    found += _fields("announce", "field", holders.others)
    if served is not None and handed_to is not None and expert_dies is not None:
        found += waits("forward-await-pulled", "forward-pulled", handed_to.ranks)
        found += waits("await-fields", "field", expert_dies.others)
        by_die = np.diff(routing.tables[:, :: shape.local_experts], axis=1)
        for peer, blocks in zip(expert_dies.ranks, by_die.T, strict=True):
            n_bytes = int(blocks.sum()) * shape.return_bytes
            found += _moved("pull", peer, "rows", int(np.count_nonzero(blocks)), n_bytes)
        found += signals("release", "pulled", expert_dies.others)
        found += _fields("forward-announce", "forward-field", served.ranks)
    return found


def summed(shape: Deployment, routing: Routing, rank: int, peers: Peers) -> list[Entry]:
    """E2A at an attention die."""
    prefix = "forward-" if shape.trampolines else ""
    first = routing.part(moe_layout.RT_SENT_FIRST, shape.num_experts + 1)
    found = waits(f"{prefix}await-fields", f"{prefix}field", peers.others)
    for peer, rows in zip(peers.ranks, np.diff(first[:: shape.num_experts // len(peers)]).tolist(), strict=True):
        found += _moved(f"{prefix}pull", peer, "rows", min(rows, 1), rows * shape.return_bytes)
    found += signals(f"{prefix}release", f"{prefix}pulled", peers.others)
    if routing.tokens:
        n_bytes = (int(first[-1]) + routing.tokens) * shape.return_bytes + int(first[-1]) * _FLOAT32_BYTES
        found.append(Entry(f"{prefix}pull", "work", "reduce", rank, _NO_LANE, routing.tokens, n_bytes))
    return found


def _rows(shape: Deployment, stage: str, peer: int, units: int, rows: int, runs: int) -> list[Entry]:
    """Rows in so many pieces, and what belongs to them in so many runs."""
    found = _moved(stage, peer, "rows", units, rows * shape.row_bytes)
    found += _moved(stage, peer, "places", runs, rows * _PLACE_BYTES)
    return found + (_moved(stage, peer, "scales", runs, rows * _FLOAT32_BYTES) if shape.is_int8 else [])


def _moved(stage: str, peer: int, what: str, units: int, n_bytes: int) -> list[Entry]:
    return [Entry(stage, "transfer", what, peer, _NO_LANE, units, n_bytes)] if units else []


def _fields(stage: str, what: str, peers: Iterable[int]) -> list[Entry]:
    return signals(stage, what, peers, EXPERT_FIELD_BYTES)
