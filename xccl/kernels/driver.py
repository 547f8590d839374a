"""What moves operations on: the order within a channel, and one wait for all of them.

Rules
- A receive goes on when it is the first of its channel's list, a list of copies too; a send starts when all before it
  are written, and ends when it is acknowledged. Requests of KV-cache transfers go on whenever they can.
- Whoever is in a call of the rank drives all operations of the rank's own (`progress`), once, and never waits for
  anything. `wait_for` does so again and again until one of them has ended, and sleeps on the doorbell in between.
- The DMA engine of a rank drives those that were queued for it (`xccl.kernels.engine`). Either thread may do what the
  other waits for (a message that is not written blocks those behind it), so after it has moved something it rings the
  rank's doorbell.
"""

from __future__ import annotations

from ..layout.ring import (
    CH_HEAD,
    CH_KIND,
    CH_ONLY,
    COPY,
    CP_BYTES,
    CP_DESTINATION,
    CP_SOURCE,
    DR_CHANNELS,
    DR_CONTROL,
    DR_COUNT,
    DR_HAS_ENGINE,
    ENGINE_MTE,
    KIND_PAGED_RECEIVE,
    KIND_PAGED_SEND,
    KIND_RECEIVE,
    KIND_SEND,
    MAX_PIECE_BYTES,
    OP_BUFFER,
    OP_CHANNEL,
    OP_CHUNKS,
    OP_DONE,
    OP_ENGINE,
    OP_LINK,
    OP_MOVED,
    OP_RESULT,
    OP_SIGNAL,
    OP_SIGNAL_CONTROL,
    OP_SIGNAL_VALUE,
    OP_STATE,
    STATE_DONE,
    STATE_UNDER_WAY,
    STATE_WITHDRAWN,
)
from ..layout.segment import CTL_ABORT, CTL_DOORBELL
from ._jit import device, kernel
from .atomics import fetch_add, load_acquire, load_i64, store_i64
from .copy import copy_bytes
from .kv import step_receive as step_paged_receive, step_send as step_paged_send
from .operations import append, lock, prepare, remove, unlock
from .ring import is_written, step_receive, step_send, withdraw_receive, withdraw_send
from .wait import ABORTED, OK, PENDING, SLICE, now_ns, relax, ring, settle
from .zerocopy import ENDED, MOVED

#: Bytes that one step of a list of copies moves before it looks at anything else.
_COPY_BYTES_A_STEP = 1 << 20
#: The same, of the requests of KV-cache transfers: whoever posts one waits for the step under way.
_PAGED_BYTES_A_STEP = 256 << 10
_DESCRIPTOR_BYTES = COPY.size_bytes


# -- steps ------------------------------------------------------------------------------------------------------------


@device
def _step_copies(op: int) -> int:
    """Copy the next part of a list; behind the last one, add to the signal."""
    copies = load_i64(op + OP_CHUNKS)
    done = load_i64(op + OP_DONE)
    moved = load_i64(op + OP_MOVED)
    budget = _COPY_BYTES_A_STEP
    while done < copies and budget > 0:
        descriptor = load_i64(op + OP_BUFFER) + done * _DESCRIPTOR_BYTES
        n_bytes = load_i64(descriptor + CP_BYTES)
        part = min(MAX_PIECE_BYTES, n_bytes - moved)
        copy_bytes(load_i64(descriptor + CP_DESTINATION) + moved, load_i64(descriptor + CP_SOURCE) + moved, part)
        moved += part
        budget -= max(part, 512)
        if moved == n_bytes:
            done += 1
            moved = 0
    store_i64(op + OP_DONE, done)
    store_i64(op + OP_MOVED, moved)
    if done < copies:
        return MOVED
    if load_i64(op + OP_SIGNAL) != 0:
        # SYNC POINT signal: added after the data; `wait_until` acquires it.
        fetch_add(load_i64(op + OP_SIGNAL), load_i64(op + OP_SIGNAL_VALUE))
        ring(load_i64(op + OP_SIGNAL_CONTROL))
    store_i64(op + OP_RESULT, STATE_DONE)
    return ENDED


@device
def _drive_sends(driver: int, channel: int, engine: int) -> bool:
    moved = False
    previous = 0
    op = load_i64(channel + CH_HEAD)
    # Answers and acknowledgements come in order: behind a message that has none there are no others.
    is_waiting = False
    while op != 0:
        following = load_i64(op + OP_LINK)
        written = is_written(op)
        if load_i64(op + OP_ENGINE) == engine and not (is_waiting and written):
            status = step_send(channel, op)
            if status == ENDED:
                remove(driver, channel, previous, op)
                moved = True
                op = following
                continue
            if status == MOVED:
                moved = True
            elif written:
                is_waiting = True
        if not is_written(op):
            break
        previous = op
        op = following
    return moved


@device
def _drive_first(driver: int, channel: int, engine: int) -> bool:
    """Receives and copies: one after the other."""
    moved = False
    is_receiving = load_i64(channel + CH_KIND) == KIND_RECEIVE
    op = load_i64(channel + CH_HEAD)
    while op != 0 and load_i64(op + OP_ENGINE) == engine:
        following = load_i64(op + OP_LINK)
        status = step_receive(channel, op) if is_receiving else _step_copies(op)
        if status != ENDED:
            return moved or status == MOVED
        moved = True
        remove(driver, channel, 0, op)
        op = following
    return moved


@device
def _drive_paged(driver: int, channel: int, engine: int) -> bool:
    """Requests of KV-cache transfers: each by itself; those that can go on share the copying of a round."""
    moved = False
    is_sending = load_i64(channel + CH_KIND) == KIND_PAGED_SEND
    budget_bytes = _PAGED_BYTES_A_STEP
    previous = 0
    op = load_i64(channel + CH_HEAD)
    while op != 0:
        following = load_i64(op + OP_LINK)
        status = PENDING
        if load_i64(op + OP_ENGINE) == engine:
            if is_sending:
                status, budget_bytes = step_paged_send(op, budget_bytes)
            else:
                status = step_paged_receive(op)
        if status == ENDED:
            remove(driver, channel, previous, op)
        else:
            previous = op
        if status != PENDING:
            moved = True
        op = following
    return moved


@device
def drive(driver: int, channel: int, engine: int) -> bool:
    """Do what can be done at once for the operations of a channel that are driven by `engine`."""
    if load_i64(channel + CH_HEAD) == 0:
        return False
    only = load_i64(channel + CH_ONLY)
    if only != 0 and only != engine + 1:
        return False  # without waiting for the other thread's step
    lock(driver, channel)
    kind = load_i64(channel + CH_KIND)
    if kind == KIND_SEND:
        moved = _drive_sends(driver, channel, engine)
    elif kind == KIND_PAGED_SEND or kind == KIND_PAGED_RECEIVE:
        moved = _drive_paged(driver, channel, engine)
    else:
        moved = _drive_first(driver, channel, engine)
    unlock(driver, channel)
    if moved and load_i64(driver + DR_HAS_ENGINE) != 0:
        ring(load_i64(driver + DR_CONTROL))  # the other thread may wait for this
    return moved


@device
def drive_all(driver: int, engine: int) -> bool:
    moved = False
    channels = load_i64(driver + DR_CHANNELS)
    for i in range(load_i64(driver + DR_COUNT)):
        if drive(driver, load_i64(channels + 8 * i), engine):
            moved = True
    return moved


# -- entry points -----------------------------------------------------------------------------------------------------


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def post(
    driver: int,
    channel: int,
    op: int,
    buffer: int,
    n_bytes: int,
    event_id: int,
    lanes: int,
    engine: int,
    zero_copy: int,
) -> int:
    """Post a send or a receive, and drive its channel once; the operation's state."""
    prepare(channel, op, buffer, n_bytes, event_id, lanes, engine, zero_copy != 0)
    append(driver, channel, op)
    drive(driver, channel, ENGINE_MTE)
    return load_acquire(op + OP_STATE)


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def post_copies(
    driver: int,
    channel: int,
    op: int,
    descriptors: int,
    count: int,
    n_bytes: int,
    engine: int,
    signal: int,
    value: int,
    control: int,
) -> int:
    """Post a list of copies with a signal behind them (or `signal` 0); the operation's state."""
    prepare(channel, op, descriptors, n_bytes, 0, 1, engine, False)
    store_i64(op + OP_CHUNKS, count)
    store_i64(op + OP_SIGNAL, signal)
    store_i64(op + OP_SIGNAL_VALUE, value)
    store_i64(op + OP_SIGNAL_CONTROL, control)
    append(driver, channel, op)
    drive(driver, channel, ENGINE_MTE)
    return load_acquire(op + OP_STATE)


@kernel("int64(int64, int64, int64, int64, int64, int64, int64)")
def post_paged(driver: int, channel: int, op: int, transfer: int, request: int, layers: int, engine: int) -> int:
    """Post one side of a KV-cache transfer, a record of `xccl.layout.kv`; the operation's state."""
    prepare(channel, op, transfer, 0, request, 1, engine, False)
    store_i64(op + OP_CHUNKS, layers)
    append(driver, channel, op)
    drive(driver, channel, ENGINE_MTE)
    return load_acquire(op + OP_STATE)


@kernel("int64(int64)")
def progress(driver: int) -> int:
    """Drive all operations of the rank's own once, and wait for nothing; ABORTED if the session is over."""
    drive_all(driver, ENGINE_MTE)
    return ABORTED if load_acquire(load_i64(driver + DR_CONTROL) + CTL_ABORT) != 0 else OK


@device
def wait_for_ended(driver: int, op: int, done: int, until_ns: int) -> int:
    """Drive all operations of the rank's own until `op` has ended, or has come to `done` (see OP_DONE)."""
    control = load_i64(driver + DR_CONTROL)
    n = 0
    while True:
        seq = load_acquire(control + CTL_DOORBELL)
        moved = drive_all(driver, ENGINE_MTE)
        # SYNC POINT operation-ended: acquires what the operation has brought.
        if load_acquire(op + OP_STATE) != STATE_UNDER_WAY or load_i64(op + OP_DONE) >= done:
            settle(control, n)
            return OK
        if moved:
            settle(control, n)
            n = 0
            if until_ns == 0 or now_ns() < until_ns:
                continue
            return SLICE
        n = relax(control, n, seq, until_ns)
        if n < 0:
            return n


@kernel("int64(int64, int64, int64, int64)")
def wait_for(driver: int, op: int, done: int, until_ns: int) -> int:
    """`wait_for_ended`, for Python code: OK, SLICE, ABORTED, or PENDING if `until_ns` is 0."""
    return wait_for_ended(driver, op, done, until_ns)


@kernel("int64(int64, int64, int64)")
def give_up(driver: int, op: int, until_ns: int) -> int:
    """Take an operation out of its channel before it has ended; its buffer is its owner's again on OK.

    Returns SLICE if the other side is in the middle of a piece of it all the time: then the buffer must stay alive.
    """
    channel = load_i64(op + OP_CHANNEL)
    lock(driver, channel)
    status = OK
    previous = 0
    at = load_i64(channel + CH_HEAD)
    while at != 0 and at != op:
        previous = at
        at = load_i64(at + OP_LINK)
    if at == op:
        kind = load_i64(channel + CH_KIND)
        if kind == KIND_SEND:
            status = withdraw_send(channel, op, until_ns)
        elif kind == KIND_RECEIVE:
            status = withdraw_receive(channel, op, until_ns)
        store_i64(op + OP_RESULT, STATE_WITHDRAWN)
        remove(driver, channel, previous, op)
    unlock(driver, channel)
    return status
