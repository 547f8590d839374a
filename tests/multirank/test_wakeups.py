"""No wake-up is lost. A rank that sleeps is woken by whoever writes the word it waits for: it does not sleep out its slice.

A lost wake-up costs no more than a slice, since every wait looks again after one, so results would not show it; time
does. There are more ranks than cores, and in each round somebody is late, so that the others sleep.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np
import pytest

import xccl
from tests.multirank.support import Shape, launch
from xccl.comm.core import SLICE_NS

RANKS: Final = 6
ROUNDS: Final = 60
LATE_S: Final = 0.0005
#: With a slice lost in every round the rounds would take longer than this; without, a tenth of it on a busy machine.
LIMIT_S: Final = ROUNDS * SLICE_NS / 1e9 / 2

Round = Callable[[int], None]


def barrier(comm: xccl.Communicator) -> Round:
    return lambda i: comm.barrier()


def signal(comm: xccl.Communicator) -> Round:
    """Around the ring of ranks."""
    s = comm.signals(1)

    def run(i: int) -> None:
        if comm.rank != 0:
            comm.wait_until(s, 0, "ge", i + 1)
        comm.signal(s, 0, i + 1, peer=(comm.rank + 1) % comm.size)
        if comm.rank == 0:
            comm.wait_until(s, 0, "ge", i + 1)

    return run


def put_signal(comm: xccl.Communicator) -> Round:
    """Everyone to its neighbour."""
    s, a = comm.signals(1), comm.empty(8, np.int64)

    def run(i: int) -> None:
        comm.put_signal(a, np.zeros(8, np.int64), (comm.rank + 1) % comm.size, s, 0, 1, "add")
        comm.wait_until(s, 0, "ge", i + 1)

    return run


def agreement(comm: xccl.Communicator) -> Round:
    return lambda i: comm.empty(1, np.int8).free()


def send(comm: xccl.Communicator) -> Round:
    """Pairs, in turn in both directions; larger than the ring, so that a sender waits for a receiver that is late."""
    peer, out = comm.rank ^ 1, np.zeros(500, np.uint8)

    def run(i: int) -> None:
        if (i + comm.rank) % 2:
            comm.send(out, dst=peer, event_id=i)
        else:
            time.sleep(LATE_S)
            comm.recv(out, src=peer, event_id=i)

    return run


def isend(comm: xccl.Communicator) -> Round:
    """Several requests at once, which wait in another way."""
    out, into = np.zeros(500, np.uint8), np.zeros(500, np.uint8)

    def run(i: int) -> None:
        requests = [
            comm.irecv(into, src=(comm.rank - 1) % comm.size, event_id=i),
            comm.isend(out, dst=(comm.rank + 1) % comm.size, event_id=i),
        ]
        for request in requests:
            request.wait()

    return run


def refusal(comm: xccl.Communicator) -> Round:
    """A sender is told at once that its message is refused, and not by what the receiver does next on the channel.

    A good message follows, so that the next refusal finds nothing to drop first, which would wake the sender.
    """
    peer, out = comm.rank ^ 1, np.zeros(500, np.uint8)

    def run(i: int) -> None:
        with pytest.raises(xccl.EventMismatch):
            if comm.rank % 2:
                comm.send(out, dst=peer, event_id=2 * i)
            else:
                time.sleep(LATE_S)
                comm.recv(out, src=peer, event_id=2 * i + 1)
        comm.barrier()
        if comm.rank % 2:
            comm.send(out[:1], dst=peer, event_id=i)
        else:
            comm.recv(out[:1], src=peer, event_id=i)

    return run


SHAPE: Final = Shape(num_experts=RANKS, hidden=16, top_k=2, max_tokens=2)
INPUT: Final = SHAPE.round(0, [2] * RANKS)


# Of dispatch and combine only the announcement can be missed: a rank that is not woken by a release is woken by the
# announcement of the next operation, without which it could not go on anyway.


def dispatch(comm: xccl.Communicator) -> Round:
    ep = SHAPE.expert_parallel(comm)

    def run(i: int) -> None:
        INPUT.dispatch(comm.rank, ep)

    return run


def combine(comm: xccl.Communicator) -> Round:
    ep = SHAPE.expert_parallel(comm)
    d = INPUT.dispatch(comm.rank, ep)

    def run(i: int) -> None:
        INPUT.combine(comm.rank, ep, d)

    return run


OPERATIONS: Final = [barrier, signal, put_signal, agreement, send, isend, refusal, dispatch, combine]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
def test_nobody_sleeps_too_long(fabric: str, operation: Callable[[xccl.Communicator], Round]) -> None:
    def main(comm: xccl.Communicator) -> float:
        run = operation(comm)
        comm.barrier()
        start = time.monotonic()
        for i in range(ROUNDS):
            if i % comm.size == comm.rank:
                time.sleep(LATE_S)
            run(i)
        seconds = time.monotonic() - start
        comm.barrier()
        return seconds

    assert max(launch(main, RANKS, fabric, ring_slots=2, slot_bytes=64)) < LIMIT_S
