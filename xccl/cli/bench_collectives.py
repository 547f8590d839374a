"""Benchmarks of collectives. A size is that of the larger of a rank's two buffers, as in nccl-tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from xccl.cli.bench_data import CHECKED, TIMED, Array, clear, count_wrong, dtype_of
from xccl.cli.bench_part import Operation, Part
from xccl.cli.options import BenchOptions, Case
from xccl.comm import reference
from xccl.protocol.collective_cuts import FLOWS, Kind, part_elements

if TYPE_CHECKING:
    from xccl.comm.communicator import Communicator

#: Starts of different data in the pool, in elements.
_PLACES: Final = 1 << 16
_ROOT: Final = 0
#: Reductions of all ranks' data take a while; ranks that are threads make them once for all.
_ONE_AT_A_TIME: Final = threading.Lock()


class Pool:
    """Data of any rank, for the price of a copy: windows into one pool of random bits."""

    def __init__(self, options: BenchOptions, largest: int) -> None:
        dtype = dtype_of(options)
        bits = np.random.default_rng(options.seed).integers(0, 256, (_PLACES + largest) * dtype.itemsize, np.uint8)
        self._pool = bits.view(dtype)

    def rows(self, data_round: int, ranks: range, part: int, count: int) -> Array:
        """[len(ranks), count] elements: what each of these ranks has as its part number `part` in a round."""
        windows = np.lib.stride_tricks.sliding_window_view(self._pool, count) if count else self._pool[:, None][:, :0]
        keys = np.array(ranks, np.int64) * 7919 + part * 104_729 + data_round * 15_485_863
        found: Array = windows[keys % _PLACES]
        return found


@lru_cache(maxsize=4)
def _pool(options: BenchOptions, largest: int) -> Pool:
    return Pool(options, largest)


@lru_cache(maxsize=2)
def _reduced(options: BenchOptions, largest: int, part: int, count: int) -> Array:
    pool = _pool(options, largest)
    rows = pool.rows(CHECKED, range(options.ranks), part, count)
    return reference.reduce(list(rows), options.reduction)  # type: ignore[arg-type]


class Collective(Operation):
    """One of the collectives, by the name of the operation."""

    def __init__(self, comm: Communicator, options: BenchOptions, cases: list[Case]) -> None:
        super().__init__(comm, options, cases)
        self.kind: Kind = options.op.replace("-", "_")  # type: ignore[assignment]
        self.dtype = dtype_of(options)
        self.flow = FLOWS[self.kind]
        self.root = _ROOT if self.flow.rooted else None
        self.places = options.ranks if self.flow.parts or self.flow.keeps else 1
        self.largest = max(self._count(case) for case in cases)
        with _ONE_AT_A_TIME:
            self.pool = _pool(options, self.largest)

    def _count(self, case: Case) -> int:
        """Elements of a part."""
        return part_elements(self.kind, case.size_bytes or 0, self.dtype.itemsize, self.options.ranks)

    def parts(self, case: Case) -> Iterator[Part]:
        """One row."""
        count = self._count(case)
        step, _, _ = self._call(count, TIMED)
        yield Part(self.options.op, step, lambda: self.check(count), count * self.places * self.dtype.itemsize)

    def _input(self, count: int, data_round: int) -> Array | None:
        rank = self.comm.rank
        if self.flow.from_root and rank != self.root:
            return np.zeros(count, self.dtype) if self.kind == "broadcast" else None
        if not self.flow.parts:
            return self._row(rank, 0, count, data_round).reshape(-1)
        return np.concatenate([self._row(rank, part, count, data_round) for part in range(self.comm.size)])

    def _row(self, rank: int, part: int, count: int, data_round: int) -> Array:
        return self.pool.rows(data_round, range(rank, rank + 1), part, count)

    def _call(self, count: int, data_round: int) -> tuple[Callable[[], object], Array | None, Array | None]:
        """A call; and the arrays that it reads and writes."""
        comm, kind = self.comm, self.kind
        x = self._input(count, data_round)
        shape: tuple[int, ...] = (comm.size, count) if self.flow.keeps else (count,)
        out = np.zeros(shape, self.dtype) if not self.flow.to_root or comm.rank == self.root else None
        if kind == "broadcast":
            assert x is not None
            return (lambda: comm.broadcast(x, _ROOT, algorithm=self.options.algorithm)), x, x
        if kind == "alltoallv":
            assert x is not None
            assert out is not None
            counts = np.full(comm.size, count)
            rows, room = x.reshape(-1), out.reshape(-1)
            return (lambda: comm.alltoallv(rows, counts, out=room, recv_counts=counts)), x, out
        options: dict[str, Any] = {"out": out, "algorithm": self.options.algorithm}
        if self.flow.rooted:
            options["root"] = self.root
        if self.flow.reduces:
            options["op"] = self.options.reduction
        method = getattr(comm, kind)
        return (lambda: method(x, **options)), x, out

    def check(self, count: int) -> int:
        """A call with fresh data, compared with the oracle."""
        step, x, out = self._call(count, CHECKED)
        if out is not x:
            clear(out)
        step()
        wrong = count_wrong(out, self._expected(count)) if out is not None else 0
        self.comm.barrier()
        return wrong

    def _expected(self, count: int) -> Array:
        every, rank = range(self.comm.size), self.comm.rank
        if self.flow.reduces:
            with _ONE_AT_A_TIME:
                return _reduced(self.options, self.largest, rank if self.flow.parts else 0, count)
        part = rank if self.flow.parts else 0
        if self.flow.from_root:
            return self._row(_ROOT, part, count, CHECKED).reshape(-1)
        return self.pool.rows(CHECKED, every, part, count)
