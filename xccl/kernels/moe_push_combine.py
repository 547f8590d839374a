"""The combine of the push protocol (CM384 §4.2.1). The protocol and its proof are in `xccl.comm.moe_push`.

Each kernel is one stage, or a part of one, and waits for nothing but `wait_tokens`.

Arguments that all have in common: `state` is the address of the ExpertParallel state, `push` that of the push state,
`routing` that of the routing record.
"""

from __future__ import annotations

from ..layout.moe import (
    EP_RANK,
    EP_RANKS,
    EP_RETURN_BYTES,
    EP_SCRATCH,
    EP_TOP_K,
    RT_AT,
    RT_EPOCH,
    RT_GOT_COUNTS,
    RT_GOT_FIRST,
    RT_GROUPS,
    RT_PLACES,
    RT_ROW_OF,
    RT_ROWS,
    RT_TOKENS,
)
from ..layout.moe_push import (
    COMBINE_HEADER_BYTES as RETURN_HEADER_BYTES,
    PS_COMBINE,
    PS_DISPATCH,
    PU_FLAGS,
    PU_KEPT,
    PU_RETURN_PACKET_BYTES,
    PU_RETURNS,
    PU_STATUS,
    PU_TARGETS,
    RP_COMBINE,
    RP_DISPATCH,
)
from ..layout.record import HOT_LINE_BYTES
from ..layout.segment import CONTROL_OFFSET, CTL_DOORBELL
from ._jit import device, kernel
from .atomics import (
    fetch_add,
    load_acquire,
    load_f32,
    load_i64,
    store_i64,
    store_release,
)
from .moe import (
    ROW_BITS,
    ROW_MASK,
    are_streamed,
    locate_by_expert,
    rows_from,
    segment,
)
from .moe_sums import add_operand, sum_operands
from .moe_writes import write_row
from .wait import OK, relax, ring, settle

_LOW_HALF = 0xFFFFFFFF


@device
def _place(state: int, push: int, at: int, token: int, slot: int) -> int:
    """Address of the place at rank `at` to which a row of a (token, slot) returns."""
    place = token * load_i64(state + EP_TOP_K) + slot
    return segment(state, at) + load_i64(push + PU_RETURNS) + place * load_i64(push + PU_RETURN_PACKET_BYTES)


@device
def _flag(state: int, push: int, at: int, token: int) -> int:
    """Address of the flag of a token at its rank."""
    return segment(state, at) + load_i64(push + PU_FLAGS) + token * HOT_LINE_BYTES


@device
def _is_awaited(push: int, row: int) -> bool:
    """Does a packet come back for this element of `row_of`?"""
    return row >= 0 and row >> ROW_BITS != load_i64(push + PU_KEPT)


@device
def _expect(state: int, push: int, routing: int, kept: int) -> None:
    """What the flags of the own tokens are to reach: as many rows more as come back for each; notes `kept`."""
    store_i64(push + PU_KEPT, kept)
    top_k = load_i64(state + EP_TOP_K)
    row_of, targets = load_i64(routing + RT_ROW_OF), load_i64(push + PU_TARGETS)
    for t in range(load_i64(routing + RT_TOKENS)):
        rows = 0
        for k in range(top_k):
            if _is_awaited(push, load_i64(row_of + 8 * (t * top_k + k))):
                rows += 1
        store_i64(targets + 8 * t, load_i64(targets + 8 * t) + rows)


@kernel("void(int64, int64, int64, int64, int64, int64)")
def combine_send(state: int, push: int, routing: int, expert_out: int, combine: int, kept: int) -> None:
    """Send and flag: each row straight to its place at its origin, and then one more in the flag of its token there.

    Args:
        state: see above.
        push: see above.
        routing: see above.
        expert_out: address of [rows, hidden].
        combine: epoch of this combine.
        kept: the own rank, if its rows are summed where they are, else -1.
    """
    _expect(state, push, routing, kept)
    rank, ranks = load_i64(state + EP_RANK), load_i64(state + EP_RANKS)
    groups = load_i64(routing + RT_GROUPS)
    row_bytes = load_i64(state + EP_RETURN_BYTES)
    got_counts, got_first = load_i64(routing + RT_GOT_COUNTS), load_i64(routing + RT_GOT_FIRST)
    places = load_i64(routing + RT_PLACES)
    epoch = load_i64(routing + RT_EPOCH)
    streamed = are_streamed(state, load_i64(routing + RT_ROWS), row_bytes)
    status = segment(state, rank) + load_i64(push + PU_STATUS)
    store_i64(status + PS_DISPATCH, epoch)
    # SYNC POINT push-status: released after what is combined; a peer that waits in vain acquires it.
    store_release(status + PS_COMBINE, combine)
    for i in range(1, ranks + 1):
        s = (rank + i) % ranks
        if s == kept:
            continue
        for g in range(groups):
            first = load_i64(got_first + 8 * (s * groups + g))
            for row in range(first, first + load_i64(got_counts + 8 * (s * groups + g))):
                place = load_i64(places + 8 * row)
                token = place >> 32
                packet = _place(state, push, s, token, place & _LOW_HALF)
                store_i64(packet + RP_DISPATCH, epoch)
                # The origin looks at it before the flag is complete, too, to say whose row is missing.
                store_release(packet + RP_COMBINE, combine)
                write_row(push, s, packet + RETURN_HEADER_BYTES, expert_out + row * row_bytes, row_bytes, streamed)
                # SYNC POINT push-token: released after the row; the origin's `wait_tokens` acquires it.
                fetch_add(_flag(state, push, s, token), 1)


@kernel("void(int64, int64, int64)")
def combine_ring(state: int, push: int, routing: int) -> None:
    """Flag, the end of it: wake the origins of all rows, once each."""
    rank, ranks = load_i64(state + EP_RANK), load_i64(state + EP_RANKS)
    for i in range(1, ranks + 1):
        s = (rank + i) % ranks
        if s != load_i64(push + PU_KEPT) and rows_from(routing, s) > 0:
            ring(segment(state, s) + CONTROL_OFFSET)


@kernel("int64(int64, int64, int64, int64, int64, int64)")
def wait_tokens(control: int, flags: int, targets: int, count: int, cursor: int, until_ns: int) -> int:
    """Wait until the flag of each token has reached what it is to reach.

    Args:
        control: address of the own control area.
        flags: address of the flags.
        targets: address of int64 [count].
        count: number of tokens.
        cursor: address of the number of the first token that was not seen to be complete, where the next call goes on.
        until_ns: when to return.
    """
    for t in range(load_i64(cursor), count):
        n = 0
        while True:
            seq = load_acquire(control + CTL_DOORBELL)
            # SYNC POINT push-token: acquires the rows of this token.
            if load_acquire(flags + t * HOT_LINE_BYTES) >= load_i64(targets + 8 * t):
                break
            n = relax(control, n, seq, until_ns)
            if n < 0:
                store_i64(cursor, t)
                return n
        settle(control, n)
    store_i64(cursor, count)
    return OK


@device
def _first_missing(state: int, push: int, routing: int, combine: int, begin: int, end: int) -> int:
    """The first (token, slot) of some tokens whose row of this combine, and of this dispatch, is not there; or -1."""
    rank, top_k = load_i64(state + EP_RANK), load_i64(state + EP_TOP_K)
    row_of, epoch = load_i64(routing + RT_ROW_OF), load_i64(routing + RT_EPOCH)
    for t in range(begin, end):
        for k in range(top_k):
            i = t * top_k + k
            if not _is_awaited(push, load_i64(row_of + 8 * i)):
                continue
            packet = _place(state, push, rank, t, k)
            if load_acquire(packet + RP_COMBINE) != combine or load_i64(packet + RP_DISPATCH) != epoch:
                return i
    return -1


@kernel("int64(int64, int64, int64, int64, int64)")
def first_missing(state: int, push: int, routing: int, combine: int, token: int) -> int:
    """`_first_missing` of one token, for Python."""
    return _first_missing(state, push, routing, combine, token, token + 1)


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def combine_reduce(
    state: int, push: int, routing: int, combine: int, expert_out: int, weights: int, shared: int, y: int
) -> int:
    """Reduce: sum the rows of each token in slot order, and the output of a shared expert after them.

    Args:
        state: see above.
        push: see above.
        routing: see above.
        combine: epoch of this combine.
        expert_out: address of the own outputs [rows, hidden], from where the own rows come if they were kept.
        weights: address of float32 [tokens, top_k]; 0 for weights of 1.
        shared: address of [tokens, hidden] to be added last; 0 for none.
        y: address of the output [tokens, hidden].

    Returns:
        -1; or the first (token, slot) whose row is not there, though flags are complete, and then nothing is summed.
    """
    missing = _first_missing(state, push, routing, combine, 0, load_i64(routing + RT_TOKENS))
    if missing >= 0:
        return missing
    rank, top_k = load_i64(state + EP_RANK), load_i64(state + EP_TOP_K)
    row_bytes = load_i64(state + EP_RETURN_BYTES)
    row_of, at = load_i64(routing + RT_ROW_OF), load_i64(routing + RT_AT)
    starts = load_i64(routing + RT_GOT_FIRST) + 8 * rank * load_i64(routing + RT_GROUPS)
    locate_by_expert(state, routing, rank, starts, expert_out, row_bytes)
    addresses = load_i64(state + EP_SCRATCH)
    gates = addresses + 8 * (top_k + 1)
    for t in range(load_i64(routing + RT_TOKENS)):
        n = 0
        for k in range(top_k):
            i = t * top_k + k
            row = load_i64(row_of + 8 * i)
            if row < 0:
                continue
            if _is_awaited(push, row):
                address = _place(state, push, rank, t, k) + RETURN_HEADER_BYTES
            else:
                address = load_i64(at + 8 * (row & ROW_MASK))
            n = add_operand(addresses, gates, n, address, 1.0 if weights == 0 else load_f32(weights + 4 * i))
        sum_operands(state, addresses, gates, n, 0 if shared == 0 else shared + t * row_bytes, y + t * row_bytes)
    return -1
