"""Collectives of the table: what each rank gives, and what it has to get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from bench.peers.work import Array, Work, count_wrong, nothing, page_aligned, pattern, repeat

#: Runs one: from the first array into the second. A broadcast is in place, in both at once. What only the root has to
#: give or to get, others have too, and leave alone.
Call = Callable[[Array, Array], object]
#: Memory for so many bytes from a page on, and how to give it back.
Allocate = Callable[[int], tuple[Array, Callable[[], None]]]

#: Each with the parts of `n_bytes` that a rank gives and gets: one, or one for each rank. The root is rank 0.
_MANY: Final = 0
PARTS: Final = {
    "allreduce": (1, 1),
    "allgather": (1, _MANY),
    "alltoall": (_MANY, _MANY),
    "alltoallv": (_MANY, _MANY),
    "reduce-scatter": (_MANY, 1),
    "broadcast": (1, 1),
    "gather": (1, _MANY),
    "scatter": (_MANY, 1),
}
#: Those that sum float32.
REDUCTIONS: Final = ("allreduce", "reduce-scatter")
FLOAT_BYTES: Final = 4


def plain(n_bytes: int) -> tuple[Array, Callable[[], None]]:
    """Memory that the library does not know."""
    return page_aligned(n_bytes), nothing


def collective(
    rank: int, ranks: int, op: str, n_bytes: int, call: Call, allocate: Allocate = plain, *, rows: bool = False
) -> Work:
    """One of `PARTS`; sums are of float32, all else is bytes. With `rows`, parts are rows."""
    dtype = np.float32 if op in REDUCTIONS else np.uint8
    given, got = ((count or ranks) * n_bytes for count in PARTS[op])
    memory, free = allocate(given)
    x = memory.view(dtype)
    out = x if op == "broadcast" else page_aligned(got).view(dtype)
    x[:] = out[:] = 0  # numbers that sums in place leave as they are
    shapes = [(ranks, -1) if rows and count == _MANY else (-1,) for count in PARTS[op]]
    arguments = x.reshape(shapes[0]), out.reshape(shapes[1])

    def check() -> int:
        x[:] = np.concatenate([_part(op, n_bytes, rank, part) for part in range(given // n_bytes)])
        if op == "allreduce":
            out[:] = x  # gloo reduces in place
        elif op != "broadcast":
            out[:] = 0
        call(*arguments)
        wrong = 0 if op == "gather" and rank else count_wrong(out, _expected(op, n_bytes, rank, ranks))
        if op in REDUCTIONS:
            x[:] = out[:] = 0
        return wrong

    return Work(repeat(lambda: call(*arguments)), check, close=free)


def _part(op: str, n_bytes: int, rank: int, part: int) -> Array:
    """What a rank gives; whole numbers where parts are summed: any order gives the same."""
    if op in REDUCTIONS:
        return (np.arange(n_bytes // FLOAT_BYTES) % 7 + 3 * rank + part).astype(np.float32)
    return pattern(n_bytes, rank, part)


def _expected(op: str, n_bytes: int, rank: int, ranks: int) -> Array:
    if op == "broadcast":
        return _part(op, n_bytes, 0, 0)
    if op == "scatter":
        return _part(op, n_bytes, 0, rank)
    mine = 0 if PARTS[op][0] == 1 else rank
    parts = [_part(op, n_bytes, peer, mine) for peer in range(ranks)]
    return np.sum(parts, axis=0) if op in REDUCTIONS else np.concatenate(parts)
