"""What dispatch and combine have in common, whichever protocol moves their rows: who is where, counts, places, copies.

Which rows there are is decided in `moe_routing`, and rows are summed in `moe_sums`. Kernels wait for nothing here; each
is a stage, or a part of one.
"""

from __future__ import annotations

from ..layout.moe import (
    COUNT_MASK,
    EP_EXPERTS,
    EP_RANK,
    EP_RANKS,
    EP_ROW_BYTES,
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
from ._jit import device
from .atomics import load_i32, load_i64, store_i64, store_release
from .copy import STREAMING_THRESHOLD_BYTES, copy_bytes, copy_bytes_streaming
from .fields import tagged
from .wait import ring_for

#: In `row_of`, the rank that owns the expert stands above the row's number.
ROW_BITS = 40
ROW_MASK = (1 << ROW_BITS) - 1


@device
def segment(state: int, rank: int) -> int:
    """Address of a rank's segment."""
    return load_i64(load_i64(state + EP_SEGMENTS) + 8 * rank)


@device
def own_segment(state: int) -> int:
    """Address of the own segment."""
    return segment(state, load_i64(state + EP_RANK))


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
def first_row_of(element: int) -> int:
    """What `row_of` has for the first slot with this row, from what it has for this one; negative for no expert."""
    return element if element >= -1 else -2 - element


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
        counts: address of int32 [local], the entries of each expert; 0 if they are known, and it is to repeat them.

    Returns:
        False if it sends by another routing, or contradicts itself.
    """
    if counts == 0:
        return bool(word == tagged(rows_from(routing, source), load_i64(routing + RT_ROOT)))
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
