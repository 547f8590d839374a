"""Receivers that say where a zero-copy message goes before it comes."""

from __future__ import annotations

import time

import numpy as np
import pytest

import xccl
from tests.multirank.support import launch

BYTES = 64 << 10


def message() -> np.ndarray:
    return np.arange(BYTES // 4, dtype=np.int32) + 1


def empty(n_bytes: int = BYTES) -> np.ndarray:
    return np.zeros(n_bytes // 4, np.int32)


def test_a_sender_pushes_at_once_where_a_receive_is_posted(fabric: str) -> None:
    """The receiver drives nothing: all pieces are the sender's."""

    def main(comm: xccl.Communicator) -> None:
        got, flags = empty(), comm.empty(1, np.int64)
        for event in range(40):  # more than there are slots
            got[:] = 0
            request = comm.irecv(got, 0, event) if comm.rank else None
            comm.barrier()
            if request is None:
                data = message() + event
                sending = comm.isend(data, 1, event)
                for _ in range(4):
                    sending.test()
                comm.put(flags, np.array([event + 1]), 1)
                sending.wait()
            else:
                end = time.monotonic() + 10
                while flags.local[0] <= event and time.monotonic() < end:
                    time.sleep(0)
                found = got.copy()
                request.wait()
                assert (found == message() + event).all()

    launch(main, 2, fabric)


@pytest.mark.parametrize("late_s", [0.0, 0.05])
def test_a_receive_that_was_given_up_is_not_written_to(fabric: str, late_s: float) -> None:
    def main(comm: xccl.Communicator) -> None:
        comm.barrier()
        got = empty()
        if comm.rank == 1:
            with pytest.raises(xccl.WaitTimeout):
                comm.recv(got, 0, 3, timeout_s=0.05)
            comm.barrier()
            time.sleep(0.2)
            assert not got.any()
        else:
            comm.barrier()
            with pytest.raises((xccl.WaitTimeout, xccl.FabricError)):
                comm.send(message(), 1, 3, timeout_s=0.1 + late_s)
        comm.barrier()

    launch(main, 2, fabric)


@pytest.mark.parametrize(("event", "n_bytes", "lanes"), [(8, BYTES, 2), (7, 2 * BYTES, 2), (7, BYTES, 4)])
def test_nothing_is_pushed_to_who_expects_another_message(fabric: str, event: int, n_bytes: int, lanes: int) -> None:
    def main(comm: xccl.Communicator) -> None:
        got = empty()
        error = xccl.EventMismatch if event != 7 else xccl.UsageError
        if comm.rank == 1:
            request = comm.irecv(got, 0, 7)
            comm.barrier()
            with pytest.raises(error):
                request.wait()
            assert not got.any()
        else:
            comm.barrier()
            with pytest.raises(error):
                comm.send(np.ones(n_bytes, np.uint8), 1, event, lanes)
        for number in range(3):
            if comm.rank:
                comm.recv(got, 0, number)
                assert (got == message() + number).all()
            else:
                comm.send(message() + number, 1, number)

    launch(main, 2, fabric)
