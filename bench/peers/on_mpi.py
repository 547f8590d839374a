"""The cells in MPI, through mpi4py: Open MPI or MPICH, whichever `MPI4PY_MPIABI` and the launcher say."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
from mpi4py import MPI

from bench.peers.collectives import Call, collective
from bench.peers.moe import Moe, Shape
from bench.peers.work import (
    Array,
    Cell,
    Library,
    Work,
    count_wrong,
    one_way,
    page_aligned,
    pattern,
    ping_pong,
    repeat,
    window_of,
)

_FLAG_BYTES = 8
#: After so many looks at a flag, MPI gets a chance to make progress, for puts that need the target's help.
_LOOKS = 1000


class Mpi(Library):
    """The world communicator."""

    def __init__(self, package: str) -> None:
        self.comm: Any = MPI.COMM_WORLD
        self.rank, self.size = self.comm.rank, self.comm.size
        self.version = f"{version(package)}, mpi4py {version('mpi4py')}"
        self.barrier = self.comm.Barrier

    def sendrecv(self, n_bytes: int) -> Work:
        """Blocking Send and Recv."""
        send, recv, peer = self.comm.Send, self.comm.Recv, 1 - self.rank
        return ping_pong(self.rank, n_bytes, lambda source: send(source, peer), lambda out: recv(out, peer))

    def stream(self, n_bytes: int) -> Work:
        """Windows of Isend and Irecv."""

        def windows(start: Callable[..., Any]) -> Callable[[Array, int], None]:
            def window(buffer: Array, count: int) -> None:
                MPI.Request.Waitall([start(buffer, 1 - self.rank) for _ in range(count)])

            return window

        return one_way(self.rank, n_bytes, windows(self.comm.Isend), windows(self.comm.Irecv))

    def put_signal(self, n_bytes: int) -> Work:
        """Put, Flush, Put of a flag, Flush; the other side looks at the flag in its own window."""
        window = _Window(self.comm, n_bytes)
        win, data_at, peer, rank = window.win, window.data_at, 1 - self.rank, self.rank
        source, flag = page_aligned(n_bytes), np.zeros(1, np.int64)
        mine: memoryview = window.flag.data
        progress = self.comm.Iprobe
        epoch = 0

        def put(value: int) -> None:
            win.Put(source, peer, data_at)
            win.Flush(peer)
            flag[0] = value
            win.Put(flag, peer, 0)
            win.Flush(peer)

        def wait(value: int) -> None:
            looks = 0
            while mine[0] < value:
                looks += 1
                if looks % _LOOKS == 0:
                    progress()

        def ping(n: int) -> None:
            nonlocal epoch
            for value in range(epoch + 1, epoch + n + 1):
                put(value)
                wait(value)
            epoch += n

        def pong(n: int) -> None:
            nonlocal epoch
            for value in range(epoch + 1, epoch + n + 1):
                wait(value)
                put(value)
            epoch += n

        run = pong if rank else ping

        def check() -> int:
            source[:], window.data[:] = pattern(n_bytes, rank), 0
            self.comm.Barrier()
            run(1)
            return count_wrong(window.data, pattern(n_bytes, 1 - rank))

        return Work(run, check, 0.5, window.free)

    def put(self, n_bytes: int) -> Work:
        """Windows of Put to one place, and Flush."""
        window = _Window(self.comm, n_bytes)
        win, data_at, count, source = window.win, window.data_at, window_of(n_bytes), page_aligned(n_bytes)

        def puts() -> None:
            if self.rank == 0:
                for _ in range(count):
                    win.Put(source, 1, data_at)
                win.Flush(1)

        def check() -> int:
            source[:], window.data[:] = pattern(n_bytes, 0), 0
            self.comm.Barrier()
            puts()
            self.comm.Barrier()
            return count_wrong(window.data, pattern(n_bytes, 0)) if self.rank else 0

        return Work(repeat(puts), check, 1 / count, window.free)

    def collective(self, op: str, n_bytes: int, variant: str) -> Work:
        """The function of that name; of alltoallv with equal counts."""
        comm, root = self.comm, self.rank == 0
        counts = [n_bytes] * self.size
        places = [n_bytes * peer for peer in range(self.size)]
        calls: dict[str, Call] = {
            "allreduce": lambda x, out: comm.Allreduce(x, out, MPI.SUM),
            "allgather": comm.Allgather,
            "alltoall": comm.Alltoall,
            "alltoallv": lambda x, out: comm.Alltoallv([x, counts, places, MPI.BYTE], [out, counts, places, MPI.BYTE]),
            "reduce-scatter": lambda x, out: comm.Reduce_scatter_block(x, out, MPI.SUM),
            "broadcast": lambda x, _: comm.Bcast(x),
            "gather": lambda x, out: comm.Gather(x, out if root else None),
            "scatter": lambda x, out: comm.Scatter(x if root else None, out),
        }
        return collective(self.rank, self.size, op, n_bytes, calls[op])

    def moe(self, cell: Cell, variant: str) -> Work:
        """Alltoallv and numba."""
        return Moe(self, Shape.of(cell), variant).work()

    def exchange_counts(self, send: Array, recv: Array) -> None:
        """Alltoall of int32."""
        self.comm.Alltoall(send, recv)

    def exchange_rows(self, send: Array, sent: Array, recv: Array, received: Array) -> None:
        """Alltoallv of elements: with 16 bits each, counts stay small."""
        width = send.shape[1]
        self.comm.Alltoallv(
            [send, sent * width, (np.cumsum(sent) - sent) * width, MPI.UINT16_T],
            [recv, received * width, (np.cumsum(received) - received) * width, MPI.UINT16_T],
        )


class _Window:
    """Memory of every rank that all may write to: a flag, and from the first page boundary after it on, data."""

    def __init__(self, comm: Any, n_bytes: int) -> None:
        size = _FLAG_BYTES + mmap.PAGESIZE + n_bytes
        self.win: Any = MPI.Win.Allocate(size, 1, comm=comm)
        memory = np.frombuffer(self.win.tomemory(), np.uint8)
        memory[:] = 0
        self.flag = memory[:_FLAG_BYTES].view(np.int64)
        mine = _FLAG_BYTES + -(memory.ctypes.data + _FLAG_BYTES) % mmap.PAGESIZE
        #: Where data begins at the peer: windows need not be aligned alike.
        self.data_at: int = comm.allgather(mine)[(1 - comm.rank) % comm.size]
        self.data = memory[mine : mine + n_bytes]
        self.win.Lock_all()
        comm.Barrier()

    def free(self) -> None:
        """Give it back; all ranks call it."""
        self.win.Unlock_all()
        self.data = self.flag = np.zeros(0, np.uint8)
        self.win.Free()
