"""Blocks of the metadata and managed areas that belong to one object, reserved on all ranks together."""

from __future__ import annotations

from typing import Any

from ..errors import CapacityError, XcclError
from ..layout.record import align_up
from .core import Core
from .symmetric import SymmetricAllocator, collective_free, give_back

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
        allocators: tuple[SymmetricAllocator, SymmetricAllocator] = (comm.metadata_allocator, comm.heap_allocator)
        offsets: list[int] = []
        failure: XcclError | None = None
        try:
            try:
                for allocator, size_bytes in zip(allocators, reserved_bytes, strict=True):
                    offsets.append(allocator.alloc(size_bytes))
                for offset, n_bytes in zip(offsets, committed_bytes, strict=True):
                    core.fabric.commit(core.rank, offset, n_bytes)
                core.fabric.view(core.rank, offsets[0], committed_bytes[0])[:] = 0
            except CapacityError as error:
                failure = error
            core.agree(call, arguments, failure)
        except BaseException as error:
            for allocator, offset in zip(allocators, offsets, strict=False):
                give_back(core, allocator, offset)
            if isinstance(error, CapacityError):  # at all ranks: the next call finds what they have given back
                core.agree("free", {"offset": -1})
            raise
        self.fields, self.block = offsets
        self._blocks = tuple(zip(allocators, offsets, strict=True))

    def free(self) -> None:
        """Give all of it back; collective."""
        collective_free(self._core, *self._blocks)


class Part:
    """A part of the own managed block, backed by memory only as far as it is used."""

    def __init__(self, core: Core, offset: int, size_bytes: int) -> None:
        self._core = core
        self._offset = offset
        self._size_bytes = size_bytes
        self._committed_bytes = 0

    def grow(self, n_bytes: int) -> None:
        """Back the first `n_bytes`.

        Raises:
            CapacityError: there is no memory.
        """
        if n_bytes > self._committed_bytes:
            target = min(align_up(n_bytes, _COMMIT_BYTES), self._size_bytes)
            self._core.fabric.commit(
                self._core.rank, self._offset + self._committed_bytes, target - self._committed_bytes
            )
            self._committed_bytes = target
