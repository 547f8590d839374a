"""Benchmarks of bytes between neighbours, and of the barrier.

Every rank works with the next one, all at the same time: rank r writes to, reads from or sends to (r + 1) % ranks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from xccl.cli.bench_data import CHECKED, TIMED, Array, clear, count_wrong, dtype_of, random_bits
from xccl.cli.bench_part import Operation, Part
from xccl.cli.options import BenchOptions, Case

if TYPE_CHECKING:
    from xccl.comm.communicator import Communicator

_BARRIER_CHECKS: Final = 10
#: In a check each rank signals each other one; with many ranks one round is work enough.
_MANY_RANKS: Final = 64


class _Neighbours(Operation):
    """Messages of `case.size_bytes` from each rank to the next."""

    name: str

    def __init__(self, comm: Communicator, options: BenchOptions, cases: list[Case]) -> None:
        super().__init__(comm, options, cases)
        self.next = (comm.rank + 1) % comm.size
        self.previous = (comm.rank - 1) % comm.size
        self.dtype = dtype_of(options)
        self.max_count = max(case.size_bytes or 0 for case in cases) // self.dtype.itemsize

    def _message(self, rank: int, count: int, data_round: int) -> Array:
        """What `rank` gives in a round."""
        return random_bits(count, self.dtype, self.options.seed, rank, data_round)

    @abstractmethod
    def _transfer(self, source: Array, received: Array) -> None:
        """One iteration: `source` goes to the neighbour; `received` is where this rank finds what it got."""

    @abstractmethod
    def _buffers(self, count: int, data_round: int) -> tuple[Array, Array, Array]:
        """Source and received buffers of [count] elements, and what must be in the latter after a transfer."""

    def parts(self, case: Case) -> Iterator[Part]:
        """One row."""
        size_bytes = case.size_bytes or 0
        count = size_bytes // self.dtype.itemsize
        source, received, _ = self._buffers(count, TIMED)
        yield Part(self.name, lambda: self._transfer(source, received), lambda: self.check(count), size_bytes)

    def check(self, count: int) -> int:
        """One transfer of fresh data, compared when this rank may read it, and before others may write again."""
        source, received, want = self._buffers(count, CHECKED)
        clear(received)
        self.comm.barrier()
        self._transfer(source, received)
        self._complete()
        wrong = count_wrong(received, want)
        self.comm.barrier()
        return wrong

    def _complete(self) -> None:
        """Wait until this rank may read what it got."""


class Put(_Neighbours):
    """put into the next rank, and quiet: complete at the target."""

    name = "put"

    def __init__(self, comm: Communicator, options: BenchOptions, cases: list[Case]) -> None:
        super().__init__(comm, options, cases)
        self.target = comm.empty((self.max_count,), self.dtype)

    def _buffers(self, count: int, data_round: int) -> tuple[Array, Array, Array]:
        source = self._message(self.comm.rank, count, data_round)
        return source, self.target.local[:count], self._message(self.previous, count, data_round)

    def _transfer(self, source: Array, received: Array) -> None:
        if self.options.engine == "dma":
            self.comm.iput(self.target, source, peer=self.next).wait()
        else:
            self.comm.put(self.target, source, peer=self.next)
        self.comm.quiet()

    def _complete(self) -> None:
        self.comm.barrier()


class PutSignal(Put):
    """put with a signal to the next rank, and a wait for the own signal, which says that the data is there."""

    name = "put-signal"

    def __init__(self, comm: Communicator, options: BenchOptions, cases: list[Case]) -> None:
        super().__init__(comm, options, cases)
        self.signals = comm.signals(1)
        self.epoch = 0

    def _transfer(self, source: Array, received: Array) -> None:
        self.epoch += 1
        self.comm.put_signal(self.target, source, peer=self.next, signals=self.signals, index=0, value=self.epoch)
        self.comm.wait_until(self.signals, 0, "ge", self.epoch)

    def _complete(self) -> None:
        """Nothing more: the signal must not overtake the data."""


class Get(_Neighbours):
    """get from the next rank."""

    name = "get"

    def __init__(self, comm: Communicator, options: BenchOptions, cases: list[Case]) -> None:
        super().__init__(comm, options, cases)
        self.target = comm.empty((self.max_count,), self.dtype)

    def _buffers(self, count: int, data_round: int) -> tuple[Array, Array, Array]:
        self.target.local[:count] = self._message(self.comm.rank, count, data_round)
        received = self._message(self.comm.rank, count, data_round)  # any buffer; it is written over
        return received, received, self._message(self.next, count, data_round)

    def _transfer(self, source: Array, received: Array) -> None:
        self.comm.get(received, self.target, peer=self.next)


class SendRecv(_Neighbours):
    """isend to the next rank, receive from the previous one, and wait for the send."""

    name = "sendrecv"

    def __init__(self, comm: Communicator, options: BenchOptions, cases: list[Case]) -> None:
        super().__init__(comm, options, cases)
        self.event_id = 0

    def _buffers(self, count: int, data_round: int) -> tuple[Array, Array, Array]:
        source = self._message(self.comm.rank, count, data_round)
        return source, source.copy(), self._message(self.previous, count, data_round)

    def _transfer(self, source: Array, received: Array) -> None:
        self.event_id += 1
        event_id, lanes, engine = self.event_id, self.options.lanes, self.options.engine
        request = self.comm.isend(source, self.next, event_id, lanes, self.options.mode, engine)
        self.comm.recv(received, self.previous, event_id, lanes, engine=engine)
        request.wait()


class Barrier(Operation):
    """A barrier of all ranks."""

    def __init__(self, comm: Communicator, options: BenchOptions, cases: list[Case]) -> None:
        super().__init__(comm, options, cases)
        self.arrivals: Any = comm.signals(1)

    def parts(self, case: Case) -> Iterator[Part]:
        """One row, of no bytes."""
        yield Part("barrier", self.comm.barrier, self.check, 0)

    def check(self) -> int:
        """Whether a rank has left a barrier before all others had come: each tells all others before it enters."""
        comm = self.comm
        wrong = 0
        for attempt in range(1, (_BARRIER_CHECKS if comm.size < _MANY_RANKS else 1) + 1):
            for peer in range(comm.size):
                comm.signal(self.arrivals, 0, 1, peer=peer, op="add")
            comm.quiet()
            comm.barrier()
            wrong += comm.wait_until(self.arrivals, 0, "ge", 0) != attempt * comm.size
            comm.barrier()
        return wrong
