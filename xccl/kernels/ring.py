"""Send and receive over the ring of a pair (XDS section 3.1, steps 1 to 8).

Rules
- A channel is an ordered pair of ranks. Its ring lies in the receiver's managed area. Positions are chunk numbers that
  only grow; chunk c lies in slot c mod slots. Only the sender writes slots and data fields, only the receiver writes
  acknowledgement fields.
- A message of b bytes over L lanes is cut into chunks, at least MIN_CHUNK_BYTES and at most a slot; chunk i belongs to
  lane i mod L, whose fields announce and acknowledge it. A message of 0 bytes is one empty chunk. So each lane has
  every L-th slot from the message's first one on: a share of slots / L, rounded up, and never more at once.
- A zero-copy message takes one position, whatever its size: `kernels.zerocopy` says what happens then.
- The sender may write chunk c once position c - slots is acknowledged: that is the back-pressure.
- Messages of a channel go in the order in which they were posted, on both sides.
- The receiver checks event ID, size and lanes when the first chunk arrives. If they differ it refuses the message.

Theory of operation. Slots carry a copy of the header, so the sender may write the next message before the last one is
acknowledged: a data field is overwritten then, but the receiver takes nothing from it but the position. Since one
thread writes all chunks in order, a tail beyond c in *any* lane's field means that chunk c is in its slot.

The receiver refuses a message by a record in the sender's metadata area, at the index of the slot of its first chunk.
Then it drops the chunks of that message, until they end or a slot starts another one. The sender looks at the record of
each message under way, stops writing one that was refused, and goes on with the next at its present position. A message
that is dropped is acknowledged, but the refusal was released before, so a sender that sees the last acknowledgement and
then no refusal has been received. Both sides report the mismatch, nothing blocks, and other messages of the channel are
not concerned. A message starts in a slot only after the last one that started there has ended at the sender (`starts`),
so no refusal is overwritten before it was seen.

Both steps here are state machines that never wait: all progress is in the channel and the operation, and a step does
what can be done at once. Waiting, and the order of the operations, are up to `kernels.driver`.
"""

from __future__ import annotations

from ..layout.ring import (
    ACK_CHUNK_ID,
    ACK_EVENT_ID,
    ACK_HEAD,
    CH_ACK_FIELDS,
    CH_DATA_FIELDS,
    CH_NEXT,
    CH_PEER_CONTROL,
    CH_REFUSAL_TABLE,
    CH_RING,
    CH_SLOT_BYTES,
    CH_SLOT_LANES,
    CH_SLOT_STRIDE,
    CH_SLOTS,
    CH_STALE_FIRST,
    CH_STALE_LANES,
    CH_STARTS,
    DATA_CHUNK_ID,
    DATA_EVENT_ID,
    DATA_MESSAGE_BYTES,
    DATA_TAIL,
    FIELD_BYTES,
    FORM_RING,
    MIN_CHUNK_BYTES,
    OP_BUFFER,
    OP_BYTES,
    OP_CHUNK_BYTES,
    OP_CHUNKS,
    OP_DONE,
    OP_EVENT_ID,
    OP_FIRST,
    OP_FORM,
    OP_LANES,
    OP_PEER_BYTES,
    OP_PEER_EVENT_ID,
    OP_PEER_LANES,
    OP_PLACE,
    OP_RESULT,
    OP_TAKES,
    REFUSAL_BYTES,
    RF_BYTES,
    RF_EVENT_ID,
    RF_LANES,
    RF_STAMP,
    SLOT_CHUNK_BYTES,
    SLOT_CLAIMS,
    SLOT_EVENT_ID,
    SLOT_FIRST,
    SLOT_FORM,
    SLOT_HEADER_BYTES,
    SLOT_LANES,
    SLOT_MESSAGE_BYTES,
    SLOT_PLACE,
    STATE_DONE,
    STATE_REFUSED,
    TAKES,
    TAKES_FAILED,
    TAKES_LATER,
    ZERO_COPY_BYTES,
)
from ._jit import device
from .atomics import fetch_add, load_acquire, load_i64, prefetch_for_writing, remainder, store_i64, store_release
from .copy import copy_bytes
from .wait import OK, PENDING, ring
from .zerocopy import (
    ALL_TAKEN,
    ENDED,
    MOVED,
    await_pushed,
    offer,
    piece_bytes,
    pull,
    push,
    set_up_transfer,
    take_back,
    withdraw,
)


@device
def _chunk_bytes(n_bytes: int, lanes: int, slot_bytes: int) -> int:
    share = -(-n_bytes // lanes)
    share = -(-share // MIN_CHUNK_BYTES) * MIN_CHUNK_BYTES
    return min(max(share, MIN_CHUNK_BYTES), slot_bytes)


@device
def slot_of(channel: int, position: int) -> int:
    """Address of the slot of a ring position."""
    index = remainder(position, load_i64(channel + CH_SLOTS))
    return load_i64(channel + CH_RING) + index * load_i64(channel + CH_SLOT_STRIDE)


# -- sender -----------------------------------------------------------------------------------------------------------


@device
def _start_of(channel: int, position: int) -> int:
    """Address of the word that says whether a message that started in this slot is under way."""
    return load_i64(channel + CH_STARTS) + 8 * remainder(position, load_i64(channel + CH_SLOTS))


@device
def _start(channel: int, op: int) -> bool:
    """Take the channel's next position, if a message may start there."""
    position = load_i64(channel + CH_NEXT)
    starts = _start_of(channel, position)
    if load_i64(starts) != 0:
        return False
    store_i64(starts, 1)
    n_bytes = load_i64(op + OP_BYTES)
    chunks = 1
    if load_i64(op + OP_FORM) != FORM_RING:
        store_i64(op + OP_CHUNK_BYTES, piece_bytes(n_bytes, load_i64(op + OP_LANES)))
    elif n_bytes <= MIN_CHUNK_BYTES:
        store_i64(op + OP_CHUNK_BYTES, min(MIN_CHUNK_BYTES, load_i64(channel + CH_SLOT_BYTES)))
        chunks = max(1, -(-n_bytes // load_i64(op + OP_CHUNK_BYTES)))
    else:
        chunk_bytes = _chunk_bytes(n_bytes, load_i64(op + OP_LANES), load_i64(channel + CH_SLOT_BYTES))
        store_i64(op + OP_CHUNK_BYTES, chunk_bytes)
        chunks = -(-n_bytes // chunk_bytes)
    store_i64(op + OP_FIRST, position)
    store_i64(op + OP_CHUNKS, chunks)
    return True


@device
def _is_refused(channel: int, op: int) -> bool:
    """Has the receiver refused this message? If so, note what it expected."""
    first = load_i64(op + OP_FIRST)
    refusal = load_i64(channel + CH_REFUSAL_TABLE) + remainder(first, load_i64(channel + CH_SLOTS)) * REFUSAL_BYTES
    # SYNC POINT ring-refusal: acquires what `_refuse` wrote before it released the stamp.
    if load_acquire(refusal + RF_STAMP) != first + 1:
        return False
    store_i64(op + OP_PEER_EVENT_ID, load_i64(refusal + RF_EVENT_ID))
    store_i64(op + OP_PEER_BYTES, load_i64(refusal + RF_BYTES))
    store_i64(op + OP_PEER_LANES, load_i64(refusal + RF_LANES))
    return True


@device
def _slot_is_free(channel: int) -> bool:
    position = load_i64(channel + CH_NEXT)
    slots = load_i64(channel + CH_SLOTS)
    if position < slots:
        return True
    lane = load_i64(load_i64(channel + CH_SLOT_LANES) + 8 * remainder(position, slots))
    # SYNC POINT ring-ack: acquires that the receiver has read what was in the slot.
    return load_acquire(load_i64(channel + CH_ACK_FIELDS) + lane * FIELD_BYTES + ACK_HEAD) > position - slots


@device
def _write_chunk(channel: int, op: int) -> None:
    """Steps 1 to 3: the next chunk into its slot, then the lane's field."""
    position = load_i64(channel + CH_NEXT)
    index = load_i64(op + OP_DONE)
    lanes = load_i64(op + OP_LANES)
    lane = remainder(index, lanes)
    chunk_bytes = load_i64(op + OP_CHUNK_BYTES)
    n_bytes = load_i64(op + OP_BYTES)
    event_id = load_i64(op + OP_EVENT_ID)
    start = index * chunk_bytes
    form = load_i64(op + OP_FORM)
    slot_index = remainder(position, load_i64(channel + CH_SLOTS))
    slot = load_i64(channel + CH_RING) + slot_index * load_i64(channel + CH_SLOT_STRIDE)
    field = load_i64(channel + CH_DATA_FIELDS) + lane * FIELD_BYTES
    store_i64(slot + SLOT_EVENT_ID, event_id)
    store_i64(slot + SLOT_FIRST, load_i64(op + OP_FIRST))
    store_i64(slot + SLOT_MESSAGE_BYTES, n_bytes)
    store_i64(slot + SLOT_LANES, lanes)
    store_i64(slot + SLOT_CHUNK_BYTES, chunk_bytes)
    store_i64(slot + SLOT_FORM, form)
    store_i64(slot + SLOT_PLACE, load_i64(op + OP_PLACE))
    if form == FORM_RING:
        copy_bytes(slot + SLOT_HEADER_BYTES, load_i64(op + OP_BUFFER) + start, min(chunk_bytes, n_bytes - start))
    else:
        set_up_transfer(slot, op)
    store_i64(load_i64(channel + CH_SLOT_LANES) + 8 * slot_index, lane)
    store_i64(field + DATA_EVENT_ID, event_id)
    store_i64(field + DATA_CHUNK_ID, index)
    store_i64(field + DATA_MESSAGE_BYTES, n_bytes)
    # SYNC POINT ring-data: released after the slot; `step_receive` acquires it.
    store_release(field + DATA_TAIL, position + 1)
    ring(load_i64(channel + CH_PEER_CONTROL))
    store_i64(channel + CH_NEXT, position + 1)
    store_i64(op + OP_DONE, index + 1)


@device
def _end_send(channel: int, op: int, result: int) -> int:
    store_i64(_start_of(channel, load_i64(op + OP_FIRST)), 0)
    store_i64(op + OP_RESULT, result)
    return ENDED


@device
def step_send(channel: int, op: int) -> int:
    """`write_or_settle`, and one piece of a zero-copy message is pushed. Returns PENDING, MOVED or ENDED."""
    status = write_or_settle(channel, op)
    if status != PENDING or not is_written(op) or load_i64(op + OP_FORM) == FORM_RING:
        return status
    status = push(channel, op, slot_of(channel, load_i64(op + OP_FIRST)))
    return _end_send(channel, op, load_i64(op + OP_RESULT)) if status == ENDED else status


@device
def write_or_settle(channel: int, op: int) -> int:
    """Steps 1 to 4 and 8: write chunks while slots are free, look for the acknowledgement of the last one.

    The operation must be the first of its channel that is not written, or be written. Returns PENDING, MOVED or ENDED.
    """
    if load_i64(op + OP_CHUNKS) == 0 and not _start(channel, op):
        return PENDING
    chunks = load_i64(op + OP_CHUNKS)
    done = load_i64(op + OP_DONE)
    if done > 0:
        acknowledged = False
        if done == chunks:
            lane = remainder(chunks - 1, load_i64(op + OP_LANES))
            head = load_i64(channel + CH_ACK_FIELDS) + lane * FIELD_BYTES + ACK_HEAD
            # SYNC POINT ring-ack: the receiver released this after it copied, or dropped, the last chunk.
            acknowledged = load_acquire(head) >= load_i64(op + OP_FIRST) + chunks
        # Looked at after the acknowledgement: a dropped message was refused first.
        if load_i64(op + OP_TAKES) == TAKES_FAILED:
            return _end_send(channel, op, load_i64(op + OP_RESULT))
        if _is_refused(channel, op):
            return _end_send(channel, op, STATE_REFUSED)
        if acknowledged:
            return _end_send(channel, op, STATE_DONE)
        if done == chunks:
            return PENDING
    status = PENDING
    while load_i64(op + OP_DONE) < chunks and _slot_is_free(channel):
        _write_chunk(channel, op)
        status = MOVED
    return status


@device
def is_written(op: int) -> bool:
    """Has the sender written all of a message, so that the next one may start?"""
    chunks = load_i64(op + OP_CHUNKS)
    return chunks != 0 and load_i64(op + OP_DONE) == chunks


@device
def withdraw_send(channel: int, op: int, until_ns: int) -> int:
    """See that nobody reads the buffer of a send any more: OK, or SLICE."""
    if load_i64(op + OP_FORM) == FORM_RING or load_i64(op + OP_CHUNKS) == 0 or load_i64(op + OP_DONE) == 0:
        return OK
    return withdraw(channel, op, slot_of(channel, load_i64(op + OP_FIRST)), True, until_ns)


# -- receiver ---------------------------------------------------------------------------------------------------------


@device
def _published(channel: int, op: int) -> bool:
    """Is the next chunk in its slot? Any lane whose tail is beyond it says so; poll those where it can be announced."""
    position = load_i64(channel + CH_NEXT)
    fields = load_i64(channel + CH_DATA_FIELDS)
    first = load_i64(op + OP_FIRST)
    lanes = load_i64(op + OP_LANES)
    if load_i64(op + OP_CHUNKS) == 0:
        # SYNC POINT ring-data: acquires the slot. A new message starts in lane 0.
        if load_acquire(fields + DATA_TAIL) > position:
            return True
        first = load_i64(channel + CH_STALE_FIRST)
        lanes = load_i64(channel + CH_STALE_LANES)
        if lanes == 0:
            return False
    return load_acquire(fields + remainder(position - first, lanes) * FIELD_BYTES + DATA_TAIL) > position


@device
def _acknowledge(channel: int, op: int, position: int, index: int, lanes: int) -> None:
    """Step 7: give the slot of chunk `index` back, which is at this position, and all before it."""
    field = load_i64(channel + CH_ACK_FIELDS) + remainder(index, lanes) * FIELD_BYTES
    store_i64(field + ACK_EVENT_ID, load_i64(op + OP_EVENT_ID))
    store_i64(field + ACK_CHUNK_ID, index)
    # SYNC POINT ring-ack: released after the slot was read; `step_send` acquires it.
    store_release(field + ACK_HEAD, position + 1)
    ring(load_i64(channel + CH_PEER_CONTROL))


@device
def acknowledge_transfer(channel: int, op: int) -> None:
    """Step 7 of a zero-copy message: all pieces are taken, and those of this side are there."""
    store_i64(op + OP_DONE, 1)
    _acknowledge(channel, op, load_i64(op + OP_FIRST), 0, 1)


@device
def _refuse(channel: int, op: int, slot: int) -> None:
    """Step 5, when the message is not the one that was asked for."""
    position = load_i64(channel + CH_NEXT)
    refusal = load_i64(channel + CH_REFUSAL_TABLE) + remainder(position, load_i64(channel + CH_SLOTS)) * REFUSAL_BYTES
    store_i64(refusal + RF_EVENT_ID, load_i64(op + OP_EVENT_ID))
    store_i64(refusal + RF_BYTES, load_i64(op + OP_BYTES))
    store_i64(refusal + RF_LANES, load_i64(op + OP_LANES))
    # SYNC POINT ring-refusal: released after the rest; `_is_refused` acquires it.
    store_release(refusal + RF_STAMP, position + 1)
    ring(load_i64(channel + CH_PEER_CONTROL))
    store_i64(channel + CH_STALE_FIRST, position)
    store_i64(channel + CH_STALE_LANES, load_i64(slot + SLOT_LANES))
    store_i64(op + OP_PEER_EVENT_ID, load_i64(slot + SLOT_EVENT_ID))
    store_i64(op + OP_PEER_BYTES, load_i64(slot + SLOT_MESSAGE_BYTES))
    store_i64(op + OP_PEER_LANES, load_i64(slot + SLOT_LANES))


@device
def _is_expected(op: int, slot: int) -> bool:
    return (
        load_i64(slot + SLOT_EVENT_ID) == load_i64(op + OP_EVENT_ID)
        and load_i64(slot + SLOT_MESSAGE_BYTES) == load_i64(op + OP_BYTES)
        and load_i64(slot + SLOT_LANES) == load_i64(op + OP_LANES)
    )


@device
def _accept(channel: int, op: int, slot: int) -> None:
    """Step 5: the message that was asked for begins in this slot. A zero-copy one takes the position at once."""
    n_bytes = load_i64(op + OP_BYTES)
    chunk_bytes = load_i64(slot + SLOT_CHUNK_BYTES)
    store_i64(op + OP_FIRST, load_i64(channel + CH_NEXT))
    store_i64(op + OP_CHUNK_BYTES, chunk_bytes)
    form = load_i64(slot + SLOT_FORM)
    store_i64(op + OP_FORM, form)
    if form != FORM_RING:
        store_i64(channel + CH_NEXT, load_i64(channel + CH_NEXT) + 1)
        store_i64(op + OP_CHUNKS, 1)
        store_i64(op + OP_PLACE, load_i64(slot + SLOT_PLACE))
        if load_i64(op + OP_TAKES) == TAKES_LATER:
            offer(channel, op)
    elif n_bytes <= chunk_bytes:
        store_i64(op + OP_CHUNKS, 1)
    else:
        store_i64(op + OP_CHUNKS, -(-n_bytes // chunk_bytes))


@device
def _read_chunk(channel: int, op: int, slot: int) -> None:
    """Steps 6 and 7: copy the next chunk to the user's buffer, and acknowledge it."""
    index = load_i64(op + OP_DONE)
    chunk_bytes = load_i64(op + OP_CHUNK_BYTES)
    start = index * chunk_bytes
    n_bytes = min(chunk_bytes, load_i64(op + OP_BYTES) - start)
    copy_bytes(load_i64(op + OP_BUFFER) + start, slot + SLOT_HEADER_BYTES, n_bytes)
    _acknowledge(channel, op, load_i64(channel + CH_NEXT), index, load_i64(op + OP_LANES))
    store_i64(channel + CH_NEXT, load_i64(channel + CH_NEXT) + 1)
    store_i64(op + OP_DONE, index + 1)


@device
def _offer_ahead(channel: int, op: int) -> None:
    """Tell the sender of a message that has not come where it goes, if its position is known; not if it is short."""
    if load_i64(op + OP_TAKES) != TAKES_LATER or load_i64(op + OP_BYTES) < ZERO_COPY_BYTES:
        return
    # Chunks of a message that was refused may come before it.
    if load_i64(op + OP_CHUNKS) == 0 and load_i64(channel + CH_STALE_LANES) == 0:
        store_i64(op + OP_FIRST, load_i64(channel + CH_NEXT))
        store_i64(op + OP_CHUNK_BYTES, piece_bytes(load_i64(op + OP_BYTES), load_i64(op + OP_LANES)))
        offer(channel, op)


@device
def is_accepted_transfer(op: int) -> bool:
    """Is this a receive of a zero-copy message that has come?"""
    return load_i64(op + OP_CHUNKS) != 0 and load_i64(op + OP_FORM) != FORM_RING


@device
def accept_transfer(channel: int, op: int) -> int:
    """Step 5, if it is a zero-copy message that comes next, and the one that was asked for. No earlier one may be open.

    Returns PENDING if nothing has come, MOVED if it was accepted, or ENDED if `step_receive` has to look at it.
    """
    if load_i64(channel + CH_STALE_LANES) != 0:
        return ENDED
    if not _published(channel, op):
        _offer_ahead(channel, op)
        return PENDING
    slot = slot_of(channel, load_i64(channel + CH_NEXT))
    prefetch_for_writing(slot)
    if load_i64(slot + SLOT_FORM) == FORM_RING or not _is_expected(op, slot):
        return ENDED
    _accept(channel, op, slot)
    return MOVED


@device
def _step_transfer(channel: int, op: int) -> int:
    """Pull pieces of a zero-copy message that was accepted; acknowledge it, and wait for those of the sender."""
    if load_i64(op + OP_DONE) != 0:
        return await_pushed(channel, op)
    status = pull(channel, op, slot_of(channel, load_i64(op + OP_FIRST)))
    if status != ALL_TAKEN:
        return status
    acknowledge_transfer(channel, op)
    return ENDED if await_pushed(channel, op) == ENDED else MOVED


@device
def step_receive(channel: int, op: int) -> int:
    """Steps 5 to 7: check the first chunk's header, copy and acknowledge all chunks that are there.

    The operation must be the first of its channel. Returns PENDING, MOVED or ENDED.
    """
    if is_accepted_transfer(op):
        return _step_transfer(channel, op)
    status = PENDING
    # No more than one ring at a time, so that a call ends although a sender keeps pace with it.
    for _ in range(load_i64(channel + CH_SLOTS)):
        if not _published(channel, op):
            _offer_ahead(channel, op)
            return status
        status = MOVED
        position = load_i64(channel + CH_NEXT)
        slot = slot_of(channel, position)
        if load_i64(op + OP_CHUNKS) == 0:
            lanes = load_i64(channel + CH_STALE_LANES)
            if lanes != 0 and load_i64(slot + SLOT_FIRST) == load_i64(channel + CH_STALE_FIRST):
                # A chunk of the message that was refused last.
                _acknowledge(channel, op, position, position - load_i64(slot + SLOT_FIRST), lanes)
                store_i64(channel + CH_NEXT, position + 1)
                continue
            store_i64(channel + CH_STALE_LANES, 0)
            if load_i64(op + OP_TAKES) == TAKES:
                fetch_add(slot + SLOT_CLAIMS, 0)  # gets the line that both sides write in one go, not to read it first
            if not _is_expected(op, slot):
                _refuse(channel, op, slot)
                store_i64(op + OP_RESULT, STATE_REFUSED)
                return ENDED
            _accept(channel, op, slot)
        if load_i64(op + OP_FORM) != FORM_RING:
            return _step_transfer(channel, op)
        _read_chunk(channel, op, slot)
        if load_i64(op + OP_DONE) == load_i64(op + OP_CHUNKS):
            store_i64(op + OP_RESULT, STATE_DONE)
            return ENDED
    return status


@device
def withdraw_receive(channel: int, op: int, until_ns: int) -> int:
    """See that nobody writes to the buffer of a receive any more: OK, or SLICE."""
    slot = slot_of(channel, load_i64(op + OP_FIRST))
    if load_i64(op + OP_CHUNKS) == 0:
        if load_i64(op + OP_TAKES) == TAKES_LATER:
            return OK
        take_back(channel, op)
        if not _published(channel, op) or load_i64(slot + SLOT_FORM) == FORM_RING or not _is_expected(op, slot):
            return OK
    elif load_i64(op + OP_FORM) == FORM_RING:
        return OK
    return withdraw(channel, op, slot, False, until_ns)
