"""The loop of a DMA engine: a thread of the rank that drives the operations queued for it, and no others.

It sleeps on a doorbell of its own while there are none, so that an idle engine costs the rank's peers no wake-ups.
"""

from __future__ import annotations

from ..layout.ring import (
    DR_BELL,
    DR_CONTROL,
    DR_IDLE,
    DR_QUEUED,
    DR_STOP,
    ENGINE_DMA,
)
from ..layout.segment import CTL_ABORT, CTL_DOORBELL
from ._jit import kernel
from .atomics import fence_seq_cst, fetch_add, load_acquire, load_i64, store_i64, store_release
from .driver import drive_all
from .wait import ABORTED, OK, SLICE, futex_wait, futex_wake, now_ns, relax, ring, settle


@kernel("int64(int64, int64)")
def serve(driver: int, until_ns: int) -> int:
    """The DMA engine: drive what was queued for it. OK when it is told to stop, SLICE at the time, or ABORTED."""
    control = load_i64(driver + DR_CONTROL)
    n = 0
    while load_acquire(driver + DR_STOP) == 0:
        if load_acquire(control + CTL_ABORT) != 0:
            settle(control, n)
            return ABORTED
        if load_acquire(driver + DR_QUEUED) == 0:
            settle(control, n)
            n = 0
            bell = load_acquire(driver + DR_BELL)
            store_i64(driver + DR_IDLE, 1)
            fence_seq_cst()
            if load_acquire(driver + DR_QUEUED) == 0 and load_acquire(driver + DR_STOP) == 0:
                futex_wait(driver + DR_BELL, bell & 0xFFFFFFFF, until_ns)
            store_release(driver + DR_IDLE, 0)
            if now_ns() >= until_ns:
                return SLICE
            continue
        seq = load_acquire(control + CTL_DOORBELL)
        if drive_all(driver, ENGINE_DMA):
            settle(control, n)
            n = 0
            if now_ns() >= until_ns:
                return SLICE
            continue
        n = relax(control, n, seq, until_ns)
        if n < 0:
            return n
    settle(control, n)
    return OK


@kernel("void(int64)")
def stop(driver: int) -> None:
    """Tell the DMA engine to end, whatever it waits for."""
    store_release(driver + DR_STOP, 1)
    fetch_add(driver + DR_BELL, 1)
    futex_wake(driver + DR_BELL, 1)
    fence_seq_cst()
    ring(load_i64(driver + DR_CONTROL))
