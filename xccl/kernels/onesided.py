"""Put, get, signal, wait and barrier.

Rules. A signal never overtakes the data that the same rank put before it: data is stored, then the signal word is
released (SYNC POINT signal); the waiter acquires it. A barrier is a count at rank 0 and a release word in each segment:
the last rank to arrive, whoever it is, releases all, so that every rank waits on its own segment only.
"""

from __future__ import annotations

from ..layout.calls import BA_ARRIVALS, BA_ARRIVED, BA_EPOCH, BA_RELEASED, BA_RELEASES
from ..layout.segment import CTL_DOORBELL
from ._jit import device, kernel
from .atomics import fence_seq_cst, fetch_add, load_acquire, load_i64, store_i64, store_release
from .copy import copy_bytes_auto
from .wait import OK, awaits, relax_for, ring_for, settle, wake

#: Comparison codes of `wait_until`, by name.
COMPARISONS = {"eq": 0, "ne": 1, "gt": 2, "ge": 3, "lt": 4, "le": 5}


@kernel("void(int64, int64, int64)")
def copy(destination: int, source: int, n_bytes: int) -> None:
    """Copy `n_bytes` between two addresses that do not overlap."""
    copy_bytes_auto(destination, source, n_bytes)


@kernel("void()")
def quiet() -> None:
    """Complete all earlier stores of this rank, as seen by every other."""
    fence_seq_cst()


@device
def send_signal(address: int, value: int, add: int, control: int) -> None:
    """Set a signal word, or add to it, and wake its rank."""
    # SYNC POINT signal: released after the data; `wait_until` acquires it.
    if add != 0:
        fetch_add(address, value)
    else:
        store_release(address, value)
    ring_for(control, address)


@kernel("void(int64, int64, int64, int64)")
def signal(address: int, value: int, add: int, control: int) -> None:
    """Set (or add to) a signal word of the rank with this control area, and wake that rank."""
    send_signal(address, value, add, control)


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def put_signal(destination: int, source: int, n_bytes: int, address: int, value: int, add: int, control: int) -> None:
    """Copy, then signal."""
    copy_bytes_auto(destination, source, n_bytes)
    send_signal(address, value, add, control)


@device
def word_holds(seen: int, comparison: int, value: int) -> bool:
    """Does a word compare so with `value`? `comparison` is one of `COMPARISONS`."""
    if comparison == 0:
        return seen == value
    if comparison == 1:
        return seen != value
    if comparison == 2:
        return seen > value
    if comparison == 3:
        return seen >= value
    if comparison == 4:
        return seen < value
    return seen <= value


@device
def wait_for_word(control: int, address: int, comparison: int, value: int, until_ns: int) -> tuple[int, int]:
    """Wait until a signal word of this rank compares so: status, and the value seen last."""
    n = 0
    while True:
        seq = load_acquire(control + CTL_DOORBELL)
        # SYNC POINT signal: acquires what the signalling rank released.
        seen = load_acquire(address)
        if word_holds(seen, comparison, value):
            settle(control, n)
            return OK, seen
        n = relax_for(control, n, seq, until_ns, address)
        if n < 0:
            return n, seen


@kernel("int64(int64, int64, int64, int64, int64, int64)")
def wait_until(control: int, address: int, comparison: int, value: int, seen_address: int, until_ns: int) -> int:
    """`wait_for_word`, for Python code; the value seen is stored at `seen_address`."""
    status, seen = wait_for_word(control, address, comparison, value, until_ns)
    store_i64(seen_address, seen)
    return status


@device
def arrive(state: int, ranks: int, controls: int, epoch: int) -> None:
    """Be counted at barrier number `epoch` (from 1), unless this rank was; the last one to come releases all."""
    if load_i64(state + BA_ARRIVED) == epoch:
        return
    store_i64(state + BA_ARRIVED, epoch)
    # SYNC POINT barrier: the counting is acquire and release, so the last to arrive has seen what all did before.
    if fetch_add(load_i64(state + BA_ARRIVALS), 1) + 1 != epoch * ranks:
        return
    store_i64(state + BA_RELEASED, epoch)
    releases = load_i64(state + BA_RELEASES)
    for i in range(ranks):
        # SYNC POINT barrier-release: after all arrivals; `await_release` acquires it.
        store_release(load_i64(releases + 8 * i), epoch)
    fence_seq_cst()
    for i in range(ranks):
        # SYNC POINT doorbell: with one fence for all.
        control = load_i64(controls + 8 * i)
        if awaits(control, load_i64(releases + 8 * i)):
            wake(control)


@device
def await_release(control: int, own: int, epoch: int, until_ns: int) -> int:
    """Wait until the word at `own` says that all have arrived at barrier number `epoch`."""
    n = 0
    while True:
        seq = load_acquire(control + CTL_DOORBELL)
        # SYNC POINT barrier-release: acquires what the last to arrive has released.
        if load_acquire(own) >= epoch:
            break
        n = relax_for(control, n, seq, until_ns, own)
        if n < 0:
            return n
    settle(control, n)
    return OK


@kernel("int64(int64, int64, int64, int64, int64, int64, int64)")
def barrier(state: int, ranks: int, controls: int, control: int, own: int, epoch: int, until_ns: int) -> int:
    """Barrier number `epoch`.

    Args:
        state: address of the barrier's state.
        ranks: number of ranks.
        controls: address of [ranks] int64, the control areas of all ranks.
        control: address of the own control area.
        own: address of the own release word.
        epoch: number of this barrier, from 1, the same at all ranks.
        until_ns: when to return at the latest.
    """
    arrive(state, ranks, controls, epoch)
    status = await_release(control, own, epoch, until_ns)
    if status == OK:
        store_i64(state + BA_EPOCH, epoch)
    return status
