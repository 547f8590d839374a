"""What ranks say to each other in a step of a collective, and how they wait for it.

The rules are those of `xccl.comm.collectives`.
"""

from __future__ import annotations

from ..layout.collectives import (
    CB_ARRIVALS,
    CB_RELEASE,
    CR_AT,
    CR_BYTES,
    CR_LIMIT,
    CR_PAYLOAD,
    CR_RESULTS,
    CR_SIGNATURE,
    CR_STEP,
    CR_STRIDE,
    CS_BLOCKS,
    CS_CHUNK,
    CS_CONTROL,
    CS_CONTROLS,
    CS_COUNTS,
    CS_CURSOR,
    CS_EXPOSED,
    CS_INDEX,
    CS_LARGEST,
    CS_METER,
    CS_RANK,
    CS_RANKS,
    CS_SEGMENTS,
    CS_STAGE,
    CS_TABLE,
    HEADERS_OFFSET,
    INLINE_BYTES,
    LIMIT_SHIFT,
    METER_ARRIVAL,
    METER_AWAIT,
    METER_PAYLOAD,
    METER_RECORD,
    METER_RELEASE,
    PL_BYTES,
    PL_HALF,
    PL_INLINE,
    PL_RECEIVER,
    PL_RESULTS,
    PL_SEND_STRIDE,
    PL_SENDER,
    PL_SIGNATURE,
    PL_TWO_STEP,
    PRIVATE,
    RECORD_BYTES,
    RECORDS_OFFSET,
    TB_SENT,
    TB_SENT_AT,
)
from ..layout.segment import CTL_DOORBELL
from ._jit import device
from .atomics import fence_seq_cst, fetch_add, load_acquire, load_i64, store_i64, store_release
from .copy import copy_bytes
from .wait import OK, awaits, now_ns, relax_for, ring_for, settle, wake


@device
def meter(state: int, kind: int, peer: int, n_bytes: int, units: int = 1) -> None:
    """Count units and their bytes, if somebody wants to know."""
    table = load_i64(state + CS_METER)
    if table != 0:
        at = table + 16 * (kind * load_i64(state + CS_RANKS) + peer)
        store_i64(at, load_i64(at) + units)
        store_i64(at + 8, load_i64(at + 8) + n_bytes)


# -- places -----------------------------------------------------------------------------------------------------------


@device
def segment_of(state: int, rank: int) -> int:
    """Address of a rank's segment."""
    return load_i64(load_i64(state + CS_SEGMENTS) + 8 * rank)


@device
def half_of(state: int, plan: int, step: int) -> int:
    """Offset of the half of the staging area that a step uses."""
    return load_i64(state + CS_STAGE) + (step & 1) * load_i64(plan + PL_HALF)


@device
def record_of(state: int, peer: int, step: int) -> int:
    """Address of what `peer` says in a step: in the own block, or, where arrivals are counted, in the peer's."""
    blocks = load_i64(state + CS_BLOCKS)
    if load_i64(state + CS_COUNTS) != 0:
        return load_i64(blocks + 8 * peer) + HEADERS_OFFSET + (step & 1) * RECORD_BYTES
    own = load_i64(blocks + 8 * load_i64(state + CS_RANK))
    return own + RECORDS_OFFSET + ((step & 1) * load_i64(state + CS_RANKS) + peer) * RECORD_BYTES


@device
def table_at(state: int, column: int, peer: int) -> int:
    """Address of a number in the table of alltoallv."""
    return load_i64(state + CS_TABLE) + 8 * (column * load_i64(state + CS_RANKS) + peer)


@device
def sent_bytes(state: int, plan: int, peer: int) -> int:
    """Size of the part that this rank has for `peer`."""
    n_bytes = load_i64(plan + PL_BYTES)
    return n_bytes if n_bytes >= 0 else load_i64(table_at(state, TB_SENT, peer))


@device
def sent_at(state: int, plan: int, peer: int) -> int:
    """Where in the input the part for `peer` starts."""
    if load_i64(plan + PL_BYTES) >= 0:
        return peer * load_i64(plan + PL_SEND_STRIDE)
    return load_i64(table_at(state, TB_SENT_AT, peer))


@device
def has_parts(plan: int) -> bool:
    """Has the input a part for each rank, rather than one for all?"""
    return load_i64(plan + PL_BYTES) < 0 or load_i64(plan + PL_SEND_STRIDE) != 0


@device
def is_inline(state: int, plan: int, n_bytes: int) -> bool:
    """Does a part of `n_bytes` travel in the record?"""
    if load_i64(plan + PL_BYTES) < 0:
        return load_i64(state + CS_COUNTS) == 0 and n_bytes <= INLINE_BYTES
    return load_i64(plan + PL_INLINE) != 0


@device
def limit_of(state: int) -> int:
    """What this rank says of its input: how large its largest part is, and whether it is read where it lies."""
    return (load_i64(state + CS_LARGEST) << LIMIT_SHIFT) + load_i64(state + CS_EXPOSED)


# -- to say -----------------------------------------------------------------------------------------------------------


@device
def _fill(state: int, plan: int, record: int, peer: int, x: int, step: int) -> None:
    """Write what this rank says to `peer` in a step (where arrivals are counted: to all), and release it."""
    counts = load_i64(state + CS_COUNTS) != 0
    n_bytes = sent_bytes(state, plan, peer)
    store_i64(record + CR_SIGNATURE, load_i64(plan + PL_SIGNATURE))
    store_i64(record + CR_BYTES, n_bytes)
    store_i64(record + CR_LIMIT, limit_of(state))
    if is_inline(state, plan, n_bytes):
        rank = load_i64(state + CS_RANK)
        sender, receiver = load_i64(plan + PL_SENDER), load_i64(plan + PL_RECEIVER)
        gives = sender < 0 or sender == rank
        if gives and (receiver < 0 or receiver == peer or counts) and load_i64(state + CS_INDEX) == 0 and n_bytes > 0:
            copy_bytes(record + CR_PAYLOAD, x + sent_at(state, plan, peer), n_bytes)
            meter(state, METER_PAYLOAD, peer, n_bytes)
    else:
        half = half_of(state, plan, step)
        exposed = load_i64(state + CS_EXPOSED)
        at, stride = half, load_i64(state + CS_CHUNK) if has_parts(plan) else 0
        if exposed != 0:
            at, stride = x, load_i64(plan + PL_SEND_STRIDE)
            if exposed & PRIVATE == 0:
                at -= segment_of(state, load_i64(state + CS_RANK))
        if load_i64(plan + PL_TWO_STEP) != 0:
            stride = 0
        elif not counts:
            at += sent_at(state, plan, peer) if exposed != 0 else peer * stride
            stride = 0
        store_i64(record + CR_AT, at)
        store_i64(record + CR_STRIDE, stride)
        store_i64(record + CR_RESULTS, half + load_i64(plan + PL_RESULTS))
    # SYNC POINT collective-step: released after what it says, and what is staged; `await_all` acquires it.
    store_release(record + CR_STEP, step)


@device
def say(state: int, plan: int, x: int, step: int) -> None:
    """Tell all others that this rank has published a step."""
    ranks, rank = load_i64(state + CS_RANKS), load_i64(state + CS_RANK)
    blocks = load_i64(state + CS_BLOCKS)
    if load_i64(state + CS_COUNTS) != 0:
        _fill(state, plan, record_of(state, rank, step), rank, x, step)
        meter(state, METER_ARRIVAL, 0, 8)
        # SYNC POINT collective-arrival: counted after the record was written; rank 0 acquires the count.
        word = load_i64(blocks) + CB_ARRIVALS
        if fetch_add(word, 1) + 1 == ranks * step:
            ring_for(load_i64(load_i64(state + CS_CONTROLS)), word)
        return
    mine = RECORDS_OFFSET + ((step & 1) * ranks + rank) * RECORD_BYTES
    peer = rank
    for _ in range(1, ranks):
        peer = peer + 1 if peer + 1 < ranks else 0
        _fill(state, plan, load_i64(blocks + 8 * peer) + mine, peer, x, step)
        meter(state, METER_RECORD, peer, CR_PAYLOAD)
    _wake_others(state, mine + CR_STEP)


@device
def _wake_others(state: int, word: int) -> None:
    """SYNC POINT doorbell for all others that wait for the word at this offset of their blocks, with one fence."""
    ranks, rank = load_i64(state + CS_RANKS), load_i64(state + CS_RANK)
    controls, blocks = load_i64(state + CS_CONTROLS), load_i64(state + CS_BLOCKS)
    fence_seq_cst()
    for peer in range(ranks):
        if peer != rank:
            control = load_i64(controls + 8 * peer)
            if awaits(control, load_i64(blocks + 8 * peer) + word):
                wake(control)


# -- to hear ----------------------------------------------------------------------------------------------------------


@device
def _await_word(state: int, address: int, target: int, until_ns: int) -> int:
    """Wait until a word of the own segment is at least `target`. `until_ns` below 0 counts from now."""
    if load_acquire(address) >= target:
        return OK
    control = load_i64(state + CS_CONTROL)
    if until_ns < 0:
        until_ns = now_ns() - until_ns
    n = 0
    while True:
        seq = load_acquire(control + CTL_DOORBELL)
        if load_acquire(address) >= target:
            break
        n = relax_for(control, n, seq, until_ns, address)
        if n < 0:
            return n
    settle(control, n)
    return OK


@device
def await_all(state: int, step: int, until_ns: int) -> int:
    """Wait until all others have published a step."""
    ranks, rank = load_i64(state + CS_RANKS), load_i64(state + CS_RANK)
    blocks = load_i64(state + CS_BLOCKS)
    if load_i64(state + CS_COUNTS) == 0:
        for peer in range(load_i64(state + CS_CURSOR), ranks):
            if peer == rank:
                continue
            # SYNC POINT collective-step: acquires the record, and what its sender has staged.
            status = _await_word(state, record_of(state, peer, step) + CR_STEP, step, until_ns)
            if status != OK:
                store_i64(state + CS_CURSOR, peer)
                return status
            meter(state, METER_AWAIT, peer, 0)
        return OK
    if rank != 0:
        # SYNC POINT collective-arrival: rank 0 has acquired the arrivals of all, and released this after them.
        status = _await_word(state, load_i64(blocks + 8 * rank) + CB_RELEASE, step, until_ns)
    else:
        status = _await_word(state, load_i64(blocks) + CB_ARRIVALS, ranks * step, until_ns)
        if status == OK:
            for peer in range(1, ranks):
                store_release(load_i64(blocks + 8 * peer) + CB_RELEASE, step)
                meter(state, METER_RELEASE, peer, 8)
            _wake_others(state, CB_RELEASE)
    if status == OK:
        meter(state, METER_AWAIT, 0, 0, ranks if rank == 0 else 1)
    return status


@device
def all_agree(state: int, plan: int, step: int) -> bool:
    """Have all ranks made the same call?"""
    signature, n_bytes = load_i64(plan + PL_SIGNATURE), load_i64(plan + PL_BYTES)
    rank = load_i64(state + CS_RANK)
    for peer in range(load_i64(state + CS_RANKS)):
        if peer != rank:
            record = record_of(state, peer, step)
            if load_i64(state + CS_COUNTS) != 0:
                meter(state, METER_RECORD, peer, CR_PAYLOAD)
            if load_i64(record + CR_SIGNATURE) != signature:
                return False
            if n_bytes >= 0 and load_i64(record + CR_BYTES) != n_bytes:
                return False
    return True


@device
def place_of(state: int, record: int, peer: int) -> int:
    """Address of what a record says its sender has for this rank; if that is in private memory, it is one there."""
    base = segment_of(state, peer) if load_i64(record + CR_LIMIT) & PRIVATE == 0 else 0
    return base + load_i64(record + CR_AT) + load_i64(state + CS_RANK) * load_i64(record + CR_STRIDE)


@device
def results_of(state: int, record: int, peer: int) -> int:
    """Address of the results, or of the sizes, that a record speaks of."""
    return segment_of(state, peer) + load_i64(record + CR_RESULTS)
