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

A refusal is a counter with the receiver's event ID beside it. The sender that sees a new one fails every message that
starts at or after the refused position and is still under way, and writes the new count into all later slots. The
receiver drops chunks that carry an older count: they were sent before the sender knew. So both sides report the
mismatch, nothing blocks, and the channel is usable afterwards. At most one refusal is under way, since the receiver
refuses only chunks with the current count.

Both kernels are state machines: all progress is in the channel and the operation, so a call that returns SLICE or
PENDING is simply made again.
"""

from __future__ import annotations

from ..layout.ring import (
    ACK_CHUNK_ID,
    ACK_EVENT_ID,
    ACK_HEAD,
    ACK_REFUSAL,
    CH_ACK_FIELDS,
    CH_DATA_FIELDS,
    CH_NEXT,
    CH_OWN_CONTROL,
    CH_PEER_BYTES,
    CH_PEER_CONTROL,
    CH_PEER_EVENT_ID,
    CH_PEER_LANES,
    CH_REFUSALS,
    CH_REFUSED_FIRST,
    CH_RING,
    CH_SLOT_BYTES,
    CH_SLOT_LANES,
    CH_SLOT_STRIDE,
    CH_SLOTS,
    CH_STALE_FIRST,
    CH_STALE_LANES,
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
    SLOT_CHUNK_BYTES,
    SLOT_EVENT_ID,
    SLOT_FIRST,
    SLOT_HEADER_BYTES,
    SLOT_LANES,
    SLOT_MESSAGE_BYTES,
    SLOT_REFUSALS_SEEN,
)
from ..layout.segment import CTL_DOORBELL
from ._jit import device, kernel
from .atomics import load_acquire, load_i64, store_i64, store_release
from .copy import copy_bytes
from .wait import MISMATCH, OK, PENDING, relax, ring, settle

#: Bits of the refusal word: count (8), lanes (8), bytes (48).
_SIZE_MASK = (1 << 48) - 1


@device
def _chunk_bytes(n_bytes: int, lanes: int, slot_bytes: int) -> int:
    share = -(-n_bytes // lanes)
    share = -(-share // MIN_CHUNK_BYTES) * MIN_CHUNK_BYTES
    return min(max(share, MIN_CHUNK_BYTES), slot_bytes)


@device
def _start(channel: int, op: int) -> None:
    """Take the channel's next position for the first chunk."""
    n_bytes = load_i64(op + OP_BYTES)
    chunk_bytes = _chunk_bytes(n_bytes, load_i64(op + OP_LANES), load_i64(channel + CH_SLOT_BYTES))
    store_i64(op + OP_CHUNK_BYTES, chunk_bytes)
    store_i64(op + OP_FIRST, load_i64(channel + CH_NEXT))
    store_i64(op + OP_CHUNKS, max(1, -(-n_bytes // chunk_bytes)))


@device
def _notice_refusal(channel: int, acks: int) -> bool:
    """Has the receiver refused a message since the last look? If so, note what it says."""
    # SYNC POINT ring-refusal: acquires event ID and position, which `_refuse` wrote before it released the word.
    word = load_acquire(acks + ACK_REFUSAL)
    refusals = load_i64(channel + CH_REFUSALS)
    if (word >> 56) & 0xFF == refusals & 0xFF:
        return False
    store_i64(channel + CH_REFUSALS, refusals + 1)
    store_i64(channel + CH_REFUSED_FIRST, load_i64(acks + ACK_CHUNK_ID))
    store_i64(channel + CH_PEER_EVENT_ID, load_i64(acks + ACK_EVENT_ID))
    store_i64(channel + CH_PEER_BYTES, word & _SIZE_MASK)
    store_i64(channel + CH_PEER_LANES, (word >> 48) & 0xFF)
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
    store_i64(slot + SLOT_REFUSALS_SEEN, load_i64(channel + CH_REFUSALS))
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


@kernel("int64(int64, int64, int64)")
def send(channel: int, op: int, slice_ns: int) -> int:
    """Steps 1 to 4 and 8: write chunks while slots are free, then wait for the acknowledgement of the last one.

    Returns OK, SLICE, ABORTED, PENDING (nothing to do now, or not this operation's turn), or MISMATCH: the receiver has
    refused a message, and the caller decides which operations that concerns.
    """
    control = load_i64(channel + CH_OWN_CONTROL)
    acks = load_i64(channel + CH_ACK_FIELDS)
    if load_i64(op + OP_CHUNKS) == 0:
        if load_i64(channel + CH_TURN) != load_i64(op + OP_TICKET):
            return PENDING
        _start(channel, op)
    chunks = load_i64(op + OP_CHUNKS)
    last = acks + ((chunks - 1) % load_i64(op + OP_LANES)) * FIELD_BYTES + ACK_HEAD
    end = load_i64(op + OP_FIRST) + chunks
    n = 0
    while True:
        seq = load_acquire(control + CTL_DOORBELL)
        if _notice_refusal(channel, acks):
            settle(control, n)
            return MISMATCH
        if load_i64(op + OP_DONE) < chunks:
            if _slot_is_free(channel, acks):
                settle(control, n)
                n = 0
                _write_chunk(channel, op)
                if load_i64(op + OP_DONE) == chunks:
                    store_i64(channel + CH_TURN, load_i64(op + OP_TICKET) + 1)
                continue
        # SYNC POINT ring-ack: the receiver released this after it copied the last chunk.
        elif load_acquire(last) >= end:
            break
        n = relax(control, n, seq, slice_ns)
        if n < 0:
            return n
    settle(control, n)
    return OK


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
def _acknowledge(channel: int, lane: int) -> None:
    """Step 7: give the slot of the next chunk back, and go on to the one behind it."""
    position = load_i64(channel + CH_NEXT)
    # SYNC POINT ring-ack: released after the slot was read; `send` acquires it.
    store_release(load_i64(channel + CH_ACK_FIELDS) + lane * FIELD_BYTES + ACK_HEAD, position + 1)
    store_i64(channel + CH_NEXT, position + 1)
    ring(load_i64(channel + CH_PEER_CONTROL))


@device
def _refuse(channel: int, op: int, slot: int) -> None:
    """Step 5, when the message is not the one that was asked for."""
    position = load_i64(channel + CH_NEXT)
    refusals = load_i64(channel + CH_REFUSALS) + 1
    acks = load_i64(channel + CH_ACK_FIELDS)
    store_i64(acks + ACK_EVENT_ID, load_i64(op + OP_EVENT_ID))
    store_i64(acks + ACK_CHUNK_ID, position)
    size = (load_i64(op + OP_LANES) << 48) | (load_i64(op + OP_BYTES) & _SIZE_MASK)
    # SYNC POINT ring-refusal: released after event ID and position; `_notice_refusal` acquires it.
    store_release(acks + ACK_REFUSAL, ((refusals & 0xFF) << 56) | size)
    ring(load_i64(channel + CH_PEER_CONTROL))
    store_i64(channel + CH_REFUSALS, refusals)
    store_i64(channel + CH_REFUSED_FIRST, position)
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
    _acknowledge(channel, index % load_i64(op + OP_LANES))
    store_i64(op + OP_DONE, index + 1)


@kernel("int64(int64, int64, int64)")
def receive(channel: int, op: int, slice_ns: int) -> int:
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
            n = relax(control, n, seq, slice_ns)
            if n < 0:
                return n
            continue
        settle(control, n)
        n = 0
        position = load_i64(channel + CH_NEXT)
        slot = _slot(channel, position)
        if load_i64(op + OP_CHUNKS) == 0:
            if load_i64(slot + SLOT_REFUSALS_SEEN) != load_i64(channel + CH_REFUSALS):
                # Sent before the sender knew of the last refusal.
                lanes = load_i64(slot + SLOT_LANES)
                store_i64(channel + CH_STALE_FIRST, load_i64(slot + SLOT_FIRST))
                store_i64(channel + CH_STALE_LANES, lanes)
                _acknowledge(channel, (position - load_i64(slot + SLOT_FIRST)) % lanes)
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
