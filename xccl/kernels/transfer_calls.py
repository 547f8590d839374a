"""Send, receive, isend, irecv and the wait for a request, straight from Python. The rule is that of `kernels.calls`.

A request is a Python object that keeps its buffer alive, so its record must know it until it has ended. Compiled code
makes the object, like the template of its channel, and takes note of its end, if that is a good one: a record refers to
its request while the request is under way (`OperationRecord`), and lies on the list of free records otherwise. All of
that is done with the interpreter's lock held. What ends in any other way, or is recorded, is left to Python.
"""

from __future__ import annotations

from ..layout.calls import (
    CA_AUTO,
    CA_BEGAN_NS,
    CA_DETOUR,
    CA_DRIVER,
    CA_MTE,
    CA_NONE,
    CA_RANKS,
    CA_RECEIVE_CHANNELS,
    CA_RECORD_ADDRESS,
    CA_RECORD_REQUEST,
    CA_REQUEST_BUFFER,
    CA_REQUEST_BYTES,
    CA_REQUEST_ERROR,
    CA_REQUEST_RECORD,
    CA_SEND_CHANNELS,
    CA_SLICE_NS,
    CA_SPINS,
)
from ..layout.ring import (
    CH_SPARE,
    CH_TEMPLATE,
    DONE_NEVER,
    DR_ENDED,
    DR_FREE,
    DR_REQUESTS,
    ENGINE_MTE,
    FORM_RING,
    MAX_LANES,
    OP_DIRECT,
    OP_FORM,
    OP_LINK,
    OP_OBJECT,
    OP_RESULT,
    OP_STATE,
    STATE_DONE,
    STATE_UNDER_WAY,
    ZERO_COPY_BYTES,
)
from ._jit import device
from .atomics import cpu_pause, load_acquire, load_i64, store_i64
from .calls import LONG_BYTES, MAX_INDEX, NOT_TAKEN, must_detour
from .driver import drive, wait_for_ended
from .fastcall import fastcall, release_lock, take_lock
from .objects import (
    argument,
    array_address,
    array_bytes,
    as_index,
    drop_reference,
    int_value,
    new_int,
    object_like,
    own_state,
    same_object,
    set_slot,
)
from .operations import append, first_ended, prepare, take_ended
from .ring import step_receive, step_send
from .wait import OK, now_ns
from .zerocopy import ENDED, MOVED

#: A send or receive was posted, in the spare record of its channel. It has not ended; or it has, but not well.
UNDER_WAY = -1
UNWELL = -2


# -- blocking ---------------------------------------------------------------------------------------------------------


@device
def _transfer(calls: int, args: int, is_send: bool) -> int:
    """(buffer, peer, event_id, lanes, timeout, mode, engine): a blocking call. OK, NOT_TAKEN, UNDER_WAY or UNWELL."""
    n_bytes = array_bytes(calls, argument(args, 0), not is_send)
    peer = as_index(calls, argument(args, 1), 0, load_i64(calls + CA_RANKS) - 1)
    event_id = as_index(calls, argument(args, 2), 0, MAX_INDEX)
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


# -- requests ---------------------------------------------------------------------------------------------------------


@device
def _collect(calls: int, driver: int) -> None:
    """Take note of operations that have ended, until there is one that Python has to look at."""
    none = load_i64(calls + CA_NONE)
    while True:
        op = first_ended(driver)
        if op == 0 or load_i64(op + OP_DIRECT) == 0 or load_i64(op + OP_STATE) != STATE_DONE:
            return
        take_ended(driver, op)
        record = load_i64(op + OP_OBJECT)
        request = same_object(load_i64(record + load_i64(calls + CA_RECORD_REQUEST)))
        store_i64(op + OP_LINK, load_i64(driver + DR_FREE))
        store_i64(driver + DR_FREE, op)
        store_i64(driver + DR_REQUESTS, load_i64(driver + DR_REQUESTS) - 1)
        # From here on all is as it should be, should any code run because an object goes.
        set_slot(request + load_i64(calls + CA_REQUEST_RECORD), none)
        set_slot(record + load_i64(calls + CA_RECORD_REQUEST), none)
        drop_reference(request)


@device
def _post(calls: int, args: int, is_send: bool) -> int:
    """(buffer, peer, event_id, lanes, mode, engine): a new request that is under way, or None if it was not taken."""
    none = load_i64(calls + CA_NONE)
    n_bytes = array_bytes(calls, argument(args, 0), not is_send)
    peer = as_index(calls, argument(args, 1), 0, load_i64(calls + CA_RANKS) - 1)
    event_id = as_index(calls, argument(args, 2), 0, MAX_INDEX)
    lanes = as_index(calls, argument(args, 3), 1, MAX_LANES)
    if load_i64(calls + CA_DETOUR) != 0 or n_bytes < 0 or peer < 0 or event_id < 0 or lanes < 0:
        return same_object(none)
    if argument(args, 4) != load_i64(calls + CA_AUTO) or argument(args, 5) != load_i64(calls + CA_MTE):
        return same_object(none)
    channels = load_i64(calls + (CA_SEND_CHANNELS if is_send else CA_RECEIVE_CHANNELS))
    channel = load_i64(channels + 8 * peer)
    if channel == 0:
        return same_object(none)
    driver = load_i64(calls + CA_DRIVER)
    request = object_like(load_i64(channel + CH_TEMPLATE), load_i64(calls + CA_REQUEST_BYTES))
    if request == 0:
        return 0
    # Garbage may have been collected for that, and any code have run: from here on there is none.
    op = load_i64(driver + DR_FREE)
    if op == 0 or load_i64(channels + 8 * peer) != channel:
        drop_reference(request)
        return same_object(none)
    store_i64(driver + DR_FREE, load_i64(op + OP_LINK))
    store_i64(driver + DR_REQUESTS, load_i64(driver + DR_REQUESTS) + 1)
    record = load_i64(op + OP_OBJECT)
    set_slot(request + load_i64(calls + CA_REQUEST_BUFFER), argument(args, 0))
    set_slot(request + load_i64(calls + CA_REQUEST_RECORD), record)
    set_slot(record + load_i64(calls + CA_RECORD_REQUEST), request)
    zero_copy = is_send and n_bytes >= ZERO_COPY_BYTES
    prepare(channel, op, array_address(argument(args, 0)), n_bytes, event_id, lanes, ENGINE_MTE, zero_copy)
    store_i64(op + OP_DIRECT, 1)
    if n_bytes <= LONG_BYTES or load_i64(op + OP_FORM) != FORM_RING:
        append(driver, channel, op)
        drive(driver, channel, ENGINE_MTE, False)
    else:
        thread = release_lock()
        append(driver, channel, op)
        drive(driver, channel, ENGINE_MTE, False)
        take_lock(thread)
    return request


@fastcall
def post_send(self, args, count):  # type: ignore[no-untyped-def]
    """(buffer, dst, event_id, lanes, mode, engine) -> see `_post`."""
    return _post(own_state(self), args, True)


@fastcall
def post_receive(self, args, count):  # type: ignore[no-untyped-def]
    """(buffer, src, event_id, lanes, mode, engine) -> see `_post`."""
    return _post(own_state(self), args, False)


@fastcall
def wait(self, args, count):  # type: ignore[no-untyped-def]
    """(request,) -> OK if it has ended well and was collected; else wait on: NOT_TAKEN, or UNDER_WAY after a slice."""
    calls = own_state(self)
    none = load_i64(calls + CA_NONE)
    request = argument(args, 0)
    record = load_i64(request + load_i64(calls + CA_REQUEST_RECORD))
    if record == none:
        return new_int(OK if load_i64(request + load_i64(calls + CA_REQUEST_ERROR)) == none else NOT_TAKEN)
    if load_i64(calls + CA_DETOUR) != 0:
        return new_int(NOT_TAKEN)
    op = int_value(load_i64(record + load_i64(calls + CA_RECORD_ADDRESS)))
    driver = load_i64(calls + CA_DRIVER)
    # SYNC POINT operation-ended: acquires what the operation has brought.
    if load_acquire(op + OP_STATE) == STATE_UNDER_WAY:
        store_i64(calls + CA_BEGAN_NS, now_ns())
        until_ns = load_i64(calls + CA_BEGAN_NS) + load_i64(calls + CA_SLICE_NS)
        thread = release_lock()
        status = wait_for_ended(driver, op, DONE_NEVER, until_ns)
        take_lock(thread)
        if status != OK:
            return new_int(UNDER_WAY)
    _collect(calls, driver)
    return new_int(OK if load_i64(request + load_i64(calls + CA_REQUEST_RECORD)) == none else NOT_TAKEN)
