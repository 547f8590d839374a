"""Send and receive: sizes, lanes, order, progress, back-pressure, buffers."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import numpy as np
import pytest

import xccl
from tests.multirank.messages import RINGS, TINY, guarded, message
from tests.multirank.support import BF16, FP32, assert_same, error_of, launch
from xccl.errors import UsageError, WaitTimeout

# --- sizes and lanes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", RINGS)
def test_sizes(fabric: str, ring: dict[str, int]) -> None:
    slot = ring.get("slot_bytes", 32 << 10)
    sizes = sorted(
        {0, 1, 7, 63, 64, 65, 511, 512, 513, 4096, 10_001, slot - 1, slot, slot + 1, 2 * slot + 1, 40 * slot}
    )

    def main(comm: xccl.Communicator) -> None:
        for lanes in (1, 2, 3, 48):
            for i, n in enumerate(sizes):
                data = message(n, i)
                if comm.rank == 0:
                    comm.send(data, dst=1, event_id=i, lanes=lanes)
                else:
                    out, check = guarded(n)
                    comm.recv(out, src=0, event_id=i, lanes=lanes)
                    assert_same(out, data, f"{n} bytes on {lanes} lanes")
                    check()

    launch(main, 2, fabric, **ring)


@pytest.mark.parametrize("ring", [{}, TINY], ids=["default", "2x64"])
def test_every_number_of_lanes(fabric: str, ring: dict[str, int]) -> None:
    """Also more lanes than chunks, and messages of other numbers of lanes right behind."""
    sizes = [0, 100, 3000, 70_000 if not ring else 4000]

    def main(comm: xccl.Communicator) -> None:
        peer = 1 - comm.rank
        for lanes in range(1, 49):
            sends = [comm.isend(message(n, n + comm.rank), dst=peer, event_id=n, lanes=lanes) for n in sizes]
            for n in sizes:
                out, check = guarded(n)
                comm.recv(out, src=peer, event_id=n, lanes=lanes)
                assert_same(out, message(n, n + peer), f"{n} bytes on {lanes} lanes")
                check()
            for request in sends:
                request.wait()

    launch(main, 2, fabric, **ring)


@pytest.mark.parametrize("ring", [{}, TINY], ids=["default", "2x64"])
def test_far_larger_than_the_ring(fabric: str, ring: dict[str, int]) -> None:
    n = 20 << 20 if not ring else 256 << 10

    def main(comm: xccl.Communicator) -> None:
        data = message(n, 5)
        if comm.rank == 0:
            comm.send(data, dst=1, event_id=1, lanes=5)
        else:
            out, check = guarded(n)
            comm.recv(out, src=0, event_id=1, lanes=5)
            assert_same(out, data)
            check()

    launch(main, 2, fabric, **ring)


def test_the_largest_event_id(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        for event in (0, 1, (1 << 63) - 1, np.int64(12), np.uint8(200)):
            if comm.rank == 0:
                comm.send(np.arange(3), dst=1, event_id=event)  # type: ignore[arg-type]
            else:
                out = np.zeros(3, np.int64)
                comm.recv(out, src=0, event_id=int(event))
                assert out.tolist() == [0, 1, 2]

    launch(main, 2, fabric)


# --- several requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [{}, TINY], ids=["default", "2x64"])
def test_both_send_first(fabric: str, ring: dict[str, int]) -> None:
    """Each has far more to send than the ring holds before it receives: no deadlock, since all that waits drives all."""

    def main(comm: xccl.Communicator) -> None:
        peer = 1 - comm.rank
        for n in (10, 10_000):
            request = comm.isend(message(n, comm.rank), dst=peer, event_id=n)
            out = np.zeros(n, np.uint8)
            comm.recv(out, src=peer, event_id=n)
            assert_same(out, message(n, peer))
            request.wait()
            # And the other way round: both receives are posted first.
            incoming = comm.irecv(out, src=peer, event_id=n + 1)
            comm.send(message(n, 10 + comm.rank), dst=peer, event_id=n + 1)
            incoming.wait()
            assert_same(out, message(n, 10 + peer))

    launch(main, 2, fabric, **ring)


@pytest.mark.parametrize("ring", [{}, TINY], ids=["default", "2x64"])
def test_everyone_to_everyone_at_once(fabric: str, ring: dict[str, int]) -> None:
    ranks, n = 5, 10_000

    def main(comm: xccl.Communicator) -> None:
        sends = [comm.isend(message(n + p, 10 * comm.rank + p), dst=p, event_id=p, lanes=1 + p) for p in range(ranks)]
        outs = [np.zeros(n + comm.rank, np.uint8) for _ in range(ranks)]
        receives = [comm.irecv(outs[p], src=p, event_id=comm.rank, lanes=1 + comm.rank) for p in reversed(range(ranks))]
        for request in [*receives, *sends]:
            request.wait()
        for p in range(ranks):
            assert_same(outs[p], message(n + comm.rank, 10 * p + comm.rank), f"from {p}")

    launch(main, ranks, fabric, **ring)


@pytest.mark.parametrize("ring", [{}, TINY], ids=["default", "2x64"])
@pytest.mark.parametrize("wait_backwards", [False, True])
def test_many_outstanding_on_a_pair(fabric: str, ring: dict[str, int], wait_backwards: bool) -> None:
    count = 100

    def main(comm: xccl.Communicator) -> None:
        peer = 1 - comm.rank
        sizes = [(i * 379) % 3000 for i in range(count)]
        if comm.rank == 0:
            requests = [comm.isend(message(n, i), dst=1, event_id=i, lanes=1 + i % 48) for i, n in enumerate(sizes)]
        else:
            outs = [np.zeros(n, np.uint8) for n in sizes]
            requests = [comm.irecv(out, src=peer, event_id=i, lanes=1 + i % 48) for i, out in enumerate(outs)]
        for request in reversed(requests) if wait_backwards else requests:
            request.wait()
        assert all(request.test() for request in requests)
        if comm.rank == 1:
            for i, out in enumerate(outs):
                assert_same(out, message(sizes[i], i), f"message {i}")

    launch(main, 2, fabric, **ring)


def test_receives_match_in_the_order_of_posting(fabric: str) -> None:
    """The same event ID again and again: the n-th receive gets the n-th message."""

    def main(comm: xccl.Communicator) -> None:
        outs = [np.zeros(1, np.int64) for _ in range(50)]
        if comm.rank == 0:
            requests = [comm.isend(np.array([i]), dst=1, event_id=3) for i in range(50)]
        else:
            requests = [comm.irecv(out, src=0, event_id=3) for out in outs]
        for request in requests:
            request.wait()
        if comm.rank == 1:
            assert [int(out[0]) for out in outs] == list(range(50))

    launch(main, 2, fabric)


@pytest.mark.parametrize("ring", [{}, TINY], ids=["default", "2x64"])
def test_to_self(fabric: str, ring: dict[str, int]) -> None:
    def main(comm: xccl.Communicator) -> None:
        for i, n in enumerate([0, 1, 500, 20_000]):
            data, out = message(n, i), np.zeros(n, np.uint8)
            send_first = i % 2 == 0
            first = comm.isend(data, dst=comm.rank, event_id=i) if send_first else comm.irecv(out, comm.rank, i)
            second = comm.irecv(out, comm.rank, i) if send_first else comm.isend(data, dst=comm.rank, event_id=i)
            first.wait()
            second.wait()
            assert_same(out, data)
            # A blocking receive finds what was sent before.
            request = comm.isend(data, dst=comm.rank, event_id=100 + i)
            out[:] = 0
            comm.recv(out, src=comm.rank, event_id=100 + i)
            request.wait()
            assert_same(out, data)

    launch(main, 2, fabric, **ring)


def test_polling(fabric: str) -> None:
    """`test` alone drives a transfer; it is False until the end, and True ever after."""

    def main(comm: xccl.Communicator) -> None:
        n = 5000
        peer, out = 1 - comm.rank, np.zeros(n, np.uint8)
        signals = comm.signals(1)
        if comm.rank == 0:
            request = comm.isend(message(n, 1), dst=1, event_id=1)
            for _ in range(20):
                assert not request.test()  # rank 1 has not even posted its receive
            comm.signal(signals, 0, 1, peer=1)
        else:
            comm.wait_until(signals, 0, "eq", 1)
            request = comm.irecv(out, src=peer, event_id=1)
        deadline = time.monotonic() + 20
        while not request.test():
            assert time.monotonic() < deadline
        assert request.test()
        request.wait(timeout_s=1e-3)
        assert request.test()
        if comm.rank == 1:
            assert_same(out, message(n, 1))
        comm.barrier()

    launch(main, 2, fabric, **TINY)


def test_a_sender_far_ahead_of_a_slow_receiver(fabric: str) -> None:
    """Back-pressure: what is not yet received stays with the sender, and nothing in the ring is overwritten."""
    count = 60

    def main(comm: xccl.Communicator) -> None:
        if comm.rank == 0:
            requests = [comm.isend(message(300, i), dst=1, event_id=i, lanes=1 + i % 5) for i in range(count)]
            for _ in range(50):
                requests[-1].test()
            # 4 slots of 128 bytes, and a message of 300 bytes takes 3 of them: only one whole message fits.
            assert not any(request.done for request in requests)
            comm.barrier()
            for request in requests:
                request.wait()
        else:
            out = np.zeros(300, np.uint8)
            comm.barrier()
            for i in range(count):
                if i % 10 == 0:
                    time.sleep(0.005)
                comm.recv(out, src=0, event_id=i, lanes=1 + i % 5)
                assert_same(out, message(300, i), f"message {i}")

    launch(main, 2, fabric, ring_slots=4, slot_bytes=128)


def test_small_sends_are_buffered_while_the_ring_has_room(fabric: str) -> None:
    """A send is complete when it is acknowledged, not when it is written."""

    def main(comm: xccl.Communicator) -> None:
        if comm.rank == 0:
            request = comm.isend(np.arange(4), dst=1, event_id=0)
            error = error_of(request.wait, timeout_s=0.05)
            assert isinstance(error, WaitTimeout)
            assert "not acknowledged" in str(error)
            comm.barrier()
            request.wait()
        else:
            comm.barrier()
            out = np.zeros(4, np.int64)
            comm.recv(out, src=0, event_id=0)
            assert out.tolist() == [0, 1, 2, 3]

    launch(main, 2, fabric)


# --- progress in other calls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["barrier", "wait_until", "empty", "dispatch", "recv from another", "send to another"])
def test_requests_move_on_in_other_calls(fabric: str, call: str) -> None:
    """Rank 0 starts a send far larger than the ring, and goes into another call, which rank 1 joins only after it has
    received all of it."""
    n = 6000

    def main(comm: xccl.Communicator) -> None:
        signals = comm.signals(1)
        ep = xccl.ExpertParallel(
            comm, num_experts=3, hidden=8, top_k=1, max_tokens=4, dtype=np.float32, quant="none"
        )  # fmt: skip
        word = np.zeros(1, np.int64)

        def other() -> None:
            if call == "barrier":
                comm.barrier()
            elif call == "wait_until":
                if comm.rank == 1:
                    comm.signal(signals, 0, 1, peer=0)
                elif comm.rank == 0:
                    comm.wait_until(signals, 0, "eq", 1)
            elif call == "empty":
                comm.empty(10, np.int8)
            elif call == "dispatch":
                d = ep.dispatch(np.full((4, 8), comm.rank, np.float32), np.full((4, 1), 2 - comm.rank))
                assert (d.tokens == 2 - comm.rank).all()
            elif call == "recv from another":
                if comm.rank == 0:
                    comm.recv(word, src=2, event_id=9)
                elif comm.rank == 1:
                    comm.send(word, dst=2, event_id=8)
                else:
                    comm.recv(word, src=1, event_id=8)
                    comm.send(word, dst=0, event_id=9)
            elif comm.rank == 0:
                comm.send(word, dst=2, event_id=9)
            elif comm.rank == 1:
                comm.send(word, dst=2, event_id=8)
            else:
                comm.recv(word, src=1, event_id=8)
                comm.recv(word, src=0, event_id=9)

        comm.barrier()
        if comm.rank == 0:
            request = comm.isend(message(n, 3), dst=1, event_id=5, lanes=3)
            other()
            request.wait()
        elif comm.rank == 1:
            out = np.zeros(n, np.uint8)
            comm.recv(out, src=0, event_id=5, lanes=3)
            assert_same(out, message(n, 3))
            other()
        else:
            other()
        comm.barrier()

    launch(main, 3, fabric, **TINY)


def test_a_receive_moves_on_while_its_rank_waits_elsewhere(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        n = 6000
        comm.barrier()
        if comm.rank == 0:
            comm.send(message(n, 3), dst=1, event_id=5)
            comm.barrier()
        else:
            out = np.zeros(n, np.uint8)
            request = comm.irecv(out, src=0, event_id=5)
            comm.barrier()
            assert request.done
            assert_same(out, message(n, 3))

    launch(main, 2, fabric, **TINY)


# --- buffers ---------------------------------------------------------------------------------------------------------


def test_strided_and_read_only_sources(fabric: str) -> None:
    base = np.arange(3000, dtype=np.float32).astype(BF16).reshape(30, 100)
    frozen = base.copy()
    frozen.flags.writeable = False
    sources = [
        base[::3],
        base[:, 1::7],
        base.T,
        base[::-1, ::-1],
        frozen,
        base[3, 4, ...],
        base[:0],
        np.asfortranarray(base),
    ]

    def main(comm: xccl.Communicator) -> None:
        for i, source in enumerate(sources):
            if comm.rank == 0:
                request = comm.isend(source, dst=1, event_id=i)
                del source
                request.wait()
            else:
                out = np.zeros(np.shape(source), BF16)
                comm.recv(out, src=0, event_id=i)
                assert_same(out, np.ascontiguousarray(source).reshape(np.shape(source)), f"source {i}")

    launch(main, 2, fabric, **TINY)


def test_buffers_that_cannot_be_written_into(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        frozen = np.zeros(4)
        frozen.flags.writeable = False
        for bad, why in (
            (frozen, "read-only"), (np.zeros((4, 4))[:, ::2], "contiguous"), (np.zeros((4, 4)).T, "contiguous"),
            ([0, 0], "list"), (b"0000", "bytes"), (None, "NoneType"),
        ):  # fmt: skip
            for call in (comm.recv, comm.irecv):
                error = error_of(call, bad, src=1 - comm.rank, event_id=0)
                assert isinstance(error, UsageError)
                assert why in str(error)
        # Nothing was started: the channel is as good as new.
        request = comm.isend(np.arange(3), dst=1 - comm.rank, event_id=0)
        out = np.zeros(3, np.int64)
        comm.recv(out, src=1 - comm.rank, event_id=0)
        request.wait()
        assert out.tolist() == [0, 1, 2]

    launch(main, 2, fabric)


def test_a_request_keeps_its_buffers_alive(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        n = 50_000
        if comm.rank == 0:
            requests = [comm.isend(message(n, i), dst=1, event_id=i) for i in range(5)]  # nobody else holds the arrays
            noise = [np.full(n, 0xCC, np.uint8) for _ in range(10)]
            for request in requests:
                request.wait()
            del noise
        else:
            comm.recv(out := np.zeros(n, np.uint8), src=0, event_id=0)
            assert_same(out, message(n, 0))
            requests = [comm.irecv(np.zeros(n, np.uint8), src=0, event_id=i) for i in range(1, 5)]
            for i, request in enumerate(requests, start=1):
                request.wait()
                assert_same(request.buffer, message(n, i), f"message {i}")

    launch(main, 2, fabric, **TINY)


def test_symmetric_arrays_are_buffers_too(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        a = comm.empty(5000, np.int32)
        a.local[:] = comm.rank
        if comm.rank == 0:
            comm.send(a.local, dst=1, event_id=0)
        else:
            comm.recv(a.local, src=0, event_id=0)
            assert (a.local == 0).all()
        comm.barrier()

    launch(main, 2, fabric)


def test_rings_take_no_memory_before_a_pair_talks() -> None:
    """Of 8 ranks with rings of 32 MiB only one pair talks, in one direction: one ring is backed, and not 64 of them."""

    def main(comm: xccl.Communicator) -> tuple[int, int]:
        before = backed_bytes()
        comm.barrier()
        if comm.rank == 0:
            comm.send(np.zeros(10, FP32), dst=1, event_id=0)
        if comm.rank == 1:
            comm.recv(np.zeros(10, FP32), src=0, event_id=0)
        comm.barrier()
        return before, backed_bytes()

    ring = 32 << 20
    for before, after in launch(main, 8, "shm", ring_slots=32, slot_bytes=1 << 20):
        assert 0 < before < 1 << 20
        assert ring <= after - before < ring + (1 << 20)


def backed_bytes() -> int:
    """Memory of all segments that this process has open."""
    bytes_of_file: dict[int, int] = {}
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if "/xccl-" in os.readlink(fd):
                status = os.stat(fd)
                bytes_of_file[status.st_ino] = status.st_blocks * 512
    return sum(bytes_of_file.values())
