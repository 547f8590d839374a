"""Oracles of collectives in plain NumPy; see `reference`, which offers them too.

Each takes the inputs of all ranks as a list, by rank, and returns the outputs of all ranks as a list. Outputs of
different ranks may be the same array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Operator = Literal["sum", "prod", "max", "min"]

#: Reduced in float32.
_NARROW: Final = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


def reduce(xs: Sequence[Array], op: Operator = "sum") -> Array:
    """((x0 op x1) op x2) ..., element by element.

    Bfloat16 and float16 are reduced in float32 and rounded once, float32, float64 and integers in their own type,
    integers modulo 2**bits. If an operand of max or min is NaN, so is the result; of equal ones the first is kept (-0
    and +0 are equal). A NaN is the positive quiet NaN of the dtype.
    """
    dtype = xs[0].dtype
    wide = np.dtype(np.float32) if dtype in _NARROW else dtype
    floating = wide.kind == "f"
    acc = xs[0].astype(wide)
    with np.errstate(all="ignore"):
        for x in xs[1:]:
            value = x.astype(wide)
            if op == "sum":
                acc = acc + value
            elif op == "prod":
                acc = acc * value
            else:
                takes = value > acc if op == "max" else value < acc
                acc = np.where(takes | np.isnan(value) if floating else takes, value, acc)
        result = acc.astype(dtype)
    if floating:
        result[np.isnan(acc)] = np.array(np.nan, dtype)
    return result


def allreduce(xs: Sequence[Array], op: Operator = "sum") -> list[Array]:
    """The reduced array at each rank; see `reduce`."""
    return [reduce(xs, op)] * len(xs)


def reduce_scatter(xs: Sequence[Array], op: Operator = "sum") -> list[Array]:
    """Rank r has part r, xs[...][r], reduced."""
    return [reduce([x[r] for x in xs], op) for r in range(len(xs))]


def allgather(xs: Sequence[Array]) -> list[Array]:
    """Each rank has the arrays of all, [ranks, ...]."""
    return [np.stack(xs)] * len(xs)


def alltoall(xs: Sequence[Array]) -> list[Array]:
    """Rank r has part r of each rank, in the order of ranks."""
    return [np.stack([x[r] for x in xs]) for r in range(len(xs))]


def alltoallv(xs: Sequence[Array], send_counts: Sequence[npt.ArrayLike]) -> list[tuple[Array, npt.NDArray[np.int64]]]:
    """Rank r has the rows that each rank has for it, in the order of ranks, and their numbers.

    Args:
        xs: [rows, ...] of each rank, ordered by destination.
        send_counts: [ranks] of each rank, rows for each destination.
    """
    counts = np.asarray(send_counts, np.int64).reshape(len(xs), len(xs))
    ends = np.cumsum(counts, axis=1)
    results = []
    for r in range(len(xs)):
        rows = [x[end[r] - count[r] : end[r]] for x, count, end in zip(xs, counts, ends, strict=True)]
        results.append((np.concatenate(rows), counts[:, r].copy()))
    return results


def broadcast(xs: Sequence[Array], root: int) -> list[Array]:
    """Each rank has the array of the root."""
    return [xs[root]] * len(xs)


def gather(xs: Sequence[Array], root: int) -> list[Array | None]:
    """The root has the arrays of all, [ranks, ...]."""
    return [np.stack(xs) if r == root else None for r in range(len(xs))]


def scatter(x: Array, ranks: int) -> list[Array]:
    """Rank r has part r of the root's array x [ranks, ...]."""
    return [x[r] for r in range(ranks)]
