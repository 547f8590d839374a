"""What a library is asked to do in a cell of the table."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class NotComparableError(Exception):
    """A library has no such operation, or not the same one; the message says what is different."""


@dataclass(frozen=True)
class Cell:
    """An operation at a size.

    Attributes:
        op: sendrecv, put-signal, stream, put, barrier, one of `bench.peers.collectives.PARTS`, or moe.
        ranks: processes.
        size: bytes of a message, of a rank's array or of a pair's part; for moe the tokens of a rank; else 0.
        experts: moe only: in all; 32 as in the published figures.
        hidden: moe only: elements of a token.
    """

    op: str
    ranks: int
    size: int = 0
    experts: int = 32
    hidden: int = 7168


def nothing() -> None:
    """To do."""


@dataclass
class Work:
    """What one rank does in a cell.

    Attributes:
        run: run(n) does n operations. All ranks call it together.
        check: one operation on fresh data, and how many elements of its result are wrong at this rank.
        per_operation: the figure of the cell is the time of an operation times this.
        close: give back what was allocated; all ranks call it together.
        note: what a reader of the figure has to know.
    """

    run: Callable[[int], None]
    check: Callable[[], int]
    per_operation: float = 1.0
    close: Callable[[], None] = nothing
    note: str = ""


class Prepared(NamedTuple):
    """That work is ready: wrong elements of its first operation, and of `Work` what the driver has to know."""

    wrong: int
    per_operation: float
    note: str


class Block(NamedTuple):
    """Operations that were timed as one: the mean, and whether another process took a rank's core meanwhile."""

    operation_s: float
    is_disturbed: bool


class Library:
    """A library, as one of its ranks sees it. Operations that it does not override are not comparable.

    Attributes:
        rank: of this process.
        size: number of ranks.
        version: for the report.
        barrier: all ranks meet; the library's own function, with nothing around it.
    """

    rank: int
    size: int
    version: str
    barrier: Callable[[], object]

    def work(self, cell: Cell, variant: str) -> Work:
        """Prepare a cell; all ranks call it together.

        Raises:
            NotComparableError: it has no such thing; raised by all ranks.
        """
        if cell.op == "barrier":
            return Work(repeat(self.barrier), lambda: 0)
        if cell.op == "moe":
            return self.moe(cell, variant)
        make: dict[str, Callable[[int], Work]] = {
            "sendrecv": self.sendrecv, "put-signal": self.put_signal, "stream": self.stream, "put": self.put,
        }  # fmt: skip
        return make[cell.op](cell.size) if cell.op in make else self.collective(cell.op, cell.size, variant)

    def sendrecv(self, n_bytes: int) -> Work:
        """A message there and one back; half of it is the figure."""
        raise NotComparableError("no send and receive")

    def put_signal(self, n_bytes: int) -> Work:
        """Data written into the peer's memory, then a flag that it waits for; there and back, half of it counts."""
        raise NotComparableError("no one-sided operations")

    def stream(self, n_bytes: int) -> Work:
        """Messages of rank 0 to rank 1, many under way."""
        raise NotComparableError("no asynchronous send")

    def put(self, n_bytes: int) -> Work:
        """Writes of rank 0 into the memory of rank 1, which does nothing."""
        raise NotComparableError("no one-sided operations")

    def collective(self, op: str, n_bytes: int, variant: str) -> Work:
        """One of `bench.peers.collectives.PARTS`."""
        raise NotComparableError(f"no {op}")

    def moe(self, cell: Cell, variant: str) -> Work:
        """Dispatch and combine, back to back."""
        raise NotComparableError("no alltoallv to build it on")


def repeat(operation: Callable[[], object]) -> Callable[[int], None]:
    """A `Work.run` of an operation without arguments."""

    def run(n: int) -> None:
        for _ in range(n):
            operation()

    return run


# -- buffers and their contents ---------------------------------------------------------------------------------------


def page_aligned(n_bytes: int) -> npt.NDArray[np.uint8]:
    """[n_bytes] bytes that begin at a page and are backed by memory."""
    array = np.frombuffer(mmap.mmap(-1, max(n_bytes, 1)), np.uint8)[:n_bytes]
    array[:] = 1
    return array


def pattern(n_bytes: int, *key: int) -> npt.NDArray[np.uint8]:
    """Bytes that tell who wrote them, for whom."""
    return np.random.default_rng(key).integers(0, 256, n_bytes, np.uint8)


def count_wrong(got: Array, want: Array) -> int:
    """Bytes that differ."""
    return int(np.count_nonzero(got.reshape(-1).view(np.uint8) != want.reshape(-1).view(np.uint8)))


def window_of(n_bytes: int) -> int:
    """Messages under way at once in a stream."""
    return max(4, min(32, (64 << 20) // n_bytes))


def pin(rank: int, ranks: int) -> bool:
    """Bind this rank to a core, after the library has started, which may bind, too; whether it has the core to itself.

    More ranks than cores take cores in turn. Left to the scheduler, one core may have most of them for a whole session,
    of the one library or the other, and the ratio would be chance.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    return ranks <= len(cores)


# -- cells that differ between libraries in one call only ------------------------------------------------------------


def ping_pong(
    rank: int,
    n_bytes: int,
    send: Callable[[Array], object],
    receive: Callable[[Array], object],
    close: Callable[[], None] = nothing,
) -> Work:
    """Rank 0 sends and receives, rank 1 receives and sends."""
    source, destination = page_aligned(n_bytes), page_aligned(n_bytes)

    def ping(n: int) -> None:
        for _ in range(n):
            send(source)
            receive(destination)

    def pong(n: int) -> None:
        for _ in range(n):
            receive(destination)
            send(source)

    run = pong if rank else ping

    def check() -> int:
        source[:], destination[:] = pattern(n_bytes, rank), 0
        run(1)
        return count_wrong(destination, pattern(n_bytes, 1 - rank))

    return Work(run, check, 0.5, close)


def one_way(
    rank: int, n_bytes: int, send: Callable[[Array, int], object], receive: Callable[[Array, int], object]
) -> Work:
    """Rank 0 sends windows of one buffer, rank 1 receives them into one."""
    buffer, window = page_aligned(n_bytes), window_of(n_bytes)
    step = receive if rank else send

    def check() -> int:
        buffer[:] = 0 if rank else pattern(n_bytes, 0)
        step(buffer, window)
        return count_wrong(buffer, pattern(n_bytes, 0))

    return Work(repeat(lambda: step(buffer, window)), check, 1 / window)
