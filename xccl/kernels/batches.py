"""Zero-copy messages of a channel that are under way together: one call of the kernel copies pieces of several.

A call of the operating system's kernel takes 0.4 us beside what it does for each page, and 0.7 when the other rank is
in one, too, as both touch each other's records there. So in a stream each side copies up to BATCH pieces at a time.

Rules
- A message takes part when it was accepted (receiver), or is announced and answered (sender); `kernels.zerocopy` says
  what either may take, and how a message ends. Nothing is copied by a call that posts, only by those that wait or test.
- Each side takes one piece of each message first, in their order, and only then others. So halves meet, as of a message
  alone, and each core copies the same half of buffers that are used again. Messages of more than BATCH_BYTES are moved
  one after the other.
- Receives accept zero-copy messages in their order, ahead of those before them that have not ended. Anything else is
  looked at by the first receive of a channel alone (`ring.step_receive`).
- The receiver acknowledges in order: a message when it and all before it are taken and its own pieces are there.

Theory of operation. Positions are taken when messages are accepted, and an acknowledgement gives all slots up to one
back, so none may skip a message. A receive that breaks off is not acknowledged, nor is anything behind it: the channel
is broken then, for good. A sender may push pieces of a later message before others of an earlier one, so it counts them
for each slot by itself, and a receiver waits for the count of its message's slot; the next message with that slot comes
after the acknowledgement, and its pieces after those of this one, as a sender copies what it has taken in one step.
"""

from __future__ import annotations

from ..layout.ring import (
    BATCH,
    BATCH_BYTES,
    CH_BATCH,
    CH_HEAD,
    CH_OWN_VECTORS,
    CH_PEER_CONTROL,
    CH_PEER_PID,
    CH_PEER_VECTORS,
    CH_REACH,
    FORM_PRIVATE,
    FORM_RING,
    OP_BUFFER,
    OP_BYTES,
    OP_DONE,
    OP_ENGINE,
    OP_FIRST,
    OP_FORM,
    OP_LINK,
    OP_MOVED,
    OP_PIECES,
    OP_PLACE,
    OP_TAKES,
    OP_TARGET_FORM,
    OP_TARGET_PLACE,
    REACH_KERNEL,
    TAKES_FAILED,
    TAKES_LATER,
    TAKES_NO_MORE,
)
from ._jit import device
from .atomics import load_i64, store_i64
from .processes import copy_together
from .ring import accept_transfer, acknowledge_transfer, is_accepted_transfer, is_written, slot_of
from .wait import PENDING, ring
from .zerocopy import (
    MOVED,
    count_pull,
    count_push,
    expect_pushed,
    fail_pull,
    fail_push,
    move_between,
    piece,
    take_from_back,
    take_from_front,
    wake_for_answer,
)

#: What comes next is no zero-copy message that was asked for.
OTHER = 4


@device
def _may_take(op: int, again: bool) -> bool:
    """Is it a message's turn? If not `again`, of those of which this side has taken nothing, or which are large."""
    takes = load_i64(op + OP_TAKES)
    if takes == TAKES_NO_MORE or takes == TAKES_FAILED:
        return False
    return again or load_i64(op + OP_MOVED) == 0 or load_i64(op + OP_BYTES) > BATCH_BYTES


@device
def _other(op: int, outward: bool) -> tuple[int, int]:
    """Form and place of the peer's buffer."""
    if outward:
        return load_i64(op + OP_TARGET_FORM), load_i64(op + OP_TARGET_PLACE)
    return load_i64(op + OP_FORM), load_i64(op + OP_PLACE)


@device
def _add(channel: int, op: int, index: int, n: int, outward: bool) -> int:
    """Make a piece the n-th of the batch; its size."""
    start, n_bytes = piece(op, index)
    _, place = _other(op, outward)
    store_i64(channel + CH_BATCH + 8 * n, op)
    own, other = channel + CH_OWN_VECTORS + 16 * n, channel + CH_PEER_VECTORS + 16 * n
    store_i64(own, load_i64(op + OP_BUFFER) + start)
    store_i64(own + 8, n_bytes)
    store_i64(other, place + start)
    store_i64(other + 8, n_bytes)
    return n_bytes


@device
def _gather_pushes(channel: int, engine: int, again: bool) -> tuple[int, int]:
    """Take pieces of messages that are answered: how many, and their bytes."""
    n, n_bytes = 0, 0
    op = load_i64(channel + CH_HEAD)
    while op != 0 and n < BATCH and n_bytes < BATCH_BYTES and is_written(op):
        if load_i64(op + OP_FORM) != FORM_RING and load_i64(op + OP_ENGINE) == engine and _may_take(op, again):
            index = take_from_back(channel, op, slot_of(channel, load_i64(op + OP_FIRST)))
            if index >= 0:
                n_bytes += _add(channel, op, index, n, True)
                n += 1
            elif load_i64(op + OP_TAKES) == TAKES_LATER and load_i64(op + OP_PIECES) > 1:
                break  # answers come in order
        op = load_i64(op + OP_LINK)
    return n, n_bytes


@device
def _gather_pulls(channel: int, engine: int, again: bool) -> tuple[int, int]:
    """Take pieces of messages that were accepted: how many, and their bytes."""
    n, n_bytes = 0, 0
    op = load_i64(channel + CH_HEAD)
    while op != 0 and n < BATCH and n_bytes < BATCH_BYTES and is_accepted_transfer(op):
        if load_i64(op + OP_ENGINE) == engine and _may_take(op, again):
            index = take_from_front(channel, op, slot_of(channel, load_i64(op + OP_FIRST)))
            if index >= 0:
                n_bytes += _add(channel, op, index, n, False)
                n += 1
        op = load_i64(op + OP_LINK)
    return n, n_bytes


@device
def _copy(channel: int, n: int, n_bytes: int, outward: bool) -> None:
    """Copy the pieces of a batch, and count them."""
    own, other = channel + CH_OWN_VECTORS, channel + CH_PEER_VECTORS
    all_private = n > 1 and load_i64(channel + CH_REACH) == REACH_KERNEL
    for i in range(n):
        form, _ = _other(load_i64(channel + CH_BATCH + 8 * i), outward)
        all_private = all_private and form == FORM_PRIVATE
    copied = all_private and copy_together(load_i64(channel + CH_PEER_PID), own, other, n, outward) == n_bytes
    for i in range(n):
        op = load_i64(channel + CH_BATCH + 8 * i)
        slot = slot_of(channel, load_i64(op + OP_FIRST))
        fine = copied
        if not fine:
            # One by one, also what could not be copied together: that says of which message it was.
            form, _ = _other(op, outward)
            here, there, size = load_i64(own + 16 * i), load_i64(other + 16 * i), load_i64(own + 16 * i + 8)
            fine = move_between(channel, here, form, there, size, outward)
        if outward and fine:
            count_push(channel, op)
        elif outward:
            fail_push(channel, op, slot)
        elif fine:
            count_pull(op, slot)
        else:
            fail_pull(channel, op, slot)


@device
def push_together(channel: int, engine: int) -> bool:
    """The sender takes a batch of pieces, and copies it."""
    n, n_bytes = _gather_pushes(channel, engine, False)
    if n == 0:
        n, n_bytes = _gather_pushes(channel, engine, True)
    if n == 0:
        return False
    _copy(channel, n, n_bytes, True)
    ring(load_i64(channel + CH_PEER_CONTROL))
    return True


@device
def pull_together(channel: int, engine: int) -> bool:
    """The receiver takes a batch of pieces, copies it, and acknowledges what is complete then."""
    n, n_bytes = _gather_pulls(channel, engine, False)
    if n == 0:
        n, n_bytes = _gather_pulls(channel, engine, True)
    if n > 0:
        wake_for_answer(channel)
        _copy(channel, n, n_bytes, False)
    last = 0
    op = load_i64(channel + CH_HEAD)
    while op != 0 and is_accepted_transfer(op):
        if load_i64(op + OP_DONE) == 0:
            if load_i64(op + OP_TAKES) != TAKES_NO_MORE:
                break
            expect_pushed(channel, op)
            store_i64(op + OP_DONE, 1)
            last = op
        op = load_i64(op + OP_LINK)
    if last != 0:
        acknowledge_transfer(channel, last)
    return n > 0 or last != 0


@device
def accept_together(channel: int, engine: int) -> int:
    """Accept messages that have come, as many as there are receives for.

    Returns PENDING, or MOVED if one was accepted, or OTHER if `step_receive` has to look at the first receive.
    """
    op = load_i64(channel + CH_HEAD)
    while op != 0 and load_i64(op + OP_ENGINE) == engine and is_accepted_transfer(op):
        op = load_i64(op + OP_LINK)
    first = load_i64(channel + CH_HEAD)
    found = PENDING
    while op != 0 and load_i64(op + OP_ENGINE) == engine:
        status = accept_transfer(channel, op)
        if status == PENDING:
            return found
        if status != MOVED:
            return OTHER if op == first else found
        found = MOVED
        op = load_i64(op + OP_LINK)
    return found
