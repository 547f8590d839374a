"""What dispatch and combine have in common, whichever protocol moves their rows.

Kernels wait for nothing here; each is a stage, or a part of one.
"""

from __future__ import annotations

from ..layout.moe import (
    COUNT_MASK,
    EP_EXPERTS,
    EP_RANK,
    EP_RANKS,
    EP_ROW_BYTES,
    EP_SCRATCH,
    EP_SEGMENTS,
    EP_TOP_K,
    RT_AT,
    RT_ENTRIES,
    RT_ENTRY_COUNTS,
    RT_ENTRY_FIRST,
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
from .atomics import load_f32, load_i32, load_i64, store_f32, store_i64, store_release
from .copy import STREAMING_THRESHOLD_BYTES, copy_bytes, copy_bytes_streaming
from .fields import tagged
from .reduce import weighted_sum_rows
from .wait import ring_for

#: In `row_of`, the rank that owns the expert stands above the row's number.
ROW_BITS = 40
ROW_MASK = (1 << ROW_BITS) - 1


@device
def segment(state: int, rank: int) -> int:
    """Address of a rank's segment."""
    return load_i64(load_i64(state + EP_SEGMENTS) + 8 * rank)


@device
def first_expert(state: int, rank: int) -> int:
    """The first expert of a rank: as `layout.moe.first_expert`."""
    experts, ranks = load_i64(state + EP_EXPERTS), load_i64(state + EP_RANKS)
    each = experts // ranks
    return rank * each + min(rank, experts - each * ranks)


@device
def local_experts(state: int, rank: int) -> int:
    """How many experts a rank holds."""
    return first_expert(state, rank + 1) - first_expert(state, rank)


@device
def _owner(each: int, more: int, expert: int) -> int:
    """The rank of an expert, if `more` ranks hold `each + 1` experts, and then the others `each`."""
    whole = more * (each + 1)
    if expert < whole:
        return expert // (each + 1)
    return more + (expert - whole) // each


@device
def first_row_of(element: int) -> int:
    """What `row_of` has for the first slot with this row, from what it has for this one; negative for no expert."""
    return element if element >= -1 else -2 - element


@device
def _count(state: int, routing: int, topk_idx: int) -> int:
    """Where the entries of each expert begin, into `sent_first`; how many there are, or -1 - i for a bad element i."""
    experts = load_i64(state + EP_EXPERTS)
    sent_first = load_i64(routing + RT_SENT_FIRST)
    for e in range(experts):
        store_i64(sent_first + 8 * e, 0)
    for i in range(load_i64(routing + RT_TOKENS) * load_i64(state + EP_TOP_K)):
        e = load_i64(topk_idx + 8 * i)
        if e < -1 or e >= experts:
            return -1 - i
        if e >= 0:
            store_i64(sent_first + 8 * e, load_i64(sent_first + 8 * e) + 1)
    entries = 0
    for e in range(experts):
        count = load_i64(sent_first + 8 * e)
        store_i64(sent_first + 8 * e, entries)
        entries += count
    store_i64(sent_first + 8 * experts, entries)
    return entries


@device
def route_rows(state: int, routing: int, topk_idx: int) -> int:
    """Give each (token, slot) a row of its own: by expert, then token, then slot.

    Args:
        state: address of the ExpertParallel state.
        routing: address of the routing record; `row_of`, `sent_first` and `sent_rows` are filled.
        topk_idx: address of int64 [tokens, top_k].

    Returns:
        The number of rows, or -1 - i if element i is neither -1 nor an expert.
    """
    rows = _count(state, routing, topk_idx)
    if rows < 0:
        return rows
    experts, ranks = load_i64(state + EP_EXPERTS), load_i64(state + EP_RANKS)
    each = experts // ranks
    more = experts - each * ranks
    row_of = load_i64(routing + RT_ROW_OF)
    sent_first, sent_rows = load_i64(routing + RT_SENT_FIRST), load_i64(routing + RT_SENT_ROWS)
    for r in range(ranks + 1):
        store_i64(sent_rows + 8 * r, load_i64(sent_first + 8 * (r * each + min(r, more))))
    cursor = load_i64(state + EP_SCRATCH)
    for e in range(experts):
        store_i64(cursor + 8 * e, load_i64(sent_first + 8 * e))
    for i in range(load_i64(routing + RT_TOKENS) * load_i64(state + EP_TOP_K)):
        e = load_i64(topk_idx + 8 * i)
        if e < 0:
            store_i64(row_of + 8 * i, -1)
        else:
            row = load_i64(cursor + 8 * e)
            store_i64(cursor + 8 * e, row + 1)
            store_i64(row_of + 8 * i, (_owner(each, more, e) << ROW_BITS) | row)
    return rows


@device
def route_rows_dedup(state: int, routing: int, topk_idx: int) -> int:
    """Give each token one row for each rank that has any of its experts: by rank, then token.

    Arguments and result are those of `route_rows`.
    """
    entries = _count(state, routing, topk_idx)
    if entries < 0:
        return entries
    experts, ranks = load_i64(state + EP_EXPERTS), load_i64(state + EP_RANKS)
    tokens, top_k = load_i64(routing + RT_TOKENS), load_i64(state + EP_TOP_K)
    each = experts // ranks
    more = experts - each * ranks
    row_of = load_i64(routing + RT_ROW_OF)
    sent_rows = load_i64(routing + RT_SENT_ROWS)
    # For each rank: the last token that was seen to need it, and the row that this token has there.
    last = load_i64(state + EP_SCRATCH)
    row_at = last + 8 * ranks
    for r in range(ranks):
        store_i64(last + 8 * r, -1)
        store_i64(sent_rows + 8 * r, 0)
    for t in range(tokens):
        for k in range(top_k):
            e = load_i64(topk_idx + 8 * (t * top_k + k))
            if e < 0:
                continue
            r = _owner(each, more, e)
            if load_i64(last + 8 * r) != t:
                store_i64(last + 8 * r, t)
                store_i64(sent_rows + 8 * r, load_i64(sent_rows + 8 * r) + 1)
    rows = 0
    for r in range(ranks):
        count = load_i64(sent_rows + 8 * r)
        store_i64(sent_rows + 8 * r, rows)
        store_i64(row_at + 8 * r, rows - 1)
        store_i64(last + 8 * r, -1)
        rows += count
    store_i64(sent_rows + 8 * ranks, rows)
    for t in range(tokens):
        for k in range(top_k):
            i = t * top_k + k
            e = load_i64(topk_idx + 8 * i)
            if e < 0:
                store_i64(row_of + 8 * i, -1)
                continue
            r = _owner(each, more, e)
            is_first = load_i64(last + 8 * r) != t
            if is_first:
                store_i64(last + 8 * r, t)
                store_i64(row_at + 8 * r, load_i64(row_at + 8 * r) + 1)
            row = (r << ROW_BITS) | load_i64(row_at + 8 * r)
            store_i64(row_of + 8 * i, row if is_first else -2 - row)
    return rows


@kernel("int64(int64, int64, int64)")
def route(state: int, routing: int, topk_idx: int) -> int:
    """`route_rows` for Python."""
    return route_rows(state, routing, topk_idx)


@kernel("int64(int64, int64, int64)")
def route_dedup(state: int, routing: int, topk_idx: int) -> int:
    """`route_rows_dedup` for Python."""
    return route_rows_dedup(state, routing, topk_idx)


@device
def _lay_runs(counts: int, firsts: int, ranks: int, groups: int, totals: int) -> int:
    """Where each run goes: by group, then source. The totals of groups, if asked for, and of all."""
    rows = 0
    for g in range(groups):
        first = rows
        for s in range(ranks):
            at = 8 * (s * groups + g)
            store_i64(firsts + at, rows)
            rows += load_i64(counts + at)
        if totals != 0:
            store_i64(totals + 8 * g, rows - first)
    return rows


@device
def tell_all(state: int, fields: int, field_bytes: int, word: int, value: int) -> None:
    """Release a word of the own field at every rank, the next rank first, to spread the load.

    Args:
        state: address of the ExpertParallel state.
        fields: offset in every segment of the fields of all ranks there.
        field_bytes: of a field.
        word: offset in the field.
        value: what the word becomes.
    """
    rank, ranks = load_i64(state + EP_RANK), load_i64(state + EP_RANKS)
    own = fields + rank * field_bytes + word
    for i in range(1, ranks + 1):
        peer = segment(state, (rank + i) % ranks)
        store_release(peer + own, value)
        ring_for(peer + CONTROL_OFFSET, peer + own)


@device
def take_counts(routing: int, source: int, local: int, word: int, counts: int) -> bool:
    """Note what a source sends to each of the own experts.

    Args:
        routing: address of the routing record.
        source: the rank.
        local: how many experts this rank holds.
        word: what its field says: rows, and the dispatch by whose routing it sends.
        counts: address of int32 [local], the entries of each expert.

    Returns:
        False if it sends by another routing, or contradicts itself.
    """
    rows = word & COUNT_MASK
    if word != tagged(rows, load_i64(routing + RT_ROOT)):
        return False
    entry_counts, got_counts = load_i64(routing + RT_ENTRY_COUNTS), load_i64(routing + RT_GOT_COUNTS)
    total = 0
    for e in range(local):
        count = load_i32(counts + 4 * e)
        total += count
        store_i64(entry_counts + 8 * (source * local + e), count)
    if got_counts == entry_counts:
        return bool(rows == total)
    store_i64(got_counts + 8 * source, rows)
    return True


@device
def lay_out(routing: int, ranks: int, local: int, counts_out: int) -> None:
    """From the counts of all sources, where each run goes in the output; fills the routing, and the experts' counts."""
    entry_counts, got_counts = load_i64(routing + RT_ENTRY_COUNTS), load_i64(routing + RT_GOT_COUNTS)
    entries = _lay_runs(entry_counts, load_i64(routing + RT_ENTRY_FIRST), ranks, local, counts_out)
    rows = entries
    if got_counts != entry_counts:
        rows = _lay_runs(got_counts, load_i64(routing + RT_GOT_FIRST), ranks, 1, 0)
    store_i64(routing + RT_ENTRIES, entries)
    store_i64(routing + RT_ROWS, rows)


@device
def rows_from(routing: int, source: int) -> int:
    """Rows that have come from a source."""
    groups = load_i64(routing + RT_GROUPS)
    counts = load_i64(routing + RT_GOT_COUNTS) + 8 * source * groups
    rows = 0
    for g in range(groups):
        rows += load_i64(counts + 8 * g)
    return rows


@device
def locate_run(routing: int, first: int, end: int, at: int, row_bytes: int) -> None:
    """Note that rows first to end, as they were sent, lie one behind the other from address `at` on."""
    places = load_i64(routing + RT_AT)
    for row in range(first, end):
        store_i64(places + 8 * row, at)
        at += row_bytes


@device
def locate_by_expert(state: int, routing: int, peer: int, starts: int, rows: int, row_bytes: int) -> None:
    """Note where the rows for a peer lie in an array that has them in the order of its result.

    Args:
        state: address of the ExpertParallel state.
        routing: address of the routing record; `at` is filled.
        peer: the rank of the experts.
        starts: address of int64 [experts of the peer]: where the rows of this rank for each start; [1] if deduplicated.
        rows: address of that array.
        row_bytes: bytes of a row.
    """
    if load_i64(routing + RT_GOT_COUNTS) != load_i64(routing + RT_ENTRY_COUNTS):
        sent_rows = load_i64(routing + RT_SENT_ROWS) + 8 * peer
        locate_run(
            routing, load_i64(sent_rows), load_i64(sent_rows + 8), rows + load_i64(starts) * row_bytes, row_bytes
        )
        return
    begin = first_expert(state, peer)
    sent_first = load_i64(routing + RT_SENT_FIRST)
    for e in range(begin, first_expert(state, peer + 1)):
        at = rows + load_i64(starts + 8 * (e - begin)) * row_bytes
        locate_run(routing, load_i64(sent_first + 8 * e), load_i64(sent_first + 8 * (e + 1)), at, row_bytes)


@device
def are_streamed(state: int, rows: int, row_bytes: int) -> bool:
    """Do so many rows at every rank outgrow the caches, so that they had better be written past them?

    Measured with 7168 bfloat16 elements a row, on two cores: 28 MiB at all ranks together take a quarter longer past
    the caches, and 56 MiB a sixth less.
    """
    return load_i64(state + EP_RANKS) * rows * row_bytes >= STREAMING_THRESHOLD_BYTES


@device
def copy_rows(dst: int, src: int, n_bytes: int, streamed: bool) -> None:
    """Copy a row, or several, past the caches or through them."""
    if streamed:
        copy_bytes_streaming(dst, src, n_bytes)
    else:
        copy_bytes(dst, src, n_bytes)


@device
def take_own_rows(state: int, routing: int, x: int, tokens: int, streamed: bool) -> None:
    """Rows for the own experts straight from the tokens at `x` to the output; none of them is quantised."""
    rank, top_k = load_i64(state + EP_RANK), load_i64(state + EP_TOP_K)
    row_bytes = load_i64(state + EP_ROW_BYTES)
    row_of, at = load_i64(routing + RT_ROW_OF), load_i64(routing + RT_AT)
    starts = load_i64(routing + RT_GOT_FIRST) + 8 * rank * load_i64(routing + RT_GROUPS)
    locate_by_expert(state, routing, rank, starts, tokens, row_bytes)
    for t in range(load_i64(routing + RT_TOKENS)):
        for k in range(top_k):
            row = load_i64(row_of + 8 * (t * top_k + k))
            if row >= 0 and row >> ROW_BITS == rank:
                copy_rows(load_i64(at + 8 * (row & ROW_MASK)), x + t * row_bytes, row_bytes, streamed)


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def reduce_local(
    code: int,
    hidden: int,
    row_bytes: int,
    rows: int,
    entries: int,
    index: int,
    weights: int,
    expert_out: int,
    scratch: int,
    partial: int,
) -> None:
    """Sum the outputs of each row's local experts with their weights, in the order of the token's slots.

    Args:
        code: element type.
        hidden: elements of a row.
        row_bytes: bytes of a row.
        rows: number of rows.
        entries: number of entries.
        index: address of int32 [entries][3]: row, expert, slot.
        weights: address of float32 [entries].
        expert_out: address of [entries, hidden], in the order of the index.
        scratch: address of int64 [rows + 1 + 4 * entries].
        partial: address of the output [rows, hidden].
    """
    starts = scratch
    order = starts + 8 * (rows + 1)
    addresses = order + 8 * entries
    gates = addresses + 8 * entries
    for r in range(rows + 1):
        store_i64(starts + 8 * r, 0)
    for i in range(entries):
        at = starts + 8 * (load_i32(index + 12 * i) + 1)
        store_i64(at, load_i64(at) + 1)
    for r in range(rows):
        store_i64(starts + 8 * (r + 1), load_i64(starts + 8 * (r + 1)) + load_i64(starts + 8 * r))
    # Entries of a row by slot: each moves down until it meets one with a lower slot, or the row's start.
    filled = addresses
    for r in range(rows):
        store_i64(filled + 8 * r, load_i64(starts + 8 * r))
    for i in range(entries):
        r = load_i32(index + 12 * i)
        slot = load_i32(index + 12 * i + 8)
        at = load_i64(filled + 8 * r)
        store_i64(filled + 8 * r, at + 1)
        while at > load_i64(starts + 8 * r) and load_i32(index + 12 * load_i64(order + 8 * (at - 1)) + 8) > slot:
            store_i64(order + 8 * at, load_i64(order + 8 * (at - 1)))
            at -= 1
        store_i64(order + 8 * at, i)
    for r in range(rows):
        first, n = load_i64(starts + 8 * r), load_i64(starts + 8 * (r + 1)) - load_i64(starts + 8 * r)
        for j in range(n):
            i = load_i64(order + 8 * (first + j))
            store_i64(addresses + 8 * j, expert_out + i * row_bytes)
            store_f32(gates + 4 * j, load_f32(weights + 4 * i))
        weighted_sum_rows(code, addresses, gates, n, hidden, partial + r * row_bytes)
