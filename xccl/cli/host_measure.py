"""What two ranks measure of this machine for `xccl calibrate host`: primitives, as the protocols use them.

Every block is freshly written by its owner before it is read, since that is how a protocol finds it: in the caches of
the core that wrote it. Both ranks measure at the same time, so that each figure is that of a core beside a busy one.
What Python costs is measured between copies, too, which take its objects and code out of the nearest caches.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import numpy.typing as npt
from ml_dtypes import bfloat16

from xccl.cli.host_samples import Samples, Steps, Stopwatch, limit_s
from xccl.comm import steps as operation_steps
from xccl.comm.buffers import BufferPool, address_of
from xccl.comm.core import Waiting
from xccl.comm.dispatched import Dispatched, Outputs, Routing
from xccl.comm.moe_input import check_outputs, check_weights
from xccl.comm.symmetric import Signals
from xccl.kernels import onesided, rows, words
from xccl.layout.dtypes import BF16
from xccl.layout.moe import SOURCE_DTYPE

if TYPE_CHECKING:
    from xccl.comm.communicator import Communicator

Array = npt.NDArray[Any]

#: Working sets of the curves: MoE layers of a few tokens up to hundreds move so much.
SIZES: Final = tuple(1 << k for k in range(16, 25))
ROW_BYTES: Final = 4096
HIDDEN: Final = ROW_BYTES // 2
#: Rows that repeat a token in a dispatch, and rows that are summed in a combine.
COPIES: Final = 8
#: Rows of the measurement that tells what a row costs besides its bytes, and bytes of each.
SMALL_ROWS: Final = 1024
SMALL_ROW_BYTES: Final = 64
#: Tokens that fit into the nearest cache with what becomes of them, and how often they are worked on.
NEAR_TOKENS: Final = 4
NEAR_TIMES: Final = 16
#: A record is begun by the stage that writes, and completed by the one that reads.
RECORDING_STAGES: Final = 2
#: Ping-pongs in a sample.
PINGS: Final = 20
#: Undisturbed samples of each figure in a round.
_WANTED: Final = 16
_AT_LEAST: Final = onesided.COMPARISONS["ge"]
_PYTHON_TOKENS: Final = 8
_PYTHON_EXPERTS: Final = 32


def pin(rank: int) -> None:
    """Give this rank a core of its own, if there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


class HostMeter:
    """Measures one rank's share of a machine; made and called by both ranks of a session together."""

    def __init__(self, comm: Communicator) -> None:
        largest = max(SIZES)
        self._comm = comm
        self._watch = Stopwatch(comm, _WANTED)
        peer = 1 - comm.rank
        area, inbox = comm.empty((largest,), np.uint8), comm.empty((largest // 2,), np.uint8)
        self._own: int = area.addresses[comm.rank]
        self._peer: int = area.addresses[peer]
        #: Where each rank takes puts; not where it writes its own rows, which a protocol's peers only read.
        self._inbox: int = inbox.addresses[comm.rank]
        self._peer_inbox: int = inbox.addresses[peer]
        self._areas = area, inbox
        self._values = np.random.default_rng(comm.rank).standard_normal(largest // 2, np.float32).astype(bfloat16)
        self._pool = BufferPool()
        self._held: list[Array] = []
        self._words = np.zeros(16, np.int64)
        self._scratch = address_of(self._words)
        self._signals = comm.signals(2)
        self._python = _Python(comm, self._signals)
        self._pings = 0

    def round(self, sizes: tuple[int, ...] = SIZES) -> Samples:
        """Some samples of everything, "NAME" or "NAME BYTES"."""
        for size in sizes:
            for pattern in (self._repeat_and_get, self._copy_and_sum, self._put, self._call):
                self._watch.collect(pattern(size), limit_s(size))
                self._held.clear()
        for cycle in self._small():
            self._watch.collect(cycle, limit_s(0))
        self._held.clear()
        return self._watch.take()

    # Buffers are as large as those of an operation, and come from where those come from: the kernel backs large ones
    # with larger pages than small ones.

    def _source(self, n_bytes: int) -> int:
        """Address of values of its own."""
        self._held.append(self._values[: n_bytes // 2].copy())
        return address_of(self._held[-1])

    def _result(self, n_bytes: int) -> int:
        """Address of a result."""
        self._held.append(self._pool.take((n_bytes,), np.dtype(np.uint8)))
        return address_of(self._held[-1])

    # -- rows, in the caches and out of them -------------------------------------------------------------------------

    def _repeat_and_get(self, size: int) -> list[Steps]:
        """Rows are written, each to several places; half of them are then copied by this rank, half by its peer."""
        half, n_rows, copy = size // 2, size // ROW_BYTES, onesided.copy.call
        tokens, result = self._source(size // COPIES), self._result(size)
        write = partial(rows.copy_rows.call, self._own, tokens, ROW_BYTES, n_rows, COPIES)
        get = partial(copy, result, self._peer + half, half)
        local_get = partial(copy, result + half, self._own, half)
        return [{f"repeat {size}": write}, {f"get {size}": get, f"local_get {size}": local_get}]

    def _copy_and_sum(self, size: int) -> list[Steps]:
        """Rows are copied, each to one place; half of them are then summed by this rank, half by its peer."""
        half, n_rows = size // 2, size // ROW_BYTES
        sums = self._result(size // COPIES)
        write = partial(rows.copy_rows.call, self._own, self._source(size), ROW_BYTES, n_rows, 1)
        sum_get = self._sum(sums, self._peer + half, half)
        local_sum = self._sum(sums + half // COPIES, self._own, half)
        return [{f"copy {size}": write}, {f"sum {size}": sum_get, f"local_sum {size}": local_sum}]

    def _put(self, size: int) -> list[Steps]:
        """Each rank puts to the other one, and then reads what was put to it: the next put finds it read."""
        half, copy = size // 2, onesided.copy.call
        put = partial(copy, self._peer_inbox, self._source(half), half)
        return [{f"put {size}": put}, {f"take {size}": partial(copy, self._result(half), self._inbox, half)}]

    def _call(self, size: int) -> list[Steps]:
        """What Python does, after a block has passed through the caches and taken its code and objects out of them."""
        python, evict = self._python, partial(onesided.copy.call, self._own, self._source(size), size)
        return [
            {f"evict {size}": evict},
            {f"launch {size}": python.launch, f"record {size}": python.record},
            {f"evict {size}": evict},
            {f"call {size}": onesided.quiet.call, f"wait {size}": python.wait},
        ]

    def _sum(self, destination: int, source: int, n_bytes: int) -> Callable[[], object]:
        n_sums = n_bytes // ROW_BYTES // COPIES
        return partial(rows.sum_rows.call, BF16, destination, source, HIDDEN, ROW_BYTES, n_sums, self._scratch)

    # -- what does not depend on the working set ---------------------------------------------------------------------

    def _small(self) -> list[list[Steps]]:
        tokens, result = self._source(SMALL_ROWS * SMALL_ROW_BYTES), self._result(SMALL_ROWS * SMALL_ROW_BYTES)
        many = partial(rows.copy_rows.call, result, tokens, SMALL_ROW_BYTES, SMALL_ROWS, SMALL_ROWS)
        copy = partial(rows.copy_rows.call, result, tokens, HIDDEN, NEAR_TOKENS, 1)
        quantise = partial(rows.quantise_rows.call, BF16, result, tokens, ROW_BYTES, HIDDEN, NEAR_TOKENS)
        return [
            [{"rows": many}],
            [{"near_copy": _times(NEAR_TIMES, copy), "near_quantise": _times(NEAR_TIMES, quantise)}],
            [{"trip": self._trips}],
        ]

    def _trips(self) -> None:
        """Round trips of a signal, without Python's checks of its arguments."""
        rank, signal, core = self._comm.rank, onesided.signal.call, self._comm.core
        mine, theirs = self._signals.addresses[rank], self._signals.addresses[1 - rank]
        peer_control = int(core.fabric.controls[1 - rank])
        for i in range(self._pings + 1, self._pings + PINGS + 1):
            if rank == 0:
                signal(theirs, i, 0, peer_control)
            step = partial(onesided.wait_until.call, core.control, mine, _AT_LEAST, i, self._scratch)
            core.run(step, partial(Waiting, "calibration", peer=1 - rank, expected=i))
            if rank == 1:
                signal(theirs, i, 0, peer_control)
        self._pings += PINGS


class _Python:
    """What operations do in Python, besides calls of kernels."""

    def __init__(self, comm: Communicator, signals: Signals) -> None:
        self._core = comm.core
        self._word: int = signals.addresses[comm.rank]
        self._x = np.zeros((_PYTHON_TOKENS, HIDDEN), bfloat16)
        self._weights = np.zeros((_PYTHON_TOKENS, COPIES), np.float32)
        self._pool = BufferPool()
        self._kept: tuple[object, ...] = ()

    def wait(self) -> None:
        """A wait for words of two ranks that are there."""
        self._core.wait_all(self._word, Signals.STRIDE_BYTES, 0, "wait")

    def launch(self) -> None:
        """Checks of two arguments, and an array for the result."""
        check_outputs(self._x, self._x.shape, self._x.dtype)
        check_weights(self._weights, self._weights.shape)
        self._pool.take(self._x.shape, self._x.dtype)

    def record(self) -> None:
        """A record of where rows go, arrays for places and counts, and what the caller gets of them."""
        outputs: Any = Outputs(cast(Any, None), cast(Any, None), self._pool, None)
        steps = operation_steps.Steps(self._core, None, "record")
        steps("write")
        routing = Routing(_PYTHON_TOKENS, COPIES, _PYTHON_EXPERTS, _PYTHON_EXPERTS // 2, 2)
        places, counts = np.empty(_PYTHON_TOKENS, SOURCE_DTYPE), np.empty(_PYTHON_EXPERTS, np.int64)
        for address in (routing.address, address_of(places), address_of(counts)):
            words.load(address)
        steps("pull")
        self._kept = (outputs, Dispatched(self._x, self._weights, counts, places, routing, outputs.owner))


def _times(n: int, step: Callable[[], object]) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(n):
            step()

    return steps
