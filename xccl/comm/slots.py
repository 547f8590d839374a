"""Memory of the managed area that is handed to the caller, and used again when nobody refers to it any more."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from ..layout.moe import INDEX_DTYPE, RT_COUNTS, SOURCE_DTYPE
from ..layout.moe_direct import OUTPUTS, SLOTS, DirectBlocks
from ..layout.record import align_up
from ..layout.segment import PAGE_BYTES
from .core import Core
from .dispatched import Routing
from .managed import Part
from .moe_shape import MoeShape


class Slots:
    """Parts of the managed area that hold the results of dispatches.

    Args:
        core: of this rank.
        shape: of the ExpertParallel object.
        blocks: what a slot has where.
        start: offset of slot 0 in every segment.

    Attributes:
        offsets: of each slot in every segment, int64 [SLOTS].
        capacities: rows for which there is memory in each of the own ones, int64 [SLOTS].
        raws: all bytes of each of the own ones; every view of a result, and every view of a view, has one as its base.
    """

    def __init__(self, core: Core, shape: MoeShape, blocks: DirectBlocks, start: int) -> None:
        self._core = core
        self._shape = shape
        self._blocks = blocks
        self.offsets = start + blocks.slot_bytes * np.arange(SLOTS, dtype=np.int64)
        self.capacities = np.zeros(SLOTS, np.int64)
        self.raws = [core.fabric.view(core.rank, offset, blocks.slot_bytes) for offset in self.offsets.tolist()]
        self._most_rows = shape.ranks * shape.max_tokens * (1 if shape.is_dedup else shape.top_k)
        #: Of each part: where it is in a slot, and its bytes for a row.
        self._parts = [(0, shape.row_bytes), (blocks.source, SOURCE_DTYPE.itemsize)]
        if shape.is_int8:
            self._parts.append((blocks.scales, 4))
        if shape.is_dedup:
            self._parts += [(blocks.index, INDEX_DTYPE.itemsize * shape.top_k), (blocks.weights, 4 * shape.top_k)]

    def choose(self) -> tuple[int, bool]:
        """A slot to which nobody refers, and whether it may be given away: there is another one."""
        free = free_ones(self.raws, 2)
        return free[0], len(free) > 1

    def counts(self, routing: Routing) -> npt.NDArray[np.int64]:
        """Entries of each local expert that have come."""
        return routing.part(RT_COUNTS, self._shape.local_experts)

    def rows(self, slot: int, routing: Routing) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
        """Tokens and scales that have come to a slot."""
        n, raw, shape = routing.rows, self.raws[slot], self._shape
        tokens: npt.NDArray[Any] = np.ndarray((n, shape.hidden), shape.token_dtype, raw)
        return tokens, np.ndarray(n, np.float32, raw, self._blocks.scales) if shape.is_int8 else None

    def origins(
        self, slot: int, routing: Routing
    ) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void] | None, npt.NDArray[np.float32] | None]:
        """Source records that have come to a slot; with deduplicated rows, index and weights, too."""
        raw, blocks, entries = self.raws[slot], self._blocks, routing.entries
        source: npt.NDArray[np.void] = np.ndarray(routing.rows, SOURCE_DTYPE, raw, blocks.source)
        if not self._shape.is_dedup:
            return source, None, None
        index: npt.NDArray[np.void] = np.ndarray(entries, INDEX_DTYPE, raw, blocks.index)
        return source, index, np.ndarray(entries, np.float32, raw, blocks.weights)

    def back(self, rank: int, offset: int, rows: int) -> None:
        """Back a slot of a rank with memory for so many rows, and a quarter more.

        Raises:
            CapacityError: there is no memory.
        """
        rows = min(rows + rows // 4, self._most_rows)
        for start, each_bytes in self._parts:
            self._core.fabric.commit(rank, offset + start, align_up(rows * each_bytes, PAGE_BYTES))
        if rank == self._core.rank:
            self.capacities[self.offsets == offset] = rows


class OutputArrays:
    """Parts of the managed area into which the caller writes the outputs of experts.

    Args:
        core: of this rank.
        shape: of the ExpertParallel object.
        start: offset of the first in every segment.
        size_bytes: of each.
        count: how many there are.

    Attributes:
        raws: all bytes of each; see `Slots`.
    """

    def __init__(self, core: Core, shape: MoeShape, start: int, size_bytes: int, count: int = OUTPUTS) -> None:
        self._shape = shape
        offsets = [start + i * size_bytes for i in range(count)]
        self.raws = [core.fabric.view(core.rank, offset, size_bytes) for offset in offsets]
        self._parts = [Part(core, offset, size_bytes) for offset in offsets]

    def take(self, rows: int) -> npt.NDArray[Any] | None:
        """An uninitialised array [rows, hidden] in one to which nobody refers; None if there is none."""
        for i in free_ones(self.raws, 1):
            self._parts[i].grow(rows * self._shape.return_bytes)
            found: npt.NDArray[Any] = np.ndarray((rows, self._shape.hidden), self._shape.dtype, self.raws[i])
            return found
        return None


def _references(raws: list[npt.NDArray[np.uint8]]) -> int:
    """How many refer to the first, in such a loop as in `free_ones`: how many the loop makes is Python's affair."""
    for _, raw in enumerate(raws):
        return sys.getrefcount(raw)
    return 0


_REFERENCES_TO_A_FREE_ONE = _references([np.empty(1, np.uint8)])


def free_ones(raws: list[npt.NDArray[np.uint8]], most: int) -> list[int]:
    """Numbers of those to which nobody refers, up to so many."""
    found: list[int] = []
    for i, raw in enumerate(raws):
        if sys.getrefcount(raw) == _REFERENCES_TO_A_FREE_ONE:
            found.append(i)
            if len(found) == most:
                break
    return found


def any_held(*lists: list[npt.NDArray[np.uint8]]) -> bool:
    """Does anybody refer to any of them?"""
    return any(len(free_ones(raws, len(raws))) < len(raws) for raws in lists)
