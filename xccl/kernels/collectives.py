"""Collectives: one kernel call each. The protocol and its proof are in `xccl.comm.collectives`.

A call is a sequence of steps. In each step a rank stages data in its own segment and says so to all others
(`_publish`), waits until all others have said so (`_await_all`), and uses what they have staged. The kernel is a state
machine: all progress is in the state, so a call that returns SLICE or PENDING is simply made again.
"""

from __future__ import annotations

from ..layout.collectives import (
    CB_ARRIVALS,
    CB_RELEASE,
    CR_AT,
    CR_BYTES,
    CR_LIMIT,
    CR_PAYLOAD,
    CR_SIGNATURE,
    CR_STEP,
    CS_BLOCKS,
    CS_CONTROL,
    CS_CONTROLS,
    CS_COUNTS,
    CS_CURSOR,
    CS_INDEX,
    CS_METER,
    CS_PHASE,
    CS_PLAN,
    CS_RANK,
    CS_RANKS,
    CS_ROWS,
    CS_SEGMENTS,
    CS_STAGE,
    CS_STEP,
    CS_STEPS,
    CS_TAKES,
    CS_TARGET,
    HEADERS_OFFSET,
    INLINE_BYTES,
    METER_ARRIVAL,
    METER_AWAIT,
    METER_FOLD,
    METER_GATHER,
    METER_OWN,
    METER_PAYLOAD,
    METER_PULL,
    METER_RECORD,
    METER_RELEASE,
    METER_RESULT,
    METER_STAGE,
    METER_UNPACK,
    PL_BYTES,
    PL_CHUNK,
    PL_DTYPE,
    PL_FOLD,
    PL_HALF,
    PL_IN_PLACE,
    PL_INLINE,
    PL_ITEM_BYTES,
    PL_OUT_BYTES,
    PL_RECEIVER,
    PL_RECV_STRIDE,
    PL_RESULTS,
    PL_SEND_STRIDE,
    PL_SENDER,
    PL_SIGNATURE,
    PL_STEPS,
    PL_TABLE,
    PL_TWO_STEP,
    PL_X_BYTES,
    RECORD_BYTES,
    RECORDS_OFFSET,
    TB_CAME,
    TB_EXPECTED,
    TB_RECEIVED,
    TB_RECEIVED_AT,
    TB_ROWS,
    TB_SENT,
    TB_SENT_AT,
)
from ..layout.segment import CTL_DOORBELL, CTL_WAITERS
from ._jit import device, kernel
from .atomics import fence_seq_cst, fetch_add, load_acquire, load_i64, store_i64, store_release
from .copy import copy_bytes, copy_bytes_auto
from .fold import fold_rows
from .ndarray import bytes_of, data_of, first_dim, is_plain
from .wait import MISMATCH, OK, now_ns, relax, ring, settle, wake

#: Phases of a call.
IDLE, PUBLISH, AWAIT, CONSUME = range(4)
#: Status, beside those of `wait`: alltoallv knows what it will receive, and needs room for it.
SIZES_KNOWN = 1
#: Another call is in the middle.
BUSY = 2
#: The arrays are not what the plan is for; nothing was begun.
UNFIT = 3
#: Alltoallv: other numbers of rows came than expected, or there was no room for them; none was written.
WRONG_ROWS = 4


@device
def _meter(state: int, kind: int, peer: int, n_bytes: int, units: int = 1) -> None:
    """Count units and their bytes, if somebody wants to know."""
    meter = load_i64(state + CS_METER)
    if meter != 0:
        at = meter + 16 * (kind * load_i64(state + CS_RANKS) + peer)
        store_i64(at, load_i64(at) + units)
        store_i64(at + 8, load_i64(at + 8) + n_bytes)


@device
def _own_segment(state: int) -> int:
    return load_i64(load_i64(state + CS_SEGMENTS) + 8 * load_i64(state + CS_RANK))


@device
def _half(state: int, plan: int, step: int) -> int:
    """Offset of the half of the staging area that a step uses."""
    return load_i64(state + CS_STAGE) + (step & 1) * load_i64(plan + PL_HALF)


@device
def _record_of(state: int, peer: int, step: int) -> int:
    """Address of what `peer` says in a step: in the own block, or, where arrivals are counted, in the peer's."""
    if load_i64(state + CS_COUNTS) != 0:
        return load_i64(load_i64(state + CS_BLOCKS) + 8 * peer) + HEADERS_OFFSET + (step & 1) * RECORD_BYTES
    ranks = load_i64(state + CS_RANKS)
    own = load_i64(load_i64(state + CS_BLOCKS) + 8 * load_i64(state + CS_RANK))
    return own + RECORDS_OFFSET + ((step & 1) * ranks + peer) * RECORD_BYTES


@device
def _part_bytes(plan: int, index: int, n_bytes: int) -> int:
    """Bytes of a part of `n_bytes` that go in step `index` of a call."""
    chunk = load_i64(plan + PL_CHUNK)
    return min(chunk, max(0, n_bytes - index * chunk))


@device
def _table(state: int, plan: int, column: int, peer: int) -> int:
    """A number of the table of alltoallv."""
    return load_i64(load_i64(plan + PL_TABLE) + 8 * (column * load_i64(state + CS_RANKS) + peer))


@device
def _set_table(state: int, plan: int, column: int, peer: int, value: int) -> None:
    store_i64(load_i64(plan + PL_TABLE) + 8 * (column * load_i64(state + CS_RANKS) + peer), value)


@device
def _slice_bytes(n_bytes: int, ranks: int) -> int:
    """Two steps: bytes of each rank's slice of a window, but for the last ones; whole cache lines."""
    return -(-n_bytes // (64 * ranks)) * 64


@device
def _is_inline(state: int, plan: int, n_bytes: int) -> bool:
    """Does a part of `n_bytes` travel in the record?"""
    if load_i64(plan + PL_BYTES) < 0:
        return load_i64(state + CS_COUNTS) == 0 and n_bytes <= INLINE_BYTES
    return load_i64(plan + PL_INLINE) != 0


# -- publish ----------------------------------------------------------------------------------------------------------


@device
def _fill(state: int, plan: int, record: int, peer: int, x: int, step: int) -> None:
    """Write what this rank says to `peer` (or to all) in a step, and release it."""
    n_bytes = load_i64(plan + PL_BYTES)
    inline = _is_inline(state, plan, n_bytes)
    part = x + peer * load_i64(plan + PL_SEND_STRIDE)
    limit = 0
    if n_bytes < 0:
        ranks = load_i64(state + CS_RANKS)
        n_bytes = _table(state, plan, TB_SENT, peer)
        part = x + _table(state, plan, TB_SENT_AT, peer)
        inline = _is_inline(state, plan, n_bytes)
        for other in range(ranks):
            limit = max(limit, _table(state, plan, TB_SENT, other))
    store_i64(record + CR_SIGNATURE, load_i64(plan + PL_SIGNATURE))
    store_i64(record + CR_BYTES, n_bytes)
    store_i64(record + CR_LIMIT, limit)
    store_i64(record + CR_AT, _half(state, plan, step))
    rank = load_i64(state + CS_RANK)
    sender, receiver = load_i64(plan + PL_SENDER), load_i64(plan + PL_RECEIVER)
    if inline and load_i64(state + CS_INDEX) == 0 and (sender < 0 or sender == rank):
        if receiver < 0 or receiver == peer or load_i64(state + CS_COUNTS) != 0:
            copy_bytes(record + CR_PAYLOAD, part, n_bytes)
            if n_bytes > 0:
                _meter(state, METER_PAYLOAD, peer, n_bytes)
    # SYNC POINT collective-step: released after what it says, and what is staged; `_await_all` acquires it.
    store_release(record + CR_STEP, step)


@device
def _say(state: int, plan: int, x: int, step: int) -> None:
    """Tell all others that this rank has published a step."""
    ranks, rank = load_i64(state + CS_RANKS), load_i64(state + CS_RANK)
    controls = load_i64(state + CS_CONTROLS)
    if load_i64(state + CS_COUNTS) != 0:
        _fill(state, plan, _record_of(state, rank, step), rank, x, step)
        # SYNC POINT collective-arrival: counted after the record was written; rank 0 acquires the count.
        first = load_i64(load_i64(state + CS_BLOCKS))
        _meter(state, METER_ARRIVAL, 0, 8)
        if fetch_add(first + CB_ARRIVALS, 1) + 1 == ranks * step:
            ring(load_i64(controls))
        return
    blocks = load_i64(state + CS_BLOCKS)
    mine = RECORDS_OFFSET + ((step & 1) * ranks + rank) * RECORD_BYTES
    for i in range(1, ranks):
        peer = (rank + i) % ranks
        _fill(state, plan, load_i64(blocks + 8 * peer) + mine, peer, x, step)
        _meter(state, METER_RECORD, peer, CR_PAYLOAD)
    _wake_others(state)


@device
def _wake_others(state: int) -> None:
    """SYNC POINT doorbell for all others, with one fence."""
    ranks, rank = load_i64(state + CS_RANKS), load_i64(state + CS_RANK)
    controls = load_i64(state + CS_CONTROLS)
    fence_seq_cst()
    for i in range(1, ranks):
        control = load_i64(controls + 8 * ((rank + i) % ranks))
        if load_acquire(control + CTL_WAITERS) > 0:
            wake(control)


@device
def _stage_piece(state: int, target: int, source: int, n_bytes: int) -> None:
    if n_bytes > 0:
        copy_bytes(target, source, n_bytes)
        _meter(state, METER_STAGE, load_i64(state + CS_RANK), n_bytes)


@device
def _stage_parts(state: int, plan: int, x: int, step: int) -> None:
    """Stage this step's pieces of the parts for all receivers."""
    index = load_i64(state + CS_INDEX)
    ranks, rank = load_i64(state + CS_RANKS), load_i64(state + CS_RANK)
    chunk = load_i64(plan + PL_CHUNK)
    start = index * chunk
    target = _own_segment(state) + _half(state, plan, step)
    n_bytes = load_i64(plan + PL_BYTES)
    if n_bytes < 0:
        counts = load_i64(state + CS_COUNTS) != 0
        for peer in range(ranks):
            size = _table(state, plan, TB_SENT, peer)
            if index == 0 and counts:
                store_i64(target + load_i64(plan + PL_RESULTS) + 8 * peer, size)
            if peer != rank and (counts or size > INLINE_BYTES):
                source = x + _table(state, plan, TB_SENT_AT, peer) + start
                _stage_piece(state, target + peer * chunk, source, _part_bytes(plan, index, size))
        return
    sender, receiver = load_i64(plan + PL_SENDER), load_i64(plan + PL_RECEIVER)
    if load_i64(plan + PL_INLINE) != 0 or (sender >= 0 and sender != rank) or ranks == 1:
        return
    size = _part_bytes(plan, index, n_bytes)
    stride = load_i64(plan + PL_SEND_STRIDE)
    if stride == 0:
        if receiver != rank:
            _stage_piece(state, target, x + start, size)
        return
    for peer in range(ranks):
        if peer != rank and (receiver < 0 or receiver == peer):
            _stage_piece(state, target + peer * chunk, x + peer * stride + start, size)


@device
def _stage_window(state: int, plan: int, x: int, step: int) -> None:
    """Two steps: stage this step's window of the input, but for the own slice."""
    index = load_i64(state + CS_INDEX)
    rank, sender = load_i64(state + CS_RANK), load_i64(plan + PL_SENDER)
    n_bytes = _part_bytes(plan, index, load_i64(plan + PL_BYTES))
    if n_bytes == 0 or (sender >= 0 and sender != rank):
        return
    first = min(rank * _slice_bytes(n_bytes, load_i64(state + CS_RANKS)), n_bytes)
    end = min(first + _slice_bytes(n_bytes, load_i64(state + CS_RANKS)), n_bytes)
    target = _own_segment(state) + _half(state, plan, step)
    source = x + index * load_i64(plan + PL_CHUNK)
    _stage_piece(state, target, source, first)
    _stage_piece(state, target + end, source + end, n_bytes - end)


# -- await ------------------------------------------------------------------------------------------------------------


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
        n = relax(control, n, seq, until_ns)
        if n < 0:
            return n
    settle(control, n)
    return OK


@device
def _await_all(state: int, step: int, until_ns: int) -> int:
    """Wait until all others have published a step."""
    ranks, rank = load_i64(state + CS_RANKS), load_i64(state + CS_RANK)
    if load_i64(state + CS_COUNTS) == 0:
        for peer in range(load_i64(state + CS_CURSOR), ranks):
            if peer == rank:
                continue
            # SYNC POINT collective-step: acquires the record, and what its sender has staged.
            status = _await_word(state, _record_of(state, peer, step) + CR_STEP, step, until_ns)
            if status != OK:
                store_i64(state + CS_CURSOR, peer)
                return status
            _meter(state, METER_AWAIT, peer, 0)
        return OK
    own = load_i64(load_i64(state + CS_BLOCKS) + 8 * rank)
    if rank != 0:
        # SYNC POINT collective-arrival: rank 0 has acquired the arrivals of all, and released this after them.
        status = _await_word(state, own + CB_RELEASE, step, until_ns)
    else:
        status = _await_word(state, own + CB_ARRIVALS, ranks * step, until_ns)
        if status == OK:
            for peer in range(1, ranks):
                store_release(load_i64(load_i64(state + CS_BLOCKS) + 8 * peer) + CB_RELEASE, step)
                _meter(state, METER_RELEASE, peer, 8)
            _wake_others(state)
    if status == OK:
        _meter(state, METER_AWAIT, 0, 0, ranks if rank == 0 else 1)
    return status


@device
def _agrees(state: int, plan: int, step: int) -> bool:
    """Have all ranks made the same call?"""
    signature, n_bytes = load_i64(plan + PL_SIGNATURE), load_i64(plan + PL_BYTES)
    rank = load_i64(state + CS_RANK)
    for peer in range(load_i64(state + CS_RANKS)):
        if peer != rank:
            record = _record_of(state, peer, step)
            if load_i64(state + CS_COUNTS) != 0:
                _meter(state, METER_RECORD, peer, CR_PAYLOAD)
            if load_i64(record + CR_SIGNATURE) != signature:
                return False
            if n_bytes >= 0 and load_i64(record + CR_BYTES) != n_bytes:
                return False
    return True


@device
def _learn_sizes(state: int, plan: int, step: int, room_bytes: int) -> None:
    """Alltoallv: what each rank sends to this one, whether that can be taken, and how many steps there will be."""
    ranks, rank = load_i64(state + CS_RANKS), load_i64(state + CS_RANK)
    row_bytes = load_i64(plan + PL_ITEM_BYTES)
    largest, at, takes = 0, 0, 1
    for peer in range(ranks):
        size = _table(state, plan, TB_SENT, peer)
        largest = max(largest, size)
        if peer != rank:
            record = _record_of(state, peer, step)
            largest = max(largest, load_i64(record + CR_LIMIT))
            size = load_i64(record + CR_BYTES)
            if load_i64(state + CS_COUNTS) != 0:
                segment = load_i64(load_i64(state + CS_SEGMENTS) + 8 * peer)
                size = load_i64(segment + load_i64(record + CR_AT) + load_i64(plan + PL_RESULTS) + 8 * rank)
        expected = _table(state, plan, TB_EXPECTED, peer)
        if expected >= 0 and expected * row_bytes != size:
            takes = 0
        _set_table(state, plan, TB_RECEIVED, peer, size)
        _set_table(state, plan, TB_RECEIVED_AT, peer, at)
        _set_table(state, plan, TB_CAME, peer, size // row_bytes)
        at += size
    if room_bytes >= 0 and at > room_bytes:
        takes = 0
    store_i64(state + CS_TAKES, takes)
    store_i64(state + CS_STEPS, max(1, -(-largest // load_i64(plan + PL_CHUNK))))


# -- consume ----------------------------------------------------------------------------------------------------------


@device
def _meter_part(state: int, plan: int, peer: int, n_bytes: int, size: int) -> None:
    """Count a piece of `size` bytes of a part of `n_bytes` that was read."""
    rank = load_i64(state + CS_RANK)
    if peer != rank and load_i64(state + CS_COUNTS) == 0 and _is_inline(state, plan, n_bytes):
        _meter(state, METER_UNPACK, peer, size)
    else:
        _meter(state, METER_OWN if peer == rank else METER_PULL, peer, size)


@device
def _part_from(state: int, plan: int, peer: int, step: int, x: int, n_bytes: int) -> int:
    """Address of this step's piece of the part of `n_bytes` that `peer` has for this rank."""
    rank = load_i64(state + CS_RANK)
    chunk = load_i64(plan + PL_CHUNK)
    if peer == rank:
        own = rank * load_i64(plan + PL_SEND_STRIDE)
        if load_i64(plan + PL_BYTES) < 0:
            own = _table(state, plan, TB_SENT_AT, rank)
        return x + own + load_i64(state + CS_INDEX) * chunk
    record = _record_of(state, peer, step)
    if _is_inline(state, plan, n_bytes):
        return record + CR_PAYLOAD
    one_for_all = load_i64(plan + PL_BYTES) >= 0 and load_i64(plan + PL_SEND_STRIDE) == 0
    place = 0 if one_for_all else rank * chunk
    return load_i64(load_i64(state + CS_SEGMENTS) + 8 * peer) + load_i64(record + CR_AT) + place


@device
def _consume_parts(state: int, plan: int, x: int, out: int, step: int) -> None:
    """Copy this step's pieces of the parts of all senders to where they belong. The next rank comes first."""
    rank, ranks = load_i64(state + CS_RANK), load_i64(state + CS_RANKS)
    sender, receiver = load_i64(plan + PL_SENDER), load_i64(plan + PL_RECEIVER)
    if receiver >= 0 and receiver != rank:
        return
    index = load_i64(state + CS_INDEX)
    start = index * load_i64(plan + PL_CHUNK)
    for i in range(1, ranks + 1):
        peer = (rank + i) % ranks
        if sender >= 0 and sender != peer:
            continue
        n_bytes = load_i64(plan + PL_BYTES)
        target = out + peer * load_i64(plan + PL_RECV_STRIDE) + start
        if n_bytes < 0:
            n_bytes = _table(state, plan, TB_RECEIVED, peer)
            target = out + _table(state, plan, TB_RECEIVED_AT, peer) + start
        size = _part_bytes(plan, index, n_bytes)
        source = _part_from(state, plan, peer, step, x, n_bytes)
        if size > 0 and source != target:
            copy_bytes_auto(target, source, size)
            _meter_part(state, plan, peer, n_bytes, size)


@device
def _operands(state: int, plan: int, x: int, out: int, step: int) -> int:
    """Note where this step's pieces of the parts of all ranks lie, in the order of ranks; their size."""
    rank, ranks = load_i64(state + CS_RANK), load_i64(state + CS_RANKS)
    index = load_i64(state + CS_INDEX)
    n_bytes = load_i64(plan + PL_BYTES)
    size = _part_bytes(plan, index, n_bytes)
    rows = load_i64(state + CS_ROWS)
    for peer in range(ranks):
        store_i64(rows + 8 * peer, _part_from(state, plan, peer, step, x, n_bytes))
        if peer != rank and size > 0:
            _meter_part(state, plan, peer, n_bytes, size)
    store_i64(state + CS_TARGET, out + index * load_i64(plan + PL_CHUNK))
    return size


@device
def _gather_results(state: int, plan: int, out: int, step: int) -> None:
    """Two steps: pull the results of the window before from the ranks that made them."""
    rank, ranks = load_i64(state + CS_RANK), load_i64(state + CS_RANKS)
    index = load_i64(state + CS_INDEX) - 1
    n_bytes = _part_bytes(plan, index, load_i64(plan + PL_BYTES))
    slice_bytes = _slice_bytes(n_bytes, ranks)
    if load_i64(plan + PL_SENDER) == rank:
        return
    for i in range(1, ranks):
        peer = (rank + i) % ranks
        first = min(peer * slice_bytes, n_bytes)
        size = min(slice_bytes, n_bytes - first)
        if size > 0:
            segment = load_i64(load_i64(state + CS_SEGMENTS) + 8 * peer)
            source = segment + load_i64(_record_of(state, peer, step) + CR_AT) + load_i64(plan + PL_RESULTS)
            copy_bytes(out + index * load_i64(plan + PL_CHUNK) + first, source, size)
            _meter(state, METER_GATHER, peer, size)


@device
def _own_slice(state: int, plan: int) -> tuple[int, int]:
    """Two steps: where the own slice of this step's window starts in the whole, and its size."""
    index = load_i64(state + CS_INDEX)
    n_bytes = _part_bytes(plan, index, load_i64(plan + PL_BYTES))
    slice_bytes = _slice_bytes(n_bytes, load_i64(state + CS_RANKS))
    first = min(load_i64(state + CS_RANK) * slice_bytes, n_bytes)
    return index * load_i64(plan + PL_CHUNK) + first, min(slice_bytes, n_bytes - first)


@device
def _slice_from(state: int, plan: int, peer: int, step: int, x: int, start: int, size: int) -> int:
    """Two steps: address of the own slice, which starts at `start` in the whole, of the input of `peer`."""
    if peer == load_i64(state + CS_RANK):
        return x + start
    _meter(state, METER_PULL, peer, size)
    segment = load_i64(load_i64(state + CS_SEGMENTS) + 8 * peer)
    within = start - load_i64(state + CS_INDEX) * load_i64(plan + PL_CHUNK)
    return segment + load_i64(_record_of(state, peer, step) + CR_AT) + within


@device
def _slice_operands(state: int, plan: int, x: int, step: int) -> int:
    """Two steps: as `_operands`, of the own slice of this step's window; the result goes to the next step's half."""
    start, size = _own_slice(state, plan)
    if size == 0:
        return 0
    result = _own_segment(state) + _half(state, plan, step + 1) + load_i64(plan + PL_RESULTS)
    store_i64(state + CS_TARGET, result)
    sender = load_i64(plan + PL_SENDER)
    if sender >= 0:
        copy_bytes(result, _slice_from(state, plan, sender, step, x, start, size), size)
        return 0
    rows = load_i64(state + CS_ROWS)
    for peer in range(load_i64(state + CS_RANKS)):
        store_i64(rows + 8 * peer, _slice_from(state, plan, peer, step, x, start, size))
    return size


@device
def _keep_slice(state: int, plan: int, out: int) -> None:
    """Two steps: copy the result of the own slice from the staging area, where the others will find it."""
    start, size = _own_slice(state, plan)
    rank = load_i64(state + CS_RANK)
    if size == 0:
        return
    _meter(state, METER_RESULT, rank, size)
    if load_i64(plan + PL_SENDER) != rank:
        copy_bytes(out + start, load_i64(state + CS_TARGET), size)
        _meter(state, METER_OWN, rank, size)


# -- the whole --------------------------------------------------------------------------------------------------------


@device
def _plan_rows(state: int, plan: int, rows: int) -> bool:
    """Alltoallv: from rows to bytes; False if they are not the `rows` rows of the input."""
    row_bytes = load_i64(plan + PL_ITEM_BYTES)
    at = 0
    for peer in range(load_i64(state + CS_RANKS)):
        size = _table(state, plan, TB_ROWS, peer) * row_bytes
        if size < 0:
            return False
        _set_table(state, plan, TB_SENT, peer, size)
        _set_table(state, plan, TB_SENT_AT, peer, at)
        at += size
    return at == rows * row_bytes


@device
def _fit(state: int, plan: int, x: int, out: int) -> bool:
    """Are the arrays what the plan is for, and apart?"""
    dtype, ranks = load_i64(plan + PL_DTYPE), load_i64(state + CS_RANKS)
    x_bytes, out_bytes = load_i64(plan + PL_X_BYTES), load_i64(plan + PL_OUT_BYTES)
    if x_bytes >= 0:
        if x == 0 or not is_plain(x, dtype, False):
            return False
        if load_i64(plan + PL_SEND_STRIDE) > 0 and first_dim(x) != ranks:
            return False
    if out_bytes >= 0:
        item_bytes = load_i64(plan + PL_ITEM_BYTES)
        if out == 0 or not is_plain(out, dtype, True) or bytes_of(out, item_bytes) != out_bytes:
            return False
        x_data, out_data = data_of(x), data_of(out)
        if x_bytes > 0 and x_data < out_data + out_bytes and out_data < x_data + x_bytes:
            place = load_i64(plan + PL_IN_PLACE)
            return place >= 0 and x_data == out_data + place
    return True


@device
def _begin(state: int, plan: int, x: int, out: int, check: int) -> bool:
    if check != 0 and not _fit(state, plan, x, out):
        return False
    if load_i64(plan + PL_BYTES) < 0 and not _plan_rows(state, plan, first_dim(x)):
        return False
    store_i64(state + CS_PLAN, plan)
    store_i64(state + CS_INDEX, 0)
    store_i64(state + CS_STEPS, load_i64(plan + PL_STEPS))
    store_i64(state + CS_TAKES, 1)
    return True


@device
def _publish(state: int, plan: int, x: int) -> None:
    """Stage and announce the next step."""
    step = load_i64(state + CS_STEP) + 1
    if load_i64(plan + PL_TWO_STEP) != 0:
        _stage_window(state, plan, x, step)
    else:
        _stage_parts(state, plan, x, step)
    store_i64(state + CS_STEP, step)
    store_i64(state + CS_CURSOR, 0)
    _say(state, plan, x, step)


@kernel("int64(int64, int64, int64, int64, int64, int64)")
def collective(state: int, plan: int, x_array: int, out_array: int, check: int, until_ns: int) -> int:
    """Begin a call, or go on with the one that is under way.

    Args:
        state: address of the communicator's state.
        plan: address of the call's plan.
        x_array: address of the array object of the input, 0 for none.
        out_array: that of the output; 0 in alltoallv if it is to be made when sizes are known.
        check: 1: look whether the arrays are what the plan is for; 0: they are.
        until_ns: when to return at the latest; below 0: so many ns from the first wait on; 0: do not wait.

    Returns:
        OK, SLICE, ABORTED, PENDING; MISMATCH if ranks disagree about the call: nothing was moved; or SIZES_KNOWN, BUSY,
        UNFIT, WRONG_ROWS.
    """
    phase = load_i64(state + CS_PHASE)
    if phase == IDLE:
        if not _begin(state, plan, x_array, out_array, check):
            return UNFIT
        phase = PUBLISH
    elif load_i64(state + CS_PLAN) != plan:
        return BUSY
    x, out = data_of(x_array), data_of(out_array)
    while True:
        if phase == PUBLISH:
            _publish(state, plan, x)
            phase = AWAIT
        step = load_i64(state + CS_STEP)
        index = load_i64(state + CS_INDEX)
        if phase == AWAIT:
            status = _await_all(state, step, until_ns)
            if status != OK:
                store_i64(state + CS_PHASE, AWAIT)
                return status
            if index == 0:
                if not _agrees(state, plan, step):
                    store_i64(state + CS_PHASE, IDLE)
                    return MISMATCH
                if load_i64(plan + PL_BYTES) < 0:
                    room_bytes = -1
                    if out_array != 0:
                        room_bytes = first_dim(out_array) * load_i64(plan + PL_ITEM_BYTES)
                    _learn_sizes(state, plan, step, room_bytes)
                    if out_array == 0 and load_i64(state + CS_TAKES) != 0:
                        store_i64(state + CS_PHASE, CONSUME)
                        return SIZES_KNOWN
        two_step = load_i64(plan + PL_TWO_STEP) != 0
        makes = two_step and index + 1 < load_i64(state + CS_STEPS)
        size = 0
        if two_step:
            if index > 0:
                _gather_results(state, plan, out, step)
            if makes:
                size = _slice_operands(state, plan, x, step)
        elif load_i64(plan + PL_FOLD) >= 0:
            size = _operands(state, plan, x, out, step)
        elif load_i64(state + CS_TAKES) != 0:
            _consume_parts(state, plan, x, out, step)
        if size > 0:
            n = size // load_i64(plan + PL_ITEM_BYTES)
            rows, target = load_i64(state + CS_ROWS), load_i64(state + CS_TARGET)
            fold_rows(load_i64(plan + PL_FOLD), rows, load_i64(state + CS_RANKS), n, target)
            _meter(state, METER_FOLD, load_i64(state + CS_RANK), size)
        if makes:
            _keep_slice(state, plan, out)
        if index + 1 >= load_i64(state + CS_STEPS):
            store_i64(state + CS_PHASE, IDLE)
            return OK if load_i64(state + CS_TAKES) != 0 else WRONG_ROWS
        store_i64(state + CS_INDEX, index + 1)
        phase = PUBLISH


@kernel("void(int64, int64)")
def refuse(state: int, plan: int) -> None:
    """Publish a step that no other rank agrees with, and wait for nobody; `collective` with this plan waits."""
    _begin(state, plan, 0, 0, 0)
    _publish(state, plan, 0)
    store_i64(state + CS_PHASE, AWAIT)
