"""Zero-copy messages that are under way together: windows of requests, in any order, with anything in the middle."""

from __future__ import annotations

import ctypes
import mmap
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

import xccl
from tests.multirank.messages import guarded, message
from tests.multirank.support import launch
from xccl.layout import ring

BYTES = 64 << 10
WINDOW = 24
_SIZES = (0, 8, 20_000, 32 << 10, 40_001, 64 << 10, 64 << 10, 64 << 10, 300_000, 1_100_000)


def post(comm: xccl.Communicator, buffer: np.ndarray, event: int, **options: Any) -> xccl.Request:
    """Rank 0 sends to rank 1."""
    if comm.rank:
        options.pop("mode", None)
        return comm.irecv(buffer, 0, event, **options)
    return comm.isend(buffer, 1, event, **options)


@pytest.mark.parametrize("slots", [32, 3, 1])
@pytest.mark.parametrize("seed", [1, 2])
def test_windows_of_any_messages_waited_for_in_any_order(fabric: str, seed: int, slots: int) -> None:
    def main(comm: xccl.Communicator) -> None:
        common, own = np.random.default_rng(seed), np.random.default_rng([seed, comm.rank])
        room = comm.empty(1 << 20, np.uint8)
        for turn in range(8):
            requests: list[xccl.Request] = []
            checks = []
            used = 0
            for i in range(WINDOW):
                n_bytes, lanes = int(common.choice(_SIZES)), int(common.integers(1, 7))
                buffer, check = guarded(n_bytes)
                if own.random() < 0.2 and used + n_bytes <= room.local.nbytes:
                    buffer = room.local[used : used + n_bytes]
                    used += n_bytes
                want = message(n_bytes, 1000 * turn + i)
                if comm.rank == 0:
                    buffer[:] = want
                mode = ("auto", "auto", "auto", "ring")[common.integers(4)]
                engine = ("mte", "mte", "mte", "dma")[own.integers(4)]
                requests.append(post(comm, buffer, i, lanes=lanes, mode=mode, engine=engine))
                checks.append((buffer, want, check))
                if own.random() < 0.1:
                    requests[int(own.integers(len(requests)))].test()
            for i in own.permutation(WINDOW):
                requests[i].wait()
            for buffer, want, check in checks:
                assert np.array_equal(buffer, want)
                check()

    launch(main, 2, fabric, ring_slots=slots)


def test_a_call_that_waits_copies_a_piece_of_each_of_eight_messages(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        buffers = [np.full(BYTES, i + 1 if comm.rank == 0 else 0, np.uint8) for i in range(ring.BATCH)]
        comm.send(np.zeros(1), 1, 99) if comm.rank == 0 else comm.recv(np.zeros(1), 0, 99)
        told = comm.empty(2, np.int64)
        told.local[:] = 0
        comm.barrier()

        def tell(index: int) -> None:
            comm.put(told, np.ones(1, np.int64), 1 - comm.rank, index)

        def hear(index: int) -> None:
            """Without a call that drives requests."""
            end = time.monotonic() + 10
            while not told.local[index] and time.monotonic() < end:
                time.sleep(0)

        if comm.rank == 0:
            requests = [post(comm, buffer, i) for i, buffer in enumerate(buffers)]
            tell(0)
            hear(0)
            assert [request.word(ring.OP_MOVED) for request in requests] == [0] * ring.BATCH
            requests[3].test()
            assert [request.word(ring.OP_MOVED) for request in requests] == [1] * ring.BATCH
            tell(1)
            hear(1)
        else:
            hear(0)
            requests = [post(comm, buffer, i) for i, buffer in enumerate(buffers)]
            tell(0)
            hear(1)
            for i, buffer in enumerate(buffers):
                half = BYTES // 2
                assert not buffer[:half].any()
                assert (buffer[half:] == i + 1).all()
            tell(1)
        for request in reversed(requests):
            request.wait()
        assert all((buffer == i + 1).all() for i, buffer in enumerate(buffers))

    launch(main, 2, fabric)


@pytest.mark.parametrize("late", [0, 1])
def test_one_side_copies_all_while_the_other_computes(fabric: str, late: int) -> None:
    def main(comm: xccl.Communicator) -> None:
        buffers = [message(BYTES, i) if comm.rank == 0 else np.zeros(BYTES, np.uint8) for i in range(WINDOW)]
        requests = [post(comm, buffer, i) for i, buffer in enumerate(buffers)]
        if comm.rank == late:
            time.sleep(0.1)
        for request in requests:
            request.wait()
        for i, buffer in enumerate(buffers):
            assert np.array_equal(buffer, message(BYTES, i))

    launch(main, 2, fabric)


@pytest.mark.parametrize("bad", [0, 5, WINDOW - 1])
def test_a_refused_message_leaves_the_others_alone(fabric: str, bad: int) -> None:
    def main(comm: xccl.Communicator) -> None:
        for turn in range(3):
            buffers = [message(BYTES, i) if comm.rank == 0 else np.zeros(BYTES, np.uint8) for i in range(WINDOW)]
            events = list(range(WINDOW))
            events[bad] += 100 * comm.rank
            requests = [post(comm, buffer, event) for buffer, event in zip(buffers, events, strict=True)]
            for i in (1, *range(WINDOW)) if turn else reversed(range(WINDOW)):
                if i == bad:
                    with pytest.raises(xccl.EventMismatch):
                        requests[i].wait()
                else:
                    requests[i].wait()
                    assert np.array_equal(buffers[i], message(BYTES, i))

    launch(main, 2, fabric)


def _mapped(n_bytes: int) -> tuple[np.ndarray, Any]:
    """Memory that can be taken away under an array, and how."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, n_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    array = np.frombuffer((ctypes.c_uint8 * n_bytes).from_address(address), np.uint8)
    return array, lambda: libc.munmap(address, n_bytes)


def test_behind_a_message_that_breaks_off_nothing_is_taken_for_complete() -> None:
    def main(comm: xccl.Communicator) -> None:
        buffers = [message(BYTES, i) if comm.rank == 0 else np.zeros(BYTES, np.uint8) for i in range(6)]
        requests: list[xccl.Request] = []
        if comm.rank == 0:
            buffers[2], take_away = _mapped(BYTES)
            requests = [post(comm, buffer, i) for i, buffer in enumerate(buffers)]
            assert take_away() == 0
        comm.barrier()
        requests = requests or [post(comm, buffer, i) for i, buffer in enumerate(buffers)]
        ended: list[bool] = []
        for i, request in enumerate(requests):
            try:
                request.wait(timeout_s=20)
            except (xccl.FabricError, xccl.WaitTimeout, xccl.PeerDied):
                ended.append(False)
                continue
            ended.append(True)
            assert comm.rank == 0 or np.array_equal(buffers[i], message(BYTES, i))
        assert not any(ended[2:])
        if comm.rank:
            assert ended[:2] == [True, True]
            assert all(isinstance(request.error, xccl.FabricError) for request in requests[2:])
            with pytest.raises(xccl.FabricError, match="unusable"):
                comm.irecv(buffers[0], 0, 7)

    launch(main, 2, "shm")


def test_a_request_is_two_calls_of_compiled_code(fabric: str) -> None:
    """And a Python function around each."""

    def main(comm: xccl.Communicator) -> None:
        buffer = np.zeros(8)
        for turn in range(3):
            comm.barrier()
            seen: Counter[str] = Counter()

            def note(frame: Any, event: str, argument: Any, seen: Counter[str] = seen) -> None:
                if argument is not sys.setprofile:
                    seen[event] += 1

            start, peer = (comm.irecv, 0) if comm.rank else (comm.isend, 1)
            sys.setprofile(note)
            try:
                request = start(buffer, peer, turn)
                request.wait()
            finally:
                sys.setprofile(None)
            assert turn == 0 or (seen["c_call"] <= 2 and seen["call"] <= 2), seen

    launch(main, 2, fabric)


def test_a_request_that_nobody_keeps_is_completed(fabric: str) -> None:
    """Its record keeps it, and its buffer, until then."""

    def main(comm: xccl.Communicator) -> None:
        for turn in range(50):
            if comm.rank == 0:
                for event in range(4):
                    comm.isend(message(BYTES, 10 * turn + event), 1, event)
                comm.recv(np.zeros(1), 1, 9)
            else:
                out = np.zeros(BYTES, np.uint8)
                for event in range(4):
                    comm.recv(out, 0, event)
                    assert np.array_equal(out, message(BYTES, 10 * turn + event))
                comm.send(np.zeros(1), 0, 9)

    launch(main, 2, fabric)
