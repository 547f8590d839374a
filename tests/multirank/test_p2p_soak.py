"""Ten thousand messages between 4 ranks: random sizes, lanes, directions and kinds of call, every byte checked."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest

import xccl
from tests.multirank.support import launch

RANKS = 4
MESSAGES = 10_000
LARGEST_BYTES = 4 << 20
#: Requests that a rank has under way at most.
WINDOW = 12
_GUARD = 32
_GUARD_BYTE = 0x5C


@dataclass(frozen=True)
class Plan:
    """All messages, in an order that both ends of each follow: so blocking calls cannot wait for each other in a ring.

    Arrays of one entry a message: ranks, size, start in the pool of random bytes, lanes, and whether each end blocks.
    """

    pool: np.ndarray
    src: list[int]
    dst: list[int]
    n_bytes: list[int]
    start: list[int]
    lanes: list[int]
    send_blocks: list[bool]
    recv_blocks: list[bool]

    def data(self, i: int) -> np.ndarray:
        """The bytes of message i."""
        return self.pool[self.start[i] : self.start[i] + self.n_bytes[i]]


def make_plan(seed: int) -> Plan:
    """Sizes are log-distributed from 1 B to 4 MiB, with some of 0 B and some of exactly the largest size."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(0, np.log(LARGEST_BYTES), MESSAGES)).astype(np.int64)
    sizes[rng.random(MESSAGES) < 0.02] = 0
    sizes[rng.integers(0, MESSAGES, 10)] = LARGEST_BYTES
    src, dst = rng.integers(0, RANKS, (2, MESSAGES))
    to_self = src == dst
    return Plan(
        pool=rng.integers(0, 256, 2 * LARGEST_BYTES + 1, np.uint8),
        src=src.tolist(), dst=dst.tolist(), n_bytes=sizes.tolist(),
        start=rng.integers(0, LARGEST_BYTES, MESSAGES).tolist(),
        lanes=rng.integers(1, 49, MESSAGES).tolist(),
        send_blocks=((rng.random(MESSAGES) < 0.4) & ~to_self).tolist(),
        recv_blocks=((rng.random(MESSAGES) < 0.4) & ~to_self).tolist(),
    )  # fmt: skip


class Incoming:
    """A receive buffer between guards, and the message that belongs into it."""

    def __init__(self, plan: Plan, i: int) -> None:
        self._plan, self._i = plan, i
        self._memory = np.empty(plan.n_bytes[i] + 2 * _GUARD, np.uint8)
        self._memory[:_GUARD] = self._memory[self._memory.size - _GUARD :] = _GUARD_BYTE
        self.buffer = self._memory[_GUARD : self._memory.size - _GUARD]

    def check(self) -> int:
        """Compare every byte; how many there are."""
        plan, i = self._plan, self._i
        if not np.array_equal(self.buffer, plan.data(i)):
            wrong = np.flatnonzero(self.buffer != plan.data(i))
            raise AssertionError(
                f"message {i} from rank {plan.src[i]} to {plan.dst[i]}, {plan.n_bytes[i]} bytes on {plan.lanes[i]} "
                f"lanes: {wrong.size} wrong bytes, from {wrong[0]} to {wrong[-1]}"
            )
        assert (self._memory[:_GUARD] == _GUARD_BYTE).all(), f"message {i}: bytes before the buffer were written"
        assert (self._memory[-_GUARD:] == _GUARD_BYTE).all(), f"message {i}: bytes behind the buffer were written"
        return self.buffer.size


@pytest.mark.parametrize(
    "ring", [{}, {"ring_slots": 3, "slot_bytes": 4096}], ids=["ring of 1 MiB", "ring of 12 KiB"]
)  # fmt: skip
def test_ten_thousand_messages(fabric: str, ring: dict[str, int]) -> None:
    plan = make_plan(seed=20)

    def main(comm: xccl.Communicator) -> tuple[int, int]:
        rank = comm.rank
        under_way: deque[tuple[xccl.Request, Incoming | None]] = deque()
        received = received_bytes = 0

        def finish_oldest() -> None:
            nonlocal received, received_bytes
            request, incoming = under_way.popleft()
            request.wait()
            if incoming is not None:
                received += 1
                received_bytes += incoming.check()

        for i in range(MESSAGES):
            lanes = plan.lanes[i]
            if plan.src[i] == rank:
                if plan.send_blocks[i]:
                    comm.send(plan.data(i), dst=plan.dst[i], event_id=i, lanes=lanes)
                else:
                    under_way.append((comm.isend(plan.data(i), dst=plan.dst[i], event_id=i, lanes=lanes), None))
            if plan.dst[i] == rank:
                incoming = Incoming(plan, i)
                if plan.recv_blocks[i]:
                    comm.recv(incoming.buffer, src=plan.src[i], event_id=i, lanes=lanes)
                    received += 1
                    received_bytes += incoming.check()
                else:
                    request = comm.irecv(incoming.buffer, src=plan.src[i], event_id=i, lanes=lanes)
                    under_way.append((request, incoming))
            while len(under_way) > WINDOW:
                finish_oldest()
        while under_way:
            finish_oldest()
        return received, received_bytes

    results = launch(main, RANKS, fabric, timeout_s=100.0, **ring)
    assert sum(count for count, _ in results) == MESSAGES
    assert sum(n_bytes for _, n_bytes in results) == sum(plan.n_bytes) > 2e9
