"""Oracles: each operation in plain NumPy, for one rank or for all ranks at once.

They define what the operations compute, to the bit, and share no code with the kernels that they judge. The functions
take the inputs of all ranks as lists, by rank, and return the outputs of all ranks as a list. The `..._one` forms
return only what one rank gets, so that each rank of a test checks its own part without doing everyone's work.

Numerics, the same on every machine:

- All arithmetic is float32, each operation rounded by itself (no fused multiply-add); results are rounded to the
  output's dtype to nearest even, and overflow to infinity.
- A NaN that comes out of arithmetic is the positive quiet NaN of its dtype (bf16 0x7fc0, fp16 0x7e00, fp32
  0x7fc00000): which NaN a processor makes is its own affair, and results are to be the same bits everywhere. Data that
  is only moved (put, send, dispatch without quantisation) keeps its bits, whatever they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..layout.moe import SOURCE_DTYPE
from .reference_collectives import (
    allgather as allgather,
)
from .reference_collectives import (
    allreduce as allreduce,
)
from .reference_collectives import (
    alltoall as alltoall,
)
from .reference_collectives import (
    alltoallv as alltoallv,
)
from .reference_collectives import (
    broadcast as broadcast,
)
from .reference_collectives import (
    gather as gather,
)
from .reference_collectives import (
    reduce as reduce,
)
from .reference_collectives import (
    reduce_scatter as reduce_scatter,
)
from .reference_collectives import (
    scatter as scatter,
)

Array = npt.NDArray[Any]
Quant = Literal["int8", "none"]

_QUANT_MAX: Final = np.float32(127)
#: The smallest normal float32. A smaller scale would have an infinite or inexact reciprocal.
_MIN_SCALE: Final = np.float32(2.0**-126)


@dataclass(frozen=True)
class DispatchResult:
    """What one rank has after a dispatch: n rows, grouped by local expert, within one by (rank, token, slot) of origin.

    Attributes:
        tokens: [n, hidden]; int8 if quantised, else the dtype of the input.
        scales: float32 [n], one per row, or None if not quantised.
        counts: int64 [local experts], rows of each; they sum to n.
        source: `SOURCE_DTYPE` [n], the origin of each row.
    """

    tokens: Array
    scales: npt.NDArray[np.float32] | None
    counts: npt.NDArray[np.int64]
    source: Array


# --- one-sided and point-to-point ------------------------------------------------------------------------------------


def put(targets: Sequence[Array], sources: Sequence[Array], peers: Sequence[int], offset: int = 0) -> list[Array]:
    """Every rank writes its source into its peer's copy of a symmetric array.

    Args:
        targets: Copies of the symmetric array before, by rank.
        sources: What each rank writes.
        peers: To which rank each rank writes. Two that write to the same place do so in the order of their ranks.
        offset: The first element written, in elements of the flattened array.

    Returns:
        The copies afterwards, by rank.
    """
    results = [target.copy() for target in targets]
    for source, peer in zip(sources, peers, strict=True):
        results[peer].reshape(-1)[offset : offset + source.size] = source.reshape(-1)
    return results


def get(targets: Sequence[Array], counts: Sequence[int], peers: Sequence[int], offset: int = 0) -> list[Array]:
    """Every rank reads `counts[rank]` elements, from `offset` on, of its peer's copy of a symmetric array.

    Returns:
        What each rank has read, flat, by rank.
    """
    return [
        targets[peer].reshape(-1)[offset : offset + count].copy() for count, peer in zip(counts, peers, strict=True)
    ]


def sendrecv(messages: Sequence[Array], peers: Sequence[int]) -> list[Array | None]:
    """Every rank sends its message to its peer; no two to the same.

    Returns:
        What each rank receives, None where nobody sends to it.
    """
    received: list[Array | None] = [None] * len(messages)
    for message, peer in zip(messages, peers, strict=True):
        if received[peer] is not None:
            raise UsageError(f"two ranks send to rank {peer} in one step", value=list(peers))
        received[peer] = message.copy()
    return received


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


def experts_per_rank(num_experts: int, ranks: int) -> int:
    """Experts on each rank: expert e lives on rank e // experts_per_rank. UsageError unless ranks divide experts."""
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
        UsageError: an expert is out of range, ranks do not divide the experts, or x and topk_idx differ in tokens.
    """
    local = experts_per_rank(num_experts, len(xs))
    return rows_of_experts(range(rank * local, (rank + 1) * local), xs, topk_idxs, range(len(xs)), num_experts, quant)


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
) -> Array:
    """What `rank` has after a combine.

    Args:
        rank: The rank whose tokens come home.
        expert_outs: [n, hidden] by rank, in the order of that rank's dispatched rows.
        dispatched: Results of the dispatch, by rank (only `source` is used).
        topk_weights: float32 [tokens, top_k] of this rank.
        topk_idx: int [tokens, top_k] of this rank, as dispatched.
        dtype: Of the result; that of `expert_outs` if None.

    Returns:
        y [tokens, hidden]; see `weighted_sum`.
    """
    hidden = expert_outs[0].shape[1]
    rows = np.zeros((*topk_idx.shape, hidden), expert_outs[0].dtype)
    for out, result in zip(expert_outs, dispatched, strict=True):
        mine = result.source["rank"] == rank
        source = result.source[mine]
        rows[source["token"], source["slot"]] = out[mine]
    return weighted_sum(rows, topk_weights, topk_idx, dtype)


def combine(
    expert_outs: Sequence[Array],
    dispatched: Sequence[DispatchResult],
    topk_weights: Sequence[Array],
    topk_idxs: Sequence[Array],
    dtype: npt.DTypeLike | None = None,
) -> list[Array]:
    """What every rank has after a combine; see `combine_one`."""
    return [
        combine_one(rank, expert_outs, dispatched, weights, topk_idx, dtype)
        for rank, (weights, topk_idx) in enumerate(zip(topk_weights, topk_idxs, strict=True))
    ]


# --- attention and experts on different dies -------------------------------------------------------------------------


def a2e_one(
    die: int,
    xs: Sequence[Array],
    topk_idxs: Sequence[Array],
    num_experts: int,
    expert_dies: int,
    quant: Quant | None = None,
    *,
    shared: int = 0,
    first: int = 0,
    ranks: Sequence[int] | None = None,
) -> DispatchResult:
    """What expert die `die` has after an A2E of one domain. The route makes no difference.

    Args:
        die: The expert die, from 0; it holds experts die * n to die * n + n - 1, where n is experts per die.
        xs: [tokens, hidden] by attention die of the domain; each is used once, in order: a lazy sequence will do.
        topk_idxs: int [tokens, top_k] by attention die, routed experts; -1 = none.
        num_experts: Routed experts in all.
        expert_dies: How many there are.
        quant: "int8" quantises each token, "none" and None move it as it is.
        shared: Replicas of a shared expert, numbered after the routed ones; each token goes to one of them besides, as
            the last slot.
        first: Number of the domain's first attention die among those of all domains; it says whose turn the replicas
            are.
        ranks: Ranks of the domain's attention dies, for `source`; first, first + 1, ... if None.
    """
    local = experts_per_rank(num_experts + shared, expert_dies)
    chosen = [with_shared(idx, first + i, num_experts, shared) for i, idx in enumerate(topk_idxs)]
    mine = range(die * local, (die + 1) * local)
    numbers = range(first, first + len(xs)) if ranks is None else ranks
    return rows_of_experts(mine, xs, chosen, numbers, num_experts + shared, quant)


def a2e(
    xs: Sequence[Array],
    topk_idxs: Sequence[Array],
    num_experts: int,
    expert_dies: int,
    quant: Quant | None = None,
    *,
    shared: int = 0,
    first: int = 0,
    ranks: Sequence[int] | None = None,
) -> list[DispatchResult]:
    """What every expert die has after an A2E of one domain; see `a2e_one`."""
    return [
        a2e_one(die, xs, topk_idxs, num_experts, expert_dies, quant, shared=shared, first=first, ranks=ranks)
        for die in range(expert_dies)
    ]


def e2a_one(
    attention: int,
    expert_outs: Sequence[Array],
    received: Sequence[DispatchResult],
    topk_weights: Array,
    topk_idx: Array,
    dtype: npt.DTypeLike | None = None,
    *,
    shared: int = 0,
    rank: int | None = None,
) -> Array:
    """What one attention die has after an E2A.

    Args:
        attention: The attention die, numbered over all domains.
        expert_outs: [n, hidden] by expert die, in the order of the rows that it received.
        received: Results of the A2E, by expert die (only `source` is used).
        topk_weights: float32 [tokens, top_k] of this die.
        topk_idx: int [tokens, top_k] of this die.
        dtype: Of the result; that of `expert_outs` if None.
        shared: Replicas of the shared expert; its output is the last slot, with weight 1.
        rank: Of the attention die; its number if None.

    Returns:
        y [tokens, hidden]; see `weighted_sum`.
    """
    # Which expert a slot names does not matter any more, only whether there is one.
    idx = with_shared(topk_idx, attention, 0, shared)
    weights = topk_weights
    if shared:
        weights = np.concatenate([topk_weights.astype(np.float32), np.ones((len(idx), 1), np.float32)], axis=1)
    return combine_one(attention if rank is None else rank, expert_outs, received, weights, idx, dtype)


def with_shared(topk_idx: Array, attention: int, num_experts: int, shared: int) -> Array:
    """Choices with a last column for the shared expert: replicas take turns, beginning with the die's own number."""
    if not shared:
        return topk_idx
    turns = num_experts + (attention + np.arange(len(topk_idx))) % shared
    return np.concatenate([topk_idx, turns[:, None]], axis=1)


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
