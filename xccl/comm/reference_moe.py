"""Oracles of dispatch and combine in plain NumPy, and the numerics of tokens; `reference` offers them, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..layout.moe import INDEX_DTYPE, SOURCE_DTYPE

Array = npt.NDArray[Any]
Quant = Literal["int8", "none"]

_QUANT_MAX: Final = np.float32(127)
#: The smallest normal float32. A smaller scale would have an infinite or inexact reciprocal.
_MIN_SCALE: Final = np.float32(2.0**-126)


@dataclass(frozen=True)
class DispatchResult:
    """What one rank has after a dispatch.

    Expanded rows are grouped by local expert, within one by (rank, token, slot) of origin. Deduplicated rows, one for
    each token that has any expert here, are ordered by (rank, token); the index has an entry for each (token, slot), in
    the order of expanded rows.

    Attributes:
        tokens: [n, hidden]; int8 if quantised, else the dtype of the input.
        scales: float32 [n], one per row, or None if not quantised.
        counts: int64 [local experts], rows of each, or entries of the index if there is one; they sum to as many.
        source: `SOURCE_DTYPE` [n], the origin of each row; with deduplicated rows, the first slot with an expert here.
        index: `INDEX_DTYPE` [m], or None if rows are expanded.
        weights: float32 [m], the gate weight of each entry of the index, or None.
    """

    tokens: Array
    scales: npt.NDArray[np.float32] | None
    counts: npt.NDArray[np.int64]
    source: Array
    index: Array | None = None
    weights: npt.NDArray[np.float32] | None = None


# --- quantisation ----------------------------------------------------------------------------------------------------


def quantise(x: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Quantise each token to INT8 with a scale of its own.

    scale = absmax / 127, at least 2**-126; q = round to nearest even(x * (1 / scale)). A token of zeros, or of no
    elements, has q = 0 and scale 0. A token with a NaN or an infinity has q = 0 and scale NaN: all of it reads as NaN.

    Args:
        x: [..., hidden], bf16, fp16 or fp32.

    Returns:
        q: int8 [..., hidden].
        scales: float32 [...].
    """
    values = x.astype(np.float32)
    absmax = np.max(np.abs(values), axis=-1, initial=np.float32(0))
    finite = np.isfinite(absmax)  # the maximum of anything and NaN is NaN
    scales = np.where(absmax == 0, np.float32(0), np.maximum(absmax / _QUANT_MAX, _MIN_SCALE))
    usable = finite & (scales > 0)
    inverse = np.float32(1) / np.where(usable, scales, np.float32(1))
    q = np.rint(np.where(usable[..., None], values, np.float32(0)) * inverse[..., None]).astype(np.int8)
    return q, np.where(finite, scales, np.float32(np.nan))


def dequantise(q: Array, scales: Array, dtype: npt.DTypeLike) -> Array:
    """The values that quantised tokens stand for: q * scale in float32, rounded to `dtype`.

    Args:
        q: int8 [..., hidden].
        scales: float32 [...].
        dtype: bf16, fp16 or fp32.

    Returns:
        [..., hidden] in `dtype`.
    """
    with np.errstate(invalid="ignore"):
        return round_to(q.astype(np.float32) * scales.astype(np.float32)[..., None], dtype)


def round_to(values: npt.NDArray[np.float32], dtype: npt.DTypeLike) -> Array:
    """Round float32 results to `dtype`: to nearest even, overflow to infinity, every NaN the canonical one."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = values.astype(dtype)
    rounded[np.isnan(values)] = np.nan
    return rounded


# --- mixture of experts ----------------------------------------------------------------------------------------------


def experts_of(rank: int, num_experts: int, ranks: int) -> range:
    """The experts on a rank: runs of num_experts // ranks, and one more on each of the first num_experts % ranks ranks.

    Raises:
        UsageError: there are no experts, or no such rank.
    """
    if num_experts < 1 or not 0 <= rank < ranks:
        raise UsageError(f"no experts of rank {rank}: {num_experts} experts, {ranks} ranks", value=rank, bound=ranks)
    shares = [num_experts // ranks + (r < num_experts % ranks) for r in range(rank + 1)]
    return range(sum(shares[:-1]), sum(shares))


def experts_per_rank(num_experts: int, ranks: int) -> int:
    """Experts on each rank, if all have as many; UsageError if not."""
    if num_experts < 1 or ranks < 1 or num_experts % ranks:
        raise UsageError(f"{num_experts} experts cannot be divided among {ranks} ranks", value=num_experts, bound=ranks)
    return num_experts // ranks


def dispatch_one(
    rank: int,
    xs: Sequence[Array],
    topk_idxs: Sequence[Array],
    num_experts: int,
    quant: Quant | None = None,
) -> DispatchResult:
    """What `rank` has after a dispatch.

    Args:
        rank: The receiving rank.
        xs: [tokens, hidden] by source rank; tokens may differ. Each is used once, in order: a lazy sequence will do.
        topk_idxs: int [tokens, top_k] by source rank, the experts of each token; -1 = none. An expert that a token
            names twice gets it twice: each slot is a row of its own.
        num_experts: Experts in all.
        quant: "int8" quantises each token, "none" and None move it as it is.

    Raises:
        UsageError: an expert is out of range, or x and topk_idx differ in tokens.
    """
    mine = experts_of(rank, num_experts, len(xs))
    return rows_of_experts(mine, xs, topk_idxs, range(len(xs)), num_experts, quant)


def rows_of_experts(
    mine: range,
    xs: Sequence[Array],
    topk_idxs: Sequence[Array],
    ranks: Sequence[int],
    num_experts: int,
    quant: Quant | None,
) -> DispatchResult:
    """What the experts `mine` get from sources with these ranks; see `dispatch_one`."""
    local = len(mine)
    rows: list[Array] = []
    experts: list[Array] = []
    sources: list[Array] = []
    for i, (source_rank, topk_idx) in enumerate(zip(ranks, topk_idxs, strict=True)):
        x = xs[i]
        _check_routing(x.shape[0], topk_idx, num_experts)
        token, slot = np.nonzero((topk_idx >= mine.start) & (topk_idx < mine.stop))
        source = np.empty(token.size, SOURCE_DTYPE)
        source["rank"], source["token"], source["slot"] = source_rank, token, slot
        rows.append(x[token])
        experts.append(topk_idx[token, slot] - mine.start)
        sources.append(source)
    expert = np.concatenate(experts).astype(np.int64)
    order = np.argsort(expert, kind="stable")  # within an expert the order stays (rank, token, slot)
    tokens = np.concatenate(rows)[order]
    scales = None
    if quant == "int8":
        tokens, scales = quantise(tokens)
    counts = np.bincount(expert, minlength=local).astype(np.int64)
    return DispatchResult(tokens, scales, counts, np.concatenate(sources)[order])


def dispatch(
    xs: Sequence[Array], topk_idxs: Sequence[Array], num_experts: int, quant: Quant | None = None
) -> list[DispatchResult]:
    """What every rank has after a dispatch; see `dispatch_one`."""
    return [dispatch_one(rank, xs, topk_idxs, num_experts, quant) for rank in range(len(xs))]


def combine_one(
    rank: int,
    expert_outs: Sequence[Array],
    dispatched: Sequence[DispatchResult],
    topk_weights: Array,
    topk_idx: Array,
    dtype: npt.DTypeLike | None = None,
    shared_out: Array | None = None,
) -> Array:
    """What `rank` has after a combine.

    Args:
        rank: The rank whose tokens come home.
        expert_outs: [n, hidden] by rank, in the order of that rank's dispatched rows.
        dispatched: Results of the dispatch, by rank (only `source` is used).
        topk_weights: float32 [tokens, top_k] of this rank.
        topk_idx: int [tokens, top_k] of this rank, as dispatched.
        dtype: Of the result; that of `expert_outs` if None.
        shared_out: [tokens, hidden] of this rank, the output of a shared expert: one more slot, the last one, with
            weight 1; or None.

    Returns:
        y [tokens, hidden]; see `weighted_sum`.
    """
    hidden = expert_outs[0].shape[1]
    rows = np.zeros((*topk_idx.shape, hidden), expert_outs[0].dtype)
    for out, result in zip(expert_outs, dispatched, strict=True):
        mine = result.source["rank"] == rank
        source = result.source[mine]
        rows[source["token"], source["slot"]] = out[mine]
    if shared_out is None:
        return weighted_sum(rows, topk_weights, topk_idx, dtype)
    ones = np.ones((len(topk_idx), 1), np.float32)
    return weighted_sum(
        np.concatenate([rows, shared_out[:, None]], axis=1),
        np.concatenate([topk_weights.astype(np.float32), ones], axis=1),
        np.concatenate([topk_idx, ones.astype(np.int64)], axis=1),
        dtype,
    )


def combine(
    expert_outs: Sequence[Array],
    dispatched: Sequence[DispatchResult],
    topk_weights: Sequence[Array],
    topk_idxs: Sequence[Array],
    dtype: npt.DTypeLike | None = None,
    shared_outs: Sequence[Array] | None = None,
) -> list[Array]:
    """What every rank has after a combine; see `combine_one`."""
    return [
        combine_one(
            rank, expert_outs, dispatched, weights, topk_idx, dtype, None if shared_outs is None else shared_outs[rank]
        )
        for rank, (weights, topk_idx) in enumerate(zip(topk_weights, topk_idxs, strict=True))
    ]


# --- deduplicated rows -----------------------------------------------------------------------------------------------


def dispatch_dedup_one(
    rank: int,
    xs: Sequence[Array],
    topk_idxs: Sequence[Array],
    topk_weights: Sequence[Array],
    num_experts: int,
    quant: Quant | None = None,
) -> DispatchResult:
    """What `rank` has after a dispatch of deduplicated rows; arguments as for `dispatch_one`, and weights by source."""
    expanded = dispatch_one(rank, xs, topk_idxs, num_experts, quant)
    by_origin = np.argsort(expanded.source, order=("rank", "token", "slot"), kind="stable")
    origins = expanded.source[by_origin]
    is_first = np.ones(len(origins), bool)
    is_first[1:] = (origins["rank"][1:] != origins["rank"][:-1]) | (origins["token"][1:] != origins["token"][:-1])
    index = np.empty(len(origins), INDEX_DTYPE)
    index["row"][by_origin] = np.cumsum(is_first) - 1
    index["expert"] = np.repeat(np.arange(len(expanded.counts)), expanded.counts)
    index["slot"] = expanded.source["slot"]
    weights = np.empty(len(index), np.float32)
    for source, theirs in enumerate(topk_weights):
        mine = expanded.source["rank"] == source
        weights[mine] = theirs[expanded.source["token"][mine], expanded.source["slot"][mine]]
    kept = by_origin[is_first]
    scales = None if expanded.scales is None else expanded.scales[kept]
    return DispatchResult(expanded.tokens[kept], scales, expanded.counts, expanded.source[kept], index, weights)


def dispatch_dedup(
    xs: Sequence[Array],
    topk_idxs: Sequence[Array],
    topk_weights: Sequence[Array],
    num_experts: int,
    quant: Quant | None = None,
) -> list[DispatchResult]:
    """What every rank has after a dispatch of deduplicated rows; see `dispatch_dedup_one`."""
    return [dispatch_dedup_one(rank, xs, topk_idxs, topk_weights, num_experts, quant) for rank in range(len(xs))]


def reduce_local(expert_out: Array, dispatched: DispatchResult, top_k: int) -> Array:
    """Sum what the experts of one rank have made of each deduplicated row, in the order of slots.

    Args:
        expert_out: [m, hidden], in the order of the index.
        dispatched: Result of the dispatch at this rank.
        top_k: Slots of a token.

    Returns:
        [n, hidden]; see `weighted_sum`.
    """
    assert dispatched.index is not None
    row, slot = dispatched.index["row"], dispatched.index["slot"]
    shape = (len(dispatched.source), top_k)
    outs = np.zeros((*shape, expert_out.shape[1]), expert_out.dtype)
    weights, used = np.zeros(shape, np.float32), np.full(shape, -1)
    outs[row, slot], weights[row, slot], used[row, slot] = expert_out, dispatched.weights, 0
    return weighted_sum(outs, weights, used)


def combine_dedup_one(
    rank: int,
    partials: Sequence[Array],
    dispatched: Sequence[DispatchResult],
    topk_idx: Array,
    shared_out: Array | None = None,
) -> Array:
    """What `rank` has after a combine of partial rows: their sum in the order of each rank's first slot.

    Args:
        rank: The rank whose tokens come home.
        partials: [n, hidden] by rank, in the order of that rank's deduplicated rows.
        dispatched: Results of the dispatch, by rank (only `source` is used).
        topk_idx: int [tokens, top_k] of this rank, as dispatched.
        shared_out: [tokens, hidden] of this rank, added last; or None.

    Returns:
        y [tokens, hidden]; see `weighted_sum`.
    """
    firsts = np.full(topk_idx.shape, -1)
    for result in dispatched:
        source = result.source[result.source["rank"] == rank]
        firsts[source["token"], source["slot"]] = 0
    return combine_one(rank, partials, dispatched, np.ones(topk_idx.shape, np.float32), firsts, None, shared_out)


def combine_dedup(
    partials: Sequence[Array],
    dispatched: Sequence[DispatchResult],
    topk_idxs: Sequence[Array],
    shared_outs: Sequence[Array] | None = None,
) -> list[Array]:
    """What every rank has after a combine of partial rows; see `combine_dedup_one`."""
    return [
        combine_dedup_one(rank, partials, dispatched, idx, None if shared_outs is None else shared_outs[rank])
        for rank, idx in enumerate(topk_idxs)
    ]


def weighted_sum(rows: Array, topk_weights: Array, topk_idx: Array, dtype: npt.DTypeLike | None = None) -> Array:
    """y[t] = sum over slots k of weights[t, k] * rows[t, k], in the order of slots.

    acc = 0; for each k with an expert: acc = acc + (weight * row), two float32 roundings; then rounded to `dtype`. A
    slot without an expert (-1) adds nothing, whatever its weight; a token without any expert is +0.

    Args:
        rows: [tokens, top_k, hidden], the expert output of each slot, bf16, fp16 or fp32.
        topk_weights: float32 [tokens, top_k].
        topk_idx: int [tokens, top_k].
        dtype: Of the result; that of `rows` if None.

    Returns:
        y [tokens, hidden].
    """
    tokens, top_k, hidden = rows.shape
    acc = np.zeros((tokens, hidden), np.float32)
    weights = topk_weights.astype(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for k in range(top_k):
            used = topk_idx[:, k] >= 0
            acc[used] = acc[used] + weights[used, k, None] * rows[used, k].astype(np.float32)
    return round_to(acc, rows.dtype if dtype is None else dtype)


def _check_routing(tokens: int, topk_idx: Array, num_experts: int) -> None:
    if topk_idx.ndim != 2 or topk_idx.shape[0] != tokens:
        raise UsageError(f"topk_idx has shape {topk_idx.shape}, not ({tokens}, top_k)", value=topk_idx.shape)
    if topk_idx.size and not (topk_idx.min() >= -1 and topk_idx.max() < num_experts):
        low, high = int(topk_idx.min()), int(topk_idx.max())
        raise UsageError(f"expert ids are {low} to {high}, must be -1 to {num_experts - 1}", bound=num_experts)
