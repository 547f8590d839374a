"""Dispatch and combine by the push protocol (CM384 §4.2.1). The protocol and its proof are in `xccl.comm.moe_push`.

Each kernel is one stage, or a part of one, and waits for nothing but `wait_tokens`.

Arguments that all have in common: `state` is the address of the ExpertParallel state, `push` that of the push state,
`routing` that of the routing record.
"""

from __future__ import annotations

from ..layout.moe import (
    EP_DTYPE,
    EP_HIDDEN,
    EP_QUANT,
    EP_RANK,
    EP_RANKS,
    EP_RETURN_BYTES,
    EP_ROW_BYTES,
    EP_SCRATCH,
    EP_TOP_K,
    RT_AT,
    RT_ENTRY_FIRST,
    RT_EPOCH,
    RT_GOT_COUNTS,
    RT_GOT_FIRST,
    RT_GROUPS,
    RT_PLACES,
    RT_ROOT,
    RT_ROW_OF,
    RT_SENT_FIRST,
    RT_SENT_ROWS,
    RT_TOKENS,
)
from ..layout.moe_push import (
    COMBINE_HEADER_BYTES as RETURN_HEADER_BYTES,
    PACKET,
    PACKET_ENTRY_BYTES,
    PE_EXPERT,
    PE_SLOT,
    PE_WEIGHT,
    PF_COUNT,
    PF_EVENT,
    PF_TAKEN,
    PK_ENTRIES,
    PK_RANK,
    PK_SLOT,
    PK_TOKEN,
    PS_COMBINE,
    PS_DISPATCH,
    PU_BLOCK_BYTES,
    PU_COUNTS,
    PU_COUNTS_BYTES,
    PU_FIELDS,
    PU_FLAGS,
    PU_HEADER_BYTES,
    PU_KEPT,
    PU_PACKET_BYTES,
    PU_PACKETS,
    PU_RETURN_PACKET_BYTES,
    PU_RETURNS,
    PU_SCALE,
    PU_STATUS,
    PU_TARGETS,
    RP_COMBINE,
    RP_DISPATCH,
)
from ..layout.record import HOT_LINE_BYTES
from ..layout.ring import FIELD_BYTES
from ..layout.segment import CONTROL_OFFSET, CTL_DOORBELL
from ._jit import device, kernel
from .atomics import (
    fetch_add,
    load_acquire,
    load_f32,
    load_i32,
    load_i64,
    store_f32,
    store_i32,
    store_i64,
    store_release,
)
from .copy import copy_bytes
from .fields import tagged
from .moe import (
    ROW_BITS,
    ROW_MASK,
    first_expert,
    first_row_of,
    lay_out,
    local_experts,
    locate_by_expert,
    rows_from,
    segment,
    take_counts,
    tell_all,
)
from .quantise import quantise_row
from .reduce import weighted_sum_rows
from .wait import OK, relax, ring, ring_for, settle

_PACKET_ENTRIES = PACKET.size_bytes
_LOW_HALF = 0xFFFFFFFF


@device
def _field_at(state: int, push: int, peer: int) -> int:
    """Address of the field that this rank writes in the segment of `peer`."""
    return segment(state, peer) + load_i64(push + PU_FIELDS) + load_i64(state + EP_RANK) * FIELD_BYTES


@device
def _field_from(state: int, push: int, peer: int) -> int:
    """Address of the field that `peer` writes in the own segment."""
    return segment(state, load_i64(state + EP_RANK)) + load_i64(push + PU_FIELDS) + peer * FIELD_BYTES


@device
def _counts(state: int, push: int, at: int, writer: int, epoch: int) -> int:
    """Address of the counts that `writer` leaves at rank `at` in the dispatch with this epoch."""
    record = (epoch & 1) * load_i64(state + EP_RANKS) + writer
    return segment(state, at) + load_i64(push + PU_COUNTS) + record * load_i64(push + PU_COUNTS_BYTES)


@device
def _block(state: int, push: int, at: int, writer: int) -> int:
    """Address of the block of packets that `writer` fills at rank `at`."""
    return segment(state, at) + load_i64(push + PU_PACKETS) + writer * load_i64(push + PU_BLOCK_BYTES)


@device
def _place(state: int, push: int, at: int, token: int, slot: int) -> int:
    """Address of the place at rank `at` to which a row of a (token, slot) returns."""
    place = token * load_i64(state + EP_TOP_K) + slot
    return segment(state, at) + load_i64(push + PU_RETURNS) + place * load_i64(push + PU_RETURN_PACKET_BYTES)


@device
def _flag(state: int, push: int, at: int, token: int) -> int:
    """Address of the flag of a token at its rank."""
    return segment(state, at) + load_i64(push + PU_FLAGS) + token * HOT_LINE_BYTES


@kernel("void(int64, int64, int64)")
def release(state: int, push: int, operations: int) -> None:
    """Tell each peer that this rank has read all that it got in so many operations."""
    # SYNC POINT push-taken: released after the reads; the peer's `wait_all` acquires it before it writes.
    tell_all(state, load_i64(push + PU_FIELDS), FIELD_BYTES, PF_TAKEN, operations)


@device
def _write_entries(
    state: int, routing: int, packet: int, token: int, slot: int, topk_idx: int, weights: int, peer: int
) -> int:
    """Write the entries of a deduplicated row, whose first slot is `slot`, into its packet. How many there are."""
    top_k = load_i64(state + EP_TOP_K)
    row_of = load_i64(routing + RT_ROW_OF) + 8 * token * top_k
    row = load_i64(row_of + 8 * slot)
    first = first_expert(state, peer)
    n = 0
    for k in range(slot, top_k):
        if first_row_of(load_i64(row_of + 8 * k)) != row:
            continue
        entry = packet + _PACKET_ENTRIES + n * PACKET_ENTRY_BYTES
        i = token * top_k + k
        store_i32(entry + PE_SLOT, k)
        store_i32(entry + PE_EXPERT, load_i64(topk_idx + 8 * i) - first)
        store_f32(entry + PE_WEIGHT, load_f32(weights + 4 * i))
        n += 1
    return n


@kernel("void(int64, int64, int64, int64, int64, int64)")
def dispatch_send(state: int, push: int, routing: int, x: int, topk_idx: int, weights: int) -> None:
    """Send: each token, quantised once if asked, in packets straight into the blocks of its peers.

    Of packets for the own experts, unless they are quantised, only the header is written.

    Args:
        state: see above.
        push: see above.
        routing: see above.
        x: address of [tokens, hidden].
        topk_idx: address of int64 [tokens, top_k] if rows are deduplicated and peers do not know their entries, else 0.
        weights: address of float32 [tokens, top_k]; likewise.
    """
    rank = load_i64(state + EP_RANK)
    top_k = load_i64(state + EP_TOP_K)
    hidden = load_i64(state + EP_HIDDEN)
    row_bytes = load_i64(state + EP_ROW_BYTES)
    token_bytes = load_i64(state + EP_RETURN_BYTES)
    quant = load_i64(state + EP_QUANT)
    row_of, sent_rows = load_i64(routing + RT_ROW_OF), load_i64(routing + RT_SENT_ROWS)
    packet_bytes, header_bytes = load_i64(push + PU_PACKET_BYTES), load_i64(push + PU_HEADER_BYTES)
    for t in range(load_i64(routing + RT_TOKENS)):
        source = x + t * token_bytes
        scale = 0.0
        quantised = False
        for k in range(top_k):
            row = load_i64(row_of + 8 * (t * top_k + k))
            if row < 0:
                continue
            peer = row >> ROW_BITS
            place = (row & ROW_MASK) - load_i64(sent_rows + 8 * peer)
            packet = _block(state, push, peer, rank) + place * packet_bytes
            destination = packet + header_bytes
            store_i32(packet + PK_RANK, rank)
            store_i32(packet + PK_TOKEN, t)
            store_i32(packet + PK_SLOT, k)
            if topk_idx != 0:
                n = _write_entries(state, routing, packet, t, k, topk_idx, weights, peer)
                store_i32(packet + PK_ENTRIES, n)
            if quant != 0 and not quantised:
                scale = quantise_row(load_i64(state + EP_DTYPE), source, hidden, destination)
                source = destination
                quantised = True
            elif quant != 0 or peer != rank:
                copy_bytes(destination, source, row_bytes)
            if quant != 0:
                store_f32(packet + load_i64(push + PU_SCALE), scale)


@kernel("void(int64, int64, int64, int64)")
def dispatch_notify(state: int, push: int, routing: int, has_counts: int) -> None:
    """Notify: counts, unless peers know them, and a flag to every peer, the next rank first, to spread the load."""
    rank, ranks = load_i64(state + EP_RANK), load_i64(state + EP_RANKS)
    sent_first, sent_rows = load_i64(routing + RT_SENT_FIRST), load_i64(routing + RT_SENT_ROWS)
    epoch, root = load_i64(routing + RT_EPOCH), load_i64(routing + RT_ROOT)
    for i in range(1, ranks + 1):
        peer = (rank + i) % ranks
        if has_counts != 0:
            counts = _counts(state, push, peer, rank, epoch)
            first = sent_first + 8 * first_expert(state, peer)
            for e in range(local_experts(state, peer)):
                store_i32(counts + 4 * e, load_i64(first + 8 * (e + 1)) - load_i64(first + 8 * e))
        field = _field_at(state, push, peer)
        rows = load_i64(sent_rows + 8 * (peer + 1)) - load_i64(sent_rows + 8 * peer)
        store_i64(field + PF_COUNT + 8 * (epoch & 1), tagged(rows, root))
        # SYNC POINT push-flag: released after packets and counts; the peer's `wait_all` on `event` acquires it.
        store_release(field + PF_EVENT, epoch)
        ring_for(segment(state, peer) + CONTROL_OFFSET, field + PF_EVENT)


@kernel("int64(int64, int64, int64, int64)")
def dispatch_plan(state: int, push: int, routing: int, counts_out: int) -> int:
    """Assemble, offsets: from the counts of all sources, where each run of rows goes in the output.

    Args:
        state: see above.
        push: see above.
        routing: see above; what is about rows that come is filled in the routing.
        counts_out: address of int64 [local experts], filled with the entries of each.

    Returns:
        OK, or -1 - s if source s sends by another routing, or contradicts itself.
    """
    rank, ranks = load_i64(state + EP_RANK), load_i64(state + EP_RANKS)
    local = local_experts(state, rank)
    epoch = load_i64(routing + RT_EPOCH)
    for s in range(ranks):
        word = load_i64(_field_from(state, push, s) + PF_COUNT + 8 * (epoch & 1))
        if not take_counts(routing, s, local, word, _counts(state, push, rank, s, epoch)):
            return -1 - s
    lay_out(routing, ranks, local, counts_out)
    return OK


@kernel("int64(int64, int64, int64)")
def dispatch_check(state: int, push: int, routing: int) -> int:
    """Does each source repeat the same dispatch? OK, or -1 - s for the first that does not."""
    epoch, root = load_i64(routing + RT_EPOCH), load_i64(routing + RT_ROOT)
    for s in range(load_i64(state + EP_RANKS)):
        word = load_i64(_field_from(state, push, s) + PF_COUNT + 8 * (epoch & 1))
        if word != tagged(rows_from(routing, s), root):
            return -1 - s
    return OK


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def dispatch_assemble(state: int, push: int, routing: int, x: int, tokens: int, scales: int, source: int) -> None:
    """Assemble: rows from the blocks of all peers, each run in turn, and where each came from.

    Args:
        state: see above.
        push: see above.
        routing: see above; `places` of the routing are filled.
        x: address of [tokens, hidden], from where the own rows come unless they are quantised.
        tokens: address of the output rows.
        scales: address of float32 [rows]; used with INT8 only.
        source: address of int32 [rows][3]: rank, token, slot; 0 if that and the places are known.
    """
    rank = load_i64(state + EP_RANK)
    groups = load_i64(routing + RT_GROUPS)
    row_bytes = load_i64(state + EP_ROW_BYTES)
    quant = load_i64(state + EP_QUANT)
    got_counts, got_first = load_i64(routing + RT_GOT_COUNTS), load_i64(routing + RT_GOT_FIRST)
    places = load_i64(routing + RT_PLACES)
    packet_bytes, header_bytes = load_i64(push + PU_PACKET_BYTES), load_i64(push + PU_HEADER_BYTES)
    for s in range(load_i64(state + EP_RANKS)):
        packet = _block(state, push, rank, s)
        for g in range(groups):
            first = load_i64(got_first + 8 * (s * groups + g))
            for row in range(first, first + load_i64(got_counts + 8 * (s * groups + g))):
                payload = packet + header_bytes
                if s == rank and quant == 0:
                    payload = x + load_i32(packet + PK_TOKEN) * row_bytes
                copy_bytes(tokens + row * row_bytes, payload, row_bytes)
                if quant != 0:
                    store_f32(scales + 4 * row, load_f32(packet + load_i64(push + PU_SCALE)))
                if source != 0:
                    token, slot = load_i32(packet + PK_TOKEN), load_i32(packet + PK_SLOT)
                    at = source + 12 * row
                    store_i32(at, load_i32(packet + PK_RANK))
                    store_i32(at + 4, token)
                    store_i32(at + 8, slot)
                    store_i64(places + 8 * row, (token << 32) | slot)
                packet += packet_bytes


@kernel("void(int64, int64, int64, int64, int64)")
def dispatch_assemble_entries(state: int, push: int, routing: int, index: int, weights: int) -> None:
    """Assemble, with deduplicated rows: the entries that packets bring, by expert.

    Args:
        state: see above.
        push: see above.
        routing: see above.
        index: address of int32 [entries][3]: row, local expert, slot.
        weights: address of float32 [entries].
    """
    rank = load_i64(state + EP_RANK)
    local = local_experts(state, rank)
    got_counts, got_first = load_i64(routing + RT_GOT_COUNTS), load_i64(routing + RT_GOT_FIRST)
    entry_first = load_i64(routing + RT_ENTRY_FIRST)
    cursor = load_i64(state + EP_SCRATCH)
    for s in range(load_i64(state + EP_RANKS)):
        for e in range(local):
            store_i64(cursor + 8 * e, load_i64(entry_first + 8 * (s * local + e)))
        packet = _block(state, push, rank, s)
        first = load_i64(got_first + 8 * s)
        for row in range(first, first + load_i64(got_counts + 8 * s)):
            for i in range(load_i32(packet + PK_ENTRIES)):
                entry = packet + _PACKET_ENTRIES + i * PACKET_ENTRY_BYTES
                e = load_i32(entry + PE_EXPERT)
                at = load_i64(cursor + 8 * e)
                store_i64(cursor + 8 * e, at + 1)
                store_i32(index + 12 * at, row)
                store_i32(index + 12 * at + 4, e)
                store_i32(index + 12 * at + 8, load_i32(entry + PE_SLOT))
                store_f32(weights + 4 * at, load_f32(entry + PE_WEIGHT))
            packet += load_i64(push + PU_PACKET_BYTES)


@kernel("void(int64, int64, int64, int64, int64)")
def combine_send(state: int, push: int, routing: int, expert_out: int, combine: int) -> None:
    """Send and flag: each row straight to its place at its origin, and then one more in the flag of its token there.

    Args:
        state: see above.
        push: see above.
        routing: see above.
        expert_out: address of [rows, hidden].
        combine: epoch of this combine.
    """
    rank, ranks = load_i64(state + EP_RANK), load_i64(state + EP_RANKS)
    groups = load_i64(routing + RT_GROUPS)
    row_bytes = load_i64(state + EP_RETURN_BYTES)
    got_counts, got_first = load_i64(routing + RT_GOT_COUNTS), load_i64(routing + RT_GOT_FIRST)
    places = load_i64(routing + RT_PLACES)
    epoch = load_i64(routing + RT_EPOCH)
    status = segment(state, rank) + load_i64(push + PU_STATUS)
    store_i64(status + PS_DISPATCH, epoch)
    # SYNC POINT push-status: released after what is combined; a peer that waits in vain acquires it.
    store_release(status + PS_COMBINE, combine)
    for i in range(1, ranks + 1):
        s = (rank + i) % ranks
        if s == load_i64(push + PU_KEPT):
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
                copy_bytes(packet + RETURN_HEADER_BYTES, expert_out + row * row_bytes, row_bytes)
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


@device
def _is_awaited(push: int, row: int) -> bool:
    """Does a packet come back for this element of `row_of`?"""
    return row >= 0 and row >> ROW_BITS != load_i64(push + PU_KEPT)


@kernel("void(int64, int64, int64, int64)")
def combine_expect(state: int, push: int, routing: int, kept: int) -> None:
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


@kernel("int64(int64, int64, int64, int64, int64, int64)")
def first_missing(state: int, push: int, routing: int, combine: int, begin: int, end: int) -> int:
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


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def combine_reduce(state: int, push: int, routing: int, expert_out: int, weights: int, shared: int, y: int) -> None:
    """Reduce: sum the rows of each token in slot order, and the output of a shared expert after them.

    Args:
        state: see above.
        push: see above.
        routing: see above.
        expert_out: address of the own outputs [rows, hidden], from where the own rows come if they were kept.
        weights: address of float32 [tokens, top_k]; 0 for weights of 1.
        shared: address of [tokens, hidden] to be added last; 0 for none.
        y: address of the output [tokens, hidden].
    """
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
                store_i64(addresses + 8 * n, _place(state, push, rank, t, k) + RETURN_HEADER_BYTES)
            else:
                store_i64(addresses + 8 * n, load_i64(at + 8 * (row & ROW_MASK)))
            store_f32(gates + 4 * n, 1.0 if weights == 0 else load_f32(weights + 4 * i))
            n += 1
        if shared != 0:
            store_i64(addresses + 8 * n, shared + t * row_bytes)
            store_f32(gates + 4 * n, 1.0)
            n += 1
        weighted_sum_rows(
            load_i64(state + EP_DTYPE), addresses, gates, n, load_i64(state + EP_HIDDEN), y + t * row_bytes
        )
