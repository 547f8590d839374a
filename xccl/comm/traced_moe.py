"""What a dispatch or a combine did, as entries of its trace, read off its routing; see `xccl.comm.traced`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ..layout import moe as layout
from ..layout.moe import ENTRY_BYTES, EXPERT_FIELD_BYTES, INDEX_DTYPE, SOURCE_DTYPE
from ..layout.moe_direct import DIRECT_FIELD_PART_BYTES
from ..layout.moe_push import PACKET_ENTRY_BYTES
from ..layout.ring import FIELD_BYTES
from ..trace.entry import Entry
from .dispatched import Routing
from .moe_shape import MoeShape
from .traced import signals, waits

Ints = npt.NDArray[np.int64]

_NO_LANE = -1
_INT32_BYTES = 4
_FLOAT32_BYTES = 4
_WORD_BYTES = 8
_PLACE_BYTES = 2 * _INT32_BYTES


# -- pull -------------------------------------------------------------------------------------------------------------


def pull_dispatched(shape: MoeShape, routing: Routing) -> list[Entry]:
    """A dispatch: what was written for peers, and what came from each of them."""
    rank, is_new, sent = shape.rank, routing.known is None, routing.sent
    entries_sent = int(routing.part(layout.RT_SENT_FIRST, shape.num_experts + 1)[-1])
    written = sent if shape.is_int8 else sent - int(_sent(shape, routing)[rank])
    found = [
        *_quantised("write", shape, routing),
        *_moved("write", rank, "rows", written, written * shape.row_bytes),
    ]
    if shape.is_int8:
        found += _moved("write", rank, "scales", min(sent, 1), sent * _FLOAT32_BYTES)
    # Deduplicated, a rank's first entry goes with the counts.
    firsts_bytes = _INT32_BYTES if shape.is_dedup else 0
    if is_new:
        found += _moved("write", rank, "counts", 1, _INT32_BYTES * shape.num_experts + firsts_bytes * shape.ranks)
        found += _places(shape, "write", rank, min(entries_sent, 1), entries_sent)
    rows, runs = _received(shape, routing)
    entries = routing.part(layout.RT_ENTRY_COUNTS, shape.ranks * shape.local_experts).reshape(shape.ranks, -1)
    for peer in range(shape.ranks):
        n, pieces, m = int(rows[peer]), int(runs[peer]), int(entries[peer].sum())
        found += _moved("pull", peer, "rows", n, n * shape.row_bytes)
        if shape.is_int8:
            found += _moved("pull", peer, "scales", pieces, n * _FLOAT32_BYTES)
        if is_new:
            found += _moved("pull", peer, "counts", 1, _INT32_BYTES * shape.local_experts + firsts_bytes)
            found += _places(shape, "pull", peer, min(m, 1) if shape.is_dedup else pieces, m)
    return found + _handshake(shape.ranks)


def pull_combined(
    shape: MoeShape, routing: Routing, has_shared: bool, *, in_place: bool, with_starts: list[int]
) -> list[Entry]:
    """A combine: what came is returned, unless it lies where peers read it, and what was sent is pulled back.

    Args:
        shape: of the ExpertParallel object.
        routing: of the dispatch.
        has_shared: was an output of a shared expert added?
        in_place: was nothing copied at this rank?
        with_starts: the peers that have told where runs of rows start.
    """
    ranks, rows, sent = shape.ranks, routing.rows, _sent(shape, routing)
    if not in_place:
        found = _moved("write", shape.rank, "rows", rows, rows * shape.return_bytes)
    else:
        starts = 0 if shape.is_dedup else shape.local_experts * ranks
        found = _moved("write", shape.rank, "starts", min(starts, 1), starts * _WORD_BYTES)
    for peer, n in enumerate(sent.tolist()):
        found += _moved("pull", peer, "rows", n, n * shape.return_bytes)
        if n and peer in with_starts:
            first, end = (layout.first_expert(r, shape.num_experts, ranks) for r in (peer, peer + 1))
            found += _moved("pull", peer, "starts", 1, (end - first) * _WORD_BYTES)
    # Rows come in by the transfers of this stage; an output of a shared expert is read besides.
    n_bytes = routing.tokens * shape.return_bytes * (1 + has_shared)
    n_bytes += 0 if shape.is_dedup else int(sent.sum()) * _FLOAT32_BYTES
    found += _worked("pull", shape, "reduce", routing.tokens, n_bytes)
    if in_place:
        found += waits("await-read", "pulled", range(ranks))
    return found + _handshake(ranks)


def _places(shape: MoeShape, stage: str, peer: int, units: int, entries: int) -> list[Entry]:
    what, size_bytes = ("entries", ENTRY_BYTES) if shape.is_dedup else ("places", _PLACE_BYTES)
    return _moved(stage, peer, what, units, entries * size_bytes)


def _handshake(ranks: int) -> list[Entry]:
    """Fields and `pulled`, of and for every rank, the own one too."""
    peers = range(ranks)
    return [
        *waits("await-pulled", "pulled", peers),
        *signals("announce", "field", peers, EXPERT_FIELD_BYTES),
        *waits("await-fields", "field", peers),
        *signals("release", "pulled", peers),
    ]


# -- push -------------------------------------------------------------------------------------------------------------


def push_dispatched(
    shape: MoeShape, routing: Routing, *, in_turn: bool, packet_bytes: int, header_bytes: int, counts_bytes: int
) -> list[Entry]:
    """A dispatch: packets to each peer, and what was assembled of those that came."""
    rank, is_new, peers = shape.rank, routing.known is None, range(shape.ranks)
    found = [] if in_turn else _meeting(peers)
    found += _quantised("send", shape, routing)
    for peer, n in enumerate(_sent(shape, routing).tolist()):
        if peer == rank and not shape.is_int8:
            found += _moved("send", peer, "headers", n, n * header_bytes)
        else:
            found += _moved("send", peer, "packets", n, n * packet_bytes)
    if is_new:
        found += signals("notify", "counts", peers, counts_bytes)
    found += signals("notify", "flag", peers, FIELD_BYTES)
    found += waits("await-flags", "flag", peers)
    rows, entries = routing.rows, routing.entries
    found += _moved("assemble", rank, "rows", rows, rows * shape.row_bytes)
    if shape.is_int8:
        found += _moved("assemble", rank, "scales", min(rows, 1), rows * _FLOAT32_BYTES)
    if is_new:
        counts_bytes = _INT32_BYTES * shape.local_experts
        found += _moved("assemble", rank, "counts", 1, counts_bytes)
        found += _moved("assemble", rank, "places", min(rows, 1), rows * _PLACE_BYTES)
        if shape.is_dedup:
            found += _moved("assemble", rank, "entries", min(entries, 1), entries * PACKET_ENTRY_BYTES)
        found += _worked("assemble", shape, "scan", 1, shape.ranks * counts_bytes)
    return found


def push_combined(
    shape: MoeShape, routing: Routing, has_shared: bool, *, in_turn: bool, are_kept: bool, packet_bytes: int
) -> list[Entry]:
    """A combine: a packet and a flag for each row that had come, and the sum of those that came back.

    Of the own rows there are neither, if they were kept.
    """
    kept = shape.rank if are_kept else -1
    found = [] if in_turn else _meeting(range(shape.ranks))
    for peer, n in enumerate(_received(shape, routing)[0].tolist()):
        if n and peer != kept:
            found += _moved("send", peer, "packets", n, n * packet_bytes)
            found.append(Entry("flag", "signal", "flag", peer, _NO_LANE, n, n * _WORD_BYTES))
    sent = _sent(shape, routing)
    for peer, n in enumerate(sent.tolist()):
        if n and peer != kept:
            found.append(Entry("await-flags", "wait", "flag", peer, _NO_LANE, n, 0))
    summed = int(sent.sum())
    n_bytes = (summed + routing.tokens * (1 + has_shared)) * shape.return_bytes
    n_bytes += 0 if shape.is_dedup else summed * _FLOAT32_BYTES
    return found + _worked("reduce", shape, "reduce", routing.tokens, n_bytes)


def _meeting(peers: Iterable[int]) -> list[Entry]:
    """The round before an operation that comes out of turn."""
    return [*signals("release", "taken", peers), *waits("await-taken", "taken", peers)]


# -- direct -----------------------------------------------------------------------------------------------------------


def direct_dispatched(shape: MoeShape, routing: Routing) -> list[Entry]:
    """A dispatch: what was counted, and what was written at each peer."""
    rank, is_new, peers = shape.rank, routing.known is None, range(shape.ranks)
    counts_bytes = _INT32_BYTES * (shape.num_experts + (shape.ranks if shape.is_dedup else 0))
    found = signals("announce", "field", peers, DIRECT_FIELD_PART_BYTES)
    found += waits("await-counts", "field", peers)
    if is_new:
        found += _moved("count", rank, "counts", 1, counts_bytes)
        for peer in peers:
            found += _moved("plan", peer, "counts", 1, counts_bytes)
        found += _worked("plan", shape, "scan", 1, 0)
    found += _quantised("write", shape, routing)
    entries_sent = routing.part(layout.RT_SENT_FIRST, shape.num_experts + 1)
    for peer, n in enumerate(_sent(shape, routing).tolist()):
        found += _moved("write", peer, "rows", n, n * shape.row_bytes)
        if shape.is_int8:
            found += _moved("write", peer, "scales", n, n * _FLOAT32_BYTES)
        if is_new:
            found += _moved("write", peer, "sources", n, n * SOURCE_DTYPE.itemsize)
            if shape.is_dedup:
                first, end = (layout.first_expert(r, shape.num_experts, shape.ranks) for r in (peer, peer + 1))
                m = int(entries_sent[end] - entries_sent[first])
                found += _moved("write", peer, "entries", m, m * (INDEX_DTYPE.itemsize + _FLOAT32_BYTES))
    return found + signals("notify", "written", peers) + waits("await-rows", "written", peers)


def direct_combined(shape: MoeShape, routing: Routing, has_shared: bool, *, copied: bool) -> list[Entry]:
    """A combine: what came is copied unless it lies where peers read it, and what was sent is summed where it lies."""
    sent, peers = _sent(shape, routing), range(shape.ranks)
    rows = routing.rows if copied else 0
    found = _moved("return", shape.rank, "rows", rows, rows * shape.return_bytes)
    found += signals("announce", "field", peers, DIRECT_FIELD_PART_BYTES)
    found += waits("await-ready", "field", peers)
    for peer, n in enumerate(sent.tolist()):
        found += _moved("reduce", peer, "rows", n, n * shape.return_bytes)
    n_bytes = routing.tokens * shape.return_bytes * (1 + has_shared)
    n_bytes += 0 if shape.is_dedup else int(sent.sum()) * _FLOAT32_BYTES
    found += _worked("reduce", shape, "reduce", routing.tokens, n_bytes)
    return found + signals("release", "read", peers) + waits("await-read", "read", peers)


# -- all -------------------------------------------------------------------------------------------------------------


def _sent(shape: MoeShape, routing: Routing) -> Ints:
    """[ranks] rows that went to each rank."""
    return np.diff(routing.part(layout.RT_SENT_ROWS, shape.ranks + 1))


def _received(shape: MoeShape, routing: Routing) -> tuple[Ints, Ints]:
    """[ranks] rows that came from each rank, and in how many runs."""
    got = routing.part(layout.RT_GOT_COUNTS, shape.ranks * routing.groups).reshape(shape.ranks, -1)
    return got.sum(axis=1), np.count_nonzero(got, axis=1)


def _quantised(stage: str, shape: MoeShape, routing: Routing) -> list[Entry]:
    if not shape.is_int8:
        return []
    row_of = routing.part(layout.RT_ROW_OF, routing.tokens * shape.top_k).reshape(routing.tokens, shape.top_k)
    tokens = int(np.count_nonzero((row_of >= 0).any(axis=1)))
    return _worked(stage, shape, "quantise", tokens, tokens * shape.return_bytes)


def _moved(stage: str, peer: int, what: str, units: int, n_bytes: int) -> list[Entry]:
    return [Entry(stage, "transfer", what, peer, _NO_LANE, units, n_bytes)] if units else []


def _worked(stage: str, shape: MoeShape, kind: str, units: int, n_bytes: int) -> list[Entry]:
    return [Entry(stage, "work", kind, shape.rank, _NO_LANE, units, n_bytes)] if units else []
