"""What the ranks of `figures` run. Each function is launched on all ranks of a session, and returns what it measured.

Timing is by blocks: a block is a number of operations back to back, its figure their mean, since the clock costs a good
part of the shortest of them. All buffers begin at a page, and two ranks are pinned to a core each.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

import xccl
from bench.peers.on_xccl import Target
from bench.peers.work import page_aligned, pin
from xccl.kernels.copy import copy
from xccl.protocol.routing import make_routing

Times = npt.NDArray[np.float64]

_WARMUP_BLOCKS = 2
_HIDDEN = 7168
_TOP_K = 8


def _timed(
    comm: xccl.Communicator, block: Callable[[], object], blocks: int, operations: int, warmup: int = 2
) -> Times:
    """Microseconds an operation, [blocks]; `block` does `operations` of them, and ranks meet before each."""
    for _ in range(warmup):
        block()
    times = np.zeros(blocks)
    gc.collect()
    gc.disable()
    try:
        for i in range(blocks):
            comm.barrier()
            start = perf_counter_ns()
            block()
            times[i] = (perf_counter_ns() - start) / operations / 1e3
    finally:
        gc.enable()
    comm.barrier()
    return times


# -- latency ----------------------------------------------------------------------------------------------------------

_ROUND_TRIPS = 50
_LATENCY_BLOCKS = 200


def put_signal_latency(comm: xccl.Communicator, n_bytes: int) -> Times:
    """Half a round trip of put_signal and wait_until."""
    pin(comm.rank, comm.size)
    target, signals, source = Target(comm, n_bytes), comm.signals(1), page_aligned(n_bytes)
    array, offset, peer = target.array, target.offset, 1 - comm.rank
    epoch = 0

    def ping() -> None:
        nonlocal epoch
        for value in range(epoch + 1, epoch + _ROUND_TRIPS + 1):
            comm.put_signal(array, source, peer, signals, 0, value, "set", offset)
            comm.wait_until(signals, 0, "ge", value)
        epoch += _ROUND_TRIPS

    def pong() -> None:
        nonlocal epoch
        for value in range(epoch + 1, epoch + _ROUND_TRIPS + 1):
            comm.wait_until(signals, 0, "ge", value)
            comm.put_signal(array, source, peer, signals, 0, value, "set", offset)
        epoch += _ROUND_TRIPS

    return _timed(comm, pong if comm.rank else ping, _LATENCY_BLOCKS, 2 * _ROUND_TRIPS)


def send_recv_latency(comm: xccl.Communicator, n_bytes: int) -> Times:
    """Half a round trip of send and recv."""
    pin(comm.rank, comm.size)
    source, destination, peer = page_aligned(n_bytes), page_aligned(n_bytes), 1 - comm.rank

    def ping() -> None:
        for event in range(_ROUND_TRIPS):
            comm.send(source, peer, event)
            comm.recv(destination, peer, event)

    def pong() -> None:
        for event in range(_ROUND_TRIPS):
            comm.recv(destination, peer, event)
            comm.send(source, peer, event)

    return _timed(comm, pong if comm.rank else ping, _LATENCY_BLOCKS, 2 * _ROUND_TRIPS)


def python_spin_latency(comm: xccl.Communicator, n_bytes: int) -> Times:
    """Half a round trip of a NumPy copy to the peer's memory and a flag that it spins on in Python: no library at all.

    Right on x86 only, where stores are not reordered. It is here to compare machines.
    """
    pin(comm.rank, comm.size)
    target, flags, source = Target(comm, n_bytes), comm.empty(1, np.int64), page_aligned(n_bytes)
    flags.local[:] = 0
    comm.barrier()
    peer = 1 - comm.rank
    remote = target.array.peer(peer)[target.offset : target.offset + n_bytes]
    mine, theirs = flags.local.data, flags.peer(peer).data
    epoch = 0

    def ping() -> None:
        nonlocal epoch
        for value in range(epoch + 1, epoch + _ROUND_TRIPS + 1):
            remote[:] = source
            theirs[0] = value
            while mine[0] < value:
                pass
        epoch += _ROUND_TRIPS

    def pong() -> None:
        nonlocal epoch
        for value in range(epoch + 1, epoch + _ROUND_TRIPS + 1):
            while mine[0] < value:
                pass
            remote[:] = source
            theirs[0] = value
        epoch += _ROUND_TRIPS

    return _timed(comm, pong if comm.rank else ping, _LATENCY_BLOCKS, 2 * _ROUND_TRIPS)


# -- bandwidth --------------------------------------------------------------------------------------------------------

_STREAM_BLOCKS = 30


def put_stream(comm: xccl.Communicator, n_bytes: int) -> Times:
    """A put of rank 0 to rank 1, of many to the same place with one quiet; rank 1 sleeps meanwhile."""
    pin(comm.rank, comm.size)
    target, source = Target(comm, n_bytes), page_aligned(n_bytes)
    array, offset = target.array, target.offset
    window = max(4, min(200, (64 << 20) // n_bytes))

    def stream() -> None:
        if comm.rank == 0:
            for _ in range(window):
                comm.put(array, source, 1, offset)
            comm.quiet()

    return _timed(comm, stream, _STREAM_BLOCKS, window)


def isend_stream(comm: xccl.Communicator, n_bytes: int) -> Times:
    """A message of rank 0 to rank 1, of a window of isends and irecvs of the same buffer."""
    pin(comm.rank, comm.size)
    buffer = page_aligned(n_bytes)
    window = max(4, min(32, (64 << 20) // n_bytes))

    def stream() -> None:
        start = comm.isend if comm.rank == 0 else comm.irecv
        requests = [start(buffer, 1 - comm.rank, event) for event in range(window)]
        for request in requests:
            request.wait()

    return _timed(comm, stream, _STREAM_BLOCKS, window)


def one_copy(comm: xccl.Communicator, n_bytes: int) -> Times:
    """A copy from private to private memory in one process: no rank can be faster. Run it on one rank."""
    pin(comm.rank, comm.size)
    source, destination = page_aligned(n_bytes), page_aligned(n_bytes)
    addresses = destination.ctypes.data, source.ctypes.data
    window = max(4, min(200, (64 << 20) // n_bytes))

    def stream() -> None:
        for _ in range(window):
            copy.call(*addresses, n_bytes)

    return _timed(comm, stream, _STREAM_BLOCKS, window)


# -- barrier ----------------------------------------------------------------------------------------------------------


def barriers(comm: xccl.Communicator) -> Times:
    """A barrier, back to back."""
    pin(comm.rank, comm.size)
    count = 100

    def block() -> None:
        for _ in range(count):
            comm.barrier()

    return _timed(comm, block, 50, count)


# -- mixture of experts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoeShape:
    """A dispatch and combine; hidden 7168, top-8, bfloat16, uniform routing."""

    ranks: int
    tokens: int
    experts: int
    quant: str


@dataclass(frozen=True)
class MoeResult:
    """What a rank measured."""

    times_us: Times
    memory: Memory


def moe(comm: xccl.Communicator, shape: MoeShape) -> MoeResult:
    """Dispatch and combine back to back. The experts' outputs are prepared once, and not timed."""
    pin(comm.rank, comm.size)
    rng = np.random.default_rng((0, comm.rank))
    bf16 = np.dtype(ml_dtypes.bfloat16)
    ep = xccl.ExpertParallel(
        comm, num_experts=shape.experts, hidden=_HIDDEN, top_k=_TOP_K, max_tokens=shape.tokens, dtype=bf16,
        quant=shape.quant,
    )  # fmt: skip

    # Ordinary numbers: sums of denormal ones take several times as long.
    pool = rng.standard_normal((64, _HIDDEN), np.float32).astype(bf16)

    def values(count: int) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = page_aligned(count * pool[0].nbytes).view(bf16).reshape(count, _HIDDEN)
        for row in range(count):
            array[row] = pool[row % len(pool)]
        return array

    x = values(shape.tokens)
    topk_idx = make_routing(
        "uniform", tokens=shape.tokens, experts=shape.experts, topk=_TOP_K, seed=0, rank=comm.rank, ranks=comm.size
    )
    weights = rng.random((shape.tokens, _TOP_K), np.float32)
    outputs = values(len(ep.dispatch(x, topk_idx).tokens))
    iterations = max(4, 160 // shape.tokens)

    def block() -> None:
        for _ in range(iterations):
            ep.combine(outputs, ep.dispatch(x, topk_idx), weights)

    return MoeResult(_timed(comm, block, 9, iterations), Memory.of_this_process())


# -- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Memory of a process in bytes, as /proc/self/smaps_rollup has it.

    Attributes:
        resident: VmRSS.
        private: resident, less what is shared with any other process.
        proportional: each page divided by the processes that share it (PSS): what a rank adds to the machine.
        proportional_shm: the part of that in shared memory: segments.
    """

    resident: int
    private: int
    proportional: int
    proportional_shm: int

    @classmethod
    def of_this_process(cls) -> Memory:
        """Of the caller, now."""
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        kib: dict[str, int] = {}
        for line in lines:
            name, value, *_ = line.replace(":", "").split()
            kib[name] = int(value)
        resident = kib["Rss"]
        private = resident - kib["Shared_Clean"] - kib["Shared_Dirty"]
        return cls(*(1024 * value for value in (resident, private, kib["Pss"], kib.get("Pss_Shmem", 0))))


def memory_at_start(comm: xccl.Communicator) -> Memory:
    """After the first barrier."""
    comm.barrier()
    memory = Memory.of_this_process()
    comm.barrier()
    return memory


def median_us(times: list[Times]) -> float:
    """Median of the blocks, each that of its slowest rank."""
    return float(np.median(np.max(np.stack(times), axis=0)))
