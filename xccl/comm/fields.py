"""Peers that exchange 32-byte fields with a rank, and bounded waits for their words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..kernels import fields as kernels, words
from ..layout.a2e import PEER_BYTES, PEER_CONTROL, PEER_MINE, PEER_SEGMENT, PEER_THEIRS
from .core import Core, Waiting


class Peers:
    """A table of peers for kernels: where this rank writes its field at each of them, and where each writes here.

    Args:
        core: of this rank.
        ranks: the peers, in order; the rank itself may be one of them, and has no field.
        mine: offset, in the segment of each peer, of the field that this rank writes there.
        theirs: offset, in this rank's segment, of the field that each peer writes.
    """

    def __init__(self, core: Core, ranks: Sequence[int], mine: Sequence[int], theirs: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        #: Without the rank itself: those that have fields.
        self.others = tuple(rank for rank in ranks if rank != core.rank)
        segments = core.fabric.segments[list(ranks)]
        self._table = np.zeros((len(ranks), PEER_BYTES // 8), np.int64)
        self._table[:, PEER_MINE // 8] = segments + np.asarray(mine, np.int64)
        self._table[:, PEER_THEIRS // 8] = core.fabric.segments[core.rank] + np.asarray(theirs, np.int64)
        self._table[:, PEER_CONTROL // 8] = core.fabric.controls[list(ranks)]
        self._table[:, PEER_SEGMENT // 8] = segments
        for i, rank in enumerate(ranks):
            if rank == core.rank:
                self._table[i, [PEER_MINE // 8, PEER_THEIRS // 8]] = 0
        self.address: int = self._table.ctypes.data

    def __len__(self) -> int:
        return len(self.ranks)

    def read(self, index: int, word: int) -> int:
        """A word of the field that peer `index` writes here."""
        field = int(self._table[index, PEER_THEIRS // 8])
        return int(words.load(field + word)) if field else 0


class FieldWaiter:
    """Waits of one stream of a rank. Each stream needs its own, since streams wait at the same time.

    Attributes:
        on_slice: called whenever a wait comes back to Python, from time to time; may raise to end it.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._cursor = np.zeros(1, np.int64)
        self._cursor_address: int = self._cursor.ctypes.data
        self.on_slice: Callable[[], None] | None = None

    def wait(self, peers: Peers, word: int, target: int, operation: str) -> None:
        """Wait until a word of every peer's field is at least `target`.

        Args:
            peers: whose fields.
            word: offset of the word in the field.
            target: the epoch awaited.
            operation: name of the call, for errors.

        Raises:
            WaitTimeout, PeerDied, SessionAborted: see `xccl.errors`.
        """
        self._cursor[0] = 0
        call, count = kernels.wait_fields.call, len(peers)

        def step(until_ns: int) -> int:
            if self.on_slice is not None:
                self.on_slice()
            return int(call(self._core.control, peers.address, count, word, target, self._cursor_address, until_ns))

        def describe() -> Waiting:
            # Deadlines and errors name the first peer that has not come; the value is read for the message only.
            index = min(int(self._cursor[0]), count - 1)
            peer, seen = peers.ranks[index], peers.read(index, word)
            return Waiting(operation, target, peer, target, seen, missing=lambda: missing(index))

        def missing(first: int) -> list[int]:
            # The rank itself may be one of the peers, and has no field.
            behind = [i for i in range(first, count) if peers.ranks[i] != self._core.rank]
            return [peers.ranks[i] for i in behind if peers.read(i, word) < target]

        self._core.run(step, describe)
