"""Dispatch and combine by the pull protocol (XDS section 3.2). The protocol and its proof are in `xccl.comm.moe`.

Each kernel is one stage, and waits for nothing; the waits in between are `wait.wait_all` on the fields in the own
segment.
"""

from __future__ import annotations

from ..layout.moe import (
    COUNT_BITS,
    COUNT_MASK,
    EP_COUNTS,
    EP_DTYPE,
    EP_EXPERTS,
    EP_HIDDEN,
    EP_PLACES,
    EP_QUANT,
    EP_RANK,
    EP_RANKS,
    EP_RETURN_BYTES,
    EP_RETURNS,
    EP_ROW_BYTES,
    EP_ROWS,
    EP_SCALES,
    EP_SCRATCH,
    EP_SEGMENTS,
    EP_TOP_K,
    EPOCH_MASK,
    EXF_COUNT,
    EXF_EVENT,
    EXF_FIRST_ROW,
    EXF_PULLED,
    EXPERT_FIELD_BYTES,
    RT_EPOCH,
    RT_GOT_COUNTS,
    RT_GOT_FIRST,
    RT_ROW_OF,
    RT_SENT_FIRST,
    RT_TOKENS,
)
from ..layout.segment import CONTROL_OFFSET
from ._jit import device, kernel
from .atomics import load_f32, load_i32, load_i64, store_f32, store_i32, store_i64, store_release
from .copy import copy_bytes, copy_bytes_auto
from .quantise import quantise_row
from .reduce import weighted_sum_rows
from .wait import OK, ring

#: In `row_of`, the rank that owns the expert stands above the row's number.
ROW_BITS = 40
ROW_MASK = (1 << ROW_BITS) - 1


@device
def _segment(state: int, rank: int) -> int:
    return load_i64(load_i64(state + EP_SEGMENTS) + 8 * rank)


@device
def _local_experts(state: int) -> int:
    return load_i64(state + EP_EXPERTS) // load_i64(state + EP_RANKS)


@device
def _field_from(state: int, fields: int, peer: int) -> int:
    """Address of the field that `peer` writes in the own segment."""
    return _segment(state, load_i64(state + EP_RANK)) + fields + peer * EXPERT_FIELD_BYTES


@device
def _field_at(state: int, fields: int, peer: int) -> int:
    """Address of the field that this rank writes in the segment of `peer`."""
    return _segment(state, peer) + fields + load_i64(state + EP_RANK) * EXPERT_FIELD_BYTES


@kernel("int64(int64, int64, int64)")
def route(state: int, routing: int, topk_idx: int) -> int:
    """Give each (token, slot) its row: by expert, then token, then slot.

    Args:
        state: address of the ExpertParallel state.
        routing: address of the routing record; `row_of` and `sent_first` are filled.
        topk_idx: address of int64 [tokens, top_k].

    Returns:
        The number of rows, or -1 - i if element i is neither -1 nor an expert.
    """
    experts = load_i64(state + EP_EXPERTS)
    local_experts = _local_experts(state)
    elements = load_i64(routing + RT_TOKENS) * load_i64(state + EP_TOP_K)
    row_of = load_i64(routing + RT_ROW_OF)
    sent_first = load_i64(routing + RT_SENT_FIRST)
    cursor = load_i64(state + EP_SCRATCH)
    for e in range(experts):
        store_i64(cursor + 8 * e, 0)
    for i in range(elements):
        e = load_i64(topk_idx + 8 * i)
        if e < -1 or e >= experts:
            return -1 - i
        if e >= 0:
            store_i64(cursor + 8 * e, load_i64(cursor + 8 * e) + 1)
    rows = 0
    for e in range(experts):
        count = load_i64(cursor + 8 * e)
        store_i64(sent_first + 8 * e, rows)
        store_i64(cursor + 8 * e, rows)
        rows += count
    store_i64(sent_first + 8 * experts, rows)
    for i in range(elements):
        e = load_i64(topk_idx + 8 * i)
        if e < 0:
            store_i64(row_of + 8 * i, -1)
        else:
            row = load_i64(cursor + 8 * e)
            store_i64(cursor + 8 * e, row + 1)
            store_i64(row_of + 8 * i, ((e // local_experts) << ROW_BITS) | row)
    return rows


@device
def write_rows(state: int, routing: int, x: int) -> None:
    """Each token, quantised once if asked, into its rows in the own managed area, with scales and places."""
    own = _segment(state, load_i64(state + EP_RANK))
    top_k = load_i64(state + EP_TOP_K)
    hidden = load_i64(state + EP_HIDDEN)
    dtype = load_i64(state + EP_DTYPE)
    row_bytes = load_i64(state + EP_ROW_BYTES)
    token_bytes = load_i64(state + EP_RETURN_BYTES)
    row_of = load_i64(routing + RT_ROW_OF)
    rows = own + load_i64(state + EP_ROWS)
    scales = own + load_i64(state + EP_SCALES)
    places = own + load_i64(state + EP_PLACES)
    quant = load_i64(state + EP_QUANT)
    for t in range(load_i64(routing + RT_TOKENS)):
        source = x + t * token_bytes
        scale = 0.0
        quantised = False
        for k in range(top_k):
            row = load_i64(row_of + 8 * (t * top_k + k))
            if row < 0:
                continue
            row &= ROW_MASK
            destination = rows + row * row_bytes
            if quant != 0 and not quantised:
                scale = quantise_row(dtype, source, hidden, destination)
                source = destination
                quantised = True
            else:
                copy_bytes(destination, source, row_bytes)
            if quant != 0:
                store_f32(scales + 4 * row, scale)
            store_i32(places + 8 * row, t)
            store_i32(places + 8 * row + 4, k)


@kernel("void(int64, int64, int64)")
def dispatch_write(state: int, routing: int, x: int) -> None:
    """Steps 1 to 3: rows and counts into the own managed area."""
    write_rows(state, routing, x)
    counts = _segment(state, load_i64(state + EP_RANK)) + load_i64(state + EP_COUNTS)
    sent_first = load_i64(routing + RT_SENT_FIRST)
    for e in range(load_i64(state + EP_EXPERTS)):
        store_i32(counts + 4 * e, load_i64(sent_first + 8 * (e + 1)) - load_i64(sent_first + 8 * e))


@device
def _announce(state: int, fields: int, peer: int, event: int, first_row: int, count: int, epoch: int) -> None:
    field = _field_at(state, fields, peer)
    store_i64(field + EXF_FIRST_ROW, first_row)
    store_i64(field + EXF_COUNT, count | ((epoch & EPOCH_MASK) << COUNT_BITS))
    # SYNC POINT expert-field: released after the rows; the peer's `wait_all` on `event` acquires it.
    store_release(field + EXF_EVENT, event)
    ring(_segment(state, peer) + CONTROL_OFFSET)


@kernel("void(int64, int64, int64)")
def dispatch_announce(state: int, routing: int, fields: int) -> None:
    """Step 4: tell each destination where its block is. The next rank comes first, to spread the load."""
    ranks = load_i64(state + EP_RANKS)
    local_experts = _local_experts(state)
    sent_first = load_i64(routing + RT_SENT_FIRST)
    epoch = load_i64(routing + RT_EPOCH)
    for i in range(1, ranks + 1):
        peer = (load_i64(state + EP_RANK) + i) % ranks
        first = load_i64(sent_first + 8 * peer * local_experts)
        count = load_i64(sent_first + 8 * (peer + 1) * local_experts) - first
        _announce(state, fields, peer, epoch, first, count, epoch)


@kernel("int64(int64, int64, int64, int64)")
def dispatch_plan(state: int, routing: int, fields: int, counts_out: int) -> int:
    """Step 6, first half: from the counts of all sources, where each run of rows goes in the output.

    Args:
        state: address of the ExpertParallel state.
        routing: address of the routing record; `got_counts` and `got_first` are filled.
        fields: offset of the dispatch fields.
        counts_out: address of int64 [local experts], filled with the rows of each.

    Returns:
        The number of rows of the output, or -1 - s if source s contradicts itself.
    """
    ranks = load_i64(state + EP_RANKS)
    local_experts = _local_experts(state)
    rank = load_i64(state + EP_RANK)
    got_counts = load_i64(routing + RT_GOT_COUNTS)
    got_first = load_i64(routing + RT_GOT_FIRST)
    for s in range(ranks):
        counts = _segment(state, s) + load_i64(state + EP_COUNTS) + 4 * rank * local_experts
        total = 0
        for e in range(local_experts):
            count = load_i32(counts + 4 * e)
            total += count
            store_i64(got_counts + 8 * (s * local_experts + e), count)
        if total != load_i64(_field_from(state, fields, s) + EXF_COUNT) & COUNT_MASK:
            return -1 - s
    rows = 0
    for e in range(local_experts):
        first = rows
        for s in range(ranks):
            at = 8 * (s * local_experts + e)
            store_i64(got_first + at, rows)
            rows += load_i64(got_counts + at)
        store_i64(counts_out + 8 * e, rows - first)
    return rows


@kernel("void(int64, int64, int64, int64, int64, int64)")
def dispatch_pull(state: int, routing: int, fields: int, tokens: int, scales: int, source: int) -> None:
    """Steps 6 and 7: pull the rows from each peer's managed area, each run of an expert at once.

    Args:
        state: address of the ExpertParallel state.
        routing: address of the routing record.
        fields: offset of the dispatch fields.
        tokens: address of the output rows.
        scales: address of float32 [rows]; used with INT8 only.
        source: address of int32 [rows][3]: rank, token, slot.
    """
    ranks = load_i64(state + EP_RANKS)
    local_experts = _local_experts(state)
    row_bytes = load_i64(state + EP_ROW_BYTES)
    quant = load_i64(state + EP_QUANT)
    got_counts = load_i64(routing + RT_GOT_COUNTS)
    got_first = load_i64(routing + RT_GOT_FIRST)
    for i in range(1, ranks + 1):
        s = (load_i64(state + EP_RANK) + i) % ranks
        peer = _segment(state, s)
        row = load_i64(_field_from(state, fields, s) + EXF_FIRST_ROW)
        for e in range(local_experts):
            count = load_i64(got_counts + 8 * (s * local_experts + e))
            if count == 0:
                continue
            first = load_i64(got_first + 8 * (s * local_experts + e))
            rows = peer + load_i64(state + EP_ROWS) + row * row_bytes
            copy_bytes_auto(tokens + first * row_bytes, rows, count * row_bytes)
            if quant != 0:
                copy_bytes(scales + 4 * first, peer + load_i64(state + EP_SCALES) + 4 * row, 4 * count)
            places = peer + load_i64(state + EP_PLACES) + 8 * row
            for j in range(count):
                at = source + 12 * (first + j)
                store_i32(at, s)
                store_i32(at + 4, load_i32(places + 8 * j))
                store_i32(at + 8, load_i32(places + 8 * j + 4))
            row += count


@kernel("void(int64, int64, int64)")
def release(state: int, fields: int, epoch: int) -> None:
    """Tell each peer that this rank has pulled all it wanted from it, up to `epoch`."""
    ranks = load_i64(state + EP_RANKS)
    for i in range(1, ranks + 1):
        peer = (load_i64(state + EP_RANK) + i) % ranks
        # SYNC POINT expert-pulled: released after the reads; the peer's `wait_all` on `pulled` acquires it before it
        # writes.
        store_release(_field_at(state, fields, peer) + EXF_PULLED, epoch)
        ring(_segment(state, peer) + CONTROL_OFFSET)


@kernel("void(int64, int64, int64)")
def combine_write(state: int, routing: int, expert_out: int) -> None:
    """Combine, steps 1 to 3: expert outputs into the own managed area, a block for each origin, in its order."""
    own = _segment(state, load_i64(state + EP_RANK))
    local_experts = _local_experts(state)
    row_bytes = load_i64(state + EP_RETURN_BYTES)
    got_counts = load_i64(routing + RT_GOT_COUNTS)
    got_first = load_i64(routing + RT_GOT_FIRST)
    at = own + load_i64(state + EP_RETURNS)
    for i in range(load_i64(state + EP_RANKS) * local_experts):
        n_bytes = load_i64(got_counts + 8 * i) * row_bytes
        copy_bytes_auto(at, expert_out + load_i64(got_first + 8 * i) * row_bytes, n_bytes)
        at += n_bytes


@kernel("void(int64, int64, int64, int64)")
def combine_announce(state: int, routing: int, fields: int, event: int) -> None:
    """Combine, step 4: tell each origin where its block is."""
    local_experts = _local_experts(state)
    got_counts = load_i64(routing + RT_GOT_COUNTS)
    first = 0
    for s in range(load_i64(state + EP_RANKS)):
        count = 0
        for e in range(local_experts):
            count += load_i64(got_counts + 8 * (s * local_experts + e))
        _announce(state, fields, s, event, first, count, load_i64(routing + RT_EPOCH))
        first += count


@kernel("int64(int64, int64, int64)")
def combine_check(state: int, routing: int, fields: int) -> int:
    """Does each peer return the rows of the same dispatch? OK, or -1 - peer of the first that does not."""
    local_experts = _local_experts(state)
    sent_first = load_i64(routing + RT_SENT_FIRST)
    epoch = load_i64(routing + RT_EPOCH) & EPOCH_MASK
    for peer in range(load_i64(state + EP_RANKS)):
        first = load_i64(sent_first + 8 * peer * local_experts)
        count = load_i64(sent_first + 8 * (peer + 1) * local_experts) - first
        if load_i64(_field_from(state, fields, peer) + EXF_COUNT) != count | (epoch << COUNT_BITS):
            return -1 - peer
    return OK


@kernel("void(int64, int64, int64, int64, int64)")
def combine_reduce(state: int, routing: int, fields: int, weights: int, y: int) -> None:
    """Combine, steps 6 and 7: pull the rows of each token from the ranks of its experts, and sum them in slot order.

    Args:
        state: address of the ExpertParallel state.
        routing: address of the routing record.
        fields: offset of the combine fields.
        weights: address of float32 [tokens, top_k].
        y: address of the output [tokens, hidden].
    """
    top_k = load_i64(state + EP_TOP_K)
    row_bytes = load_i64(state + EP_RETURN_BYTES)
    local_experts = _local_experts(state)
    row_of = load_i64(routing + RT_ROW_OF)
    sent_first = load_i64(routing + RT_SENT_FIRST)
    addresses = load_i64(state + EP_SCRATCH)
    gates = addresses + 8 * top_k
    for t in range(load_i64(routing + RT_TOKENS)):
        n = 0
        for k in range(top_k):
            i = t * top_k + k
            row = load_i64(row_of + 8 * i)
            if row < 0:
                continue
            peer = row >> ROW_BITS
            within = (row & ROW_MASK) - load_i64(sent_first + 8 * peer * local_experts)
            row = load_i64(_field_from(state, fields, peer) + EXF_FIRST_ROW) + within
            store_i64(addresses + 8 * n, _segment(state, peer) + load_i64(state + EP_RETURNS) + row * row_bytes)
            store_f32(gates + 4 * n, load_f32(weights + 4 * i))
            n += 1
        weighted_sum_rows(
            load_i64(state + EP_DTYPE), addresses, gates, n, load_i64(state + EP_HIDDEN), y + t * row_bytes
        )


@kernel("int64(int64)")
def epoch_of(count_address: int) -> int:
    """Epoch of the dispatch (modulo 2**23) whose rows a field announces."""
    return load_i64(count_address) >> COUNT_BITS
