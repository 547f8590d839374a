"""Waiting for fields: only the word that is looked at wakes its rank, and no wake-up is lost."""

from __future__ import annotations

import threading
import time

import numpy as np

import xccl
from tests.multirank.support import launch
from xccl.comm.fields import FieldWaiter, Peers
from xccl.kernels import fields, words
from xccl.kernels.wait import OK, PENDING
from xccl.layout.a2e import PEER_BYTES
from xccl.layout.moe import EXF_EVENT, EXF_PULLED, EXPERT_FIELD_BYTES
from xccl.layout.segment import CTL_DOORBELL, CTL_WAITERS


def table(comm: xccl.Communicator, at: int) -> Peers:
    """All ranks, each with a field in each other's segment."""
    return Peers(
        comm.core, range(comm.size), [at + EXPERT_FIELD_BYTES * comm.rank] * comm.size,
        [at + EXPERT_FIELD_BYTES * peer for peer in range(comm.size)],
    )  # fmt: skip


def test_a_rank_has_no_field_with_itself() -> None:
    def main(comm: xccl.Communicator) -> None:
        array = comm.empty(4 * EXPERT_FIELD_BYTES, np.uint8)
        array.local[:] = 0
        comm.barrier()
        peers = table(comm, array.addresses[comm.rank] - int(comm.core.fabric.segments[comm.rank]))
        assert peers.others == tuple(r for r in range(comm.size) if r != comm.rank)
        assert peers.read(comm.rank, EXF_EVENT) == 0
        comm.barrier()
        fields.release.call(peers.address, len(peers), 1, 7)
        FieldWaiter(comm.core).wait(peers, EXF_PULLED, 7, "test")
        comm.barrier()
        assert (array.local[EXPERT_FIELD_BYTES * comm.rank :][:EXPERT_FIELD_BYTES] == 0).all()

    launch(main, 4, "local")


def test_every_order_of_writers_ends_the_wait(fabric: str) -> None:
    """Writers come in all kinds of orders and at all kinds of moments, asleep or not; each must be noticed at once."""
    rounds, writers = 120, 4

    def main(comm: xccl.Communicator) -> float:
        array = comm.empty((writers + 1) * EXPERT_FIELD_BYTES, np.uint8)
        array.local[:] = 0
        comm.barrier()
        at = array.addresses[comm.rank] - int(comm.core.fabric.segments[comm.rank])
        peers, waiter = table(comm, at), FieldWaiter(comm.core)
        rng = np.random.default_rng(comm.rank)
        start = time.monotonic()
        for epoch in range(1, rounds + 1):
            if comm.rank == 0:
                waiter.wait(peers, EXF_PULLED, epoch, "test")
                assert words.load(comm.core.control + CTL_WAITERS) == 0
                fields.release.call(peers.address, len(peers), 0, epoch)
            else:
                time.sleep(rng.choice([0.0, 0.0, 0.0002, 0.002]))
                # Only rank 0's field: the other writers are no peers of this one.
                fields.release.call(peers.address, 1, 0, epoch)
                waiter.wait(
                    Peers(comm.core, [0], [at + EXPERT_FIELD_BYTES * comm.rank], [at]), EXF_PULLED, epoch, "test"
                )
        return time.monotonic() - start

    # A lost wake-up would cost a slice of 50 ms each time.
    assert launch(main, writers + 1, fabric)[0] < rounds * 0.02


def test_another_word_does_not_wake_its_rank() -> None:
    def main(comm: xccl.Communicator) -> None:
        if comm.rank > 0:
            comm.barrier()
            return
        core = comm.core
        own = np.zeros((2, EXPERT_FIELD_BYTES), np.uint8)  # fields of two peers, somewhere
        segment, control = int(core.fabric.segments[0]), core.control
        peers = np.zeros((2, PEER_BYTES // 8), np.int64)
        for i in range(2):
            field = own[i].ctypes.data
            peers[i] = field, field, control, segment  # this rank plays its peers, too
        cursor = np.zeros(1, np.int64)
        done = threading.Event()
        statuses: list[int] = []

        def wait() -> None:
            until_ns = time.monotonic_ns() + 10_000_000_000
            statuses.append(
                fields.wait_fields.call(control, peers.ctypes.data, 2, EXF_PULLED, 1, cursor.ctypes.data, until_ns)
            )
            done.set()

        thread = threading.Thread(target=wait)
        thread.start()
        while words.load(control + CTL_WAITERS) == 0:
            time.sleep(0.001)
        time.sleep(0.05)  # it sleeps, on field 0
        before = words.load(control + CTL_DOORBELL)
        fields.release.call(peers[1:].ctypes.data, 1, 0, 1)
        assert words.load(control + CTL_DOORBELL) == before
        assert not done.wait(0.05)
        fields.release.call(peers.ctypes.data, 1, 0, 1)
        assert done.wait(5)  # both: the second had come before
        thread.join()
        assert statuses == [OK]
        assert words.load(control + CTL_DOORBELL) == before + 1
        comm.barrier()

    launch(main, 2, "local")


def test_a_wait_that_is_given_up_names_the_first_that_is_missing() -> None:
    def main(comm: xccl.Communicator) -> None:
        array = comm.empty(3 * EXPERT_FIELD_BYTES, np.uint8)
        array.local[:] = 0
        comm.barrier()
        peers = table(comm, array.addresses[comm.rank] - int(comm.core.fabric.segments[comm.rank]))
        if comm.rank == 1:
            fields.release.call(peers.address, 1, 0, 1)
        comm.barrier()
        if comm.rank == 0:
            cursor = np.zeros(1, np.int64)
            status = fields.wait_fields.call(comm.core.control, peers.address, 3, EXF_PULLED, 1, cursor.ctypes.data, 0)
            assert (status, cursor[0]) == (PENDING, 2)
            assert words.load(comm.core.control + CTL_WAITERS) == 0
        comm.barrier()

    launch(main, 3, "local")


def test_count_equal() -> None:
    values = np.array([1, 5, 1, 1], np.int64)
    addresses = values.ctypes.data + 8 * np.arange(3)
    nobody = -1
    assert words.count_equal.call(addresses.ctypes.data, 3, 0, 1, nobody) == 2
    assert words.count_equal.call(addresses.ctypes.data, 3, 8, 1, nobody) == 2
    assert words.count_equal.call(addresses.ctypes.data, 3, 0, 1, 0) == 1
    assert words.count_equal.call(addresses.ctypes.data, 0, 0, 1, nobody) == 0
