"""Dispatch by the pull protocol (XDS section 3.2). The protocol and its proof are in `xccl.comm.moe_pull`.

Each kernel is one stage, or a part of one, and waits for nothing, here and in `moe_pull_combine`; the waits in between
are `wait.wait_all` on the fields in the own segment.
"""

from __future__ import annotations

from ..layout.moe import (
    COUNT_BITS,
    EN_ROW,
    EN_SLOT,
    EN_TOKEN,
    EN_WEIGHT,
    ENTRY_BYTES,
    EP_COUNTS,
    EP_DTYPE,
    EP_EXPERTS,
    EP_HIDDEN,
    EP_PLACES,
    EP_QUANT,
    EP_RANK,
    EP_RANKS,
    EP_RETURN_BYTES,
    EP_ROW_BYTES,
    EP_ROWS,
    EP_SCALES,
    EP_SCRATCH,
    EP_TOP_K,
    EXF_BLOCK,
    EXF_COUNT,
    EXF_EVENT,
    EXF_PULLED,
    EXPERT_FIELD_BYTES,
    RT_ENTRY_COUNTS,
    RT_ENTRY_FIRST,
    RT_EPOCH,
    RT_GOT_COUNTS,
    RT_GOT_FIRST,
    RT_GROUPS,
    RT_ROOT,
    RT_ROW_OF,
    RT_ROWS,
    RT_SENT_FIRST,
    RT_SENT_ROWS,
    RT_TOKENS,
)
from ..layout.segment import CONTROL_OFFSET
from ._jit import device, kernel
from .atomics import load_f32, load_i32, load_i64, store_f32, store_i32, store_i64, store_release
from .copy import copy_bytes
from .fields import tagged
from .moe import (
    ROW_BITS,
    ROW_MASK,
    are_streamed,
    copy_rows,
    first_expert,
    first_row_of,
    lay_out,
    local_experts,
    own_segment,
    segment,
    take_counts,
    take_own_rows,
    tell_all,
)
from .quantise import quantise_row
from .wait import OK, ring_for


@device
def pull_field_from(state: int, fields: int, peer: int) -> int:
    """Address of the field that `peer` writes in the own segment."""
    return own_segment(state) + fields + peer * EXPERT_FIELD_BYTES


@device
def pull_field_at(state: int, fields: int, peer: int) -> int:
    """Address of the field that this rank writes in the segment of `peer`."""
    return segment(state, peer) + fields + load_i64(state + EP_RANK) * EXPERT_FIELD_BYTES


@device
def write_rows(state: int, routing: int, x: int, has_places: int, skipped: int, streamed: bool) -> None:
    """Each token, quantised once if asked, into its rows in the own managed area, with scales, and places if asked.

    Of the rows for rank `skipped` nothing but places is written; the others go past the caches if asked.
    """
    own = own_segment(state)
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
            is_skipped = row >> ROW_BITS == skipped
            row &= ROW_MASK
            destination = rows + row * row_bytes
            if quant != 0 and not quantised:
                scale = quantise_row(dtype, source, hidden, destination)
                source = destination
                quantised = True
            elif not is_skipped:
                copy_rows(destination, source, row_bytes, streamed)
            if quant != 0:
                store_f32(scales + 4 * row, scale)
            if has_places != 0:
                store_i32(places + 8 * row, t)
                store_i32(places + 8 * row + 4, k)


@kernel("void(int64, int64, int64, int64)")
def dispatch_write(state: int, routing: int, x: int, has_places: int) -> None:
    """Steps 1 to 3: rows into the own managed area, with places unless peers know them.

    Rows for the own experts stay where they are until step 7, unless they are quantised.
    """
    sent = load_i64(load_i64(routing + RT_SENT_ROWS) + 8 * load_i64(state + EP_RANKS))
    streamed = are_streamed(state, sent, load_i64(state + EP_ROW_BYTES))
    skipped = load_i64(state + EP_RANK) if load_i64(state + EP_QUANT) == 0 else -1
    write_rows(state, routing, x, has_places, skipped, streamed)


@kernel("void(int64, int64)")
def dispatch_write_counts(state: int, routing: int) -> None:
    """Steps 1 to 3: counts into the own managed area."""
    counts = own_segment(state) + load_i64(state + EP_COUNTS)
    sent_first = load_i64(routing + RT_SENT_FIRST)
    for e in range(load_i64(state + EP_EXPERTS)):
        store_i32(counts + 4 * e, load_i64(sent_first + 8 * (e + 1)) - load_i64(sent_first + 8 * e))


@kernel("void(int64, int64, int64, int64)")
def dispatch_write_entries(state: int, routing: int, topk_idx: int, weights: int) -> None:
    """Steps 1 to 3 with deduplicated rows: an entry for each (token, slot), and where those for each rank begin.

    Args:
        state: address of the ExpertParallel state.
        routing: address of the routing record.
        topk_idx: address of int64 [tokens, top_k].
        weights: address of float32 [tokens, top_k].
    """
    own = own_segment(state)
    experts, ranks = load_i64(state + EP_EXPERTS), load_i64(state + EP_RANKS)
    top_k = load_i64(state + EP_TOP_K)
    row_of = load_i64(routing + RT_ROW_OF)
    sent_first, sent_rows = load_i64(routing + RT_SENT_FIRST), load_i64(routing + RT_SENT_ROWS)
    firsts = own + load_i64(state + EP_COUNTS) + 4 * experts
    for r in range(ranks):
        store_i32(firsts + 4 * r, load_i64(sent_first + 8 * first_expert(state, r)))
    cursor = load_i64(state + EP_SCRATCH)
    for e in range(experts):
        store_i64(cursor + 8 * e, load_i64(sent_first + 8 * e))
    for t in range(load_i64(routing + RT_TOKENS)):
        for k in range(top_k):
            i = t * top_k + k
            e = load_i64(topk_idx + 8 * i)
            if e < 0:
                continue
            row = first_row_of(load_i64(row_of + 8 * i))
            at = load_i64(cursor + 8 * e)
            store_i64(cursor + 8 * e, at + 1)
            entry = own + load_i64(state + EP_PLACES) + ENTRY_BYTES * at
            store_i32(entry + EN_TOKEN, t)
            store_i32(entry + EN_SLOT, k)
            store_i32(entry + EN_ROW, (row & ROW_MASK) - load_i64(sent_rows + 8 * (row >> ROW_BITS)))
            store_f32(entry + EN_WEIGHT, load_f32(weights + 4 * i))


@device
def announce_block(state: int, fields: int, peer: int, event: int, block: int, count: int, epoch: int) -> None:
    field = pull_field_at(state, fields, peer)
    store_i64(field + EXF_BLOCK, block)
    store_i64(field + EXF_COUNT, tagged(count, epoch))
    # SYNC POINT expert-field: released after the rows; the peer's `wait_all` on `event` acquires it.
    store_release(field + EXF_EVENT, event)
    ring_for(segment(state, peer) + CONTROL_OFFSET, field + EXF_EVENT)


@kernel("void(int64, int64, int64)")
def dispatch_announce(state: int, routing: int, fields: int) -> None:
    """Step 4: tell each destination where its block is. The next rank comes first, to spread the load."""
    ranks = load_i64(state + EP_RANKS)
    sent_rows = load_i64(routing + RT_SENT_ROWS)
    epoch, root = load_i64(routing + RT_EPOCH), load_i64(routing + RT_ROOT)
    for i in range(1, ranks + 1):
        peer = (load_i64(state + EP_RANK) + i) % ranks
        first = load_i64(sent_rows + 8 * peer)
        count = load_i64(sent_rows + 8 * (peer + 1)) - first
        announce_block(state, fields, peer, epoch, first, count, root)


@kernel("int64(int64, int64, int64, int64)")
def dispatch_plan(state: int, routing: int, fields: int, counts_out: int) -> int:
    """Step 6, first half: from the counts of all sources, where each run of rows goes in the output.

    Args:
        state: address of the ExpertParallel state.
        routing: address of the routing record; what is about rows that come is filled.
        fields: offset of the dispatch fields.
        counts_out: address of int64 [local experts], filled with the entries of each; 0 if all of that is known.

    Returns:
        OK, or -1 - s if source s sends by another routing, or contradicts itself.
    """
    ranks, rank = load_i64(state + EP_RANKS), load_i64(state + EP_RANK)
    first, local = first_expert(state, rank), local_experts(state, rank)
    for s in range(ranks):
        word = load_i64(pull_field_from(state, fields, s) + EXF_COUNT)
        counts = 0 if counts_out == 0 else segment(state, s) + load_i64(state + EP_COUNTS) + 4 * first
        if not take_counts(routing, s, local, word, counts):
            return -1 - s
    if counts_out != 0:
        lay_out(routing, ranks, local, counts_out)
    return OK


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def dispatch_pull(state: int, routing: int, fields: int, x: int, tokens: int, scales: int, source: int) -> None:
    """Steps 6 and 7: pull the rows from each peer's managed area, each run at once.

    Args:
        state: address of the ExpertParallel state.
        routing: address of the routing record.
        fields: offset of the dispatch fields.
        x: address of [tokens, hidden], from where the own rows come unless they are quantised.
        tokens: address of the output rows.
        scales: address of float32 [rows]; used with INT8 only.
        source: address of int32 [rows][3]: rank, token, slot; 0 if places are not pulled.
    """
    ranks = load_i64(state + EP_RANKS)
    groups = load_i64(routing + RT_GROUPS)
    row_bytes = load_i64(state + EP_ROW_BYTES)
    quant = load_i64(state + EP_QUANT)
    got_counts = load_i64(routing + RT_GOT_COUNTS)
    got_first = load_i64(routing + RT_GOT_FIRST)
    rank = load_i64(state + EP_RANK)
    streamed = are_streamed(state, load_i64(routing + RT_ROWS), row_bytes)
    for i in range(1, ranks + 1):
        s = (rank + i) % ranks
        are_pulled = s != rank or quant != 0
        if not are_pulled:
            take_own_rows(state, routing, x, tokens, streamed)
        peer = segment(state, s)
        row = load_i64(pull_field_from(state, fields, s) + EXF_BLOCK)
        for g in range(groups):
            count = load_i64(got_counts + 8 * (s * groups + g))
            if count == 0:
                continue
            first = load_i64(got_first + 8 * (s * groups + g))
            rows = peer + load_i64(state + EP_ROWS) + row * row_bytes
            if are_pulled:
                copy_rows(tokens + first * row_bytes, rows, count * row_bytes, streamed)
            if quant != 0:
                copy_bytes(scales + 4 * first, peer + load_i64(state + EP_SCALES) + 4 * row, 4 * count)
            if source != 0:
                places = peer + load_i64(state + EP_PLACES) + 8 * row
                for j in range(count):
                    at = source + 12 * (first + j)
                    store_i32(at, s)
                    store_i32(at + 4, load_i32(places + 8 * j))
                    store_i32(at + 8, load_i32(places + 8 * j + 4))
            row += count


@kernel("void(int64, int64, int64, int64, int64)")
def dispatch_pull_entries(state: int, routing: int, source: int, index: int, weights: int) -> None:
    """Steps 6 and 7 with deduplicated rows: the entries for the own experts.

    Args:
        state: address of the ExpertParallel state.
        routing: address of the routing record.
        source: address of int32 [rows][3]: rank, token, first slot here.
        index: address of int32 [entries][3]: row, local expert, slot.
        weights: address of float32 [entries].
    """
    ranks, rank = load_i64(state + EP_RANKS), load_i64(state + EP_RANK)
    local = local_experts(state, rank)
    counts, firsts = load_i64(routing + RT_ENTRY_COUNTS), load_i64(routing + RT_ENTRY_FIRST)
    got_first = load_i64(routing + RT_GOT_FIRST)
    for r in range(load_i64(routing + RT_ROWS)):
        store_i32(source + 12 * r + 8, load_i64(state + EP_TOP_K))
    for i in range(1, ranks + 1):
        s = (rank + i) % ranks
        peer = segment(state, s)
        begin = load_i32(peer + load_i64(state + EP_COUNTS) + 4 * (load_i64(state + EP_EXPERTS) + rank))
        entry = peer + load_i64(state + EP_PLACES) + ENTRY_BYTES * begin
        for e in range(local):
            first = load_i64(firsts + 8 * (s * local + e))
            for j in range(load_i64(counts + 8 * (s * local + e))):
                row = load_i64(got_first + 8 * s) + load_i32(entry + EN_ROW)
                slot = load_i32(entry + EN_SLOT)
                at = index + 12 * (first + j)
                store_i32(at, row)
                store_i32(at + 4, e)
                store_i32(at + 8, slot)
                store_f32(weights + 4 * (first + j), load_f32(entry + EN_WEIGHT))
                origin = source + 12 * row
                store_i32(origin, s)
                store_i32(origin + 4, load_i32(entry + EN_TOKEN))
                store_i32(origin + 8, min(slot, load_i32(origin + 8)))
                entry += ENTRY_BYTES


@kernel("void(int64, int64, int64)")
def release(state: int, fields: int, epoch: int) -> None:
    """Tell each peer that this rank has pulled all it wanted from it, up to `epoch`."""
    # SYNC POINT expert-pulled: released after the reads; the peer's `wait_all` acquires it before it writes.
    tell_all(state, fields, EXPERT_FIELD_BYTES, EXF_PULLED, epoch)


@kernel("int64(int64)")
def epoch_of(count_address: int) -> int:
    """Epoch of the dispatch (modulo 2**23) whose rows a field announces."""
    return load_i64(count_address) >> COUNT_BITS
