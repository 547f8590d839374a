"""What two ranks measure of this machine for `xccl calibrate host`: primitives, as the protocols use them.

Every block is freshly written by its owner before it is read, since that is how a protocol finds it: in the caches of
the core that wrote it. Both ranks measure at the same time, so that each figure is that of a core beside a busy one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np

from xccl.comm.buffers import address_of
from xccl.kernels import onesided, rows
from xccl.layout.dtypes import BF16

if TYPE_CHECKING:
    from xccl.comm.communicator import Communicator

#: Working sets of the curves; MoE layers of a few tokens up to hundreds move so much.
SIZES: Final = (256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20, 16 << 20)
_HIDDEN: Final = 7168
_ROW_BYTES: Final = 2 * _HIDDEN
_SUMMED_HIDDEN: Final = (_HIDDEN, 2048)
_SMALL_ROW_BYTES: Final = 64
_COPIES: Final = 8
_PINGS: Final = 200
_LARGE_BYTES: Final = 4 << 20
_CYCLES_SMALL: Final = 14
_CYCLES_LARGE: Final = 6


def pin(rank: int) -> None:
    """Give this rank a core of its own, if there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


class HostMeter:
    """Measures one rank's share of a machine; made and called by both ranks of a session together."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        largest = max(SIZES)
        self._area = comm.empty((largest,), np.uint8)
        self._signals = comm.signals(2)
        self._private = [_aligned(largest) for _ in range(2)]
        self._outputs = _aligned(largest)
        rng = np.random.default_rng(comm.rank)
        tokens = largest // _COPIES // _ROW_BYTES + 1
        self._x = rng.standard_normal((tokens, _HIDDEN), np.float32).astype(ml_dtypes.bfloat16)
        self._scratch = np.zeros(16, np.int64)
        peer = 1 - comm.rank
        self._own: int = self._area.addresses[comm.rank]
        self._peer: int = self._area.addresses[peer]
        #: Where the peer takes puts; not where it writes its own rows, which a protocol's peers only read.
        self._inbox = comm.empty((largest // 2,), np.uint8)
        self._target: int = self._inbox.addresses[peer]
        self._pings = 0

    def round(self) -> dict[str, float]:
        """One value of everything: "NAME SIZE" in GB/s, or a name with its unit."""
        found: dict[str, float] = {}
        for size in SIZES:
            n_rows = max(size // _ROW_BYTES // (2 * _COPIES), 1) * 2 * _COPIES
            for name, gbps in self._rates(n_rows).items():
                found[f"{name} {n_rows * _ROW_BYTES}"] = gbps
        found["row_us"] = self._row_us()
        found["quantise_gelements"] = self._quantise_gelements()
        found["stage_us"] = self._stage_us()
        found["signal_us"] = self._signal_us()
        return found

    def _rates(self, n_rows: int) -> dict[str, float]:
        """GB/s of a working set: its rows are written; half of them are read by this rank, half by its peer.

        Results go to two buffers in turn, as those of an operation do while the caller holds the last one.
        """
        half = n_rows // 2 * _ROW_BYTES
        times: dict[str, list[int]] = {}

        def timed(name: str, step: Callable[[], object]) -> None:
            start = perf_counter_ns()
            step()
            times.setdefault(name, []).append(perf_counter_ns() - start)

        for i in range(_CYCLES_SMALL if 2 * half < _LARGE_BYTES else _CYCLES_LARGE):
            private = address_of(self._private[i % 2])
            timed("write", lambda: self._write(n_rows))
            self._comm.barrier()
            timed("get", partial(onesided.copy.call, private, self._peer + half, half))
            timed("local_get", partial(onesided.copy.call, private + half, self._own, half))
            self._comm.barrier()
            timed("local_put", partial(onesided.copy.call, self._own, address_of(self._outputs), 2 * half))
            self._comm.barrier()
            hidden = _SUMMED_HIDDEN[i % 2]  # rows of a power of two fall on each other in a cache
            timed("sum", partial(self._sum, hidden, private, self._peer + half, half))
            timed("local_sum", partial(self._sum, hidden, private + half, self._own, half))
            self._comm.barrier()
            timed("put", partial(onesided.copy.call, self._target, private, half))
            self._comm.barrier()
        whole = {"write": 2 * half, "local_put": 2 * half}
        # Even and odd cycles may differ; the mean of their medians is the time of both kinds of rows.
        ns = {name: (median(found[2::2]) + median(found[3::2])) / 2 for name, found in times.items()}
        return {name: whole.get(name, half) / ns[name] for name in times}

    def _write(self, n_rows: int) -> None:
        rows.copy_rows.call(self._own, int(self._x.ctypes.data), _ROW_BYTES, n_rows, _COPIES)

    def _sum(self, hidden: int, private: int, source: int, n_bytes: int) -> None:
        scratch, row_bytes = address_of(self._scratch), 2 * hidden
        rows.sum_rows.call(BF16, private, source, hidden, row_bytes, n_bytes // row_bytes // 8, scratch)

    def _row_us(self) -> float:
        """What a row costs besides its bytes: rows of a cache line."""
        count = 4096
        source = int(self._x.ctypes.data)
        start = perf_counter_ns()
        rows.copy_rows.call(self._own, source, _SMALL_ROW_BYTES, count, _COPIES)
        return (perf_counter_ns() - start) / count / 1e3

    def _quantise_gelements(self) -> float:
        tokens = min(len(self._x), 64)
        source, target = int(self._x.ctypes.data), address_of(self._private[0])
        times = []
        for _ in range(5):
            start = perf_counter_ns()
            rows.quantise_rows.call(BF16, target, source, _ROW_BYTES, _HIDDEN, tokens)
            times.append(perf_counter_ns() - start)
        return tokens * _HIDDEN / float(median(times))

    def _stage_us(self) -> float:
        """A call that has next to nothing to do, after a block has passed through the caches."""
        times = []
        for _ in range(25):
            self._write(64)
            start = perf_counter_ns()
            self._comm.signal(self._signals, 1, 1, peer=self._comm.rank)
            times.append(perf_counter_ns() - start)
        return float(median(times)) / 1e3

    def _signal_us(self) -> float:
        """Half a round trip of a signal."""
        comm, signals = self._comm, self._signals
        comm.barrier()
        times = []
        for i in range(self._pings + 1, self._pings + _PINGS + 1):
            start = perf_counter_ns()
            if comm.rank == 0:
                comm.signal(signals, 0, i, peer=1)
                comm.wait_until(signals, 0, "ge", i)
            else:
                comm.wait_until(signals, 0, "ge", i)
                comm.signal(signals, 0, i, peer=0)
            times.append(perf_counter_ns() - start)
        self._pings += _PINGS
        return float(median(times)) / 2e3


def summarised(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians of all rounds of all ranks."""
    return {name: float(median(found[name] for found in rounds)) for name in rounds[0]}


def _aligned(n_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A private buffer that begins at a cache line, its pages touched."""
    raw = np.zeros(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes]
