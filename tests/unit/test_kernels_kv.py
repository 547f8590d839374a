"""The words of a slot of KV-cache transfers: acceptance and cancellation exclude each other, at any moment."""

from __future__ import annotations

import threading
import time

import numba
import numpy as np
import numpy.typing as npt

from xccl.kernels import kv as kernels, words
from xccl.kernels.atomics import cpu_pause, load_acquire, load_i64, store_i64
from xccl.kernels.wait import sched_yield
from xccl.layout import kv as layout
from xccl.layout.segment import CONTROL

USES, BATCH, MANY = 10_000_000, 50_000, 5_000
MOST_LOOKS = 1_000_000
Words = npt.NDArray[np.int64]
PAGES = np.array([3, 1, 2], np.int32)


class Pair:
    """One slot in plain memory, and the records of both sides."""

    def __init__(self) -> None:
        self._areas = [np.zeros(1024, np.int64) for _ in range(2)]
        self._control = np.zeros(CONTROL.size_bytes // 8, np.int64)
        slot, arrival = (int(area.ctypes.data) for area in self._areas)
        common = {
            layout.PG_PEER_CONTROL: int(self._control.ctypes.data),
            layout.PG_REQUEST: 9,
            layout.PG_COUNT: len(PAGES),
        }
        sender = {layout.PG_SLOTS: 1, layout.PG_ANNOUNCEMENTS: slot, layout.PG_ARRIVALS: arrival}
        self.sender = self._record(common | sender)
        self.receiver = self._record(common | {layout.PG_SLOT: slot, layout.PG_ARRIVAL: arrival})
        self.slot, self.arrival = slot, arrival

    @staticmethod
    def _record(values: dict[int, int]) -> Words:
        record = np.zeros(layout.PAGED.size_bytes // 8, np.int64)
        for offset, value in values.items():
            record[offset // 8] = value
        return record

    def announce(self, use: int) -> None:
        self.receiver[layout.PG_USE // 8] = use
        kernels.announce.call(self.receiver.ctypes.data, PAGES.ctypes.data)

    def accept_and_withdraw(self) -> bool:
        """Accept the request, if it is announced, and tell the receiver that it does not come; was it accepted?"""
        self.sender[layout.PG_SLOT // 8] = 0
        kernels.withdraw.call(self.sender.ctypes.data)
        return bool(self.sender[layout.PG_SLOT // 8])

    def cancel(self) -> bool:
        return bool(kernels.cancel.call(self.receiver.ctypes.data))

    @property
    def progress(self) -> tuple[int, int]:
        """Use, and code."""
        word = int(words.load(self.arrival + layout.AR_PROGRESS))
        return word >> layout.USE_SHIFT, word & layout.PROGRESS_MASK


def test_an_announcement_is_what_the_sender_reads() -> None:
    pair = Pair()
    assert not pair.accept_and_withdraw()
    pair.announce(1)
    memory = pair._areas[0]
    assert memory[layout.AN_STATE // 8] == layout.USE_UNIT + layout.PHASE_ANNOUNCED
    assert (memory[layout.AN_REQUEST // 8], memory[layout.AN_PAGES // 8]) == (9, 3)
    start = layout.ANNOUNCEMENT.size_bytes // 4
    assert memory.view(np.int32)[start : start + 3].tolist() == PAGES.tolist()
    assert pair.accept_and_withdraw()
    assert pair.progress == (1, layout.PROGRESS_WITHDRAWN)
    assert not pair.accept_and_withdraw()
    assert not pair.cancel()


def test_what_was_taken_back_is_not_accepted_and_the_next_use_is() -> None:
    pair = Pair()
    pair.announce(1)
    assert pair.cancel()
    assert not pair.cancel()
    assert not pair.accept_and_withdraw()
    pair.announce(2)
    assert pair.accept_and_withdraw()
    assert pair.progress == (2, layout.PROGRESS_WITHDRAWN)


def test_another_request_is_not_accepted() -> None:
    pair = Pair()
    pair.receiver[layout.PG_REQUEST // 8] = 8
    pair.announce(1)
    assert not pair.accept_and_withdraw()


def test_acceptance_and_cancellation_exclude_each_other_at_any_moment() -> None:
    """Two threads in compiled loops: one of them has each use, never both and never neither."""
    withdraw, announce, cancel = (k.dispatcher for k in (kernels.withdraw, kernels.announce, kernels.cancel))

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def receive(address: int, arrival: int, pages: int, taken_back: npt.NDArray[np.int8], first: int) -> None:
        for use in range(first, first + BATCH):
            store_i64(address + layout.PG_USE, use)
            announce(address, pages)
            for _ in range(use % 8):  # so that both meet at different points
                cpu_pause()
            taken_back[use] = cancel(address)
            answer = (use << layout.USE_SHIFT) + layout.PROGRESS_WITHDRAWN
            looks = 0
            while taken_back[use] == 0 and load_acquire(arrival) != answer and looks < MOST_LOOKS:
                looks += 1
                sched_yield()

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def send(address: int, accepted: npt.NDArray[np.int8], stop: int) -> None:
        while load_acquire(stop) == 0:
            store_i64(address + layout.PG_SLOT, 0)
            withdraw(address)
            if load_i64(address + layout.PG_SLOT) != 0:
                accepted[load_i64(address + layout.PG_USE)] += 1

    pair = Pair()
    accepted, taken_back, stop = np.zeros(USES, np.int8), np.zeros(USES, np.int8), np.zeros(1, np.int64)
    sender, receiver = pair.sender.ctypes.data, pair.receiver.ctypes.data
    stop[0] = 1
    send(sender, accepted, stop.ctypes.data)  # compiles it
    stop[0] = 0
    thread = threading.Thread(target=send, args=(sender, accepted, stop.ctypes.data))
    thread.start()
    used, deadline = 0, time.monotonic() + 5
    try:
        # Until both have had their share: on a busy machine the threads seldom run at the same time.
        while used + BATCH < len(accepted) and np.count_nonzero(accepted) < MANY and time.monotonic() < deadline:
            receive(receiver, pair.arrival + layout.AR_PROGRESS, PAGES.ctypes.data, taken_back, used + 1)
            used += BATCH
    finally:
        words.store(stop.ctypes.data, 1)
        thread.join()
    assert ((accepted + taken_back)[1 : used + 1] == 1).all()
