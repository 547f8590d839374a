"""What the memory allows: the bytes that a cell has to move, copied once and otherwise nothing, measured in turn.

Every byte that somebody has to read and every byte that somebody has to write counts half, since a copy does both.
What an algorithm adds, such as staging, does not count. A collective reads what each rank gives once for each rank that
needs it, and writes what each gets; of a message each side copies half; a layer's dispatch reads each token once and
writes each row once, its combine reads each row once and writes each sum once.

As many processes as there are cores for copy, each on its own: this is the rate of the machine, not of a protocol.
There is no floor for what is bound by latency, below `LEAST_BYTES`.
"""

from __future__ import annotations

from typing import Any, Final

import numba as nb
import numpy as np

from bench.peers.moe import Shape, routing_of
from bench.peers.on_multiprocessing import Multiprocessing, Shared
from bench.peers.work import Cell, NotComparableError, Work, page_aligned
from xccl.kernels.copy import copy_bytes_auto

LEAST_BYTES: Final = 4096
_INT8_SCALE_BYTES: Final = 4


def bytes_to_copy(cell: Cell, variant: str, rank: int) -> int:
    """At a rank, in one operation: half of what is read and written."""
    n_bytes, ranks = cell.size, cell.ranks
    if cell.op in ("sendrecv", "stream"):
        return n_bytes // 2  # both sides can copy
    if cell.op in ("put-signal", "put"):
        return n_bytes if rank == 0 else 0
    if cell.op in ("allgather", "alltoall", "alltoallv"):
        return ranks * n_bytes
    if cell.op == "reduce-scatter":
        return (ranks + 1) * n_bytes // 2
    if cell.op == "moe":
        return _bytes_of_moe(Shape.of(cell), variant, rank)
    if cell.op == "broadcast":
        return n_bytes if rank else 0
    return n_bytes if cell.op in ("allreduce", "gather", "scatter") else 0


def _bytes_of_moe(shape: Shape, variant: str, rank: int) -> int:
    token = 2 * shape.hidden
    rows = shape.tokens * shape.topk
    if variant == "dedup":
        owners = np.sort(routing_of(shape, rank) // shape.local_experts, axis=1)
        rows = shape.tokens + int(np.count_nonzero(np.diff(owners, axis=1)))
    row = shape.hidden + _INT8_SCALE_BYTES if variant == "int8" else token
    return (2 * shape.tokens * token + rows * (row + token)) // 2


@nb.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
def _copy(target: int, source: int, n_bytes: int, times: int) -> None:
    for _ in range(times):
        copy_bytes_auto(target, source, n_bytes)


def compile_copy() -> None:
    """Before processes are forked."""
    array = page_aligned(2)
    _copy(array.ctypes.data, array.ctypes.data + 1, 1, 1)


class Memory(Multiprocessing):
    """A process that copies for some of the ranks."""

    def __init__(self, shared: Shared, rank: int) -> None:
        super().__init__(shared, rank)
        self.version = "copy_bytes_auto of xccl.kernels"

    def work(self, cell: Cell, variant: str) -> Work:
        """What ranks `rank`, `rank + size`, ... have to copy."""
        sizes = [bytes_to_copy(cell, variant, rank) for rank in range(cell.ranks)]
        if max(sizes) < LEAST_BYTES:
            raise NotComparableError("bound by latency, not by bytes")
        buffers = [(page_aligned(n), page_aligned(n)) for n in sizes[self.rank :: self.size]]
        blocks: list[tuple[Any, ...]] = [(b.ctypes.data, a.ctypes.data, a.size) for a, b in buffers]

        def run(n: int) -> None:
            if len(blocks) == 1:
                _copy(*blocks[0], n)
                return
            for _ in range(n):
                for block in blocks:
                    _copy(*block, 1)

        def check() -> int:
            for a, b in buffers:
                a[:], b[:] = 7, 0
            run(1)
            return sum(int(np.count_nonzero(a != b)) for a, b in buffers)

        return Work(run, check)
