"""A2E and E2A (XDS §3.3): what attention dies and expert dies do. The protocol and its proof are in `xccl.comm.a2e`.

Each kernel is one stage, and waits for nothing. "Holders" are the dies at which the rows for an expert die lie: without
trampolines the attention dies of a domain themselves, with trampolines those. The kernels of an expert die are the same
for both.
"""

from __future__ import annotations

from ..layout.a2e import (
    DIE_ATTENTION,
    DIE_EXPERTS,
    DIE_FIRST_EXPERT,
    DIE_FIRSTS,
    DIE_HOLDERS,
    DIE_LOCAL_EXPERTS,
    DIE_PLACES,
    DIE_QUANT,
    DIE_RETURN_BYTES,
    DIE_RETURNS,
    DIE_ROW_BYTES,
    DIE_ROWS,
    DIE_SCALES,
    DIE_SEGMENT,
    PEER_BYTES,
    PEER_MINE,
    PEER_SEGMENT,
    PEER_THEIRS,
)
from ..layout.moe import (
    EP_DTYPE,
    EP_EXPERTS,
    EP_HIDDEN,
    EP_RETURN_BYTES,
    EP_SCRATCH,
    EP_TOP_K,
    EXF_BLOCK,
    EXF_COUNT,
    RT_EPOCH,
    RT_ROW_OF,
    RT_SENT_FIRST,
    RT_TOKENS,
)
from ._jit import device, kernel
from .atomics import load_f32, load_i32, load_i64, store_f32, store_i32, store_i64
from .copy import copy_bytes, copy_bytes_auto
from .fields import announce, count_of, tagged
from .moe import ROW_MASK
from .moe_pull import write_rows
from .reduce import weighted_sum_rows
from .wait import OK

# --- attention dies --------------------------------------------------------------------------------------------------


@kernel("void(int64, int64, int64, int64)")
def attention_write(state: int, routing: int, x: int, firsts: int) -> None:
    """A2E, write: the tokens' rows into the own managed area, and the table of the experts' first rows."""
    write_rows(state, routing, x, 1, -1, False)
    sent_first = load_i64(routing + RT_SENT_FIRST)
    for e in range(load_i64(state + EP_EXPERTS) + 1):
        store_i32(firsts + 4 * e, load_i64(sent_first + 8 * e))


@kernel("void(int64, int64, int64, int64, int64)")
def attention_announce(state: int, routing: int, peers: int, count: int, start: int) -> None:
    """A2E, announce: each of `count` peers gets an equal run of the experts, from number `start` around."""
    experts = load_i64(state + EP_EXPERTS) // count
    sent_first = load_i64(routing + RT_SENT_FIRST)
    epoch = load_i64(routing + RT_EPOCH)
    for i in range(count):
        p = (start + i) % count
        first = load_i64(sent_first + 8 * p * experts)
        rows = load_i64(sent_first + 8 * (p + 1) * experts) - first
        announce(peers + PEER_BYTES * p, epoch, first, rows, epoch)


@kernel("int64(int64, int64, int64, int64)")
def attention_check(state: int, routing: int, peers: int, count: int) -> int:
    """Does each peer return the rows that this die has sent? OK, or -1 - p for the first that does not."""
    experts = load_i64(state + EP_EXPERTS) // count
    sent_first = load_i64(routing + RT_SENT_FIRST)
    for p in range(count):
        rows = load_i64(sent_first + 8 * (p + 1) * experts) - load_i64(sent_first + 8 * p * experts)
        theirs = load_i64(peers + PEER_BYTES * p + PEER_THEIRS)
        if load_i64(theirs + EXF_COUNT) != tagged(rows, load_i64(routing + RT_EPOCH)):
            return -1 - p
    return OK


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def attention_pull(state: int, routing: int, peers: int, count: int, start: int, part: int, landing: int) -> None:
    """E2A, pull, first half: outputs from part `part` of each peer's managed area, into the order of the rows sent."""
    experts = load_i64(state + EP_EXPERTS) // count
    row_bytes = load_i64(state + EP_RETURN_BYTES)
    sent_first = load_i64(routing + RT_SENT_FIRST)
    for i in range(count):
        p = (start + i) % count
        peer = peers + PEER_BYTES * p
        first = load_i64(sent_first + 8 * p * experts)
        rows = load_i64(sent_first + 8 * (p + 1) * experts) - first
        source = load_i64(peer + PEER_SEGMENT) + part
        source += load_i64(load_i64(peer + PEER_THEIRS) + EXF_BLOCK) * row_bytes
        copy_bytes_auto(landing + first * row_bytes, source, rows * row_bytes)


@kernel("void(int64, int64, int64, int64, int64)")
def attention_reduce(state: int, routing: int, landing: int, weights: int, y: int) -> None:
    """E2A, pull, second half: the weighted sum of each token's rows, in the order of its slots, in float32."""
    slots = load_i64(state + EP_TOP_K)
    row_bytes = load_i64(state + EP_RETURN_BYTES)
    row_of = load_i64(routing + RT_ROW_OF)
    addresses = load_i64(state + EP_SCRATCH)
    gates = addresses + 8 * slots
    for t in range(load_i64(routing + RT_TOKENS)):
        n = 0
        for k in range(slots):
            i = t * slots + k
            row = load_i64(row_of + 8 * i)
            if row < 0:
                continue
            store_i64(addresses + 8 * n, landing + (row & ROW_MASK) * row_bytes)
            store_f32(gates + 4 * n, load_f32(weights + 4 * i))
            n += 1
        weighted_sum_rows(
            load_i64(state + EP_DTYPE), addresses, gates, n, load_i64(state + EP_HIDDEN), y + t * row_bytes
        )


# --- expert dies -----------------------------------------------------------------------------------------------------
#
# `got` is the address of three int64 arrays, one behind the other: [attention][local experts] counts of rows,
# [attention][local experts] where they start in the output, [attention] where they start at their holder.


@device
def _firsts(die: int, got: int) -> int:
    return got + 8 * load_i64(die + DIE_ATTENTION) * load_i64(die + DIE_LOCAL_EXPERTS)


@device
def _starts(die: int, got: int) -> int:
    return got + 16 * load_i64(die + DIE_ATTENTION) * load_i64(die + DIE_LOCAL_EXPERTS)


@kernel("int64(int64, int64, int64, int64)")
def plan(die: int, holders: int, got: int, counts_out: int) -> int:
    """A2E, pull, first half: from the tables at the holders, where each run of rows goes in the output.

    Args:
        die: address of the expert die state.
        holders: table of the holders.
        got: filled, see above.
        counts_out: address of int64 [local experts], filled with the rows of each.

    Returns:
        The number of rows of the output, or -1 - h if holder h's tables contradict its field.
    """
    attention = load_i64(die + DIE_ATTENTION)
    n_holders = load_i64(die + DIE_HOLDERS)
    local = load_i64(die + DIE_LOCAL_EXPERTS)
    table_bytes = 4 * (load_i64(die + DIE_EXPERTS) + 1)
    firsts = _firsts(die, got)
    starts = _starts(die, got)
    for h in range(n_holders):
        holder = holders + PEER_BYTES * h
        table = load_i64(holder + PEER_SEGMENT) + load_i64(die + DIE_FIRSTS) + 4 * load_i64(die + DIE_FIRST_EXPERT)
        total = 0
        for a in range(h, attention, n_holders):
            first = load_i32(table)
            store_i64(starts + 8 * a, first)
            for e in range(local):
                end = load_i32(table + 4 * (e + 1))
                store_i64(got + 8 * (a * local + e), end - first)
                total += end - first
                first = end
            table += table_bytes
        if load_i64(holder + PEER_THEIRS) != 0 and total != count_of(holder):
            return -1 - h
    rows = 0
    for e in range(local):
        first = rows
        for a in range(attention):
            at = 8 * (a * local + e)
            store_i64(firsts + at, rows)
            rows += load_i64(got + at)
        store_i64(counts_out + 8 * e, rows - first)
    return rows


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def pull(die: int, holders: int, start: int, got: int, ranks: int, tokens: int, scales: int, source: int) -> None:
    """A2E, pull, second half: the rows from their holders, from attention die `start` around, each run at once.

    Args:
        die: address of the expert die state.
        holders: table of the holders.
        start: index of an attention die.
        got: filled by `plan`.
        ranks: address of int64 [attention]: ranks of the attention dies.
        tokens: address of the output rows.
        scales: address of float32 [rows]; used with INT8 only.
        source: address of int32 [rows][3]: rank, token, slot.
    """
    attention = load_i64(die + DIE_ATTENTION)
    local = load_i64(die + DIE_LOCAL_EXPERTS)
    row_bytes = load_i64(die + DIE_ROW_BYTES)
    quant = load_i64(die + DIE_QUANT)
    firsts = _firsts(die, got)
    starts = _starts(die, got)
    for i in range(attention):
        a = (start + i) % attention
        segment = load_i64(holders + PEER_BYTES * (a % load_i64(die + DIE_HOLDERS)) + PEER_SEGMENT)
        row = load_i64(starts + 8 * a)
        for e in range(local):
            count = load_i64(got + 8 * (a * local + e))
            if count == 0:
                continue
            first = load_i64(firsts + 8 * (a * local + e))
            copy_bytes_auto(
                tokens + first * row_bytes, segment + load_i64(die + DIE_ROWS) + row * row_bytes, count * row_bytes
            )
            if quant != 0:
                copy_bytes(scales + 4 * first, segment + load_i64(die + DIE_SCALES) + 4 * row, 4 * count)
            places = segment + load_i64(die + DIE_PLACES) + 8 * row
            for j in range(count):
                at = source + 12 * (first + j)
                store_i32(at, load_i64(ranks + 8 * a))
                store_i32(at + 4, load_i32(places + 8 * j))
                store_i32(at + 8, load_i32(places + 8 * j + 4))
            row += count


@kernel("void(int64, int64, int64)")
def write_returns(die: int, got: int, expert_out: int) -> None:
    """E2A, write: outputs into the own managed area, by holder, then origin, then as the origin has sent them."""
    attention = load_i64(die + DIE_ATTENTION)
    n_holders = load_i64(die + DIE_HOLDERS)
    local = load_i64(die + DIE_LOCAL_EXPERTS)
    row_bytes = load_i64(die + DIE_RETURN_BYTES)
    firsts = _firsts(die, got)
    at = load_i64(die + DIE_SEGMENT) + load_i64(die + DIE_RETURNS)
    for h in range(n_holders):
        for a in range(h, attention, n_holders):
            for i in range(a * local, (a + 1) * local):
                n_bytes = load_i64(got + 8 * i) * row_bytes
                copy_bytes_auto(at, expert_out + load_i64(firsts + 8 * i) * row_bytes, n_bytes)
                at += n_bytes


@kernel("int64(int64, int64, int64, int64, int64)")
def announce_returns(die: int, holders: int, got: int, event: int, epoch: int) -> int:
    """E2A, announce: tell each holder where the outputs are that it asks for.

    Returns:
        Where those lie that this die holds itself, as a trampoline; 0 if it is none.
    """
    attention = load_i64(die + DIE_ATTENTION)
    n_holders = load_i64(die + DIE_HOLDERS)
    local = load_i64(die + DIE_LOCAL_EXPERTS)
    first = 0
    own_first = 0
    for h in range(n_holders):
        count = 0
        for a in range(h, attention, n_holders):
            for i in range(a * local, (a + 1) * local):
                count += load_i64(got + 8 * i)
        holder = holders + PEER_BYTES * h
        if load_i64(holder + PEER_MINE) == 0:
            own_first = first
        announce(holder, event, first, count, epoch)
        first += count
    return own_first
