"""Bounded waiting, and waking.

Theory of operation. A rank has one doorbell, in its own segment, for everything that it may wait for. A waiter loops:

    n = 0
    while True:
        seq = load_acquire(control + CTL_DOORBELL)
        if <condition on words of the own segment>:
            break
        n = relax(control, n, seq, slice_ns)
        if n < 0:
            return n
    settle(control, n)

`relax` pauses, then yields, then counts the rank among the waiters (and returns once more, so that the condition is
checked again), and only then sleeps on the doorbell. A writer publishes its word, then calls `ring`, which looks at the
number of waiters and does nothing if there are none: the uncontended path has no system call and writes no shared line.

No wake-up is lost (Dekker's argument; SYNC POINT doorbell): the waiter raises `waiters`, then checks the condition; the
writer stores the word, then reads `waiters`; both with a full fence in between. Either the waiter sees the word, or the
writer sees the waiter and raises the doorbell, and then FUTEX_WAIT with the old `seq` returns at once.

A wait is cut into slices: after `slice_ns` of sleep, a signal, or many wake-ups for something else, `relax` gives up
with SLICE, and Python looks at deadlines, signals and the liveness of peers before it calls again. An abort of the
session ends the wait with ABORTED. A rank that is killed while it is counted as a waiter leaves the count raised, which
costs its peers a needless system call and nothing else.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..layout.segment import CTL_ABORT, CTL_ARMED_SEQ, CTL_DOORBELL, CTL_PAUSES, CTL_WAITERS, CTL_YIELDS
from ._jit import device, kernel
from .atomics import I64, compare_and_swap, cpu_pause, fence_seq_cst, fetch_add, load_acquire, load_i64, store_i64

#: Statuses of kernels. Negative ones end a wait.
OK = 0
SLICE = -1
ABORTED = -2
MISMATCH = -3
PENDING = -4

#: Wake-ups for something else after which a wait returns to Python all the same.
_MAX_WAKEUPS = 256

_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_FUTEX_NUMBER = {"x86_64": 202, "AMD64": 202, "aarch64": 98}.get(platform.machine(), 98)

sched_yield = types.ExternalFunction("sched_yield", types.int32())


def _call_futex(builder: Any, address: Any, operation: int, value: Any, timeout: Any) -> Any:
    function_type = ir.FunctionType(I64, [I64], var_arg=True)
    function = cgutils.get_or_insert_function(builder.module, function_type, "syscall")
    number, code = ir.Constant(I64, _FUTEX_NUMBER), ir.Constant(I64, operation)
    return builder.call(function, [number, address, code, value, timeout])


@intrinsic
def _futex_wait(typingctx: Any, address: Any, value: Any, timeout_ns: Any) -> Any:
    """Sleep while the int32 at `address` is `value`; 0 when woken, -1 on time-out, signal or changed value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        billion = ir.Constant(I64, 1_000_000_000)
        timespec = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        for index, part in enumerate((builder.sdiv(args[2], billion), builder.srem(args[2], billion))):
            builder.store(part, cgutils.gep_inbounds(builder, timespec, 0, index))
        return _call_futex(builder, args[0], _FUTEX_WAIT, args[1], builder.ptrtoint(timespec, I64))

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def _futex_wake(typingctx: Any, address: Any, count: Any) -> Any:
    """Wake at most `count` sleepers on `address`; how many were woken."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call_futex(builder, args[0], _FUTEX_WAKE, args[1], ir.Constant(I64, 0))

    return types.int64(types.int64, types.int64), codegen


@device
def wake(control: int) -> None:
    """Raise the doorbell of a rank and wake it, whether it sleeps or not."""
    fetch_add(control + CTL_DOORBELL, 1)
    _futex_wake(control + CTL_DOORBELL, 0x7FFFFFFF)


@device
def ring(control: int) -> None:
    """Wake the rank with this control area if it sleeps. Call it after publishing a word (SYNC POINT doorbell)."""
    fence_seq_cst()
    if load_acquire(control + CTL_WAITERS) > 0:
        wake(control)


@device
def relax(control: int, n: int, seq: int, slice_ns: int) -> int:
    """Wait a little (see above). The next `n`, or SLICE, ABORTED, or PENDING at once if `slice_ns` is 0."""
    if slice_ns == 0:
        return PENDING
    pauses = load_i64(control + CTL_PAUSES)
    if n < pauses:
        cpu_pause()
        return n + 1
    limit = pauses + load_i64(control + CTL_YIELDS)
    if n < limit:
        sched_yield()
        if load_acquire(control + CTL_ABORT) != 0:
            return ABORTED
        return n + 1
    if n == limit:
        # SYNC POINT doorbell: counted as a waiter before the condition is checked once more (pairs with `ring`).
        fetch_add(control + CTL_WAITERS, 1)
        return n + 1
    if load_acquire(control + CTL_ABORT) != 0:
        fetch_add(control + CTL_WAITERS, -1)
        return ABORTED
    woken = _futex_wait(control + CTL_DOORBELL, seq & 0xFFFFFFFF, slice_ns)
    if (woken != 0 and load_acquire(control + CTL_DOORBELL) == seq) or n > limit + _MAX_WAKEUPS:
        fetch_add(control + CTL_WAITERS, -1)
        return SLICE
    return n + 1


@device
def settle(control: int, n: int) -> None:
    """End a wait whose condition came true."""
    if n > load_i64(control + CTL_PAUSES) + load_i64(control + CTL_YIELDS):
        fetch_add(control + CTL_WAITERS, -1)


@kernel("int64(int64, int64, int64, int64, int64, int64, int64)")
def wait_all(control: int, address: int, stride_bytes: int, count: int, target: int, cursor: int, slice_ns: int) -> int:
    """Wait until each of `count` words, `stride_bytes` apart, is at least `target`.

    The int64 at address `cursor` holds the index of the first word that was not seen to be so: 0 at first, where the
    next call goes on, and on time-out the peer to name.
    """
    for i in range(load_i64(cursor), count):
        n = 0
        while True:
            seq = load_acquire(control + CTL_DOORBELL)
            if load_acquire(address + i * stride_bytes) >= target:
                break
            n = relax(control, n, seq, slice_ns)
            if n < 0:
                store_i64(cursor, i)
                return n
        settle(control, n)
    store_i64(cursor, count)
    return OK


@kernel("int64(int64, int64)")
def sleep(control: int, slice_ns: int) -> int:
    """Sleep until the doorbell is raised, for a rank that has counted itself as a waiter with `arm`."""
    seq = load_i64(control + CTL_ARMED_SEQ)
    if load_acquire(control + CTL_ABORT) != 0:
        return ABORTED
    _futex_wait(control + CTL_DOORBELL, seq & 0xFFFFFFFF, slice_ns)
    return OK if load_acquire(control + CTL_DOORBELL) != seq else SLICE


@kernel("void(int64)")
def arm(control: int) -> None:
    """Count the rank as a waiter and note the doorbell; then check all conditions again, `sleep`, and `disarm`."""
    fetch_add(control + CTL_WAITERS, 1)
    store_i64(control + CTL_ARMED_SEQ, load_acquire(control + CTL_DOORBELL))
    fence_seq_cst()


@kernel("void(int64)")
def disarm(control: int) -> None:
    """Undo `arm`."""
    fetch_add(control + CTL_WAITERS, -1)


@kernel("void(int64)")
def wake_kernel(control: int) -> None:
    """`wake`, for Python code."""
    wake(control)


@kernel("void(int64, int64)")
def abort(control: int, word: int) -> None:
    """Set the abort word of a rank, unless it is set already, and wake the rank."""
    compare_and_swap(control + CTL_ABORT, 0, word)
    wake(control)
