"""Send and receive over the ring of a pair (XDS section 3.1, steps 1 to 8).

Rules
- A channel is an ordered pair of ranks. Its ring lies in the receiver's managed area. Positions are chunk numbers that
  only grow; chunk c lies in slot c mod slots. Only the sender writes slots and data fields, only the receiver writes
  acknowledgement fields.
- A message of b bytes over L lanes is cut into chunks, at least MIN_CHUNK_BYTES and at most a slot; chunk i belongs to
  lane i mod L, whose fields announce and acknowledge it. A message of 0 bytes is one empty chunk.
- The sender may write chunk c once position c - slots is acknowledged: that is the back-pressure.
- Messages of a channel go in the order in which they were posted, on both sides (tickets).
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

Both kernels are state machines: all progress is in the channel and the operation, so a call that returns SLICE or
PENDING is simply made again.
"""

from __future__ import annotations

from ..layout.ring import (
    ACK_CHUNK_ID,
    ACK_EVENT_ID,
    ACK_HEAD,
    CH_ACK_FIELDS,
    CH_DATA_FIELDS,
    CH_NEXT,
    CH_OWN_CONTROL,
    CH_PEER_BYTES,
    CH_PEER_CONTROL,
    CH_PEER_EVENT_ID,
    CH_PEER_LANES,
    CH_REFUSAL_TABLE,
    CH_RING,
    CH_SLOT_BYTES,
    CH_SLOT_LANES,
    CH_SLOT_STRIDE,
    CH_SLOTS,
    CH_STALE_FIRST,
    CH_STALE_LANES,
    CH_STARTS,
    CH_TICKETS,
    CH_TURN,
    DATA_CHUNK_ID,
    DATA_EVENT_ID,
    DATA_MESSAGE_BYTES,
    DATA_TAIL,
    FIELD_BYTES,
    MIN_CHUNK_BYTES,
    OP_BUFFER,
    OP_BYTES,
    OP_CHUNK_BYTES,
    OP_CHUNKS,
    OP_DONE,
    OP_EVENT_ID,
    OP_FIRST,
    OP_LANES,
    OP_TICKET,
    REFUSAL_BYTES,
    RF_BYTES,
    RF_EVENT_ID,
    RF_LANES,
    RF_STAMP,
    SLOT_CHUNK_BYTES,
    SLOT_EVENT_ID,
    SLOT_FIRST,
    SLOT_HEADER_BYTES,
    SLOT_LANES,
    SLOT_MESSAGE_BYTES,
)
from ..layout.segment import CTL_DOORBELL
from ._jit import device, kernel
from .atomics import load_acquire, load_i64, store_i64, store_release
from .copy import copy_bytes
from .wait import MISMATCH, OK, PENDING, SLICE, now_ns, relax, ring, settle


@device
def _chunk_bytes(n_bytes: int, lanes: int, slot_bytes: int) -> int:
    share = -(-n_bytes // lanes)
    share = -(-share // MIN_CHUNK_BYTES) * MIN_CHUNK_BYTES
    return min(max(share, MIN_CHUNK_BYTES), slot_bytes)


@device
def _start(channel: int, op: int) -> bool:
    """Take the channel's next position, if it is this operation's turn and a message may start there."""
    position = load_i64(channel + CH_NEXT)
    starts = load_i64(channel + CH_STARTS) + 8 * (position % load_i64(channel + CH_SLOTS))
    if load_i64(channel + CH_TURN) != load_i64(op + OP_TICKET) or load_i64(starts) != 0:
        return False
    store_i64(starts, 1)
    n_bytes = load_i64(op + OP_BYTES)
    chunk_bytes = _chunk_bytes(n_bytes, load_i64(op + OP_LANES), load_i64(channel + CH_SLOT_BYTES))
    store_i64(op + OP_CHUNK_BYTES, chunk_bytes)
    store_i64(op + OP_FIRST, position)
    store_i64(op + OP_CHUNKS, max(1, -(-n_bytes // chunk_bytes)))
    return True


@device
def _is_refused(channel: int, op: int) -> bool:
    """Has the receiver refused this message? If so, note what it expected."""
    first = load_i64(op + OP_FIRST)
    refusal = load_i64(channel + CH_REFUSAL_TABLE) + (first % load_i64(channel + CH_SLOTS)) * REFUSAL_BYTES
    # SYNC POINT ring-refusal: acquires what `_refuse` wrote before it released the stamp.
    if load_acquire(refusal + RF_STAMP) != first + 1:
        return False
    store_i64(channel + CH_PEER_EVENT_ID, load_i64(refusal + RF_EVENT_ID))
    store_i64(channel + CH_PEER_BYTES, load_i64(refusal + RF_BYTES))
    store_i64(channel + CH_PEER_LANES, load_i64(refusal + RF_LANES))
    return True


@device
def _slot_is_free(channel: int, acks: int) -> bool:
    position = load_i64(channel + CH_NEXT)
    slots = load_i64(channel + CH_SLOTS)
    if position < slots:
        return True
    lane = load_i64(load_i64(channel + CH_SLOT_LANES) + 8 * (position % slots))
    # SYNC POINT ring-ack: acquires that the receiver has read what was in the slot.
    return load_acquire(acks + lane * FIELD_BYTES + ACK_HEAD) > position - slots


@device
def _slot(channel: int, position: int) -> int:
    return load_i64(channel + CH_RING) + (position % load_i64(channel + CH_SLOTS)) * load_i64(channel + CH_SLOT_STRIDE)


@device
def _write_chunk(channel: int, op: int) -> None:
    """Steps 1 to 3: the next chunk into its slot, then the lane's field."""
    position = load_i64(channel + CH_NEXT)
    index = load_i64(op + OP_DONE)
    lane = index % load_i64(op + OP_LANES)
    chunk_bytes = load_i64(op + OP_CHUNK_BYTES)
    n_bytes = load_i64(op + OP_BYTES)
    event_id = load_i64(op + OP_EVENT_ID)
    start = index * chunk_bytes
    slot = _slot(channel, position)
    store_i64(slot + SLOT_EVENT_ID, event_id)
    store_i64(slot + SLOT_FIRST, load_i64(op + OP_FIRST))
    store_i64(slot + SLOT_MESSAGE_BYTES, n_bytes)
    store_i64(slot + SLOT_LANES, load_i64(op + OP_LANES))
    store_i64(slot + SLOT_CHUNK_BYTES, chunk_bytes)
    copy_bytes(slot + SLOT_HEADER_BYTES, load_i64(op + OP_BUFFER) + start, min(chunk_bytes, n_bytes - start))
    store_i64(load_i64(channel + CH_SLOT_LANES) + 8 * (position % load_i64(channel + CH_SLOTS)), lane)
    field = load_i64(channel + CH_DATA_FIELDS) + lane * FIELD_BYTES
    store_i64(field + DATA_EVENT_ID, event_id)
    store_i64(field + DATA_CHUNK_ID, index)
    store_i64(field + DATA_MESSAGE_BYTES, n_bytes)
    # SYNC POINT ring-data: released after the slot; `receive` acquires it.
    store_release(field + DATA_TAIL, position + 1)
    ring(load_i64(channel + CH_PEER_CONTROL))
    store_i64(channel + CH_NEXT, position + 1)
    store_i64(op + OP_DONE, index + 1)


@device
def _send(channel: int, op: int, until_ns: int) -> int:
    """Steps 1 to 4 and 8: write chunks while slots are free, then wait for the acknowledgement of the last one.

    Returns OK, SLICE, ABORTED, PENDING (nothing to do now, or not this operation's turn), or MISMATCH: the receiver has
    refused this message.
    """
    control = load_i64(channel + CH_OWN_CONTROL)
    acks = load_i64(channel + CH_ACK_FIELDS)
    if load_i64(op + OP_CHUNKS) == 0 and not _start(channel, op):
        return PENDING
    chunks = load_i64(op + OP_CHUNKS)
    last = acks + ((chunks - 1) % load_i64(op + OP_LANES)) * FIELD_BYTES + ACK_HEAD
    end = load_i64(op + OP_FIRST) + chunks
    status = OK
    n = 0
    while True:
        seq = load_acquire(control + CTL_DOORBELL)
        done = load_i64(op + OP_DONE)
        # SYNC POINT ring-ack: the receiver released this after it copied, or dropped, the last chunk.
        acknowledged = done == chunks and load_acquire(last) >= end
        # Looked at after the acknowledgement: a dropped message was refused first.
        if done > 0 and _is_refused(channel, op):
            if done < chunks:
                store_i64(channel + CH_TURN, load_i64(op + OP_TICKET) + 1)
            status = MISMATCH
            break
        if acknowledged:
            break
        if done < chunks and _slot_is_free(channel, acks):
            settle(control, n)
            n = 0
            _write_chunk(channel, op)
            if done + 1 == chunks:
                store_i64(channel + CH_TURN, load_i64(op + OP_TICKET) + 1)
            elif until_ns != 0 and now_ns() >= until_ns:
                return SLICE
            continue
        n = relax(control, n, seq, until_ns)
        if n < 0:
            return n
    settle(control, n)
    store_i64(load_i64(channel + CH_STARTS) + 8 * (load_i64(op + OP_FIRST) % load_i64(channel + CH_SLOTS)), 0)
    return status


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
    return load_acquire(fields + ((position - first) % lanes) * FIELD_BYTES + DATA_TAIL) > position


@device
def _acknowledge(channel: int, op: int, index: int, lanes: int) -> None:
    """Step 7: give the slot of chunk `index` back, and go on to the one behind it."""
    position = load_i64(channel + CH_NEXT)
    field = load_i64(channel + CH_ACK_FIELDS) + (index % lanes) * FIELD_BYTES
    store_i64(field + ACK_EVENT_ID, load_i64(op + OP_EVENT_ID))
    store_i64(field + ACK_CHUNK_ID, index)
    # SYNC POINT ring-ack: released after the slot was read; `send` acquires it.
    store_release(field + ACK_HEAD, position + 1)
    store_i64(channel + CH_NEXT, position + 1)
    ring(load_i64(channel + CH_PEER_CONTROL))


@device
def _refuse(channel: int, op: int, slot: int) -> None:
    """Step 5, when the message is not the one that was asked for."""
    position = load_i64(channel + CH_NEXT)
    refusal = load_i64(channel + CH_REFUSAL_TABLE) + (position % load_i64(channel + CH_SLOTS)) * REFUSAL_BYTES
    store_i64(refusal + RF_EVENT_ID, load_i64(op + OP_EVENT_ID))
    store_i64(refusal + RF_BYTES, load_i64(op + OP_BYTES))
    store_i64(refusal + RF_LANES, load_i64(op + OP_LANES))
    # SYNC POINT ring-refusal: released after the rest; `_is_refused` acquires it.
    store_release(refusal + RF_STAMP, position + 1)
    ring(load_i64(channel + CH_PEER_CONTROL))
    store_i64(channel + CH_STALE_FIRST, position)
    store_i64(channel + CH_STALE_LANES, load_i64(slot + SLOT_LANES))
    store_i64(channel + CH_PEER_EVENT_ID, load_i64(slot + SLOT_EVENT_ID))
    store_i64(channel + CH_PEER_BYTES, load_i64(slot + SLOT_MESSAGE_BYTES))
    store_i64(channel + CH_PEER_LANES, load_i64(slot + SLOT_LANES))


@device
def _is_expected(op: int, slot: int) -> bool:
    return (
        load_i64(slot + SLOT_EVENT_ID) == load_i64(op + OP_EVENT_ID)
        and load_i64(slot + SLOT_MESSAGE_BYTES) == load_i64(op + OP_BYTES)
        and load_i64(slot + SLOT_LANES) == load_i64(op + OP_LANES)
    )


@device
def _read_chunk(channel: int, op: int, slot: int) -> None:
    """Steps 6 and 7: copy the next chunk to the user's buffer, and acknowledge it."""
    index = load_i64(op + OP_DONE)
    chunk_bytes = load_i64(op + OP_CHUNK_BYTES)
    start = index * chunk_bytes
    n_bytes = min(chunk_bytes, load_i64(op + OP_BYTES) - start)
    copy_bytes(load_i64(op + OP_BUFFER) + start, slot + SLOT_HEADER_BYTES, n_bytes)
    _acknowledge(channel, op, index, load_i64(op + OP_LANES))
    store_i64(op + OP_DONE, index + 1)


@device
def _receive(channel: int, op: int, until_ns: int) -> int:
    """Steps 5 to 7: wait for each chunk, check the first one's header, copy, acknowledge.

    Returns OK, SLICE, ABORTED, PENDING (nothing to do now, or not this operation's turn), or MISMATCH: this message was
    refused.
    """
    control = load_i64(channel + CH_OWN_CONTROL)
    if load_i64(channel + CH_TURN) != load_i64(op + OP_TICKET):
        return PENDING
    n = 0
    while True:
        seq = load_acquire(control + CTL_DOORBELL)
        if not _published(channel, op):
            n = relax(control, n, seq, until_ns)
            if n < 0:
                return n
            continue
        settle(control, n)
        n = 0
        position = load_i64(channel + CH_NEXT)
        slot = _slot(channel, position)
        if load_i64(op + OP_CHUNKS) == 0:
            lanes = load_i64(channel + CH_STALE_LANES)
            if lanes != 0 and load_i64(slot + SLOT_FIRST) == load_i64(channel + CH_STALE_FIRST):
                # A chunk of the message that was refused last.
                _acknowledge(channel, op, position - load_i64(slot + SLOT_FIRST), lanes)
                continue
            store_i64(channel + CH_STALE_LANES, 0)
            if not _is_expected(op, slot):
                _refuse(channel, op, slot)
                store_i64(channel + CH_TURN, load_i64(op + OP_TICKET) + 1)
                return MISMATCH
            chunk_bytes = load_i64(slot + SLOT_CHUNK_BYTES)
            store_i64(op + OP_FIRST, position)
            store_i64(op + OP_CHUNK_BYTES, chunk_bytes)
            store_i64(op + OP_CHUNKS, max(1, -(-load_i64(op + OP_BYTES) // chunk_bytes)))
        _read_chunk(channel, op, slot)
        if load_i64(op + OP_DONE) == load_i64(op + OP_CHUNKS):
            store_i64(channel + CH_TURN, load_i64(op + OP_TICKET) + 1)
            return OK
        if until_ns != 0 and now_ns() >= until_ns:
            return SLICE


@device
def _post(channel: int, op: int, buffer: int, n_bytes: int, event_id: int, lanes: int) -> None:
    """Fill an operation, and give it the next ticket of its channel."""
    ticket = load_i64(channel + CH_TICKETS)
    store_i64(channel + CH_TICKETS, ticket + 1)
    store_i64(op + OP_BUFFER, buffer)
    store_i64(op + OP_BYTES, n_bytes)
    store_i64(op + OP_EVENT_ID, event_id)
    store_i64(op + OP_LANES, lanes)
    store_i64(op + OP_TICKET, ticket)
    store_i64(op + OP_FIRST, 0)
    store_i64(op + OP_CHUNKS, 0)
    store_i64(op + OP_DONE, 0)


@kernel("int64(int64, int64, int64)")
def send(channel: int, op: int, until_ns: int) -> int:
    """Drive a send that was posted; see `_send`."""
    return _send(channel, op, until_ns)


@kernel("int64(int64, int64, int64)")
def receive(channel: int, op: int, until_ns: int) -> int:
    """Drive a receive that was posted; see `_receive`."""
    return _receive(channel, op, until_ns)


@kernel("int64(int64, int64, int64, int64, int64, int64, int64)")
def post_send(channel: int, op: int, buffer: int, n_bytes: int, event_id: int, lanes: int, until_ns: int) -> int:
    """Post a send and drive it: one call for the whole of a short one."""
    _post(channel, op, buffer, n_bytes, event_id, lanes)
    return _send(channel, op, until_ns)


@kernel("int64(int64, int64, int64, int64, int64, int64, int64)")
def post_receive(channel: int, op: int, buffer: int, n_bytes: int, event_id: int, lanes: int, until_ns: int) -> int:
    """Post a receive and drive it."""
    _post(channel, op, buffer, n_bytes, event_id, lanes)
    return _receive(channel, op, until_ns)
