"""Arguments of collectives: checked, as arrays, with the plan of the call that they ask for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..layout.collectives import TB_EXPECTED, TB_ROWS
from ..protocol.collective_cuts import FLOWS, Kind
from .buffers import address_of, readable, require_int, writable

if TYPE_CHECKING:
    from .exchange import Exchange
    from .plans import Plan

Array = npt.NDArray[Any]


def checked(
    exchange: Exchange,
    rank: int,
    size: int,
    kind: Kind,
    x: Any,
    out: Any,
    op: str | None,
    root: int | None,
    algorithm: str,
) -> tuple[Array | None, Any, Plan]:
    """Input, output and plan of a call, after all checks."""
    flow = FLOWS[kind]
    if flow.rooted:
        root = require_int(root, "root", 0, size - 1)
    gives, takes = not flow.from_root or root == rank, not flow.to_root or root == rank
    if kind == "broadcast":
        x = readable(x, "x") if gives else writable(x, "x")
        return x, x, exchange.plan(kind, x.nbytes, x.dtype, op, root, algorithm)
    shape: tuple[int, ...] = ()
    if gives:
        x = readable(x, "x")
        shape, n_bytes, dtype = x.shape, x.nbytes, x.dtype
        if flow.parts:
            if not shape or shape[0] != size:
                raise UsageError(
                    f"{kind}: x must have shape [{size}, ...], a part for each rank, got {shape}",
                    value=shape, bound=size,
                )  # fmt: skip
            shape = shape[1:]
            n_bytes //= size
    else:
        if x is not None:
            raise UsageError(f"{kind}: only the root (rank {root}) gives x; it must be None elsewhere", value=root)
        if out is None:
            raise UsageError(f"{kind}: all ranks but the root (rank {root}) must pass out", value=None)
        out = writable(out, "out")
        n_bytes, dtype = out.nbytes, out.dtype
    plan = exchange.plan(kind, n_bytes, dtype, op, root, algorithm)
    if not takes:
        return x, None, plan
    if out is None:
        return x, np.empty((*plan.leads, *shape), dtype), plan
    out = writable(out, "out")
    needed_bytes = n_bytes * size if flow.keeps else n_bytes
    if out.dtype != dtype or out.nbytes != needed_bytes:
        raise UsageError(
            f"{kind}: out must hold {needed_bytes // max(dtype.itemsize, 1)} elements of {dtype}, got shape "
            f"{out.shape} of {out.dtype}",
            value=(out.shape, str(out.dtype)), bound=needed_bytes,
        )  # fmt: skip
    if x is not None and _overlap(x, out):
        own = address_of(out) + (rank * n_bytes if flow.keeps and not flow.parts else 0)
        # The output would overwrite what is still to be read.
        if address_of(x) != own or kind not in ("allgather", "allreduce", "gather"):
            x = x.copy()
    return x, out, plan


def checked_rows(
    exchange: Exchange, size: int, x: Any, send_counts: Any, recv_counts: Any, out: Any
) -> tuple[Array, Plan, int]:
    """Input, plan and size of a row of alltoallv, after all checks; the table holds the numbers of rows."""
    x = readable(x, "x")
    if x.ndim == 0:
        raise UsageError("alltoallv: x must have shape [rows, ...], got a single number", value=())
    row_bytes = x.dtype.itemsize * math.prod(x.shape[1:])
    if row_bytes == 0:
        raise UsageError(f"alltoallv: x has rows of no bytes, shape {x.shape}", value=x.shape)
    if out is not None:
        out = writable(out, "out")
        if out.dtype != x.dtype or out.ndim != x.ndim or out.shape[1:] != x.shape[1:]:
            raise UsageError(
                f"alltoallv: out must have rows like x, {x.shape[1:]} of {x.dtype}, got {out.shape} of {out.dtype}",
                value=(out.shape, str(out.dtype)), bound=x.shape[1:],
            )  # fmt: skip
        if _overlap(x, out):
            x = x.copy()
    plan = exchange.plan_rows(x.dtype, row_bytes)
    table = exchange.table
    counts = table[TB_ROWS]
    counts[:] = _counts(send_counts, "send_counts", size)
    table[TB_EXPECTED] = -1 if recv_counts is None else _counts(recv_counts, "recv_counts", size)
    if counts.min() < 0 or counts.sum() != len(x):
        raise UsageError(
            f"alltoallv: send_counts are {counts.tolist()} and sum to {counts.sum()}, x has {len(x)} rows",
            value=int(counts.sum()), bound=len(x),
        )  # fmt: skip
    return x, plan, row_bytes


def wrong_rows(rank: int, came: Array, expected: Array, out: Array | None) -> UsageError:
    """Why the rows that came could not be taken."""
    wrong = np.flatnonzero((expected >= 0) & (came != expected))
    if wrong.size:
        peer = int(wrong[0])
        return UsageError(
            f"alltoallv: rank {peer} sends {came[peer]} rows to rank {rank}, which expects {expected[peer]}",
            peer=peer, value=int(came[peer]), bound=int(expected[peer]),
        )  # fmt: skip
    rows, room = int(came.sum()), 0 if out is None else len(out)
    return UsageError(f"alltoallv: out has room for {room} rows, {rows} come", value=room, bound=rows)


def make_out(kind: Kind, x: Array, size: int) -> Array:
    """A new array for the output of a call with that input."""
    flow = FLOWS[kind]
    part = x.shape[1:] if flow.parts else x.shape
    return np.empty((size, *part) if flow.keeps else part, x.dtype)


def _overlap(x: Array, out: Array) -> bool:
    """Do two contiguous arrays share bytes?"""
    start, other = address_of(x), address_of(out)
    return start < other + out.nbytes and other < start + x.nbytes


def _counts(values: Any, name: str, size: int) -> npt.NDArray[np.int64]:
    """[size] numbers of rows.

    Raises:
        UsageError: they are something else.
    """
    counts = np.asarray(values)
    if counts.shape != (size,) or counts.dtype.kind not in "iu":
        raise UsageError(
            f"alltoallv: {name} must be {size} integers, got shape {counts.shape} of {counts.dtype}",
            value=counts.shape, bound=size,
        )  # fmt: skip
    return counts
