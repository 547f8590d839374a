"""Blocks of the metadata and managed areas that belong to one object, reserved on all ranks together."""

from __future__ import annotations

from typing import Any

from ..layout.record import align_up
from .core import Core
from .symmetric import Block, collective_free, reserve

#: Rows of the managed area are committed in units of this.
_COMMIT_BYTES = 2 << 20


class Reservation:
    """Fields, zeroed, and a managed block at the same offsets on all ranks; made by all of them, or by none.

    Args:
        comm: the communicator.
        call: name of the collective call.
        arguments: what must be the same at all ranks.
        reserved_bytes: of the fields and of the block, the same at all ranks.
        committed_bytes: how much of each, from its start, this rank needs from the start on.

    Attributes:
        fields: offset of the fields in every segment.
        block: offset of the managed block in every segment.

    Raises:
        UsageError: ranks differ in an argument.
        CapacityError: an area or the memory is exhausted.
    """

    def __init__(
        self,
        comm: Any,
        call: str,
        arguments: dict[str, int],
        reserved_bytes: tuple[int, int],
        committed_bytes: tuple[int, int],
    ) -> None:
        core: Core = comm.core
        self._core = core
        blocks = [
            Block(allocator, size_bytes, committed)
            for allocator, size_bytes, committed in zip(
                (comm.metadata_allocator, comm.heap_allocator), reserved_bytes, committed_bytes, strict=True
            )
        ]
        self.fields, self.block = offsets = reserve(core, call, arguments, *blocks)
        self._blocks = tuple((block.allocator, offset) for block, offset in zip(blocks, offsets, strict=True))

    def free(self) -> None:
        """Give all of it back; collective."""
        collective_free(self._core, *self._blocks)


class Part:
    """A part of the own managed block, backed by memory only as far as it is used.

    Attributes:
        committed_bytes: how far that is.
    """

    def __init__(self, core: Core, offset: int, size_bytes: int) -> None:
        self._core = core
        self._offset = offset
        self._size_bytes = size_bytes
        self.committed_bytes = 0

    def grow(self, n_bytes: int) -> None:
        """Back the first `n_bytes`.

        Raises:
            CapacityError: there is no memory.
        """
        if n_bytes > self.committed_bytes:
            target = min(align_up(n_bytes, _COMMIT_BYTES), self._size_bytes)
            self._core.fabric.commit(
                self._core.rank, self._offset + self.committed_bytes, target - self.committed_bytes
            )
            self.committed_bytes = target
