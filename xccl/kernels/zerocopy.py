"""Zero-copy messages: from the sender's buffer to the receiver's, and not through the ring (XDS section 3.1).

Rules
- A zero-copy message takes one ring position. Its slot holds no payload but the place of the sender's buffer, and a
  transfer record. Order, checks, refusals and the acknowledgement are those of any message (`kernels.ring`).
- A place is an offset in the segment of its rank, if the buffer lies there (app data area), else an address in the
  private memory of its rank. Segments are reached by load and store. Private memory is, too, if ranks are threads; if
  they are processes, the operating system's kernel copies from one to the other (process_vm_readv, process_vm_writev).
- The message is dealt in pieces; piece i belongs to lane i mod L. The receiver takes pieces from the front and pulls
  them. If there are several and the sender can reach the receiver's buffer, it is told where that is, in an answer in
  its metadata area, and takes pieces from the back and pushes them: two cores copy, and they meet in the middle. Which
  pieces are taken by whom depends on timing, the result does not. A sender that computes meanwhile loses nothing: then
  the receiver pulls all of them.
- The receiver acknowledges when all pieces are there.

Theory of operation. A piece is taken by an addition to the transfer record's claims: the sum of both counts before it
says whether a piece was left, so each piece is taken once. Each side counts the pieces that it has copied, and releases
the count. The receiver is done when its own pieces and those of the sender are. The record is cleared by the sender
before the slot is announced, and not used again before the position was acknowledged.

Neither side may touch a buffer whose owner has taken it back. Who gives a message up closes the claims by one more
addition, and then waits until the piece that the other side may be copying is done (`withdraw`); nothing can be taken
after that.
"""

from __future__ import annotations

from ..layout.ring import (
    AN_FORM,
    AN_PLACE,
    AN_STAMP,
    ANSWER_BYTES,
    CH_ANSWER_TABLE,
    CH_OWN_SEGMENT,
    CH_PEER_CONTROL,
    CH_PEER_PID,
    CH_PEER_SEGMENT,
    CH_REACH,
    CH_SEGMENT_BYTES,
    CH_SLOTS,
    CH_VECTORS,
    CLAIM_BACK,
    CLAIM_CLOSED,
    CLAIM_FRONT,
    CLAIM_MASK,
    FORM_PRIVATE,
    FORM_RING,
    FORM_SEGMENT,
    MAX_PIECE_BYTES,
    MIN_PIECE_BYTES,
    OP_BUFFER,
    OP_BYTES,
    OP_CHUNK_BYTES,
    OP_FIRST,
    OP_FORM,
    OP_MOVED,
    OP_PIECES,
    OP_PLACE,
    OP_RESULT,
    OP_TAKES,
    OP_TARGET_FORM,
    OP_TARGET_PLACE,
    REACH_DIRECT,
    REACH_NONE,
    SLOT_HEADER_BYTES,
    STATE_DONE,
    STATE_FAILED,
    STATE_WITHDRAWN,
    TAKES,
    TAKES_LATER,
    TAKES_NO_MORE,
    TR_CLAIMS,
    TR_PULLED,
    TR_PUSHED,
)
from ._jit import device
from .atomics import fetch_add, load_acquire, load_i64, remainder, store_i64, store_release
from .copy import copy_bytes
from .processes import read_memory, write_memory
from .wait import OK, PENDING, SLICE, now_ns, ring, sched_yield

#: What a step has done: something, or the last thing (beside PENDING: nothing).
MOVED = 1
ENDED = 2

#: Pieces that a receiver pulls before it looks at anything else.
_PIECES_A_STEP = 4


@device
def piece_bytes(n_bytes: int, lanes: int) -> int:
    """Bytes of a full piece: a lane's share, in whole MIN_PIECE_BYTES, at most MAX_PIECE_BYTES."""
    share = -(-n_bytes // lanes)
    share = -(-share // MIN_PIECE_BYTES) * MIN_PIECE_BYTES
    return min(max(share, MIN_PIECE_BYTES), MAX_PIECE_BYTES)


@device
def locate(channel: int, buffer: int, n_bytes: int) -> tuple[int, int]:
    """Form and place of a buffer of this rank, for the peer; FORM_RING if the peer cannot reach it."""
    offset = buffer - load_i64(channel + CH_OWN_SEGMENT)
    if offset >= 0 and offset + n_bytes <= load_i64(channel + CH_SEGMENT_BYTES):
        return FORM_SEGMENT, offset
    if load_i64(channel + CH_REACH) == REACH_NONE:
        return FORM_RING, 0
    return FORM_PRIVATE, buffer


@device
def _move_between(channel: int, own: int, form: int, place: int, n_bytes: int, outward: bool) -> bool:
    """Copy between a buffer of this rank and one of the peer; False if the peer's cannot be reached (any more)."""
    if form == FORM_SEGMENT or load_i64(channel + CH_REACH) == REACH_DIRECT:
        other = place + load_i64(channel + CH_PEER_SEGMENT) if form == FORM_SEGMENT else place
        if outward:
            copy_bytes(other, own, n_bytes)
        else:
            copy_bytes(own, other, n_bytes)
        return True
    pid, vectors = load_i64(channel + CH_PEER_PID), channel + CH_VECTORS
    if outward:
        return write_memory(pid, vectors, own, place, n_bytes)
    return read_memory(pid, vectors, own, place, n_bytes)


@device
def _taken(before: int) -> int:
    """Pieces taken by both sides."""
    return (before & CLAIM_MASK) + ((before // CLAIM_BACK) & CLAIM_MASK)


@device
def _piece(op: int, index: int) -> tuple[int, int]:
    """Start and length of a piece."""
    start = index * load_i64(op + OP_CHUNK_BYTES)
    return start, min(load_i64(op + OP_CHUNK_BYTES), load_i64(op + OP_BYTES) - start)


@device
def _number_of_pieces(op: int) -> int:
    return -(-load_i64(op + OP_BYTES) // load_i64(op + OP_CHUNK_BYTES))


# -- sender -----------------------------------------------------------------------------------------------------------


@device
def set_up_transfer(slot: int, op: int) -> None:
    """Clear the transfer record of a slot that is about to be announced."""
    transfer = slot + SLOT_HEADER_BYTES
    store_i64(transfer + TR_CLAIMS, 0)
    store_i64(transfer + TR_PULLED, 0)
    store_i64(transfer + TR_PUSHED, 0)
    store_i64(op + OP_PIECES, _number_of_pieces(op))


@device
def _is_answered(channel: int, op: int) -> bool:
    """Has the receiver said where the message goes? If so, note it."""
    first = load_i64(op + OP_FIRST)
    answer = load_i64(channel + CH_ANSWER_TABLE) + remainder(first, load_i64(channel + CH_SLOTS)) * ANSWER_BYTES
    # SYNC POINT ring-answer: acquires what `offer` wrote before it released the stamp.
    if load_acquire(answer + AN_STAMP) != first + 1:
        return False
    store_i64(op + OP_TARGET_FORM, load_i64(answer + AN_FORM))
    store_i64(op + OP_TARGET_PLACE, load_i64(answer + AN_PLACE))
    store_i64(op + OP_TAKES, TAKES)
    return True


@device
def push(channel: int, op: int, slot: int) -> int:
    """Take one piece from the back, if the receiver has said where to, and write it there."""
    if load_i64(op + OP_TAKES) == TAKES_NO_MORE:
        return PENDING
    if load_i64(op + OP_TAKES) == TAKES_LATER and not _is_answered(channel, op):
        return PENDING
    transfer = slot + SLOT_HEADER_BYTES
    pieces = load_i64(op + OP_PIECES)
    before = fetch_add(transfer + TR_CLAIMS, CLAIM_BACK)
    if before >= CLAIM_CLOSED or _taken(before) >= pieces:
        store_i64(op + OP_TAKES, TAKES_NO_MORE)
        return PENDING
    pushed = load_i64(op + OP_MOVED)
    start, n_bytes = _piece(op, pieces - 1 - pushed)
    own, place = load_i64(op + OP_BUFFER) + start, load_i64(op + OP_TARGET_PLACE) + start
    if not _move_between(channel, own, load_i64(op + OP_TARGET_FORM), place, n_bytes, True):
        fetch_add(transfer + TR_CLAIMS, CLAIM_CLOSED)
        store_i64(op + OP_RESULT, STATE_FAILED)
        return ENDED
    store_i64(op + OP_MOVED, pushed + 1)
    # SYNC POINT ring-pushed: released after the piece; `pull` acquires it.
    store_release(transfer + TR_PUSHED, pushed + 1)
    ring(load_i64(channel + CH_PEER_CONTROL))
    return MOVED


# -- receiver ---------------------------------------------------------------------------------------------------------


@device
def offer(channel: int, op: int) -> None:
    """Begin to receive; tell the sender where the message goes, if there is a piece for it and it can reach that."""
    pieces = _number_of_pieces(op)
    store_i64(op + OP_PIECES, pieces)
    store_i64(op + OP_TAKES, TAKES)
    if pieces < 2:
        return
    form, place = locate(channel, load_i64(op + OP_BUFFER), load_i64(op + OP_BYTES))
    if form == FORM_RING:
        return
    first = load_i64(op + OP_FIRST)
    answer = load_i64(channel + CH_ANSWER_TABLE) + remainder(first, load_i64(channel + CH_SLOTS)) * ANSWER_BYTES
    store_i64(answer + AN_FORM, form)
    store_i64(answer + AN_PLACE, place)
    # SYNC POINT ring-answer: released after form and place; `_is_answered` acquires it.
    store_release(answer + AN_STAMP, first + 1)
    ring(load_i64(channel + CH_PEER_CONTROL))
    store_i64(op + OP_TARGET_FORM, form)


@device
def pull(channel: int, op: int, slot: int) -> int:
    """Take pieces from the front, and read them; end when those of the sender are there too."""
    transfer = slot + SLOT_HEADER_BYTES
    pieces = load_i64(op + OP_PIECES)
    status = PENDING
    n = 0
    while load_i64(op + OP_TAKES) == TAKES:
        if n == _PIECES_A_STEP:
            return MOVED
        n += 1
        before = fetch_add(transfer + TR_CLAIMS, CLAIM_FRONT)
        if before >= CLAIM_CLOSED or _taken(before) >= pieces:
            store_i64(op + OP_TAKES, TAKES_NO_MORE)
            break
        pulled = load_i64(op + OP_MOVED)
        start, n_bytes = _piece(op, pulled)
        own, place = load_i64(op + OP_BUFFER) + start, load_i64(op + OP_PLACE) + start
        if not _move_between(channel, own, load_i64(op + OP_FORM), place, n_bytes, False):
            fetch_add(transfer + TR_CLAIMS, CLAIM_CLOSED)
            store_i64(op + OP_RESULT, STATE_FAILED)
            return ENDED
        store_i64(op + OP_MOVED, pulled + 1)
        store_release(transfer + TR_PULLED, pulled + 1)
        status = MOVED
    # SYNC POINT ring-pushed: acquires the pieces that `push` has written.
    if load_i64(op + OP_MOVED) + load_acquire(transfer + TR_PUSHED) == pieces:
        store_i64(op + OP_RESULT, STATE_DONE)
        return ENDED
    if load_acquire(transfer + TR_CLAIMS) >= CLAIM_CLOSED:
        store_i64(op + OP_RESULT, STATE_WITHDRAWN)
        return ENDED
    return status


# -- giving up --------------------------------------------------------------------------------------------------------


@device
def withdraw(op: int, slot: int, sending: bool, until_ns: int) -> int:
    """Give a message up that was announced or accepted: on OK the other side does not touch this side's buffer.

    Returns SLICE if the other side is in the middle of a piece all the time.
    """
    transfer = slot + SLOT_HEADER_BYTES
    before = load_acquire(transfer + TR_CLAIMS)
    if before < CLAIM_CLOSED:
        before = fetch_add(transfer + TR_CLAIMS, CLAIM_CLOSED)
    others = (before & CLAIM_MASK) if sending else ((before // CLAIM_BACK) & CLAIM_MASK)
    others = min(others, load_i64(op + OP_PIECES) - load_i64(op + OP_MOVED))
    count = transfer + (TR_PULLED if sending else TR_PUSHED)
    while load_acquire(count) < others:
        if now_ns() >= until_ns:
            return SLICE
        sched_yield()
    return OK
