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
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .reference_collectives import (
    allgather as allgather,
    allreduce as allreduce,
    alltoall as alltoall,
    alltoallv as alltoallv,
    broadcast as broadcast,
    gather as gather,
    reduce as reduce,
    reduce_scatter as reduce_scatter,
    scatter as scatter,
)
from .reference_kv import PagedCopy as PagedCopy, kv_transfer as kv_transfer
from .reference_moe import (
    DispatchResult as DispatchResult,
    Quant as Quant,
    combine as combine,
    combine_dedup as combine_dedup,
    combine_dedup_one as combine_dedup_one,
    combine_one as combine_one,
    dequantise as dequantise,
    dispatch as dispatch,
    dispatch_dedup as dispatch_dedup,
    dispatch_dedup_one as dispatch_dedup_one,
    dispatch_one as dispatch_one,
    experts_of as experts_of,
    experts_per_rank as experts_per_rank,
    quantise as quantise,
    reduce_local as reduce_local,
    round_to as round_to,
    rows_of_experts as rows_of_experts,
    weighted_sum as weighted_sum,
)

Array = npt.NDArray[Any]


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
