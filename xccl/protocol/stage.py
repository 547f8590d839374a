"""Stages: what must happen in an operation. Pure descriptions; no memory is touched here.

An operation is a sequence of stages, the same at every rank. A stage is a set of transfers, signals, waits and work,
held column-wise, so that the 590,000 pairs of 768 ranks are a few arrays. `comm` executes the stages and, when traced,
records what it did under the same names; `model` says what they would cost.

Order. Within a stage a rank's transfers and work overlap (they are pipelined over its lanes and engines), and its
signals follow its transfers. A rank starts a stage when it has finished the one before and what the stage waits for has
happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..trace.entry import Entry

__all__ = [
    "Description",
    "Engine",
    "Entry",
    "Ints",
    "Mover",
    "Signals",
    "Stage",
    "Transfers",
    "Waits",
    "Work",
    "WorkKind",
    "all_pairs",
    "ints",
    "payload_between",
    "rank_columns",
]

#: What moves bytes: the AIV cores' transfer engines (MTE2, MTE3), or the die's DMA engine.
Engine = Literal["mte", "dma"]
#: Who drives a transfer: its source (push) or its destination (pull).
Mover = Literal["source", "destination"]
#: Kinds of local work.
WorkKind = Literal["quantise", "dequantise", "reduce", "scan"]

Ints = npt.NDArray[np.int64]


def ints(values: npt.ArrayLike) -> Ints:
    """An int64 column."""
    return np.atleast_1d(np.asarray(values, np.int64))


@dataclass(frozen=True, eq=False)
class Transfers:
    """Bytes that go from rank to rank; a row for each pair (and lane).

    Attributes:
        source: [n] rank in whose memory the bytes are.
        destination: [n] rank to whose memory they go; the same as source for a local copy.
        units: [n] pieces of the transfer (tokens, chunks, runs of a DMA engine), each of which pays a start-up.
        n_bytes: [n] bytes of all its pieces.
        mover: who drives it.
        engine: what moves it.
        lane: [n] lane that does it, -1 where all lanes of the mover share the pieces evenly.
        what: the payload, in a word.
        has_header: each piece says by itself where it belongs, so that its header is read before it can be moved.
        is_repeated: the same bytes go to several places, so that all readings but the first find them in a cache.
        is_stored: false where the bytes are used up by the stage's work on the way, and never written as they are.
    """

    source: Ints
    destination: Ints
    units: Ints
    n_bytes: Ints
    mover: Mover
    what: str
    engine: Engine = "mte"
    lane: Ints | None = None
    has_header: bool = False
    is_repeated: bool = False
    is_stored: bool = True


@dataclass(frozen=True, eq=False)
class Signals:
    """Small writes to a peer's metadata: fields, flags, counters; a row for each pair.

    Attributes:
        source: [n] rank that writes.
        destination: [n] rank in whose metadata area it writes.
        count: [n] number of writes.
        size_bytes: bytes of one.
        what: the word, in a word.
        atomic: each is an atomic addition.
        fetches: the writer needs the value before the addition, so it waits for a round trip.
    """

    source: Ints
    destination: Ints
    count: Ints
    size_bytes: int
    what: str
    atomic: bool = False
    fetches: bool = False


@dataclass(frozen=True, eq=False)
class Waits:
    """What a rank polls for in its own metadata; a row for each pair.

    Attributes:
        rank: [n] rank that waits.
        peer: [n] rank whose signals it waits for, -1 for `count` signals of any rank.
        count: [n] signals awaited.
        what: which signals: the `what` of a `Signals` of this operation or of one before it.
    """

    rank: Ints
    peer: Ints
    count: Ints
    what: str


@dataclass(frozen=True, eq=False)
class Work:
    """Local work on the vector cores; a row for each rank.

    Work is fused with the transfers of its stage where it can be: what they bring to a core, or take from it, is not
    counted again.

    Attributes:
        rank: [n] who does it.
        kind: what is done; scan is a running sum.
        units: [n] rows or tokens.
        n_bytes: [n] bytes read and written in local memory, beyond what the stage's transfers move.
        elements: [n] elements computed.
    """

    rank: Ints
    kind: WorkKind
    units: Ints
    n_bytes: Ints
    elements: Ints


@dataclass(frozen=True)
class Stage:
    """One named step of an operation.

    Attributes:
        name: the same in descriptions, traces and projections.
        waits: what must have happened before the rest.
        transfers: bytes to move.
        work: local work, overlapping the transfers.
        signals: written after the transfers.
        lane_barrier: the lanes of each rank meet at the end of the stage, when all that they wrote has arrived.
        streamed: what the stage waits for arrives piece by piece, and the stage works on each piece as it comes, so it
            overlaps the stage that is waited for, one piece behind. A streamed stage that waits for nothing follows
            the pieces of the stage before it.
    """

    name: str
    waits: tuple[Waits, ...] = ()
    transfers: tuple[Transfers, ...] = ()
    work: tuple[Work, ...] = ()
    signals: tuple[Signals, ...] = ()
    lane_barrier: bool = False
    streamed: bool = False


@dataclass(frozen=True)
class Description:
    """An operation, described.

    Attributes:
        operation: put, get, send, dispatch, ...
        protocol: which of its protocols.
        ranks: number of ranks.
        stages: in order.
        lanes: lanes of each rank that take part.
        payload_bytes: [ranks] payload (scales included, metadata not) that goes from each rank to others, whoever moves
            it, for bandwidths.
        window: how many pieces of a streamed run may be under way at once (slots of a ring); 0 if that has no bound.
    """

    operation: str
    protocol: str
    ranks: int
    stages: tuple[Stage, ...]
    lanes: int
    payload_bytes: Ints
    window: int = 0

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def entries(self, rank: int) -> list[Entry]:
        """What one rank does, in the form in which a trace records it; sorted, rows that do nothing left out."""
        found: list[Entry] = []
        for stage in self.stages:
            found += _entries_of(stage, rank)
        return sorted(found)


def _entries_of(stage: Stage, rank: int) -> list[Entry]:
    found: list[Entry] = []
    for waits in stage.waits:
        mine = (waits.rank == rank) & (waits.count > 0)
        found += _rows(stage.name, "wait", waits.what, waits.peer[mine], None, waits.count[mine], 0 * waits.count[mine])
    for transfers in stage.transfers:
        movers, others = transfers.source, transfers.destination
        if transfers.mover == "destination":
            movers, others = others, movers
        mine = (movers == rank) & (transfers.units > 0)
        lane = None if transfers.lane is None else transfers.lane[mine]
        found += _rows(
            stage.name, "transfer", transfers.what, others[mine], lane, transfers.units[mine], transfers.n_bytes[mine]
        )
    for work in stage.work:
        mine = (work.rank == rank) & (work.units > 0)
        found += _rows(stage.name, "work", work.kind, work.rank[mine], None, work.units[mine], work.n_bytes[mine])
    for signals in stage.signals:
        mine = (signals.source == rank) & (signals.count > 0)
        count = signals.count[mine]
        found += _rows(
            stage.name, "signal", signals.what, signals.destination[mine], None, count, count * signals.size_bytes
        )
    return found


def _rows(
    stage: str, kind: str, what: str, peers: Ints, lanes: Ints | None, counts: Ints, n_bytes: Ints
) -> list[Entry]:
    lane_column: Sequence[Any] = [-1] * len(peers) if lanes is None else lanes.tolist()
    columns = zip(peers.tolist(), lane_column, counts.tolist(), n_bytes.tolist(), strict=True)
    return [Entry(stage, kind, what, peer, lane, count, size) for peer, lane, count, size in columns]


def all_pairs(ranks: int) -> tuple[Ints, Ints]:
    """Every ordered pair of ranks, a rank with itself included: source and destination columns."""
    every = np.arange(ranks, dtype=np.int64)
    return np.repeat(every, ranks), np.tile(every, ranks)


def payload_between(ranks: int, transfers: Sequence[Transfers]) -> Ints:
    """[ranks] bytes of these transfers that leave each rank for another."""
    total = np.zeros(ranks, np.int64)
    for t in transfers:
        # Not bincount with weights: those are floats, and lose bytes from 2**53 on.
        np.add.at(total, t.source, t.n_bytes * (t.source != t.destination))
    return total


def rank_columns(ranks: int, *columns: npt.ArrayLike) -> list[Ints]:
    """Columns of rank numbers, broadcast to one length.

    Raises:
        UsageError: there is no such rank.
    """
    found = [column.copy() for column in np.broadcast_arrays(*map(ints, columns))]
    for column in found:
        if column.size and not (column.min() >= 0 and column.max() < ranks):
            raise UsageError(
                f"ranks are {column.min()} to {column.max()}, must be 0 to {ranks - 1}",
                value=(int(column.min()), int(column.max())),
                bound=ranks - 1,
            )
    return found
