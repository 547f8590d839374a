"""Collectives and barrier, straight from Python. The rule and how they wait are those of `kernels.calls`.

A collective looks up its arguments among those that were checked before: the plan that it finds says what the arrays
must be. Whatever is not as usual (UNFIT) was not begun.
"""

from __future__ import annotations

from ..layout.calls import (
    BA_CALLS,
    BA_EPOCH,
    BA_RELEASES,
    CA_BEGAN_NS,
    CA_CONTROL,
    CA_CONTROLS,
    CA_INT64,
    CA_NONE,
    CA_RANK,
    CA_RANKS,
    CA_SLICE_NS,
    CA_SPINS,
    CC_CALLS,
    CC_KERNEL,
    CC_STATE,
    COLLECTIVE_CALLS,
    KC_ALGORITHM,
    KC_BYTES,
    KC_DTYPE,
    KC_OP,
    KC_PLAN,
    KC_ROOT,
    KNOWN_CALL,
    KNOWN_CALLS,
)
from ..layout.collectives import (
    CS_CAME,
    CS_RANKS,
    CS_TABLE,
    PL_IN_PLACE,
    PL_OUT_BYTES,
    PL_SEND_STRIDE,
    PL_X_BYTES,
    TB_EXPECTED,
    TB_ROWS,
)
from ._jit import device
from .atomics import cpu_pause, load_acquire, load_i64, store_i64
from .calls import LONG_BYTES, NOT_TAKEN, must_detour
from .collectives import UNFIT
from .copy import copy_bytes
from .fastcall import call_kernel, fastcall, release_lock, take_lock
from .objects import (
    argument,
    array_address,
    array_bytes,
    array_dtype,
    array_row_bytes,
    array_rows,
    as_index,
    have_same_rows,
    new_int,
    own_state,
)
from .onesided import arrive, await_release
from .wait import OK, PENDING, now_ns

#: Beside the statuses of the kernel. Alltoallv: OK, `recv_counts` were given, and `out` is full.
FILLED = 6

_FIRST, _NEXT = COLLECTIVE_CALLS.size_bytes, KNOWN_CALL.size_bytes
_MAX_ROOT = 1 << 16


@device
def _known(record: int, dtype: int, n_bytes: int, op: int, root: int, algorithm: int) -> int:
    """The plan of a call with these arguments; 0 if there is none."""
    at = record + _FIRST
    for _ in range(KNOWN_CALLS):
        if load_i64(at + KC_BYTES) == n_bytes and load_i64(at + KC_DTYPE) == dtype and load_i64(at + KC_OP) == op:
            if load_i64(at + KC_ROOT) == root and load_i64(at + KC_ALGORITHM) == algorithm:
                return load_i64(at + KC_PLAN)
        at += _NEXT
    return 0


@device
def _overlap(x: int, x_bytes: int, out: int, out_bytes: int) -> bool:
    return x < out + out_bytes and out < x + x_bytes


@device
def _make(record: int, plan: int, x: int, x_rows: int, out: int, out_rows: int, n_bytes: int) -> int:
    """Make a call: spin for a while with the interpreter's lock held, then wait without it, for a slice."""
    calls, state, collective = load_i64(record + CC_CALLS), load_i64(record + CC_STATE), load_i64(record + CC_KERNEL)
    left = load_i64(calls + CA_SPINS) + 1 if n_bytes <= LONG_BYTES else 0
    while left > 0:
        status = call_kernel(collective, (state, plan, x, x_rows, out, out_rows, 0))
        if status != PENDING:
            return status
        cpu_pause()
        left -= 1
    thread = release_lock()
    status = call_kernel(collective, (state, plan, x, x_rows, out, out_rows, -load_i64(calls + CA_SLICE_NS)))
    take_lock(thread)
    return status


@device
def _fit(calls: int, plan: int, x_array: int, out_array: int, n_bytes: int, dtype: int) -> bool:
    """Are input and output what the plan is for, and apart, or together where they may be?

    One of them is known to be a plain array of `n_bytes` and this dtype: the input, or the output if there is no input.
    """
    none, x_bytes, out_bytes = load_i64(calls + CA_NONE), load_i64(plan + PL_X_BYTES), load_i64(plan + PL_OUT_BYTES)
    if x_bytes >= 0:
        if x_array == none or x_bytes != n_bytes:
            return False
        if load_i64(plan + PL_SEND_STRIDE) > 0 and array_rows(x_array) != load_i64(calls + CA_RANKS):
            return False
    elif x_array != none and x_array != out_array:
        return False
    if out_bytes < 0:
        return out_array == none or out_array == x_array
    if out_array == none or array_bytes(calls, out_array, True) != out_bytes or array_dtype(out_array) != dtype:
        return False
    if x_bytes >= 0 and _overlap(array_address(x_array), x_bytes, array_address(out_array), out_bytes):
        place = load_i64(plan + PL_IN_PLACE)
        return place >= 0 and array_address(x_array) == array_address(out_array) + place
    return True


@device
def _collect(record: int, args: int) -> int:
    calls = load_i64(record + CC_CALLS)
    none = load_i64(calls + CA_NONE)
    out_of_the_ordinary = must_detour(calls)
    if out_of_the_ordinary or argument(args, 5) != none:
        return UNFIT
    x_array, out_array, root = argument(args, 0), argument(args, 1), -1
    if argument(args, 3) != none:
        root = as_index(calls, argument(args, 3), 0, _MAX_ROOT)
        if root < 0:
            return UNFIT
    first = x_array if x_array != none else out_array
    n_bytes = array_bytes(calls, first, False)
    if n_bytes < 0:
        return UNFIT
    dtype = array_dtype(first)
    plan = _known(record, dtype, n_bytes, argument(args, 2), root, argument(args, 4))
    if plan == 0 or not _fit(calls, plan, x_array, out_array, n_bytes, dtype):
        return UNFIT
    x = array_address(x_array) if x_array != none else 0
    out = array_address(out_array) if out_array != none else 0
    return _make(record, plan, x, 0, out, 0, n_bytes)


@fastcall
def collect(self, args, count):  # type: ignore[no-untyped-def]
    """(x, out, op, root, algorithm, timeout_s) -> the kernel's status, or UNFIT. Broadcast: x is out."""
    return new_int(_collect(own_state(self), args))


@device
def _take_counts(calls: int, found: int, ranks: int, column: int) -> bool:
    """Copy numbers of rows to a column of the table, if they are a plain array of int64, one for each rank."""
    if array_bytes(calls, found, False) != 8 * ranks or array_rows(found) != ranks:
        return False
    if array_dtype(found) != load_i64(calls + CA_INT64):
        return False
    copy_bytes(column, array_address(found), 8 * ranks)
    return True


@device
def _collect_rows(record: int, args: int) -> int:
    calls, state = load_i64(record + CC_CALLS), load_i64(record + CC_STATE)
    none = load_i64(calls + CA_NONE)
    x_array, out_array, expected = argument(args, 0), argument(args, 3), argument(args, 2)
    out_of_the_ordinary = must_detour(calls)
    if out_of_the_ordinary or argument(args, 4) != none:
        return UNFIT
    x_bytes = array_bytes(calls, x_array, False)
    rows = array_rows(x_array) if x_bytes >= 0 else -1
    if rows < 0:
        return UNFIT
    dtype = array_dtype(x_array)
    plan = _known(record, dtype, array_row_bytes(x_array), none, -1, none)
    if plan == 0:
        return UNFIT
    x, out, room = array_address(x_array), 0, -1
    if out_array != none:
        out_bytes = array_bytes(calls, out_array, True)
        if out_bytes < 0 or array_dtype(out_array) != dtype or not have_same_rows(x_array, out_array):
            return UNFIT
        out, room = array_address(out_array), array_rows(out_array)
        if _overlap(x, x_bytes, out, out_bytes):
            return UNFIT
    ranks, table = load_i64(state + CS_RANKS), load_i64(state + CS_TABLE)
    if not _take_counts(calls, argument(args, 1), ranks, table + 8 * ranks * TB_ROWS):
        return UNFIT
    if expected == none:
        for i in range(ranks):
            store_i64(table + 8 * (ranks * TB_EXPECTED + i), -1)
    elif not _take_counts(calls, expected, ranks, table + 8 * ranks * TB_EXPECTED):
        return UNFIT
    status = _make(record, plan, x, rows, out, room, x_bytes)
    if status == OK and expected != none and room == load_i64(state + CS_CAME):
        return FILLED
    return status


@fastcall
def collect_rows(self, args, count):  # type: ignore[no-untyped-def]
    """(x, send_counts, recv_counts, out, timeout_s): alltoallv -> FILLED, the kernel's status, or UNFIT."""
    return new_int(_collect_rows(own_state(self), args))


@device
def _barrier(state: int, args: int) -> int:
    calls = load_i64(state + BA_CALLS)
    store_i64(calls + CA_BEGAN_NS, 0)
    out_of_the_ordinary = must_detour(calls)
    if out_of_the_ordinary or argument(args, 0) != load_i64(calls + CA_NONE):
        return NOT_TAKEN
    epoch, ranks = load_i64(state + BA_EPOCH) + 1, load_i64(calls + CA_RANKS)
    own = load_i64(load_i64(state + BA_RELEASES) + 8 * load_i64(calls + CA_RANK))
    arrive(state, ranks, load_i64(calls + CA_CONTROLS), epoch)
    for _ in range(load_i64(calls + CA_SPINS) + 1):
        # SYNC POINT barrier-release: acquires what the last to arrive has released.
        if load_acquire(own) >= epoch:
            store_i64(state + BA_EPOCH, epoch)
            return OK
        cpu_pause()
    began_ns = now_ns()
    store_i64(calls + CA_BEGAN_NS, began_ns)
    thread = release_lock()
    status = await_release(load_i64(calls + CA_CONTROL), own, epoch, began_ns + load_i64(calls + CA_SLICE_NS))
    take_lock(thread)
    if status == OK:
        store_i64(state + BA_EPOCH, epoch)
        return OK
    return NOT_TAKEN  # this rank has arrived; the long call goes on with the same barrier


@fastcall
def barrier(self, args, count):  # type: ignore[no-untyped-def]
    """(timeout_s) -> 0, or NOT_TAKEN; the long call then goes on, also where this one has begun."""
    return new_int(_barrier(own_state(self), args))
