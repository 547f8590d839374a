"""Sixteen random groups over twelve ranks: collectives, dispatches and messages, all mixed, every byte checked.

XCCL_SOAK_S says for how long (5 s unless it is set; 60 s is what the library is held to).
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import xccl
from tests.multirank.support import Round, Shape, assert_same, launch
from xccl import reference
from xccl.layout.collectives import OPERATORS
from xccl.protocol.collective_cuts import FLOWS, TWO_STEP, Kind

RANKS = 12
GROUPS = 16
#: Steps between two looks at the clock, on which all ranks agree; then two groups are made anew.
STEPS = 120
SECONDS = float(os.environ.get("XCCL_SOAK_S", "5"))
KINDS: list[Kind] = [kind for kind in FLOWS if kind not in ("agreement", "alltoallv")]
#: Sends that a rank has under way at most.
WINDOW = 6


def members_of(number: int) -> list[int]:
    """The members of group `number`, in their order: 2 to 12 ranks; the same at all ranks."""
    rng = np.random.default_rng((5, number))
    return [int(rank) for rank in rng.permutation(RANKS)[: rng.integers(2, RANKS + 1)]]


@dataclass
class Member:
    """One rank in one group."""

    comm: xccl.Communicator
    shape: Shape
    ep: xccl.ExpertParallel
    array: xccl.SymmetricArray
    signals: xccl.Signals
    signalled: int = 0
    rounds: dict[int, Round] = field(default_factory=dict)

    @classmethod
    def join(cls, world: xccl.Communicator, number: int) -> Member | None:
        """Make group `number`, if this rank is in it."""
        ranks = members_of(number)
        if world.rank not in ranks:
            return None
        comm = world.group(ranks)
        shape = Shape(
            num_experts=2 * len(ranks), hidden=24, top_k=2, max_tokens=6, quant="int8" if number % 2 else "none"
        )
        return cls(comm, shape, shape.expert_parallel(comm), comm.empty(64, np.int64), comm.signals(1))

    def collective(self, rng: np.random.Generator) -> None:
        """Any collective, of any size, against its oracle."""
        comm = self.comm
        kind = KINDS[rng.integers(len(KINDS))]
        flow, count = FLOWS[kind], int(rng.choice([1, 7, 100, 3000, 30_000], p=[0.3, 0.3, 0.2, 0.15, 0.05]))
        root, op = int(rng.integers(comm.size)), OPERATORS[rng.integers(len(OPERATORS))]
        options: dict[str, Any] = {"algorithm": "two-step" if kind in TWO_STEP and rng.random() < 0.5 else "auto"}
        pool = rng.integers(-100, 100, 2 * count + RANKS * RANKS + 100).astype(np.int32)
        shape = (comm.size, count) if flow.parts else (count,)
        xs = [np.resize(pool[r : r + count + 50], shape) for r in range(comm.size)]
        oracle: Any = getattr(reference, kind)
        if flow.reduces:
            options["op"] = op
            want = oracle(xs, op)
        elif kind == "scatter":
            want = oracle(xs[root], comm.size)
        else:
            want = oracle(xs, root) if flow.rooted else oracle(xs)
        x: Any = xs[comm.rank].copy()
        if flow.rooted:
            options["root"] = root
        if kind == "scatter" and comm.rank != root:
            x, options["out"] = None, np.zeros(count, np.int32)
        assert_same(getattr(comm, kind)(x, **options), want[comm.rank], kind)

    def ragged(self, rng: np.random.Generator) -> None:
        """alltoallv."""
        size = self.comm.size
        counts = rng.integers(0, 60, (size, size))
        xs = [np.arange(n) * 7 + r for r, n in enumerate(counts.sum(axis=1))]
        got, _ = self.comm.alltoallv(xs[self.comm.rank], counts[self.comm.rank])
        assert_same(got, reference.alltoallv(xs, counts)[self.comm.rank][0], "alltoallv")

    def experts(self, rng: np.random.Generator) -> None:
        """A dispatch and a combine, one of a few."""
        number = int(rng.integers(3))
        if number not in self.rounds:
            tokens = np.random.default_rng(number).integers(0, self.shape.max_tokens + 1, self.comm.size)
            self.rounds[number] = self.shape.round(number, tokens.tolist())
        self.rounds[number].run(self.comm.rank, self.ep)

    def one_sided(self, rng: np.random.Generator) -> None:
        """Each rank puts to another one, with a signal."""
        comm, shift, value = self.comm, int(rng.integers(1, 10)), int(rng.integers(1 << 40))
        self.signalled += 1
        peer = (comm.rank + shift) % comm.size
        comm.put_signal(self.array, np.full(64, value + comm.rank), peer, self.signals, 0, self.signalled)
        comm.wait_until(self.signals, 0, "eq", self.signalled)
        assert (self.array.local == value + (comm.rank - shift) % comm.size).all()
        comm.barrier()

    def free(self) -> None:
        """Give all back."""
        self.comm.free()


def soak(world: xccl.Communicator) -> int:
    """Run until time is up; the steps of this rank."""
    groups = {number: Member.join(world, number) for number in range(GROUPS)}
    pending: deque[xccl.Request] = deque()
    newest, steps, end = GROUPS, 0, time.monotonic() + SECONDS
    for generation in range(1_000_000):
        schedule = np.random.default_rng((7, generation))
        names = sorted(groups)
        for step in range(STEPS):
            number = names[schedule.integers(len(names))]
            action, seed = schedule.random(), int(schedule.integers(1 << 40))
            ranks = members_of(number)
            sender, receiver = (ranks[i] for i in schedule.choice(len(ranks), 2, replace=False))
            member, rng = groups[number], np.random.default_rng(seed)
            if member is None:
                continue
            steps += 1
            if action < 0.4:
                message(member.comm, pending, rng, ranks.index(sender), ranks.index(receiver), step)
            elif action < 0.7:
                member.collective(rng)
            elif action < 0.8:
                member.ragged(rng)
            elif action < 0.9:
                member.experts(rng)
            else:
                member.one_sided(rng)
        if world.allreduce(np.array([time.monotonic() > end]).astype(np.int8), "max")[0]:
            break
        while pending:
            pending.popleft().wait()
        for _ in range(2):
            oldest = groups.pop(min(groups))
            if oldest is not None:
                oldest.free()
            groups[newest] = Member.join(world, newest)
            newest += 1
    while pending:
        pending.popleft().wait()
    return steps


def message(
    comm: xccl.Communicator,
    pending: deque[xccl.Request],
    rng: np.random.Generator,
    sender: int,
    receiver: int,
    event: int,
) -> None:
    """One message of the group; the send is under way while later steps run."""
    data = rng.integers(0, 256, int(rng.choice([0, 8, 1000, 60_000])), np.uint8)
    lanes = int(rng.integers(1, 9))
    if comm.rank == sender:
        pending.append(comm.isend(data, receiver, event_id=event, lanes=lanes))
        while len(pending) > WINDOW:
            pending.popleft().wait()
    elif comm.rank == receiver:
        got = np.zeros_like(data)
        comm.recv(got, sender, event_id=event, lanes=lanes)
        assert_same(got, data, "message")


def test_groups_at_once(fabric: str) -> None:
    steps = launch(
        soak, RANKS, fabric, ring_slots=8, slot_bytes=4096, timeout_s=SECONDS + 60, op_timeout_s=30.0
    )  # fmt: skip
    assert min(steps) > 20
