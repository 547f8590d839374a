"""Dispatch and combine as one writes them without xccl: alltoallv both ways, and numba loops to pack and to sum.

Expanded: one row for each (token, expert), packed in the order of experts, those of the rank itself included. The
counts go first, [ranks, local experts]. The rows come grouped by source and within a source by expert; xccl groups
them by expert, so it does more.

Deduplicated ("dedup"): one row for each (token, rank), with the token's experts and weights behind it. What comes back
is one row for each, already summed over the experts of that rank; the sums over the ranks are left to do.

Elements are bfloat16, as bits: numba knows neither that type nor float16. What the experts do is prepared, not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numba as nb
import numpy as np
import numpy.typing as npt

from bench.peers.work import Array, Cell, Work, page_aligned, repeat
from xccl.protocol.routing import make_routing

BF16 = np.dtype(ml_dtypes.bfloat16)
VARIANTS = ("expanded", "dedup")

#: One loop is written for so many.
TOPK = 8
#: Extra bytes of a deduplicated row for each slot: an expert and a weight, 4 bytes each.
_SLOT_BYTES = 8


@dataclass(frozen=True)
class Shape:
    """Of a layer."""

    ranks: int
    tokens: int
    hidden: int
    experts: int
    topk: int = TOPK

    @classmethod
    def of(cls, cell: Cell) -> Shape:
        """Of a cell of the table."""
        return cls(cell.ranks, cell.size, cell.hidden, cell.experts)

    @property
    def local_experts(self) -> int:
        """Of each rank."""
        return self.experts // self.ranks


def routing_of(shape: Shape, rank: int) -> npt.NDArray[np.int64]:
    """[tokens, topk] experts of the tokens of a rank; the same for every library."""
    return make_routing(
        "uniform", tokens=shape.tokens, experts=shape.experts, topk=shape.topk, seed=0, rank=rank, ranks=shape.ranks
    )


class Exchange(Protocol):
    """What a library has to offer."""

    rank: int
    size: int

    def exchange_counts(self, send: Array, recv: Array) -> None:
        """Row r of `send` [ranks, n] int32 to rank r, as its row for this rank."""

    def exchange_rows(self, send: Array, sent: Array, recv: Array, received: Array) -> None:
        """Rows of uint16 [.., width]: `sent` [ranks] of them to each rank, `received` [ranks] from each."""


@dataclass(frozen=True)
class Inputs:
    """Of one rank: tokens (bf16 bits), experts, weights."""

    x: npt.NDArray[np.uint16]
    topk_idx: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]

    @classmethod
    def of(cls, shape: Shape, rank: int) -> Inputs:
        """The same for every library. Ordinary numbers: sums of denormal ones take several times as long."""
        rng = np.random.default_rng((0, rank))
        x = rows_of(shape.tokens, shape.hidden)
        x[:] = rng.standard_normal(x.shape, np.float32).astype(BF16).view(np.uint16)
        return cls(x, routing_of(shape, rank), rng.random((shape.tokens, shape.topk), np.float32))

    def count_wrong(self, y: Array, shape: Shape, tolerance: float) -> int:
        """Elements of a combined result that are not the weighted sum of what `expert_factor` makes of the tokens.

        Compared with a tolerance, since libraries round partial sums at different places; of the largest of the token.
        """
        scale = (self.weights * expert_factor(self.topk_idx, shape)).sum(axis=1)
        want = as_float(self.x) * scale[:, None]
        bound = tolerance * np.abs(want).max(axis=1, initial=0.0)[:, None]
        return int(np.count_nonzero(~(np.abs(as_float(y) - want) <= bound)))


def expert_factor(expert: Array, shape: Shape) -> npt.NDArray[np.float32]:
    """What an expert multiplies with."""
    return (1 + np.asarray(expert) / shape.experts).astype(np.float32)


def as_float(bits: Array) -> npt.NDArray[np.float32]:
    """Float32 of bf16 bits."""
    return bits.view(BF16).astype(np.float32)


def as_bits(values: Array) -> npt.NDArray[np.uint16]:
    """The bf16 bits of float32."""
    return values.astype(BF16).view(np.uint16)


def rows_of(count: int, width: int) -> npt.NDArray[np.uint16]:
    """[count, width] from a page on, filled with ordinary numbers."""
    rows: npt.NDArray[np.uint16] = page_aligned(2 * count * width).view(np.uint16).reshape(count, width)
    rows[:] = 0x3F80
    return rows


# -- loops -------------------------------------------------------------------------------------------------------------

_JIT: Callable[..., Any] = nb.njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")


@_JIT
def count_experts(topk_idx: Any, counts: Any) -> None:
    """counts[experts]: rows for each expert."""
    counts[:] = 0
    for t in range(topk_idx.shape[0]):
        for k in range(topk_idx.shape[1]):
            counts[topk_idx[t, k]] += 1


@_JIT
def pack_expanded(x: Any, topk_idx: Any, cursor: Any, out: Any, row_of: Any) -> None:
    """A row for each (token, slot), at the cursor of its expert; row_of[t, k] tells where."""
    for t in range(topk_idx.shape[0]):
        token = x[t]
        for k in range(topk_idx.shape[1]):
            row = cursor[topk_idx[t, k]]
            cursor[topk_idx[t, k]] = row + 1
            row_of[t, k] = row
            place = out[row]
            for j in range(token.shape[0]):
                place[j] = token[j]


@_JIT
def _f32(bits: Any) -> Any:
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)  # a shift gives 64 bits


@_JIT
def _bf16(value: Any) -> Any:
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@_JIT
def weighted_sum_of_8(rows: Any, row_of: Any, weights: Any, y: Any) -> None:
    """y[t] = sum over 8 slots of weight * row, in one pass over the 8 rows."""
    for t in range(row_of.shape[0]):
        a, b, c, d = rows[row_of[t, 0]], rows[row_of[t, 1]], rows[row_of[t, 2]], rows[row_of[t, 3]]
        e, f, g, h = rows[row_of[t, 4]], rows[row_of[t, 5]], rows[row_of[t, 6]], rows[row_of[t, 7]]
        w, out = weights[t], y[t]
        for j in range(out.shape[0]):
            low = w[0] * _f32(a[j]) + w[1] * _f32(b[j]) + w[2] * _f32(c[j]) + w[3] * _f32(d[j])
            high = w[4] * _f32(e[j]) + w[5] * _f32(f[j]) + w[6] * _f32(g[j]) + w[7] * _f32(h[j])
            out[j] = _bf16(low + high)


@_JIT
def count_ranks(topk_idx: Any, local_experts: int, counts: Any, last: Any) -> None:
    """counts[ranks]: tokens with an expert there. `last` [ranks] is scratch."""
    counts[:] = 0
    last[:] = -1
    for t in range(topk_idx.shape[0]):
        for k in range(topk_idx.shape[1]):
            rank = topk_idx[t, k] // local_experts
            if last[rank] != t:
                last[rank] = t
                counts[rank] += 1


@_JIT
def pack_dedup(
    x: Any, topk_idx: Any, weights: Any, local_experts: int, cursor: Any, last: Any, out: Any, row_of: Any
) -> None:
    """A row for each (token, rank): the token, its experts, its weights; row_of[t, :] lists them, -1 at the end."""
    hidden, topk = x.shape[1], topk_idx.shape[1]
    last[:] = -1
    for t in range(topk_idx.shape[0]):
        token = x[t]
        found = 0
        for k in range(topk):
            rank = topk_idx[t, k] // local_experts
            if last[rank] == t:
                continue
            last[rank] = t
            row = cursor[rank]
            cursor[rank] = row + 1
            row_of[t, found] = row
            found += 1
            place = out[row]
            for j in range(hidden):
                place[j] = token[j]
            for slot in range(topk):
                expert, weight = np.uint32(topk_idx[t, slot]), np.float32(weights[t, slot]).view(np.uint32)
                at = hidden + 4 * slot
                place[at], place[at + 1] = np.uint16(expert), np.uint16(expert >> np.uint32(16))
                place[at + 2], place[at + 3] = np.uint16(weight), np.uint16(weight >> np.uint32(16))
        for rest in range(found, topk):
            row_of[t, rest] = -1


@_JIT
def sum_rows(rows: Any, row_of: Any, total: Any, y: Any) -> None:
    """y[t] = sum of the rows of token t. `total` [hidden] float32 is scratch."""
    for t in range(row_of.shape[0]):
        total[:] = 0
        for k in range(row_of.shape[1]):
            if row_of[t, k] < 0:
                break
            row = rows[row_of[t, k]]
            for j in range(total.shape[0]):
                total[j] += _f32(row[j])
        out = y[t]
        for j in range(total.shape[0]):
            out[j] = _bf16(total[j])


def compile_loops() -> None:
    """Compile all of them, or load them from the cache: once, before ranks start together."""
    for variant in VARIANTS:
        Moe(_Alone(), Shape(ranks=1, tokens=2, hidden=16, experts=8), variant).round_trip()


class _Alone:
    """An exchange of one rank."""

    rank, size = 0, 1

    def exchange_counts(self, send: Array, recv: Array) -> None:
        recv[:] = send

    def exchange_rows(self, send: Array, sent: Array, recv: Array, received: Array) -> None:
        recv[: received[0]] = send[: sent[0]]


# -- the operation -----------------------------------------------------------------------------------------------------


class Moe:
    """Dispatch and combine over an exchange; memory is allocated once."""

    def __init__(self, exchange: Exchange, shape: Shape, variant: str) -> None:
        self.exchange, self.shape, self.is_dedup = exchange, shape, variant == "dedup"
        self.inputs = Inputs.of(shape, exchange.rank)
        ranks, hidden = shape.ranks, shape.hidden
        most_sent = shape.tokens * (min(shape.topk, ranks) if self.is_dedup else shape.topk)
        most_received = shape.tokens * ranks * (1 if self.is_dedup else min(shape.topk, shape.local_experts))
        self.width = hidden + (shape.topk * _SLOT_BYTES // 2 if self.is_dedup else 0)
        per_rank = 1 if self.is_dedup else shape.local_experts
        self.counts = np.zeros((ranks, per_rank), np.int32)
        self.counts_here = np.zeros((ranks, per_rank), np.int32)
        self.packed, self.rows = rows_of(most_sent, self.width), rows_of(most_received, self.width)
        # Experts work in place, but for rows that are wider than their outputs.
        self.outputs = rows_of(most_received, hidden) if self.is_dedup else self.rows
        self.returned = rows_of(most_sent, hidden)
        self.row_of = np.zeros((shape.tokens, shape.topk), np.int64)
        self.y = rows_of(shape.tokens, hidden)
        self.last = np.zeros(ranks, np.int64)
        self.total = np.zeros(hidden, np.float32)
        self.sent = self.received = np.zeros(ranks, np.int64)

    def dispatch(self) -> None:
        """Rows to the ranks of their experts."""
        inputs, flat = self.inputs, self.counts.reshape(-1)
        if self.is_dedup:
            count_ranks(inputs.topk_idx, self.shape.local_experts, flat, self.last)
        else:
            count_experts(inputs.topk_idx, flat)
        cursor = np.cumsum(flat, dtype=np.int64) - flat
        if self.is_dedup:
            pack_dedup(
                inputs.x, inputs.topk_idx, inputs.weights, self.shape.local_experts, cursor, self.last, self.packed,
                self.row_of,
            )  # fmt: skip
        else:
            pack_expanded(inputs.x, inputs.topk_idx, cursor, self.packed, self.row_of)
        self.exchange.exchange_counts(self.counts, self.counts_here)
        self.sent, self.received = self.counts.sum(axis=1), self.counts_here.sum(axis=1)
        self.exchange.exchange_rows(self.packed, self.sent, self.rows, self.received)

    def combine(self) -> None:
        """The experts' outputs back, and summed."""
        self.exchange.exchange_rows(self.outputs, self.received, self.returned, self.sent)
        if self.is_dedup:
            sum_rows(self.returned, self.row_of, self.total, self.y)
        else:
            weighted_sum_of_8(self.returned, self.row_of, self.inputs.weights, self.y)

    def round_trip(self) -> None:
        """Both."""
        self.dispatch()
        self.combine()

    def apply_experts(self) -> None:
        """Fill the outputs with what the experts make of the rows."""
        count, hidden, topk = int(self.received.sum()), self.shape.hidden, self.shape.topk
        values = as_float(self.rows[:count, :hidden])
        first = self.exchange.rank * self.shape.local_experts
        if self.is_dedup:
            slots = np.ascontiguousarray(self.rows[:count, hidden:]).view(np.uint32).reshape(count, topk, 2)
            expert, weight = slots[..., 0].astype(np.int64), np.ascontiguousarray(slots[..., 1]).view(np.float32)
            here = (expert >= first) & (expert < first + self.shape.local_experts)
            factor = np.where(here, weight * expert_factor(expert, self.shape), 0).sum(axis=1)
        else:
            local = np.tile(first + np.arange(self.shape.local_experts), self.shape.ranks)
            factor = expert_factor(np.repeat(local, self.counts_here.reshape(-1)), self.shape)
        self.outputs[:count] = as_bits(values * factor[:, None])

    def check(self) -> int:
        """Wrong elements of a round trip with experts that do something."""
        self.dispatch()
        self.apply_experts()
        self.y[:] = 0
        self.combine()
        return self.inputs.count_wrong(self.y, self.shape, tolerance=0.02)

    def work(self) -> Work:
        """For the table."""
        note = "rows grouped by source" if not self.is_dedup else "rows with experts and weights"
        return Work(repeat(self.round_trip), self.check, note=note)
