"""Random programs of one-sided operations, signals, sends and receives between 2 to 4 ranks, against a sequential
model.

A program is a list of phases with barriers in between. Within a phase the ranks run freely, so the model must not
depend on timing:

- a rank writes (put, put_signal) only into its own block of any rank's array, and its writes to one place are ordered;
- a rank reads (get) from the array that is written in other phases: two arrays change roles with every phase;
- a `set` has a signal word of its own for each writer, an `add` commutes;
- both ends of a transfer, and the wait for a signal, follow the order of the program, so nobody waits in a ring.

At the end of a phase each rank compares all of its array and its signals with the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import xccl
from tests.multirank.support import assert_same, launch

#: Elements of a rank's block in each copy of an array.
BLOCK = 1200


@dataclass(frozen=True)
class Put:
    """Rank `by` writes `n` elements at `offset` of its own block at `to`, and signals if asked ("set", "add")."""

    by: int
    to: int
    offset: int
    n: int
    stride: int
    signal: str | None
    value: int

    def source(self, seed: int) -> np.ndarray:
        """What it writes; a strided view if the stride is not 1."""
        return np.random.default_rng(seed).integers(0, 1 << 31, self.n * self.stride).astype(np.int32)[:: self.stride]


@dataclass(frozen=True)
class Get:
    """Rank `by` reads `n` elements at `offset` of the other array of `to`."""

    by: int
    to: int
    offset: int
    n: int


@dataclass(frozen=True)
class Notify:
    """Rank `by` signals `to`, which waits for it at this place of its own program."""

    by: int
    to: int


@dataclass(frozen=True)
class Transfer:
    """`by` sends `n` bytes to `to`; each end blocks or not."""

    by: int
    to: int
    n: int
    lanes: int
    send_blocks: bool
    recv_blocks: bool

    def message(self, seed: int) -> np.ndarray:
        """The bytes."""
        return np.random.default_rng(seed).integers(0, 256, self.n, np.uint8)


Step = Put | Get | Notify | Transfer


@dataclass
class Model:
    """The state of all ranks, as a sequential machine would have it."""

    ranks: int
    arrays: list[list[np.ndarray]] = field(init=False)
    set_words: np.ndarray = field(init=False)
    added: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.arrays = [[np.zeros(self.ranks * BLOCK, np.int32) for _ in range(self.ranks)] for _ in range(2)]
        self.set_words = np.zeros((self.ranks, self.ranks), np.int64)  # [at, by]
        self.added = np.zeros(self.ranks, np.int64)

    def run(self, phase: list[Step], number: int) -> list[np.ndarray | None]:
        """Run a phase; what its steps read."""
        read: list[np.ndarray | None] = []
        now, other = self.arrays[number % 2], self.arrays[1 - number % 2]
        for i, step in enumerate(phase):
            read.append(None)
            if isinstance(step, Put):
                start = step.by * BLOCK + step.offset
                now[step.to][start : start + step.n] = step.source(seed_of(number, i))
                if step.signal == "set":
                    self.set_words[step.to, step.by] = step.value
                elif step.signal == "add":
                    with np.errstate(over="ignore"):
                        self.added[step.to : step.to + 1] += np.int64(step.value)
            elif isinstance(step, Get):
                read[i] = other[step.to][step.offset : step.offset + step.n].copy()
        return read


def seed_of(phase: int, step: int) -> int:
    """What makes the data of each step differ from that of others."""
    return 1000 * phase + step


def steps(ranks: int) -> st.SearchStrategy[Step]:
    """One step between any two ranks, or of a rank with itself."""
    rank = st.integers(0, ranks - 1)
    int64 = st.one_of(st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1))
    n = st.one_of(st.integers(0, 40), st.integers(0, BLOCK))

    def put(by: int, to: int, start: int, n: int, stride: int, signal: str | None, value: int) -> Put:
        return Put(by, to, min(start, BLOCK - n), n, stride, signal, value)

    def get(by: int, to: int, start: int, n: int) -> Get:
        return Get(by, to, min(start, ranks * BLOCK - n), n)

    def transfer(by: int, to: int, n: int, lanes: int, send_blocks: bool, recv_blocks: bool) -> Transfer:
        # A rank cannot block in one end of a transfer whose other end it has not come to yet.
        return Transfer(by, to, n, lanes, send_blocks and by != to, recv_blocks)

    return st.one_of(
        st.builds(put, rank, rank, st.integers(0, BLOCK), n, st.integers(1, 3), st.sampled_from([None, "set", "add"]), int64),
        st.builds(get, rank, rank, st.integers(0, ranks * BLOCK), n),
        st.builds(Notify, rank, rank),
        st.builds(transfer, rank, rank, st.one_of(st.integers(0, 70), st.integers(0, 9000)), st.integers(1, 48),
                  st.booleans(), st.booleans()),
    )  # fmt: skip


#: Programs of one session: to start ranks takes longer than what they do then.
PROGRAMS = 4


@st.composite
def sessions(draw: st.DrawFn) -> tuple[int, list[list[list[Step]]]]:
    """Number of ranks, and programs, which are phases of steps."""
    ranks = draw(st.integers(2, 4))
    program = st.lists(st.lists(steps(ranks), max_size=14), min_size=1, max_size=5)
    return ranks, draw(st.lists(program, min_size=PROGRAMS, max_size=PROGRAMS))


class Player:
    """Plays one rank's part of a program."""

    def __init__(self, comm: xccl.Communicator) -> None:
        self.comm = comm
        self.arrays = [comm.empty(comm.size * BLOCK, np.int32) for _ in range(2)]
        for array in self.arrays:
            array.local[:] = 0
        #: Words 0 to size - 1: `set` by that rank; then `add` by anyone; then notifications of each rank.
        self.signals = comm.signals(2 * comm.size + 1)
        self.notified = [0] * comm.size
        self.notifications = [0] * comm.size
        comm.barrier()

    def play(self, phase: list[Step], number: int, read: list[np.ndarray | None]) -> None:
        """All steps of a phase that this rank has a part in."""
        rank = self.comm.rank
        under_way: list[tuple[xccl.Request, np.ndarray | None, str]] = []
        for i, step in enumerate(phase):
            what = f"phase {number}, step {i}: {step}"
            if isinstance(step, Transfer):
                under_way += self.transfer(step, seed_of(number, i), what)
            elif isinstance(step, Notify):
                self.notify(step)
            elif step.by == rank and isinstance(step, Put):
                self.put(step, number, seed_of(number, i))
            elif step.by == rank and isinstance(step, Get):
                into = np.full(step.n, -1, np.int32)
                self.comm.get(into, self.arrays[1 - number % 2], peer=step.to, offset=step.offset)
                assert_same(into, read[i], what)
        for request, message, what in under_way:
            request.wait()
            if message is not None:
                assert_same(request.buffer, message, what)

    def put(self, step: Put, number: int, seed: int) -> None:
        source, start = step.source(seed), step.by * BLOCK + step.offset
        array = self.arrays[number % 2]
        if step.signal is None:
            self.comm.put(array, source, peer=step.to, offset=start)
        else:
            word = step.by if step.signal == "set" else self.comm.size
            self.comm.put_signal(
                array, source, peer=step.to, signals=self.signals, index=word, value=step.value, op=step.signal,
                offset=start,
            )  # fmt: skip

    def notify(self, step: Notify) -> None:
        word = self.comm.size + 1
        if step.by == self.comm.rank:
            self.notified[step.to] += 1
            self.comm.signal(self.signals, word + step.by, self.notified[step.to], peer=step.to)
        if step.to == self.comm.rank:
            self.notifications[step.by] += 1
            self.comm.wait_until(self.signals, word + step.by, "ge", self.notifications[step.by])

    def transfer(self, step: Transfer, event: int, what: str) -> Iterator[tuple[xccl.Request, np.ndarray | None, str]]:
        rank, message = self.comm.rank, step.message(event)
        if step.by == rank:
            if step.send_blocks:
                self.comm.send(message, dst=step.to, event_id=event, lanes=step.lanes)
            else:
                yield self.comm.isend(message, dst=step.to, event_id=event, lanes=step.lanes), None, what
        if step.to == rank:
            out = np.full(step.n, 0xAB, np.uint8)
            if step.recv_blocks:
                self.comm.recv(out, src=step.by, event_id=event, lanes=step.lanes)
                assert_same(out, message, what)
            else:
                yield self.comm.irecv(out, src=step.by, event_id=event, lanes=step.lanes), message, what

    def check(self, number: int, snapshot: tuple[np.ndarray, np.ndarray, int]) -> None:
        """Compare all that this rank has with the model's state after the phase."""
        array, set_words, added = snapshot
        assert_same(self.arrays[number % 2].local, array, f"array after phase {number}")
        size = self.comm.size
        assert [self.signals.read(i) for i in range(size)] == set_words.tolist(), f"words after phase {number}"
        assert self.signals.read(size) == added, f"sum after phase {number}"


@dataclass(frozen=True)
class Expected:
    """A program, and by phase what its steps read, and what each rank has at the end."""

    phases: list[list[Step]]
    read: list[list[np.ndarray | None]]
    snapshots: list[list[tuple[np.ndarray, np.ndarray, int]]]

    @classmethod
    def of(cls, ranks: int, phases: list[list[Step]]) -> Expected:
        """Run the model."""
        model = Model(ranks)
        read, snapshots = [], []
        for number, phase in enumerate(phases):
            read.append(model.run(phase, number))
            arrays = model.arrays[number % 2]
            snapshots.append([(arrays[r].copy(), model.set_words[r].copy(), int(model.added[r])) for r in range(ranks)])
        return cls(phases, read, snapshots)


@given(
    session=sessions(),
    ring=st.sampled_from([{}, {"ring_slots": 2, "slot_bytes": 64}, {"ring_slots": 1, "slot_bytes": 512}]),
)
@settings(max_examples=120 // PROGRAMS)
@pytest.mark.timeout(110)
def test_any_program(fabric: str, session: tuple[int, list[list[list[Step]]]], ring: dict[str, int]) -> None:
    ranks, programs = session
    all_expected = [Expected.of(ranks, phases) for phases in programs]

    def main(comm: xccl.Communicator) -> None:
        for expected in all_expected:
            player = Player(comm)
            for number, phase in enumerate(expected.phases):
                player.play(phase, number, expected.read[number])
                comm.barrier()
                player.check(number, expected.snapshots[number][comm.rank])
                comm.barrier()

    launch(main, ranks, fabric, **ring)
