"""Combine by the pull protocol; see `moe_pull`."""

from __future__ import annotations

from ..layout.moe import (
    EP_RANK,
    EP_RANKS,
    EP_RETURN_BYTES,
    EP_RETURNS,
    EP_SCRATCH,
    EP_STARTS,
    EP_TOP_K,
    EXF_BLOCK,
    EXF_COUNT,
    RT_AT,
    RT_EPOCH,
    RT_GOT_COUNTS,
    RT_GOT_FIRST,
    RT_GROUPS,
    RT_ROW_OF,
    RT_ROWS,
    RT_SENT_ROWS,
    RT_TOKENS,
)
from ._jit import device, kernel
from .atomics import load_f32, load_i64
from .copy import copy_bytes
from .fields import tagged
from .moe import (
    ROW_MASK,
    are_streamed,
    copy_rows,
    local_experts,
    locate_by_expert,
    locate_run,
    own_segment,
    rows_from,
    segment,
)
from .moe_pull import announce_block, pull_field_from
from .moe_sums import add_operand, sum_operands
from .wait import OK


@kernel("void(int64, int64)")
def combine_write_starts(state: int, routing: int) -> None:
    """Combine, steps 1 to 3 with outputs in place: where those for each origin and expert start."""
    starts = own_segment(state) + load_i64(state + EP_STARTS)
    runs = load_i64(state + EP_RANKS) * load_i64(routing + RT_GROUPS)
    copy_bytes(starts, load_i64(routing + RT_GOT_FIRST), 8 * runs)


@kernel("void(int64, int64, int64)")
def combine_write(state: int, routing: int, expert_out: int) -> None:
    """Combine, steps 1 to 3: expert outputs into the own managed area, a block for each origin, in its order."""
    own = own_segment(state)
    row_bytes = load_i64(state + EP_RETURN_BYTES)
    got_counts = load_i64(routing + RT_GOT_COUNTS)
    got_first = load_i64(routing + RT_GOT_FIRST)
    streamed = are_streamed(state, load_i64(routing + RT_ROWS), row_bytes)
    at = own + load_i64(state + EP_RETURNS)
    for i in range(load_i64(state + EP_RANKS) * load_i64(routing + RT_GROUPS)):
        n_bytes = load_i64(got_counts + 8 * i) * row_bytes
        copy_rows(at, expert_out + load_i64(got_first + 8 * i) * row_bytes, n_bytes, streamed)
        at += n_bytes


@kernel("void(int64, int64, int64, int64, int64, int64)")
def combine_announce(state: int, routing: int, fields: int, event: int, rows: int, in_place: int) -> None:
    """Combine, step 4: tell each origin where its block is.

    Args:
        state: address of the ExpertParallel state.
        routing: address of the routing record.
        fields: offset of the combine fields.
        event: epoch of this combine.
        rows: offset in the own segment of the block for the first origin, or of outputs that lie in place.
        in_place: 1 if each origin has to look where its runs of rows start, else 0.
    """
    row_bytes = load_i64(state + EP_RETURN_BYTES)
    first = 0
    for s in range(load_i64(state + EP_RANKS)):
        count = rows_from(routing, s)
        block = -rows if in_place != 0 else rows + first * row_bytes
        announce_block(state, fields, s, event, block, count, load_i64(routing + RT_EPOCH))
        first += count


@kernel("int64(int64, int64, int64)")
def combine_check(state: int, routing: int, fields: int) -> int:
    """Does each peer return the rows of the same dispatch? OK, or -1 - peer of the first that does not."""
    sent_rows = load_i64(routing + RT_SENT_ROWS)
    epoch = load_i64(routing + RT_EPOCH)
    for peer in range(load_i64(state + EP_RANKS)):
        count = load_i64(sent_rows + 8 * (peer + 1)) - load_i64(sent_rows + 8 * peer)
        if load_i64(pull_field_from(state, fields, peer) + EXF_COUNT) != tagged(count, epoch):
            return -1 - peer
    return OK


@device
def _locate_returned(state: int, routing: int, fields: int) -> None:
    """Note where the output of each row is: in the block for this rank, or among all outputs of its rank."""
    row_bytes = load_i64(state + EP_RETURN_BYTES)
    sent_rows = load_i64(routing + RT_SENT_ROWS)
    rank = load_i64(state + EP_RANK)
    for p in range(load_i64(state + EP_RANKS)):
        peer, block = segment(state, p), load_i64(pull_field_from(state, fields, p) + EXF_BLOCK)
        if block >= 0:
            first, end = load_i64(sent_rows + 8 * p), load_i64(sent_rows + 8 * (p + 1))
            locate_run(routing, first, end, peer + block, row_bytes)
        else:
            starts = peer + load_i64(state + EP_STARTS) + 8 * rank * local_experts(state, p)
            locate_by_expert(state, routing, p, starts, peer - block, row_bytes)


@kernel("void(int64, int64, int64, int64, int64, int64)")
def combine_reduce(state: int, routing: int, fields: int, weights: int, shared: int, y: int) -> None:
    """Combine, steps 6 and 7: pull the rows of each token from the ranks of its experts, and sum them in slot order.

    Args:
        state: address of the ExpertParallel state.
        routing: address of the routing record.
        fields: offset of the combine fields.
        weights: address of float32 [tokens, top_k]; 0 for weights of 1.
        shared: address of [tokens, hidden] to be added last; 0 for none.
        y: address of the output [tokens, hidden].
    """
    top_k = load_i64(state + EP_TOP_K)
    row_bytes = load_i64(state + EP_RETURN_BYTES)
    row_of, at = load_i64(routing + RT_ROW_OF), load_i64(routing + RT_AT)
    _locate_returned(state, routing, fields)
    addresses = load_i64(state + EP_SCRATCH)
    gates = addresses + 8 * (top_k + 1)
    for t in range(load_i64(routing + RT_TOKENS)):
        n = 0
        for k in range(top_k):
            i = t * top_k + k
            row = load_i64(row_of + 8 * i)
            if row < 0:
                continue
            address = load_i64(at + 8 * (row & ROW_MASK))
            n = add_operand(addresses, gates, n, address, 1.0 if weights == 0 else load_f32(weights + 4 * i))
        sum_operands(state, addresses, gates, n, 0 if shared == 0 else shared + t * row_bytes, y + t * row_bytes)
