"""Operations that move on by themselves, and the lists in which they are: of a channel, and of those that have ended.

Rules
- A channel has a list of its operations, in the order of their posting. `xccl.kernels.driver` says when each goes on.
- An operation that has ended is taken out of its channel, and put on the list of those that the rank has not collected
  yet. Its state is published last: then nobody but the rank touches the operation.
- With a DMA engine two threads use the channels: each channel has a lock then, held while its list is walked.
"""

from __future__ import annotations

from ..layout.ring import (
    CH_HEAD,
    CH_LOCK,
    CH_TAIL,
    DR_BELL,
    DR_CONTROL,
    DR_ENDED,
    DR_HAS_ENGINE,
    DR_IDLE,
    DR_QUEUED,
    ENGINE_DMA,
    FORM_RING,
    OP_BUFFER,
    OP_BYTES,
    OP_CHANNEL,
    OP_CHUNKS,
    OP_DONE,
    OP_ENGINE,
    OP_EVENT_ID,
    OP_FIRST,
    OP_FORM,
    OP_LANES,
    OP_LINK,
    OP_MOVED,
    OP_PIECES,
    OP_PLACE,
    OP_RESULT,
    OP_STATE,
    OP_TAKES,
    OP_TARGET_FORM,
    STATE_UNDER_WAY,
    TAKES_LATER,
)
from ._jit import device
from .atomics import compare_and_swap, cpu_pause, fetch_add, load_acquire, load_i64, store_i64, store_release
from .fastcall import fastcall
from .objects import new_int, own_state
from .wait import futex_wake, ring, sched_yield
from .zerocopy import locate


@device
def lock(driver: int, channel: int) -> None:
    """The other thread holds it for no longer than a step."""
    if load_i64(driver + DR_HAS_ENGINE) == 0:
        return
    while compare_and_swap(channel + CH_LOCK, 0, 1) != 0:
        sched_yield()


@device
def unlock(driver: int, channel: int) -> None:
    if load_i64(driver + DR_HAS_ENGINE) != 0:
        store_release(channel + CH_LOCK, 0)


@device
def prepare(
    channel: int, op: int, buffer: int, n_bytes: int, event_id: int, lanes: int, engine: int, zero_copy: bool
) -> None:
    """Fill an operation."""
    form, place = FORM_RING, 0
    if zero_copy:
        form, place = locate(channel, buffer, n_bytes)
    store_i64(op + OP_STATE, STATE_UNDER_WAY)
    store_i64(op + OP_BUFFER, buffer)
    store_i64(op + OP_BYTES, n_bytes)
    store_i64(op + OP_EVENT_ID, event_id)
    store_i64(op + OP_LANES, lanes)
    store_i64(op + OP_ENGINE, engine)
    store_i64(op + OP_FORM, form)
    store_i64(op + OP_PLACE, place)
    store_i64(op + OP_FIRST, 0)
    store_i64(op + OP_CHUNKS, 0)
    store_i64(op + OP_DONE, 0)
    store_i64(op + OP_PIECES, 0)
    store_i64(op + OP_MOVED, 0)
    store_i64(op + OP_TAKES, TAKES_LATER)
    store_i64(op + OP_TARGET_FORM, FORM_RING)
    store_i64(op + OP_CHANNEL, channel)
    store_i64(op + OP_LINK, 0)


@device
def append(driver: int, channel: int, op: int) -> None:
    """Put an operation at the end of its channel's list."""
    lock(driver, channel)
    tail = load_i64(channel + CH_TAIL)
    if tail == 0:
        store_i64(channel + CH_HEAD, op)
    else:
        store_i64(tail + OP_LINK, op)
    store_i64(channel + CH_TAIL, op)
    unlock(driver, channel)
    if load_i64(op + OP_ENGINE) == ENGINE_DMA:
        fetch_add(driver + DR_QUEUED, 1)
        fetch_add(driver + DR_BELL, 1)  # also the full fence between the queue and the look at `idle`
        if load_acquire(driver + DR_IDLE) != 0:
            futex_wake(driver + DR_BELL, 1)
        ring(load_i64(driver + DR_CONTROL))


@device
def remove(driver: int, channel: int, previous: int, op: int) -> None:
    """Take an operation that has ended out of its channel, and let the rank collect it."""
    following = load_i64(op + OP_LINK)
    if previous == 0:
        store_i64(channel + CH_HEAD, following)
    else:
        store_i64(previous + OP_LINK, following)
    if following == 0:
        store_i64(channel + CH_TAIL, previous)
    if load_i64(op + OP_ENGINE) == ENGINE_DMA:
        fetch_add(driver + DR_QUEUED, -1)
    while True:
        ended = load_acquire(driver + DR_ENDED)
        store_i64(op + OP_LINK, ended)
        if compare_and_swap(driver + DR_ENDED, ended, op) == ended:
            break
    # SYNC POINT operation-ended: released after everything else; `wait_for` and `next_ended` acquire it.
    store_release(op + OP_STATE, load_i64(op + OP_RESULT))


@fastcall
def next_ended(self, args, count):  # type: ignore[no-untyped-def]
    """() -> address of an operation, now off the list of those that have ended, or 0. It is bound to the driver."""
    driver = own_state(self)
    while True:
        op = load_acquire(driver + DR_ENDED)
        if op == 0:
            return new_int(0)
        if compare_and_swap(driver + DR_ENDED, op, load_i64(op + OP_LINK)) == op:
            # SYNC POINT operation-ended: it is on the list a moment before its state is set.
            while load_acquire(op + OP_STATE) == STATE_UNDER_WAY:
                cpu_pause()
            return new_int(op)
