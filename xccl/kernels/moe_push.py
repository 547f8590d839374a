"""The dispatch of the push protocol (CM384 §4.2.1). The protocol and its proof are in `xccl.comm.moe_push`.

Each kernel is one stage, or a part of one, and waits for nothing.

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
    RT_ENTRY_FIRST,
    RT_EPOCH,
    RT_GOT_COUNTS,
    RT_GOT_FIRST,
    RT_GROUPS,
    RT_PLACES,
    RT_ROOT,
    RT_ROW_OF,
    RT_ROWS,
    RT_SENT_FIRST,
    RT_SENT_ROWS,
    RT_TOKENS,
)
from ..layout.moe_push import (
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
    PU_BACKED,
    PU_BLOCK_BYTES,
    PU_COUNTS,
    PU_COUNTS_BYTES,
    PU_FIELDS,
    PU_HEADER_BYTES,
    PU_PACKET_BYTES,
    PU_PACKETS,
    PU_SCALE,
)
from ..layout.ring import FIELD_BYTES
from ..layout.segment import CONTROL_OFFSET
from ._jit import device, kernel
from .atomics import (
    load_f32,
    load_i32,
    load_i64,
    store_f32,
    store_i32,
    store_i64,
    store_release,
)
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
from .moe_routing import route_rows, route_rows_dedup
from .moe_writes import write_row
from .quantise import quantise_row
from .wait import OK, ring_for

_PACKET_ENTRIES = PACKET.size_bytes

#: A status: blocks need more memory.
BACK = 1


@device
def _field_at(state: int, push: int, peer: int) -> int:
    """Address of the field that this rank writes in the segment of `peer`."""
    return segment(state, peer) + load_i64(push + PU_FIELDS) + load_i64(state + EP_RANK) * FIELD_BYTES


@device
def _field_from(state: int, push: int, peer: int) -> int:
    """Address of the field that `peer` writes in the own segment."""
    return own_segment(state) + load_i64(push + PU_FIELDS) + peer * FIELD_BYTES


@device
def _counts(state: int, push: int, at: int, writer: int, epoch: int) -> int:
    """Address of the counts that `writer` leaves at rank `at` in the dispatch with this epoch."""
    record = (epoch & 1) * load_i64(state + EP_RANKS) + writer
    return segment(state, at) + load_i64(push + PU_COUNTS) + record * load_i64(push + PU_COUNTS_BYTES)


@device
def _block(state: int, push: int, at: int, writer: int) -> int:
    """Address of the block of packets that `writer` fills at rank `at`."""
    return segment(state, at) + load_i64(push + PU_PACKETS) + writer * load_i64(push + PU_BLOCK_BYTES)


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


@kernel("int64(int64, int64, int64, int64, int64)")
def dispatch_route(state: int, push: int, routing: int, topk_idx: int, dedup: int) -> int:
    """Which rows go where, unless that is known; and is there memory for them in the own blocks?

    Args:
        state: see above.
        push: see above.
        routing: see above.
        topk_idx: address of int64 [tokens, top_k]; 0 if the routing is known.
        dedup: 1 if rows are deduplicated, else 0.

    Returns:
        OK; BACK if a block at a peer has no memory for its rows; -1 - i if element i is neither -1 nor an expert.
    """
    if topk_idx != 0:
        rows = route_rows_dedup(state, routing, topk_idx) if dedup else route_rows(state, routing, topk_idx)
        if rows < 0:
            return rows
    sent_rows, backed = load_i64(routing + RT_SENT_ROWS), load_i64(push + PU_BACKED)
    for p in range(load_i64(state + EP_RANKS)):
        if load_i64(sent_rows + 8 * (p + 1)) - load_i64(sent_rows + 8 * p) > load_i64(backed + 8 * p):
            return BACK
    return OK


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
    streamed = are_streamed(state, load_i64(sent_rows + 8 * load_i64(state + EP_RANKS)), row_bytes)
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
                write_row(push, peer, destination, source, row_bytes, streamed)
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
        counts_out: address of int64 [local experts], filled with the entries of each; 0 if all of that is known.

    Returns:
        OK, or -1 - s if source s sends by another routing, or contradicts itself.
    """
    rank, ranks = load_i64(state + EP_RANK), load_i64(state + EP_RANKS)
    local = local_experts(state, rank)
    epoch = load_i64(routing + RT_EPOCH)
    for s in range(ranks):
        word = load_i64(_field_from(state, push, s) + PF_COUNT + 8 * (epoch & 1))
        counts = 0 if counts_out == 0 else _counts(state, push, rank, s, epoch)
        if not take_counts(routing, s, local, word, counts):
            return -1 - s
    if counts_out != 0:
        lay_out(routing, ranks, local, counts_out)
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
    streamed = are_streamed(state, load_i64(routing + RT_ROWS), row_bytes)
    if quant == 0:
        take_own_rows(state, routing, x, tokens, streamed)
    for s in range(load_i64(state + EP_RANKS)):
        packet = _block(state, push, rank, s)
        for g in range(groups):
            first = load_i64(got_first + 8 * (s * groups + g))
            for row in range(first, first + load_i64(got_counts + 8 * (s * groups + g))):
                if s != rank or quant != 0:
                    copy_rows(tokens + row * row_bytes, packet + header_bytes, row_bytes, streamed)
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
