"""Zero-copy messages: from the sender's buffer to the receiver's, and not through the ring (XDS section 3.1).

Rules
- A zero-copy message takes one ring position. Its slot holds no payload but the place of the sender's buffer, claims,
  and a transfer record. Order, checks, refusals and the acknowledgement are those of any message (`kernels.ring`).
- A place is an offset in the segment of its rank, if the buffer lies there (app data area), else an address in the
  private memory of its rank. Segments are reached by load and store. Private memory is, too, if ranks are threads; if
  they are processes, the operating system's kernel copies from one to the other (process_vm_readv, process_vm_writev).
- The message is dealt in pieces; piece i belongs to lane i mod L. The receiver takes pieces from the front and pulls
  them. If there are several and the sender can reach the receiver's buffer, it is told where that is, in an answer in
  its metadata area, and takes pieces from the back and pushes them: two cores copy, and they meet in the middle. Which
  pieces are taken by whom depends on timing, the result does not. A sender that computes meanwhile loses nothing: then
  the receiver pulls all of them.
- A receiver that is there first answers before the message has come: it knows the position. The sender compares event,
  size and lanes, as the receiver will, and pushes nothing to one who expects another message.
- The receiver acknowledges when all pieces are taken, and its own are there; then it waits for those that the sender
  has taken. The sender, which has copied its own, is done with the acknowledgement.

Theory of operation. A piece is taken by an addition to the slot's claims: the sum of both counts before it says whether
a piece was left, so each piece is taken once. Each side counts the pieces that it has copied, and releases the count.
Claims and the receiver's count are in the slot: the sender clears them before it announces the slot, and does not use
them again before the position was acknowledged. The sender's count is that of all messages with this slot so far, in a
word of its own that is never cleared: the receiver waits for it after the acknowledgement, when the slot may have
another message. Who has taken a piece copies it in the same step, so it comes, unless that rank dies or fails.

A step copies a piece of one message, or, of several that are under way together, a piece of each: `kernels.batches`.

Neither side may touch a buffer whose owner has taken it back. Who gives a message up closes the claims by one more
addition, and then waits until the piece that the other side may be copying is done (`withdraw`); nothing can be taken
after that. Who has answered a message that has not come takes the answer back first (`take_back`). Sender and receiver
both have a full fence between what they write and what they look at, so either the sender finds no answer, or the
receiver finds the message, and closes its claims.
"""

from __future__ import annotations

from ..layout.ring import (
    AN_BYTES,
    AN_EVENT_ID,
    AN_FORM,
    AN_LANES,
    AN_PLACE,
    AN_STAMP,
    ANSWER_BYTES,
    CH_ANSWER_TABLE,
    CH_OWN_SEGMENT,
    CH_PEER_CONTROL,
    CH_PEER_PID,
    CH_PEER_SEGMENT,
    CH_PUSHED,
    CH_PUSHES,
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
    OP_DONE,
    OP_EVENT_ID,
    OP_FIRST,
    OP_FORM,
    OP_LANES,
    OP_MOVED,
    OP_PIECES,
    OP_PLACE,
    OP_PUSHED,
    OP_RESULT,
    OP_TAKES,
    OP_TARGET_FORM,
    OP_TARGET_PLACE,
    PU_COUNT,
    PUSH_FAILED,
    PUSHES_BYTES,
    REACH_DIRECT,
    REACH_NONE,
    SLOT_CLAIMS,
    SLOT_HEADER_BYTES,
    STATE_DONE,
    STATE_FAILED,
    STATE_WITHDRAWN,
    TAKES,
    TAKES_FAILED,
    TAKES_LATER,
    TAKES_NO_MORE,
    TR_PULLED,
)
from ._jit import device
from .atomics import fence_seq_cst, fetch_add, load_acquire, load_i64, remainder, store_i64, store_release
from .copy import copy_bytes
from .processes import read_memory, write_memory
from .wait import OK, PENDING, SLICE, now_ns, ring, sched_yield, waiters, wake

#: What a step has done: something, or the last thing (beside PENDING: nothing).
MOVED = 1
ENDED = 2
#: Of a pull: all pieces are taken, and those of this side are there.
ALL_TAKEN = 3

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
def move_between(channel: int, own: int, form: int, place: int, n_bytes: int, outward: bool) -> bool:
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
def _taken_by_sender(claims: int) -> int:
    return (claims // CLAIM_BACK) & CLAIM_MASK


@device
def _taken(claims: int) -> int:
    """Pieces taken by both sides."""
    return (claims & CLAIM_MASK) + _taken_by_sender(claims)


@device
def piece(op: int, index: int) -> tuple[int, int]:
    """Start and length of a piece."""
    start = index * load_i64(op + OP_CHUNK_BYTES)
    return start, min(load_i64(op + OP_CHUNK_BYTES), load_i64(op + OP_BYTES) - start)


@device
def _pushes(channel: int, op: int) -> int:
    """Address of the sender's count of pieces, for the slot of a message."""
    index = remainder(load_i64(op + OP_FIRST), load_i64(channel + CH_SLOTS))
    return load_i64(channel + CH_PUSHES) + index * PUSHES_BYTES + PU_COUNT


@device
def _expect(channel: int, op: int, pieces: int) -> int:
    """Add to the pieces that the sender pushes, for the slot of a message; the sum."""
    own = load_i64(channel + CH_PUSHED) + 8 * remainder(load_i64(op + OP_FIRST), load_i64(channel + CH_SLOTS))
    store_i64(own, load_i64(own) + pieces)
    return load_i64(own)


@device
def _number_of_pieces(op: int) -> int:
    return -(-load_i64(op + OP_BYTES) // load_i64(op + OP_CHUNK_BYTES))


# -- sender -----------------------------------------------------------------------------------------------------------


@device
def set_up_transfer(slot: int, op: int) -> None:
    """Clear the transfer record of a slot that is about to be announced."""
    store_i64(slot + SLOT_CLAIMS, 0)
    store_i64(slot + SLOT_HEADER_BYTES + TR_PULLED, 0)
    store_i64(op + OP_PIECES, _number_of_pieces(op))


@device
def _answer(channel: int, position: int) -> int:
    """Address of the answer to the message that begins at a position."""
    return load_i64(channel + CH_ANSWER_TABLE) + remainder(position, load_i64(channel + CH_SLOTS)) * ANSWER_BYTES


@device
def _is_answered(channel: int, op: int) -> bool:
    """Has the receiver said where the message goes? If so, note it."""
    first = load_i64(op + OP_FIRST)
    answer = _answer(channel, first)
    # SYNC POINT ring-answer: acquires what `offer` wrote before it released the stamp.
    if load_acquire(answer + AN_STAMP) != first + 1:
        return False
    # An answer that came before the message may be one to another message: then this one will be refused.
    if (
        load_i64(answer + AN_EVENT_ID) != load_i64(op + OP_EVENT_ID)
        or load_i64(answer + AN_BYTES) != load_i64(op + OP_BYTES)
        or load_i64(answer + AN_LANES) != load_i64(op + OP_LANES)
    ):
        return False
    store_i64(op + OP_TARGET_FORM, load_i64(answer + AN_FORM))
    store_i64(op + OP_TARGET_PLACE, load_i64(answer + AN_PLACE))
    store_i64(op + OP_TAKES, TAKES)
    return True


@device
def take_from_back(channel: int, op: int, slot: int) -> int:
    """Take a piece to push, if the receiver has said where to: its number, or -1."""
    takes = load_i64(op + OP_TAKES)
    if takes == TAKES_NO_MORE or (takes == TAKES_LATER and not _is_answered(channel, op)):
        return -1
    pieces = load_i64(op + OP_PIECES)
    before = fetch_add(slot + SLOT_CLAIMS, CLAIM_BACK)
    if before >= CLAIM_CLOSED or _taken(before) + 1 >= pieces:
        store_i64(op + OP_TAKES, TAKES_NO_MORE)
        if before >= CLAIM_CLOSED or _taken(before) >= pieces:
            return -1
    return pieces - 1 - load_i64(op + OP_MOVED)


@device
def count_push(channel: int, op: int) -> None:
    """A piece that was taken has been pushed. The receiver is to be woken after that."""
    store_i64(op + OP_MOVED, load_i64(op + OP_MOVED) + 1)
    index = remainder(load_i64(op + OP_FIRST), load_i64(channel + CH_SLOTS))
    own = load_i64(channel + CH_PUSHED) + 8 * index
    count = load_i64(own) + 1
    store_i64(own, count)
    # SYNC POINT ring-pushed: released after the piece; `await_pushed` acquires it.
    store_release(_pushes(channel, op), count)


@device
def fail_push(channel: int, op: int, slot: int) -> None:
    """A piece that was taken cannot be pushed: the message is broken off. The receiver is to be woken after that."""
    fetch_add(slot + SLOT_CLAIMS, CLAIM_CLOSED)
    store_release(_pushes(channel, op), PUSH_FAILED)
    store_i64(op + OP_TAKES, TAKES_FAILED)
    store_i64(op + OP_RESULT, STATE_FAILED)


@device
def push(channel: int, op: int, slot: int) -> int:
    """Take one piece from the back, if the receiver has said where to, and write it there."""
    index = take_from_back(channel, op, slot)
    if index < 0:
        return PENDING
    start, n_bytes = piece(op, index)
    own, place = load_i64(op + OP_BUFFER) + start, load_i64(op + OP_TARGET_PLACE) + start
    copied = move_between(channel, own, load_i64(op + OP_TARGET_FORM), place, n_bytes, True)
    if copied:
        count_push(channel, op)
    else:
        fail_push(channel, op, slot)
    ring(load_i64(channel + CH_PEER_CONTROL))
    return MOVED if copied else ENDED


# -- receiver ---------------------------------------------------------------------------------------------------------


@device
def offer(channel: int, op: int) -> None:
    """Begin to receive; tell the sender where the message goes, if there is a piece for it and it can reach that.

    The sender is not woken, since it does not need to help: who has accepted a message does that (`pull`).
    """
    pieces = _number_of_pieces(op)
    store_i64(op + OP_PIECES, pieces)
    store_i64(op + OP_TAKES, TAKES)
    if pieces < 2:
        return
    form, place = locate(channel, load_i64(op + OP_BUFFER), load_i64(op + OP_BYTES))
    if form == FORM_RING:
        return
    first = load_i64(op + OP_FIRST)
    answer = _answer(channel, first)
    store_i64(answer + AN_FORM, form)
    store_i64(answer + AN_PLACE, place)
    store_i64(answer + AN_EVENT_ID, load_i64(op + OP_EVENT_ID))
    store_i64(answer + AN_BYTES, load_i64(op + OP_BYTES))
    store_i64(answer + AN_LANES, load_i64(op + OP_LANES))
    # SYNC POINT ring-answer: released after the rest; `_is_answered` acquires it.
    store_release(answer + AN_STAMP, first + 1)
    store_i64(op + OP_TARGET_FORM, form)


@device
def take_back(channel: int, op: int) -> None:
    """Undo an `offer` for a message that had not come. If it has come now, its sender may have seen the answer."""
    store_i64(_answer(channel, load_i64(op + OP_FIRST)) + AN_STAMP, 0)
    # SYNC POINT ring-answer-ahead: between the answer and the look at the data field. The sender has one between data
    # field and answer (`ring`), so either it does not see the answer, or this rank sees the message.
    fence_seq_cst()


@device
def take_from_front(channel: int, op: int, slot: int) -> int:
    """Take a piece to pull: its number, or -1. OP_TAKES says afterwards whether there may be more."""
    pieces, pulled = load_i64(op + OP_PIECES), load_i64(op + OP_MOVED)
    before = load_acquire(slot + SLOT_CLAIMS) if pulled > 0 else 0
    if pulled == pieces or (before < CLAIM_CLOSED and _taken(before) >= pieces):
        store_i64(op + OP_TAKES, TAKES_NO_MORE)
        return -1
    before = fetch_add(slot + SLOT_CLAIMS, CLAIM_FRONT)
    if before >= CLAIM_CLOSED:
        _count_pushed(channel, op, before)
        store_i64(op + OP_TAKES, TAKES_FAILED)
        store_i64(op + OP_RESULT, STATE_WITHDRAWN)
        return -1
    if _taken(before) + 1 >= pieces:
        store_i64(op + OP_TAKES, TAKES_NO_MORE)
        if _taken(before) >= pieces:
            return -1
    return pulled


@device
def count_pull(op: int, slot: int) -> None:
    """A piece that was taken has been pulled."""
    pulled = load_i64(op + OP_MOVED) + 1
    store_i64(op + OP_MOVED, pulled)
    store_release(slot + SLOT_HEADER_BYTES + TR_PULLED, pulled)


@device
def fail_pull(channel: int, op: int, slot: int) -> None:
    """A piece that was taken cannot be pulled: the message is broken off."""
    _count_pushed(channel, op, fetch_add(slot + SLOT_CLAIMS, CLAIM_CLOSED))
    store_i64(op + OP_TAKES, TAKES_FAILED)
    store_i64(op + OP_RESULT, STATE_FAILED)


@device
def wake_for_answer(channel: int) -> None:
    """Wake the sender, should it sleep, for answers that it has not seen.

    SYNC POINT doorbell: taking a piece is the full fence between the answer and the look at the number of waiters.
    """
    if waiters(load_i64(channel + CH_PEER_CONTROL)) > 0:
        wake(load_i64(channel + CH_PEER_CONTROL))


@device
def expect_pushed(channel: int, op: int) -> None:
    """All pieces are taken, and those of this side are there: note what the sender's count has to come to."""
    store_i64(op + OP_PUSHED, _expect(channel, op, load_i64(op + OP_PIECES) - load_i64(op + OP_MOVED)))


@device
def pull(channel: int, op: int, slot: int) -> int:
    """Take pieces from the front, and read them. ALL_TAKEN when there is none left: the sender takes the others."""
    for n in range(_PIECES_A_STEP):
        index = -1
        if load_i64(op + OP_TAKES) == TAKES:
            index = take_from_front(channel, op, slot)
            if n == 0:
                wake_for_answer(channel)
        if load_i64(op + OP_TAKES) == TAKES_FAILED:
            return ENDED
        if index < 0:
            expect_pushed(channel, op)
            return ALL_TAKEN
        start, n_bytes = piece(op, index)
        own, place = load_i64(op + OP_BUFFER) + start, load_i64(op + OP_PLACE) + start
        if not move_between(channel, own, load_i64(op + OP_FORM), place, n_bytes, False):
            fail_pull(channel, op, slot)
            return ENDED
        count_pull(op, slot)
    return MOVED


@device
def await_pushed(channel: int, op: int) -> int:
    """Has the sender copied the pieces that it has taken? ENDED if so."""
    if load_i64(op + OP_MOVED) == load_i64(op + OP_PIECES):
        store_i64(op + OP_RESULT, STATE_DONE)
        return ENDED
    # SYNC POINT ring-pushed: acquires the pieces that `push` has written.
    count = load_acquire(_pushes(channel, op))
    if count < load_i64(op + OP_PUSHED):
        return PENDING
    store_i64(op + OP_RESULT, STATE_WITHDRAWN if count == PUSH_FAILED else STATE_DONE)
    return ENDED


@device
def _count_pushed(channel: int, op: int, claims: int) -> int:
    """Count the pieces of a message that is given up which its sender has taken; what its count has to come to."""
    return _expect(channel, op, min(_taken_by_sender(claims), load_i64(op + OP_PIECES) - load_i64(op + OP_MOVED)))


# -- giving up --------------------------------------------------------------------------------------------------------


@device
def withdraw(channel: int, op: int, slot: int, sending: bool, until_ns: int) -> int:
    """Give a message up that was announced or accepted: on OK the other side does not touch this side's buffer.

    Returns SLICE if the other side is in the middle of a piece all the time.
    """
    if not sending and load_i64(op + OP_DONE) != 0:
        # Acknowledged: the slot may be used again. All pieces are taken.
        word, target = _pushes(channel, op), load_i64(op + OP_PUSHED)
    else:
        before = load_acquire(slot + SLOT_CLAIMS)
        if before < CLAIM_CLOSED:
            before = fetch_add(slot + SLOT_CLAIMS, CLAIM_CLOSED)
        if sending:
            word = slot + SLOT_HEADER_BYTES + TR_PULLED
            target = min(before & CLAIM_MASK, load_i64(op + OP_PIECES) - load_i64(op + OP_MOVED))
        else:
            word, target = _pushes(channel, op), _count_pushed(channel, op, before)
    while load_acquire(word) < target:
        if now_ns() >= until_ns:
            return SLICE
        sched_yield()
    return OK
