"""Direct dispatch. The protocol and its proof are in `xccl.comm.moe_direct`.

One kernel is one operation, here and in `moe_direct_combine`. It goes through its stages until it has done `stop`
of them; a wait that takes long ends with SLICE, and the next call goes on with it. Called for one stage after the
other, it does the same.

Both take `state`, `direct` and `routing`: addresses of the ExpertParallel state, the direct state, and the routing
record.
"""

from __future__ import annotations

from ..layout.moe import (
    EP_CONTROL,
    EP_DTYPE,
    EP_EXPERTS,
    EP_HIDDEN,
    EP_QUANT,
    EP_RANK,
    EP_RANKS,
    EP_RETURN_BYTES,
    EP_ROW_BYTES,
    EP_SCRATCH,
    EP_TOP_K,
    EPOCH_MASK,
    RT_ARRIVING,
    RT_COUNTS,
    RT_ENTRIES,
    RT_ENTRY_COUNTS,
    RT_ENTRY_FIRST,
    RT_EPOCH,
    RT_GOT_COUNTS,
    RT_GOT_FIRST,
    RT_ROOT,
    RT_ROW_OF,
    RT_ROWS,
    RT_SENT_FIRST,
    RT_SENT_ROWS,
    RT_TOKENS,
)
from ..layout.moe_direct import (
    DF_CAPACITY,
    DF_COUNTED,
    DF_ROOT,
    DF_SLOT,
    DF_WRITTEN,
    DI_CAPACITY,
    DI_COUNTS,
    DI_CURSOR,
    DI_DEDUP,
    DI_FIELDS,
    DI_INDEX,
    DI_RESULT,
    DI_SCALES,
    DI_SLOT,
    DI_SOURCE,
    DI_STAGE,
    DI_WEIGHTS,
    DIRECT_FIELD_BYTES,
)
from ._jit import device, kernel
from .atomics import load_f32, load_i32, load_i64, store_f32, store_i32, store_i64
from .moe import (
    ROW_BITS,
    ROW_MASK,
    are_streamed,
    copy_rows,
    first_expert,
    first_row_of,
    own_segment,
    segment,
    tell_all,
)
from .moe_routing import route_rows, route_rows_dedup
from .quantise import quantise_row
from .wait import MISMATCH, OK, SLICE, await_words

#: Statuses of their own: a slot needs more memory; an element of `topk_idx` is no expert; a wait has ended with SLICE,
#: but another one than that with which the call began.
BACK, BAD_CHOICE, MOVED = 1, 2, 3

#: Stages.
COUNT, ANNOUNCE, AWAIT_COUNTS, PLAN, WRITE, NOTIFY, AWAIT_ROWS, DISPATCHED = range(8)

_SOURCE_BYTES = 12
_INDEX_BYTES = 12


@device
def direct_field_from(state: int, direct: int, peer: int) -> int:
    """Address of the field that `peer` writes in the own segment."""
    return own_segment(state) + load_i64(direct + DI_FIELDS) + peer * DIRECT_FIELD_BYTES


@device
def direct_field_at(state: int, direct: int, peer: int) -> int:
    """Address of the field that this rank writes in the segment of `peer`."""
    return segment(state, peer) + load_i64(direct + DI_FIELDS) + load_i64(state + EP_RANK) * DIRECT_FIELD_BYTES


@device
def await_direct(state: int, direct: int, word: int, epoch: int, stage: int, began: int, until_ns: int) -> int:
    """Wait for a word of the fields of all ranks; OK, or why the call ends."""
    control, cursor = load_i64(state + EP_CONTROL), direct + DI_CURSOR
    first = direct_field_from(state, direct, 0) + word
    status = await_words(control, first, DIRECT_FIELD_BYTES, load_i64(state + EP_RANKS), epoch, cursor, until_ns)
    if status == OK:
        store_i64(cursor, 0)
    else:
        store_i64(direct + DI_STAGE, stage)
    return MOVED if status == SLICE and stage != began else status


@device
def _write_counts(state: int, direct: int, routing: int) -> None:
    """Entries for each expert, and deduplicated rows for each rank, into the own managed area."""
    experts = load_i64(state + EP_EXPERTS)
    counts = own_segment(state) + load_i64(direct + DI_COUNTS)
    sent_first, sent_rows = load_i64(routing + RT_SENT_FIRST), load_i64(routing + RT_SENT_ROWS)
    for e in range(experts):
        store_i32(counts + 4 * e, load_i64(sent_first + 8 * (e + 1)) - load_i64(sent_first + 8 * e))
    if load_i64(direct + DI_DEDUP) != 0:
        for r in range(load_i64(state + EP_RANKS)):
            rows = load_i64(sent_rows + 8 * (r + 1)) - load_i64(sent_rows + 8 * r)
            store_i32(counts + 4 * (experts + r), rows)


@device
def _announce(state: int, direct: int, routing: int) -> None:
    """Tell every rank that this one has counted, by whose routing it sends, and where it takes rows."""
    for peer in range(load_i64(state + EP_RANKS)):
        field = direct_field_at(state, direct, peer)
        store_i64(field + DF_SLOT, load_i64(direct + DI_SLOT))
        store_i64(field + DF_CAPACITY, load_i64(direct + DI_CAPACITY))
        store_i64(field + DF_ROOT, load_i64(routing + RT_ROOT) & EPOCH_MASK)
    # SYNC POINT direct-counts: released after counts and fields; every rank acquires it before it plans.
    tell_all(state, load_i64(direct + DI_FIELDS), DIRECT_FIELD_BYTES, DF_COUNTED, load_i64(routing + RT_EPOCH))


@device
def _lay(state: int, direct: int, routing: int) -> None:
    """From the counts of all: where the own rows begin at each rank, and what comes to this one.

    Scratch memory then has, for each expert, where the own entries begin at its rank, and behind them, for each rank,
    where the own deduplicated rows begin there.
    """
    rank, ranks, experts = load_i64(state + EP_RANK), load_i64(state + EP_RANKS), load_i64(state + EP_EXPERTS)
    counts = load_i64(direct + DI_COUNTS)
    first_entry = load_i64(state + EP_SCRATCH)
    first_row = first_entry + 8 * experts
    arriving, counts_out = load_i64(routing + RT_ARRIVING), load_i64(routing + RT_COUNTS)
    entry_counts, entry_first = load_i64(routing + RT_ENTRY_COUNTS), load_i64(routing + RT_ENTRY_FIRST)
    got_counts, got_first = load_i64(routing + RT_GOT_COUNTS), load_i64(routing + RT_GOT_FIRST)
    for p in range(ranks):
        begin, end = first_expert(state, p), first_expert(state, p + 1)
        entries = 0
        for e in range(begin, end):
            before = entries
            for s in range(ranks):
                count = load_i32(segment(state, s) + counts + 4 * e)
                if s == rank:
                    store_i64(first_entry + 8 * e, entries)
                if p == rank:
                    at = 8 * (s * (end - begin) + e - begin)
                    store_i64(entry_counts + at, count)
                    store_i64(entry_first + at, entries)
                entries += count
            if p == rank:
                store_i64(counts_out + 8 * (e - begin), entries - before)
        rows = entries
        if load_i64(direct + DI_DEDUP) != 0:
            rows = 0
            for s in range(ranks):
                count = load_i32(segment(state, s) + counts + 4 * (experts + p))
                if s == rank:
                    store_i64(first_row + 8 * p, rows)
                if p == rank:
                    store_i64(got_counts + 8 * s, count)
                    store_i64(got_first + 8 * s, rows)
                rows += count
        store_i64(arriving + 8 * p, rows)
        if p == rank:
            store_i64(routing + RT_ENTRIES, entries)
            store_i64(routing + RT_ROWS, rows)


@device
def _place_rows(state: int, direct: int, routing: int, topk_idx: int) -> None:
    """Number the own rows as they are to lie at their ranks, no longer as they are sent."""
    experts = load_i64(state + EP_EXPERTS)
    first_entry = load_i64(state + EP_SCRATCH)
    first_row = first_entry + 8 * experts
    row_of = load_i64(routing + RT_ROW_OF)
    sent_first, sent_rows = load_i64(routing + RT_SENT_FIRST), load_i64(routing + RT_SENT_ROWS)
    dedup = load_i64(direct + DI_DEDUP)
    for i in range(load_i64(routing + RT_TOKENS) * load_i64(state + EP_TOP_K)):
        row = load_i64(row_of + 8 * i)
        if row == -1:
            continue
        if dedup == 0:
            e = load_i64(topk_idx + 8 * i)
            row += load_i64(first_entry + 8 * e) - load_i64(sent_first + 8 * e)
        else:
            peer = first_row_of(row) >> ROW_BITS
            shift = load_i64(first_row + 8 * peer) - load_i64(sent_rows + 8 * peer)
            row = row + shift if row >= 0 else row - shift
        store_i64(row_of + 8 * i, row)


@device
def _plan(state: int, direct: int, routing: int, topk_idx: int) -> int:
    """OK, BACK if a slot needs memory for what is to come, or MISMATCH if rank `result` sends by another routing."""
    ranks, root = load_i64(state + EP_RANKS), load_i64(routing + RT_ROOT)
    for peer in range(ranks):
        if load_i64(direct_field_from(state, direct, peer) + DF_ROOT) != root & EPOCH_MASK:
            store_i64(direct + DI_RESULT, peer)
            return MISMATCH
    if root == load_i64(routing + RT_EPOCH):
        _lay(state, direct, routing)
        _place_rows(state, direct, routing, topk_idx)
    arriving = load_i64(routing + RT_ARRIVING)
    for peer in range(ranks):
        if load_i64(arriving + 8 * peer) > load_i64(direct_field_from(state, direct, peer) + DF_CAPACITY):
            return BACK
    return OK


@device
def _write(state: int, direct: int, routing: int, x: int) -> None:
    """Each token, quantised once if asked, to the final place of each of its rows, with its scale and its source."""
    rank, top_k = load_i64(state + EP_RANK), load_i64(state + EP_TOP_K)
    row_bytes, token_bytes = load_i64(state + EP_ROW_BYTES), load_i64(state + EP_RETURN_BYTES)
    quant, dtype, hidden = load_i64(state + EP_QUANT), load_i64(state + EP_DTYPE), load_i64(state + EP_HIDDEN)
    scales, source = load_i64(direct + DI_SCALES), load_i64(direct + DI_SOURCE)
    row_of = load_i64(routing + RT_ROW_OF)
    sent = load_i64(load_i64(routing + RT_SENT_ROWS) + 8 * load_i64(state + EP_RANKS))
    streamed = are_streamed(state, sent, row_bytes)
    is_new = load_i64(routing + RT_ROOT) == load_i64(routing + RT_EPOCH)
    for t in range(load_i64(routing + RT_TOKENS)):
        token = x + t * token_bytes
        scale = 0.0
        quantised = False
        for k in range(top_k):
            row = load_i64(row_of + 8 * (t * top_k + k))
            if row < 0:
                continue
            peer = row >> ROW_BITS
            row &= ROW_MASK
            slot = segment(state, peer) + load_i64(direct_field_from(state, direct, peer) + DF_SLOT)
            destination = slot + row * row_bytes
            if quant != 0 and not quantised:
                scale = quantise_row(dtype, token, hidden, destination)
                token = destination
                quantised = True
            else:
                copy_rows(destination, token, row_bytes, streamed)
            if quant != 0:
                store_f32(slot + scales + 4 * row, scale)
            if is_new:
                at = slot + source + _SOURCE_BYTES * row
                store_i32(at, rank)
                store_i32(at + 4, t)
                store_i32(at + 8, k)


@device
def _write_entries(state: int, direct: int, routing: int, topk_idx: int, gates: int) -> None:
    """With deduplicated rows: an entry for each (token, slot) to its final place, by expert, and its gate weight."""
    top_k = load_i64(state + EP_TOP_K)
    first_entry = load_i64(state + EP_SCRATCH)
    index, weights = load_i64(direct + DI_INDEX), load_i64(direct + DI_WEIGHTS)
    row_of = load_i64(routing + RT_ROW_OF)
    for t in range(load_i64(routing + RT_TOKENS)):
        for k in range(top_k):
            i = t * top_k + k
            e = load_i64(topk_idx + 8 * i)
            if e < 0:
                continue
            row = first_row_of(load_i64(row_of + 8 * i))
            peer = row >> ROW_BITS
            at = load_i64(first_entry + 8 * e)
            store_i64(first_entry + 8 * e, at + 1)
            slot = segment(state, peer) + load_i64(direct_field_from(state, direct, peer) + DF_SLOT)
            entry = slot + index + _INDEX_BYTES * at
            store_i32(entry, row & ROW_MASK)
            store_i32(entry + 4, e - first_expert(state, peer))
            store_i32(entry + 8, k)
            store_f32(slot + weights + 4 * at, load_f32(gates + 4 * i))


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def dispatch(state: int, direct: int, routing: int, x: int, topk_idx: int, gates: int, stop: int, until_ns: int) -> int:
    """A dispatch, up to a stage.

    Args:
        state: see above.
        direct: see above; `stage` and `cursor` are 0 at first.
        routing: see above; with epoch, root and tokens. The rest is filled unless it repeats another dispatch.
        x: address of [tokens, hidden].
        topk_idx: address of int64 [tokens, top_k]; not used by a dispatch that repeats another one.
        gates: address of float32 [tokens, top_k], of a new dispatch of deduplicated rows.
        stop: number of stages to be done.
        until_ns: when to give up waiting for now.

    Returns:
        OK; SLICE, MOVED, ABORTED or PENDING of a wait; BACK if slots need memory for the rows that are `arriving`;
        MISMATCH if rank `result` sends by another routing; BAD_CHOICE if element `result` of `topk_idx` is neither -1
        nor an expert, and then nothing was done.
    """
    epoch = load_i64(routing + RT_EPOCH)
    is_new = load_i64(routing + RT_ROOT) == epoch
    began = stage = load_i64(direct + DI_STAGE)
    if stage == COUNT and stage < stop:
        if is_new:
            if load_i64(direct + DI_DEDUP) != 0:
                rows = route_rows_dedup(state, routing, topk_idx)
            else:
                rows = route_rows(state, routing, topk_idx)
            if rows < 0:
                store_i64(direct + DI_RESULT, -1 - rows)
                return BAD_CHOICE
            _write_counts(state, direct, routing)
        stage = ANNOUNCE
    if stage == ANNOUNCE and stage < stop:
        _announce(state, direct, routing)
        stage = AWAIT_COUNTS
    if stage == AWAIT_COUNTS and stage < stop:
        # SYNC POINT direct-counts: acquires the counts of all, and where their slots are.
        status = await_direct(state, direct, DF_COUNTED, epoch, stage, began, until_ns)
        if status != OK:
            return status
        stage = PLAN
    if stage == PLAN and stage < stop:
        status = _plan(state, direct, routing, topk_idx)
        stage = WRITE
        if status != OK:
            store_i64(direct + DI_STAGE, stage)
            return status
    if stage == WRITE and stage < stop:
        _write(state, direct, routing, x)
        if is_new and load_i64(direct + DI_DEDUP) != 0:
            _write_entries(state, direct, routing, topk_idx, gates)
        stage = NOTIFY
    if stage == NOTIFY and stage < stop:
        # SYNC POINT direct-rows: released after rows and entries.
        tell_all(state, load_i64(direct + DI_FIELDS), DIRECT_FIELD_BYTES, DF_WRITTEN, epoch)
        stage = AWAIT_ROWS
    if stage == AWAIT_ROWS and stage < stop:
        # SYNC POINT direct-rows: acquires the rows of all sources.
        status = await_direct(state, direct, DF_WRITTEN, epoch, stage, began, until_ns)
        if status != OK:
            return status
        stage = DISPATCHED
    store_i64(direct + DI_STAGE, stage if stage < DISPATCHED else COUNT)
    return OK
