"""Bounded waiting, and waking.

Theory of operation. A rank has one doorbell, in its own segment, for everything that it may wait for. A waiter loops:

    n = 0
    while True:
        seq = load_acquire(control + CTL_DOORBELL)
        if <condition on words of the own segment>:
            break
        n = relax(control, n, seq, until_ns)
        if n < 0:
            return n
    settle(control, n)

`relax` pauses, then yields, then counts the rank among the waiters (and returns once more, so that the condition is
checked again), and only then sleeps on the doorbell. A writer publishes its word, then calls `ring`, which looks at the
number of waiters and does nothing if there are none: the uncontended path has no system call and writes no shared line.

No wake-up is lost (Dekker's argument; SYNC POINT doorbell): the waiter raises `waiters`, then checks the condition; the
writer stores the word, then reads `waiters`; both with a full fence in between. Either the waiter sees the word, or the
writer sees the waiter and raises the doorbell, and then FUTEX_WAIT with the old `seq` returns at once.

A wait for one word alone says which, with `relax_for`: then `ring_for` does not wake it for another one. The number of
waiters and the word awaited are one word, so each change of either is one step, and a waiter that joins another one
clears the word awaited: then all writers wake both. Nothing is lost, by the same argument: a writer that reads
`waiters` as it was before has published its word before the waiter looks at it.

A wait is cut into slices: at the time `until_ns`, or when a signal arrives, `relax` gives up with SLICE, and Python
looks at signals, deadlines and the liveness of peers before it calls again. Wake-ups for something else do not prolong
a slice. An abort of the session ends the wait with ABORTED. A rank that is killed while it is counted as a waiter
leaves the count raised, which costs its peers a needless system call and nothing else.

Times are those of CLOCK_MONOTONIC in nanoseconds, as Python's `time.monotonic_ns` has them; 0 means not to wait at all.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..layout.segment import CTL_ABORT, CTL_ARMED_SEQ, CTL_DOORBELL, CTL_PAUSES, CTL_WAITERS, CTL_YIELDS, WAITERS_BITS
from ._jit import device, kernel
from .atomics import I64, compare_and_swap, cpu_pause, fence_seq_cst, fetch_add, load_acquire, load_i64, store_i64

#: Statuses of kernels. Negative ones end a wait.
OK = 0
SLICE = -1
ABORTED = -2
MISMATCH = -3
PENDING = -4

_FUTEX_WAKE = 1
_FUTEX_WAIT_BITSET = 9  # FUTEX_WAIT with an absolute time-out, by CLOCK_MONOTONIC
_FUTEX_ANY_BIT = 0xFFFFFFFF
_FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
if platform.machine() not in _FUTEX_NUMBERS:
    raise ImportError(f"xccl knows no futex on {platform.machine()}; it runs on {', '.join(_FUTEX_NUMBERS)}")
_FUTEX_NUMBER = _FUTEX_NUMBERS[platform.machine()]
_CLOCK_MONOTONIC = 1
_WAITERS_MASK = (1 << WAITERS_BITS) - 1

sched_yield = types.ExternalFunction("sched_yield", types.int32())


def _call_futex(builder: Any, address: Any, operation: int, value: Any, timeout: Any) -> Any:
    function_type = ir.FunctionType(I64, [I64], var_arg=True)
    function = cgutils.get_or_insert_function(builder.module, function_type, "syscall")
    number, code, nowhere = (ir.Constant(I64, n) for n in (_FUTEX_NUMBER, operation, 0))
    return builder.call(function, [number, address, code, value, timeout, nowhere, ir.Constant(I64, _FUTEX_ANY_BIT)])


@intrinsic
def futex_wait(typingctx: Any, address: Any, value: Any, until_ns: Any) -> Any:
    """Sleep while the int32 at `address` is `value`; 0 when woken, -1 at the time, on a signal or a changed value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        billion = ir.Constant(I64, 1_000_000_000)
        timespec = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        for index, part in enumerate((builder.sdiv(args[2], billion), builder.srem(args[2], billion))):
            builder.store(part, cgutils.gep_inbounds(builder, timespec, 0, index))
        return _call_futex(builder, args[0], _FUTEX_WAIT_BITSET, args[1], builder.ptrtoint(timespec, I64))

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def futex_wake(typingctx: Any, address: Any, count: Any) -> Any:
    """Wake at most `count` sleepers on `address`; how many were woken."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call_futex(builder, args[0], _FUTEX_WAKE, args[1], ir.Constant(I64, 0))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def now_ns(typingctx: Any) -> Any:
    """CLOCK_MONOTONIC in nanoseconds (about 25 ns)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        timespec = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        function_type = ir.FunctionType(ir.IntType(32), [ir.IntType(32), timespec.type])
        function = cgutils.get_or_insert_function(builder.module, function_type, "clock_gettime")
        builder.call(function, [ir.Constant(ir.IntType(32), _CLOCK_MONOTONIC), timespec])
        seconds, rest = (builder.load(cgutils.gep_inbounds(builder, timespec, 0, i)) for i in (0, 1))
        return builder.add(builder.mul(seconds, ir.Constant(I64, 1_000_000_000)), rest)

    return types.int64(), codegen


@device
def wake(control: int) -> None:
    """Raise the doorbell of a rank and wake it, whether it sleeps or not."""
    fetch_add(control + CTL_DOORBELL, 1)
    futex_wake(control + CTL_DOORBELL, 0x7FFFFFFF)


@device
def _enter(control: int, awaited: int) -> None:
    """Count a waiter: for the word at `awaited` behind the control area alone, or for several if that is 0."""
    while True:
        seen = load_acquire(control + CTL_WAITERS)
        others = seen & _WAITERS_MASK
        word = others + 1
        if others == 0:
            word |= awaited << WAITERS_BITS
        if compare_and_swap(control + CTL_WAITERS, seen, word) == seen:
            return


@device
def _leave(control: int) -> None:
    """Undo `_enter`."""
    while True:
        seen = load_acquire(control + CTL_WAITERS)
        if compare_and_swap(control + CTL_WAITERS, seen, (seen & _WAITERS_MASK) - 1) == seen:
            return


@device
def waiters(control: int) -> int:
    """How many threads of the rank sleep, or are about to."""
    return load_acquire(control + CTL_WAITERS) & _WAITERS_MASK


@device
def awaits(control: int, address: int) -> bool:
    """May the rank sleep until something happens to the word at this address? Only after a full fence."""
    seen = load_acquire(control + CTL_WAITERS)
    if seen & _WAITERS_MASK == 0:
        return False
    awaited = seen >> WAITERS_BITS
    return awaited == 0 or awaited == address - control


@device
def ring(control: int) -> None:
    """Wake the rank with this control area if it sleeps. Call it after publishing a word (SYNC POINT doorbell)."""
    fence_seq_cst()
    if waiters(control) > 0:
        wake(control)


@device
def ring_for(control: int, address: int) -> None:
    """`ring` after publishing the word at this address of that rank's segment: not if it waits for another word alone.

    A rank that waits for words of hundreds of peers, one after the other, would be woken by each of them otherwise.
    """
    fence_seq_cst()
    if awaits(control, address):
        wake(control)


@device
def relax_for(control: int, n: int, seq: int, until_ns: int, address: int) -> int:
    """Wait a little (see above) for the word at this address alone, whose writers use `ring_for` or `ring`.

    The next `n`, or SLICE, ABORTED, or PENDING at once if `until_ns` is 0.
    """
    if until_ns == 0:
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
        # With other load, a yield can give the core away for milliseconds.
        return SLICE if now_ns() >= until_ns else n + 1
    if n == limit:
        # SYNC POINT doorbell: counted as a waiter before the condition is checked once more (pairs with `ring`).
        _enter(control, address - control)
        fence_seq_cst()
        return n + 1
    status = OK
    if load_acquire(control + CTL_ABORT) != 0:
        status = ABORTED
    else:
        woken = futex_wait(control + CTL_DOORBELL, seq & 0xFFFFFFFF, until_ns)
        if (woken != 0 and load_acquire(control + CTL_DOORBELL) == seq) or now_ns() >= until_ns:
            status = SLICE
    if status != OK:
        _leave(control)
        return status
    return n + 1


@device
def relax(control: int, n: int, seq: int, until_ns: int) -> int:
    """`relax_for` in a wait for one of several words: any writer wakes the rank."""
    return relax_for(control, n, seq, until_ns, control)


@device
def settle(control: int, n: int) -> None:
    """End a wait whose condition came true."""
    if n > load_i64(control + CTL_PAUSES) + load_i64(control + CTL_YIELDS):
        _leave(control)


@device
def await_words(
    control: int, address: int, stride_bytes: int, count: int, target: int, cursor: int, until_ns: int
) -> int:
    """Wait until each of `count` words, `stride_bytes` apart, is at least `target`.

    The int64 at address `cursor` holds the index of the first word that was not seen to be so: 0 at first, where the
    next call goes on, and on time-out the peer to name.
    """
    for i in range(load_i64(cursor), count):
        n = 0
        word = address + i * stride_bytes
        while True:
            seq = load_acquire(control + CTL_DOORBELL)
            if load_acquire(word) >= target:
                break
            n = relax_for(control, n, seq, until_ns, word)
            if n < 0:
                store_i64(cursor, i)
                return n
        settle(control, n)
    store_i64(cursor, count)
    return OK


@kernel("int64(int64, int64, int64, int64, int64, int64, int64)")
def wait_all(control: int, address: int, stride_bytes: int, count: int, target: int, cursor: int, until_ns: int) -> int:
    """`await_words` for Python."""
    return await_words(control, address, stride_bytes, count, target, cursor, until_ns)


@kernel("int64(int64, int64)")
def sleep(control: int, until_ns: int) -> int:
    """Sleep until the doorbell is raised, for a rank that has counted itself as a waiter with `arm`."""
    seq = load_i64(control + CTL_ARMED_SEQ)
    if load_acquire(control + CTL_ABORT) != 0:
        return ABORTED
    futex_wait(control + CTL_DOORBELL, seq & 0xFFFFFFFF, until_ns)
    return OK if load_acquire(control + CTL_DOORBELL) != seq else SLICE


@kernel("void(int64)")
def arm(control: int) -> None:
    """Count the rank as a waiter and note the doorbell; then check all conditions again, `sleep`, and `disarm`."""
    _enter(control, 0)
    store_i64(control + CTL_ARMED_SEQ, load_acquire(control + CTL_DOORBELL))
    fence_seq_cst()


@kernel("void(int64)")
def disarm(control: int) -> None:
    """Undo `arm`."""
    _leave(control)


@kernel("void(int64, int64)")
def ring_all(controls: int, ranks: int) -> None:
    """`ring` for each of `ranks` control areas, whose addresses are at `controls`, after publishing a word."""
    for rank in range(ranks):
        ring(load_i64(controls + 8 * rank))


@kernel("void(int64, int64)")
def abort(control: int, word: int) -> None:
    """Set the abort word of a rank, unless it is set already, and wake the rank."""
    compare_and_swap(control + CTL_ABORT, 0, word)
    wake(control)
