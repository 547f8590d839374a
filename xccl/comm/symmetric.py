"""Symmetric memory: arrays and signals at the same offset in every rank's segment."""

from __future__ import annotations

import zlib
from bisect import bisect_left, insort
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError, UsageError
from ..fabric.base import whole_pages
from ..kernels import words
from ..layout.calls import SY_ADDRESSES, SY_ALIVE, SY_CALLS, SY_COUNT, SY_DTYPE, SY_ITEM_BYTES, SYMMETRIC
from ..layout.record import HOT_LINE_BYTES, align_up
from .buffers import require_int
from .core import Core

#: Stands for the offsets of blocks in the agreement on them.
_OFFSETS = "offsets"


class SymmetricAllocator:
    """First fit over a range of offsets. Ranks that make the same calls get the same offsets.

    Args:
        name: of the area, for messages.
        start: first offset.
        size_bytes: length of the range.
        option: argument of `launch` and `init` that makes the area larger, if there is one.
    """

    def __init__(self, name: str, start: int, size_bytes: int, option: str | None = None) -> None:
        self._name = name
        self._advice = "" if option is None else f"; launch and init take {option} to make it larger"
        self._free: list[tuple[int, int]] = [(start, size_bytes)] if size_bytes else []
        self._taken: dict[int, int] = {}

    def alloc(self, n_bytes: int, alignment: int = HOT_LINE_BYTES, lowest: int = 0) -> int:
        """Offset of `n_bytes` free bytes, aligned; blocks take at least one unit of alignment.

        Args:
            n_bytes: how many.
            alignment: of the offset.
            lowest: the least offset allowed.

        Raises:
            CapacityError: no free range is long enough; says the longest.
        """
        needed_bytes = align_up(max(n_bytes, 1), alignment)
        for i, (start, length) in enumerate(self._free):
            offset = align_up(max(start, lowest), alignment)
            spare = offset - start
            if length < spare + needed_bytes:
                continue
            rest = [(start, spare), (offset + needed_bytes, length - spare - needed_bytes)]
            self._free[i : i + 1] = [part for part in rest if part[1]]
            self._taken[offset] = needed_bytes
            return offset
        largest = max((length for _, length in self._free), default=0)
        raise CapacityError(
            f"the {self._name} has no {needed_bytes} bytes in one piece, the longest free range has {largest}"
            f"{self._advice}",
            needed_bytes=needed_bytes,
            available_bytes=largest,
        )

    def free(self, offset: int) -> int:
        """Give a block back; its size.

        Raises:
            UsageError: no block starts there.
        """
        if offset not in self._taken:
            raise UsageError(f"no block of the {self._name} starts at offset {offset}", value=offset)
        n_bytes = self._taken.pop(offset)
        insort(self._free, (offset, n_bytes))
        i = bisect_left(self._free, (offset, 0))
        for j in (i, i - 1):  # merge with the range behind, then with the one before
            if 0 <= j < len(self._free) - 1:
                (start, length), (behind, more) = self._free[j], self._free[j + 1]
                if start + length == behind:
                    self._free[j : j + 2] = [(start, length + more)]
        return n_bytes


class SymmetricArray:
    """An array of the same shape and dtype at the same offset in every rank's app data area.

    Made by `Communicator.empty`.

    Attributes:
        shape: shape of each rank's copy.
        dtype: element type.
        size: elements of one copy.
        nbytes: bytes of one copy.
        addresses: where each rank's copy lies in this process.
        handle: address of the record by which direct calls know it.
    """

    def __init__(self, core: Core, allocator: SymmetricAllocator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._core = core
        self._allocator = allocator
        self.shape = shape
        self.dtype = dtype
        self.itemsize: int = dtype.itemsize
        self.size = int(np.prod(shape, dtype=np.int64))
        self.nbytes = self.size * dtype.itemsize
        (self._offset,) = reserve(core, "empty", _describe(shape, dtype), Block(allocator, self.nbytes))
        self._addresses = core.fabric.segments + self._offset
        self.addresses: list[int] = self._addresses.tolist()
        self._record = _record_for_calls(core, self._addresses, self.size, self.itemsize, dtype)
        self.handle: int = self._record.ctypes.data
        self._local: npt.NDArray[Any] | None = self.peer(core.rank)

    @property
    def local(self) -> npt.NDArray[Any]:
        """This rank's copy."""
        self.require_alive()
        assert self._local is not None
        return self._local

    def peer(self, rank: int) -> npt.NDArray[Any]:
        """Rank `rank`'s copy, by load and store.

        Raises:
            UsageError: there is no such rank, or the array was freed.
            FabricError: the fabric gives no load/store access to peers.
        """
        self.require_alive()
        rank = require_int(rank, "rank", 0, self._core.size - 1)
        self._core.fabric.require_peer(rank)
        return self._core.fabric.view(rank, self._offset, self.nbytes).view(self.dtype).reshape(self.shape)

    def free(self) -> None:
        """Give the memory back. Collective: returns when all ranks have called it, so nobody still uses the array.

        Raises:
            UsageError: it was freed before, or ranks free different arrays.
        """
        self.require_alive()
        collective_free(self._core, (self._allocator, self._offset))
        self._record[SY_ALIVE // 8] = 0
        self._local = None
        self._offset = -1

    def require_alive(self) -> None:
        """Raise UsageError if the array was freed, or its rank has left the session."""
        self._core.require_open()
        if self._offset < 0:
            raise UsageError("this symmetric array was freed", value="freed")

    def require_of(self, core: Core) -> None:
        """Raise UsageError if the array is not alive, or another communicator's, which counts ranks differently."""
        self.require_alive()
        if self._core is not core:
            raise UsageError("this symmetric array belongs to another communicator", value="another communicator")

    def __repr__(self) -> str:
        return f"SymmetricArray(shape={self.shape}, dtype={self.dtype}, rank={self._core.rank} of {self._core.size})"


class Signals:
    """Epoch words in each rank's own segment, two cache lines apart. Made by `Communicator.signals`; they start at 0.

    Attributes:
        count: number of words.
        addresses: where each rank's first word lies in this process.
        handle: address of the record by which direct calls know them.
    """

    STRIDE_BYTES = HOT_LINE_BYTES

    def __init__(self, core: Core, allocator: SymmetricAllocator, count: int) -> None:
        self._core = core
        self._allocator = allocator
        self.count = count
        (self._offset,) = reserve(core, "signals", {"count": count}, Block(allocator, count * self.STRIDE_BYTES))
        self._addresses = core.fabric.segments + self._offset
        self.addresses: list[int] = self._addresses.tolist()
        self._record = _record_for_calls(core, self._addresses, count, self.STRIDE_BYTES, None)
        self.handle: int = self._record.ctypes.data

    def read(self, index: int) -> int:
        """The present value of this rank's word `index`."""
        self.require_alive()
        index = require_int(index, "index", 0, self.count - 1)
        return int(words.load(self.addresses[self._core.rank] + index * self.STRIDE_BYTES))

    def free(self) -> None:
        """Give the words back. Collective: returns when all ranks have called it.

        Raises:
            UsageError: they were freed before, or ranks free different ones.
        """
        self.require_alive()
        collective_free(self._core, (self._allocator, self._offset))
        self._record[SY_ALIVE // 8] = 0
        self._offset = -1

    def require_alive(self) -> None:
        """Raise UsageError if the words were freed, or their rank has left the session."""
        self._core.require_open()
        if self._offset < 0:
            raise UsageError("these signals were freed", value="freed")

    def require_of(self, core: Core) -> None:
        """Raise UsageError if the words are not alive, or another communicator's, which counts ranks differently."""
        self.require_alive()
        if self._core is not core:
            raise UsageError("these signals belong to another communicator", value="another communicator")

    def __len__(self) -> int:
        return self.count


def _record_for_calls(
    core: Core, addresses: npt.NDArray[np.int64], count: int, item_bytes: int, dtype: np.dtype[Any] | None
) -> npt.NDArray[np.int64]:
    """What direct calls need to know of symmetric memory; `addresses` must live as long as the record."""
    record = np.zeros(SYMMETRIC.size_bytes // 8, np.int64)
    record[SY_CALLS // 8] = core.calls.address
    record[SY_COUNT // 8] = count
    record[SY_ITEM_BYTES // 8] = item_bytes
    record[SY_ADDRESSES // 8] = addresses.ctypes.data
    record[SY_DTYPE // 8] = 0 if dtype is None else id(dtype)
    record[SY_ALIVE // 8] = 1
    return record


def _describe(shape: tuple[int, ...], dtype: np.dtype[Any]) -> dict[str, int]:
    dims = {f"shape[{i}]": n for i, n in enumerate(shape)}
    return {"ndim": len(shape), "dtype (checksum of its name)": zlib.crc32(str(dtype).encode()), **dims}


@dataclass(frozen=True)
class Block:
    """Memory that all ranks reserve at the same offset.

    Attributes:
        allocator: of the area.
        size_bytes: its size, the same at all ranks.
        committed_bytes: how much of it, from its start, this rank backs with memory; all of it if None.
        alignment: of its offset.
    """

    allocator: SymmetricAllocator
    size_bytes: int
    committed_bytes: int | None = None
    alignment: int = HOT_LINE_BYTES


def reserve(core: Core, call: str, arguments: dict[str, int], *blocks: Block) -> list[int]:
    """Allocate blocks on all ranks or on none, at the same offsets; they read as 0.

    Ranks that have made the same calls before find the same offsets by themselves. Those of a group may have to look
    again, beyond the highest offset that any of them has found.

    Args:
        core: of this rank.
        call: name of the collective call.
        arguments: what must be the same at all ranks; at most 12.
        blocks: what to allocate.

    Raises:
        UsageError: ranks differ in an argument, at all of them.
        CapacityError: a rank has no room, at all of them.
    """
    lowest = [0] * len(blocks)
    while True:
        offsets: list[int] = []
        failure: CapacityError | None = None
        try:
            try:
                for block, least in zip(blocks, lowest, strict=True):
                    offsets.append(block.allocator.alloc(block.size_bytes, block.alignment, least))
                for block, offset in zip(blocks, offsets, strict=True):
                    n_bytes = block.size_bytes if block.committed_bytes is None else block.committed_bytes
                    core.fabric.commit(core.rank, offset, n_bytes)
            except CapacityError as error:
                failure = error
            found = zlib.crc32(np.array(offsets, np.int64).tobytes()) if failure is None else -1
            core.agree(call, {**arguments, _OFFSETS: found}, failure)
            core.blocks.update(zip(offsets, (block.allocator for block in blocks), strict=True))
            return offsets
        except BaseException as error:
            for block, offset in zip(blocks, offsets, strict=False):
                give_back(core, block.allocator, offset)
            if isinstance(error, CapacityError):  # at all ranks: the next call finds what they have given back
                core.agree("free", {"offset": -1})
            if not isinstance(error, UsageError) or error.details.get("argument") != _OFFSETS:
                raise
        lowest = _highest(core, call, offsets, failure, len(blocks))


def _highest(core: Core, call: str, offsets: list[int], failure: CapacityError | None, count: int) -> list[int]:
    """The highest offsets that any rank has found; a CapacityError, at all of them, if one has found none."""
    seen = core.exchange(call, [int(failure is not None), *(offsets if failure is None else [0] * count)])
    full = np.flatnonzero(seen[:, 0])
    if full.size:
        if failure is not None:
            raise failure
        raise CapacityError(f"{call}: rank {full[0]} has no room for it, so no rank goes on", peer=int(full[0]))
    highest: list[int] = seen[:, 1:].max(axis=0).tolist()
    return highest


def give_back(core: Core, allocator: SymmetricAllocator, offset: int) -> None:
    """Free a block, and the memory behind it in the own segment. Memory that is free reads as 0.

    A block of which the caller holds results stays as it is, at this rank, until the session ends.
    """
    core.blocks.pop(offset, None)
    is_held = core.lent.pop(offset, None)
    if is_held is not None and is_held():
        return
    n_bytes = allocator.free(offset)
    core.fabric.release(offset, n_bytes)
    start, length = whole_pages(offset, n_bytes)
    edges = [(offset, start - offset), (start + length, offset + n_bytes - start - length)]
    for edge, size_bytes in edges if length else [(offset, n_bytes)]:
        # What can't be backed by memory now was not backed before.
        with suppress(CapacityError):
            core.fabric.commit(core.rank, edge, size_bytes)
            core.fabric.view(core.rank, edge, size_bytes)[:] = 0


def collective_free(core: Core, *blocks: tuple[SymmetricAllocator, int]) -> None:
    """Give blocks back on all ranks: when nobody uses them any more, and returning when all have given theirs back."""
    core.agree("free", {"offset": blocks[0][1]})
    for allocator, offset in blocks:
        give_back(core, allocator, offset)
    core.agree("free", {"offset": -1})
