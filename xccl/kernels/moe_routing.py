"""Which rows the choices of tokens make: one for each (token, slot), or one for each rank that a token goes to."""

from __future__ import annotations

from ..layout.moe import (
    EP_EXPERTS,
    EP_RANKS,
    EP_SCRATCH,
    EP_TOP_K,
    RT_ROW_OF,
    RT_SENT_FIRST,
    RT_SENT_ROWS,
    RT_TOKENS,
)
from ._jit import device, kernel
from .atomics import load_i64, store_i64
from .moe import ROW_BITS


@device
def _owner(each: int, more: int, expert: int) -> int:
    """The rank of an expert, if `more` ranks hold `each + 1` experts, and then the others `each`."""
    whole = more * (each + 1)
    if expert < whole:
        return expert // (each + 1)
    return more + (expert - whole) // each


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
