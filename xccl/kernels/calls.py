"""Calls that go straight from Python into a kernel: put, signal, wait, send and receive in their plainest form.

Rule. A call here either does exactly what its long form in `comm` would do, or changes nothing and says NOT_TAKEN (for
waits: None), and then the long form is called with the same arguments: for arguments that are no plain ints, arrays or
well-known strings, for any that are wrong, for options, and while operations are recorded or the session is over. So
nothing here raises, and every error is that of the long form.

Waiting. A call spins for as long as its rank's wait policy says, with the interpreter's lock held, since whoever waits
for the other rank waits less than it takes to give the lock up. Then it gives the lock up and waits on, for a slice. If
ranks are threads, it gives it up at once. Long messages are moved without the lock from the start.
"""

from __future__ import annotations

from ..layout.calls import (
    CA_AUTO,
    CA_BEGAN_NS,
    CA_COMPARISONS,
    CA_CONTROL,
    CA_CONTROLS,
    CA_DETOUR,
    CA_DRIVER,
    CA_MTE,
    CA_NONE,
    CA_OPS,
    CA_RANK,
    CA_RANKS,
    CA_RECEIVE_CHANNELS,
    CA_SEND_CHANNELS,
    CA_SLICE_NS,
    CA_SPINS,
    SY_ADDRESSES,
    SY_ALIVE,
    SY_CALLS,
    SY_COUNT,
    SY_DTYPE,
    SY_ITEM_BYTES,
)
from ..layout.ring import (
    CH_SPARE,
    DONE_NEVER,
    DR_ENDED,
    DR_REQUESTS,
    ENGINE_MTE,
    MAX_LANES,
    OP_RESULT,
    OP_STATE,
    STATE_DONE,
    STATE_UNDER_WAY,
    ZERO_COPY_BYTES,
)
from ._jit import device
from .atomics import cpu_pause, load_acquire, load_i64, store_i64
from .copy import copy_bytes_auto
from .driver import drive, wait_for_ended
from .fastcall import fastcall, release_lock, take_lock
from .objects import (
    argument,
    array_address,
    array_bytes,
    array_dtype,
    as_index,
    as_int,
    new_int,
    own_state,
    same_object,
)
from .onesided import send_signal, wait_for_word, word_holds
from .operations import append, prepare
from .ring import step_receive, step_send
from .wait import OK, now_ns
from .zerocopy import ENDED, MOVED

#: The call was not made: make the long one.
NOT_TAKEN = 1
#: A send or receive was posted, in the spare record of its channel. It has not ended; or it has, but not well.
UNDER_WAY = -1
UNWELL = -2
#: An operation was posted, and has ended already.
POSTED_AND_ENDED = 2

_MAX_INDEX = (1 << 62) - 1
#: What takes longer to copy than the interpreter should be held up.
LONG_BYTES = 64 << 10


@device
def must_detour(calls: int) -> bool:
    """Must a call that waits go the long way, whatever its arguments?"""
    return load_i64(calls + CA_DETOUR) != 0 or load_i64(load_i64(calls + CA_DRIVER) + DR_REQUESTS) != 0


# -- one-sided --------------------------------------------------------------------------------------------------------


@device
def _is_usable(calls: int, symmetric: int) -> bool:
    """Is symmetric memory that of this communicator, and not freed?"""
    return load_i64(symmetric + SY_CALLS) == calls and load_i64(symmetric + SY_ALIVE) != 0


@device
def _remote(calls: int, target: int, source: int, peer: int, offset: int, writable: bool) -> tuple[int, int, int]:
    """Address at the peer, own address, bytes; the first is 0 if something is out of the ordinary.

    Args:
        calls: call state.
        target: symmetric memory (an int object).
        source: the array.
        peer: a rank (an int object).
        offset: the first element (an int object).
        writable: the array is written to.
    """
    fits, symmetric = as_int(calls, target)
    if not fits:
        return 0, 0, 0
    rank = as_index(calls, peer, 0, load_i64(calls + CA_RANKS) - 1)
    count = load_i64(symmetric + SY_COUNT)
    first = as_index(calls, offset, 0, count)
    n_bytes = array_bytes(calls, source, writable)
    if rank < 0 or first < 0 or n_bytes < 0 or not _is_usable(calls, symmetric):
        return 0, 0, 0
    item_bytes = load_i64(symmetric + SY_ITEM_BYTES)
    if array_dtype(source) != load_i64(symmetric + SY_DTYPE) or n_bytes > (count - first) * item_bytes:
        return 0, 0, 0
    here = array_address(source)
    there = load_i64(load_i64(symmetric + SY_ADDRESSES) + 8 * rank) + first * item_bytes
    if here < there + n_bytes and there < here + n_bytes:
        return 0, 0, 0  # they overlap
    return there, here, n_bytes


@device
def _word(calls: int, signals: int, index: int, rank: int) -> int:
    """Address of a rank's signal word; 0 if something is out of the ordinary."""
    fits, symmetric = as_int(calls, signals)
    if not fits:
        return 0
    i = as_index(calls, index, 0, load_i64(symmetric + SY_COUNT) - 1)
    if i < 0 or not _is_usable(calls, symmetric):
        return 0
    return load_i64(load_i64(symmetric + SY_ADDRESSES) + 8 * rank) + i * load_i64(symmetric + SY_ITEM_BYTES)


@device
def _which(table: int, count: int, found: int) -> int:
    """Index of an object among those whose addresses are in a table; -1 if it is none of them."""
    for i in range(count):
        if load_i64(table + 8 * i) == found:
            return i
    return -1


@device
def _copy(destination: int, source: int, n_bytes: int) -> None:
    if n_bytes <= LONG_BYTES:
        copy_bytes_auto(destination, source, n_bytes)
    else:
        thread = release_lock()
        copy_bytes_auto(destination, source, n_bytes)
        take_lock(thread)


@fastcall
def put(self, args, count):  # type: ignore[no-untyped-def]
    """(target, source, peer, offset) -> 0 or NOT_TAKEN."""
    calls = own_state(self)
    if load_i64(calls + CA_DETOUR) != 0:
        return new_int(NOT_TAKEN)
    there, here, n_bytes = _remote(
        calls, argument(args, 0), argument(args, 1), argument(args, 2), argument(args, 3), False
    )
    if there == 0:
        return new_int(NOT_TAKEN)
    _copy(there, here, n_bytes)
    return new_int(OK)


@fastcall
def get(self, args, count):  # type: ignore[no-untyped-def]
    """(destination, source, peer, offset) -> 0 or NOT_TAKEN."""
    calls = own_state(self)
    if load_i64(calls + CA_DETOUR) != 0:
        return new_int(NOT_TAKEN)
    there, here, n_bytes = _remote(
        calls, argument(args, 1), argument(args, 0), argument(args, 2), argument(args, 3), True
    )
    if there == 0:
        return new_int(NOT_TAKEN)
    _copy(here, there, n_bytes)
    return new_int(OK)


@fastcall
def put_signal(self, args, count):  # type: ignore[no-untyped-def]
    """(target, source, peer, signals, index, value, op, offset) -> 0 or NOT_TAKEN."""
    calls = own_state(self)
    if load_i64(calls + CA_DETOUR) != 0:
        return new_int(NOT_TAKEN)
    there, here, n_bytes = _remote(
        calls, argument(args, 0), argument(args, 1), argument(args, 2), argument(args, 7), False
    )
    fits, value = as_int(calls, argument(args, 5))
    add = _which(calls + CA_OPS, 2, argument(args, 6))
    if there == 0 or not fits or add < 0:
        return new_int(NOT_TAKEN)
    peer = as_index(calls, argument(args, 2), 0, _MAX_INDEX)
    word = _word(calls, argument(args, 3), argument(args, 4), peer)
    if word == 0:
        return new_int(NOT_TAKEN)
    _copy(there, here, n_bytes)
    send_signal(word, value, add, load_i64(load_i64(calls + CA_CONTROLS) + 8 * peer))
    return new_int(OK)


@fastcall
def signal(self, args, count):  # type: ignore[no-untyped-def]
    """(signals, index, value, peer, op) -> 0 or NOT_TAKEN."""
    calls = own_state(self)
    peer = as_index(calls, argument(args, 3), 0, load_i64(calls + CA_RANKS) - 1)
    fits, value = as_int(calls, argument(args, 2))
    add = _which(calls + CA_OPS, 2, argument(args, 4))
    if load_i64(calls + CA_DETOUR) != 0 or peer < 0 or not fits or add < 0:
        return new_int(NOT_TAKEN)
    word = _word(calls, argument(args, 0), argument(args, 1), peer)
    if word == 0:
        return new_int(NOT_TAKEN)
    send_signal(word, value, add, load_i64(load_i64(calls + CA_CONTROLS) + 8 * peer))
    return new_int(OK)


@fastcall
def wait_until(self, args, count):  # type: ignore[no-untyped-def]
    """(signals, index, comparison, value, timeout) -> the value seen, or None."""
    calls = own_state(self)
    none = load_i64(calls + CA_NONE)
    store_i64(calls + CA_BEGAN_NS, 0)
    fits, value = as_int(calls, argument(args, 3))
    comparison = _which(calls + CA_COMPARISONS, 6, argument(args, 2))
    out_of_the_ordinary = must_detour(calls)
    if out_of_the_ordinary or not fits or comparison < 0 or argument(args, 4) != none:
        return same_object(none)
    word = _word(calls, argument(args, 0), argument(args, 1), load_i64(calls + CA_RANK))
    if word == 0:
        return same_object(none)
    for _ in range(load_i64(calls + CA_SPINS) + 1):
        # SYNC POINT signal: acquires what the signalling rank released.
        seen = load_acquire(word)
        if word_holds(seen, comparison, value):
            return new_int(seen)
        cpu_pause()
    began_ns = now_ns()
    store_i64(calls + CA_BEGAN_NS, began_ns)
    thread = release_lock()
    control, until_ns = load_i64(calls + CA_CONTROL), began_ns + load_i64(calls + CA_SLICE_NS)
    status, seen = wait_for_word(control, word, comparison, value, until_ns)
    take_lock(thread)
    return new_int(seen) if status == OK else same_object(none)


# -- send and receive -------------------------------------------------------------------------------------------------


@device
def _transfer(calls: int, args: int, is_send: bool) -> int:
    """(buffer, peer, event_id, lanes, timeout, mode, engine): a blocking call. OK, NOT_TAKEN, UNDER_WAY or UNWELL."""
    n_bytes = array_bytes(calls, argument(args, 0), not is_send)
    peer = as_index(calls, argument(args, 1), 0, load_i64(calls + CA_RANKS) - 1)
    event_id = as_index(calls, argument(args, 2), 0, _MAX_INDEX)
    lanes = as_index(calls, argument(args, 3), 1, MAX_LANES)
    out_of_the_ordinary = must_detour(calls)
    if out_of_the_ordinary or n_bytes < 0 or peer < 0 or event_id < 0 or lanes < 0:
        return NOT_TAKEN
    if (
        argument(args, 4) != load_i64(calls + CA_NONE)
        or argument(args, 5) != load_i64(calls + CA_AUTO)
        or argument(args, 6) != load_i64(calls + CA_MTE)
    ):
        return NOT_TAKEN
    channels = load_i64(calls + (CA_SEND_CHANNELS if is_send else CA_RECEIVE_CHANNELS))
    channel = load_i64(channels + 8 * peer)
    if channel == 0:
        return NOT_TAKEN
    op = load_i64(channel + CH_SPARE)
    zero_copy = is_send and n_bytes >= ZERO_COPY_BYTES
    prepare(channel, op, array_address(argument(args, 0)), n_bytes, event_id, lanes, ENGINE_MTE, zero_copy)
    left = load_i64(calls + CA_SPINS) + 1 if n_bytes <= LONG_BYTES else 0
    while left > 0:
        status = step_send(channel, op) if is_send else step_receive(channel, op)
        if status == ENDED:
            break
        if status != MOVED:
            cpu_pause()
            left -= 1
    if left > 0:
        if load_i64(op + OP_RESULT) == STATE_DONE:
            return OK
        store_i64(op + OP_STATE, load_i64(op + OP_RESULT))
        return UNWELL
    store_i64(calls + CA_BEGAN_NS, now_ns())
    driver = load_i64(calls + CA_DRIVER)
    thread = release_lock()
    append(driver, channel, op)
    until_ns = load_i64(calls + CA_BEGAN_NS) + load_i64(calls + CA_SLICE_NS)
    wait_for_ended(driver, op, DONE_NEVER, until_ns)
    take_lock(thread)
    state = load_acquire(op + OP_STATE)
    if state == STATE_UNDER_WAY:
        return UNDER_WAY
    store_i64(driver + DR_ENDED, 0)  # it was the only one
    return OK if state == STATE_DONE else UNWELL


@fastcall
def send(self, args, count):  # type: ignore[no-untyped-def]
    """(buffer, dst, event_id, lanes, timeout_s, mode, engine) -> see `_transfer`."""
    return new_int(_transfer(own_state(self), args, True))


@fastcall
def receive(self, args, count):  # type: ignore[no-untyped-def]
    """(buffer, src, event_id, lanes, timeout_s, mode, engine) -> see `_transfer`."""
    return new_int(_transfer(own_state(self), args, False))


@device
def _post(calls: int, args: int, is_send: bool) -> int:
    """(buffer, peer, event_id, lanes, mode, engine, record): OK if it is under way, or POSTED_AND_ENDED."""
    n_bytes = array_bytes(calls, argument(args, 0), not is_send)
    peer = as_index(calls, argument(args, 1), 0, load_i64(calls + CA_RANKS) - 1)
    event_id = as_index(calls, argument(args, 2), 0, _MAX_INDEX)
    lanes = as_index(calls, argument(args, 3), 1, MAX_LANES)
    op = as_index(calls, argument(args, 6), 1, _MAX_INDEX)
    if load_i64(calls + CA_DETOUR) != 0 or n_bytes < 0 or peer < 0 or event_id < 0 or lanes < 0 or op < 0:
        return NOT_TAKEN
    if argument(args, 4) != load_i64(calls + CA_AUTO) or argument(args, 5) != load_i64(calls + CA_MTE):
        return NOT_TAKEN
    channels = load_i64(calls + (CA_SEND_CHANNELS if is_send else CA_RECEIVE_CHANNELS))
    channel = load_i64(channels + 8 * peer)
    if channel == 0:
        return NOT_TAKEN
    driver = load_i64(calls + CA_DRIVER)
    zero_copy = is_send and n_bytes >= ZERO_COPY_BYTES
    prepare(channel, op, array_address(argument(args, 0)), n_bytes, event_id, lanes, ENGINE_MTE, zero_copy)
    thread = release_lock()
    append(driver, channel, op)
    drive(driver, channel, ENGINE_MTE)
    take_lock(thread)
    return OK if load_acquire(op + OP_STATE) == STATE_UNDER_WAY else POSTED_AND_ENDED


@fastcall
def post_send(self, args, count):  # type: ignore[no-untyped-def]
    """(buffer, dst, event_id, lanes, mode, engine, record) -> see `_post`."""
    return new_int(_post(own_state(self), args, True))


@fastcall
def post_receive(self, args, count):  # type: ignore[no-untyped-def]
    """(buffer, src, event_id, lanes, mode, engine, record) -> see `_post`."""
    return new_int(_post(own_state(self), args, False))


@fastcall
def wait(self, args, count):  # type: ignore[no-untyped-def]
    """(record,) -> OK if the operation has ended, NOT_TAKEN, or why it was not waited for any longer than a slice."""
    calls = own_state(self)
    op = as_index(calls, argument(args, 0), 1, _MAX_INDEX)
    if load_i64(calls + CA_DETOUR) != 0 or op < 0:
        return new_int(NOT_TAKEN)
    store_i64(calls + CA_BEGAN_NS, now_ns())
    driver = load_i64(calls + CA_DRIVER)
    until_ns = load_i64(calls + CA_BEGAN_NS) + load_i64(calls + CA_SLICE_NS)
    thread = release_lock()
    status = wait_for_ended(driver, op, DONE_NEVER, until_ns)
    take_lock(thread)
    return new_int(status)
