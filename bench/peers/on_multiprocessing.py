"""The cells in plain multiprocessing: pipes, a barrier, and memory that all processes map.

It has no collectives. They are what one writes with the barrier and shared memory: everyone writes into a place of its
own, all meet, everyone reads what it wants, all meet.
"""

from __future__ import annotations

import mmap
import multiprocessing
import platform
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from bench.peers.collectives import PARTS, collective
from bench.peers.moe import Moe, Shape
from bench.peers.work import (
    Array,
    Cell,
    Library,
    NotComparableError,
    Work,
    count_wrong,
    one_way,
    page_aligned,
    pattern,
    ping_pong,
    repeat,
    window_of,
)

#: Address space of each rank's part of the shared memory; only what is touched takes memory.
_PLACE_BYTES = 128 << 20
_COUNTS_BYTES = 1 << 16
_FORK: Any = multiprocessing.get_context("fork")


class Shared:
    """What the processes inherit."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.barrier = _FORK.Barrier(ranks)
        self.pipe: tuple[Connection, Connection] = _FORK.Pipe()
        self.signals = [_FORK.Semaphore(0) for _ in range(2)]
        self.memory = mmap.mmap(-1, ranks * (_PLACE_BYTES + _COUNTS_BYTES))


def start(ranks: int, main: Callable[[Shared, int], None]) -> None:
    """Run `main` in so many forked processes with what they share and their number, and wait for them."""
    shared = Shared(ranks)
    processes = [_FORK.Process(target=main, args=(shared, rank)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


class Multiprocessing(Library):
    """One of the processes."""

    def __init__(self, shared: Shared, rank: int) -> None:
        self.rank, self.size, self.version = rank, shared.ranks, f"Python {platform.python_version()}"
        self.shared = shared
        memory = np.frombuffer(shared.memory, np.uint8)
        end = self.size * _PLACE_BYTES
        self.places = memory[:end].reshape(self.size, _PLACE_BYTES)
        self.counts = memory[end:].reshape(self.size, _COUNTS_BYTES)
        self.barrier = shared.barrier.wait

    def sendrecv(self, n_bytes: int) -> Work:
        """Bytes through a Pipe."""
        pipe = self.shared.pipe[min(self.rank, 1)]
        return ping_pong(self.rank, n_bytes, pipe.send_bytes, pipe.recv_bytes_into)

    def stream(self, n_bytes: int) -> Work:
        """The same, one way."""
        pipe = self.shared.pipe[min(self.rank, 1)]

        def send(buffer: Array, count: int) -> None:
            for _ in range(count):
                pipe.send_bytes(buffer)

        def receive(buffer: Array, count: int) -> None:
            for _ in range(count):
                pipe.recv_bytes_into(buffer)

        return one_way(self.rank, n_bytes, send, receive)

    def put_signal(self, n_bytes: int) -> Work:
        """A NumPy copy into the peer's place, and a Semaphore."""
        rank, source = self.rank, page_aligned(n_bytes)
        mine, theirs = self.places[rank, :n_bytes], self.places[1 - rank, :n_bytes]
        wait, signal = self.shared.signals[rank].acquire, self.shared.signals[1 - rank].release

        def ping(n: int) -> None:
            for _ in range(n):
                theirs[:] = source
                signal()
                wait()

        def pong(n: int) -> None:
            for _ in range(n):
                wait()
                theirs[:] = source
                signal()

        run = pong if rank else ping

        def check() -> int:
            source[:], mine[:] = pattern(n_bytes, rank), 0
            self.barrier()
            run(1)
            return count_wrong(mine, pattern(n_bytes, 1 - rank))

        return Work(run, check, 0.5, note="NumPy copy to shared memory, Semaphore")

    def put(self, n_bytes: int) -> Work:
        """A NumPy copy into the peer's place."""
        window, source, target = window_of(n_bytes), page_aligned(n_bytes), self.places[1, :n_bytes]

        def puts() -> None:
            if self.rank == 0:
                for _ in range(window):
                    target[:] = source

        def check() -> int:
            self.barrier()
            source[:] = pattern(n_bytes, 0)
            target[:] = 0
            self.barrier()
            puts()
            self.barrier()
            return count_wrong(target, pattern(n_bytes, 0))

        return Work(repeat(puts), check, 1 / window, note="NumPy copy to shared memory")

    def collective(self, op: str, n_bytes: int, variant: str) -> Work:
        """Who gives writes into its place, all meet, everyone reads what it gets, all meet."""
        needed = n_bytes * (PARTS[op][0] or self.size)
        if needed > _PLACE_BYTES:
            raise NotComparableError(f"written here for up to {_PLACE_BYTES >> 20} MiB a rank")
        mine = slice(self.rank * n_bytes, (self.rank + 1) * n_bytes)
        heads, parts = self.places[:, :n_bytes], self.places[:, mine]
        by_rank = (self.size, n_bytes)

        def read_all(out: Array) -> None:
            out.reshape(by_rank)[:] = heads

        def read_parts(out: Array) -> None:
            out.reshape(by_rank)[:] = parts

        def read_if_root(out: Array) -> None:
            if self.rank == 0:
                read_all(out)

        def read_first(out: Array) -> None:
            if self.rank:
                out[:] = heads[0]

        def read_part_of_first(out: Array) -> None:
            out[:] = parts[0]

        def add(places: Array) -> Callable[[Array], object]:
            floats = places.view(np.float32)
            return lambda out: np.sum(floats, axis=0, out=out)

        read: Callable[[Array], object] = {
            "allreduce": add(heads),
            "allgather": read_all,
            "alltoall": read_parts,
            "alltoallv": read_parts,
            "reduce-scatter": add(parts),
            "broadcast": read_first,
            "gather": read_if_root,
            "scatter": read_part_of_first,
        }[op]
        gives = self.rank == 0 or op not in ("broadcast", "scatter")

        def call(x: Array, out: Array) -> None:
            if gives:
                self.places[self.rank, : x.nbytes].view(x.dtype)[:] = x
            self.barrier()
            read(out)
            self.barrier()

        return collective(self.rank, self.size, op, n_bytes, call)

    def moe(self, cell: Cell, variant: str) -> Work:
        """Shared memory and numba."""
        return Moe(self, Shape.of(cell), variant).work()

    def exchange_counts(self, send: Array, recv: Array) -> None:
        """Through the places for counts."""
        n_bytes = send.nbytes
        counts = self.counts[:, :n_bytes].view(np.int32).reshape(self.size, *send.shape)
        counts[self.rank] = send
        self.barrier()
        recv[:] = counts[:, self.rank]
        self.barrier()

    def exchange_rows(self, send: Array, sent: Array, recv: Array, received: Array) -> None:
        """Where each part begins goes through the places for counts, the rows through the others."""
        width = send.shape[1]
        starts = self.counts[:, : 8 * self.size].view(np.int64)
        starts[self.rank] = np.cumsum(sent) - sent
        rows, n_bytes = int(sent.sum()), 2 * width
        self.places[self.rank, : rows * n_bytes].view(np.uint16).reshape(rows, width)[:] = send[:rows]
        self.barrier()
        at = 0
        for peer, count in enumerate(received.tolist()):
            first = int(starts[peer, self.rank]) * n_bytes
            part = self.places[peer, first : first + count * n_bytes].view(np.uint16)
            recv[at : at + count] = part.reshape(count, width)
            at += count
        self.barrier()
