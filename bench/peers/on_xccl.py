"""The cells in xccl."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any, Final

import numpy as np

import xccl
from bench.peers.collectives import Call, collective, plain
from bench.peers.moe import BF16, Inputs, Shape, as_bits, as_float, expert_factor
from bench.peers.table import BEST_PROTOCOL, SYMMETRIC
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

#: What the ways of dispatch and combine ask for, other than a protocol by its name.
_MOE: Final[dict[str, dict[str, str]]] = {
    "dedup": {"protocol": BEST_PROTOCOL, "rows": "dedup"},
    "int8": {"protocol": BEST_PROTOCOL, "quant": "int8"},
}


class Target:
    """A symmetric array of bytes, from the first page boundary on.

    Attributes:
        array: the symmetric array.
        offset: where the first page in it begins; the same at all ranks, as segments begin at pages.
        local: the bytes from there on at this rank.
    """

    def __init__(self, comm: xccl.Communicator, n_bytes: int) -> None:
        self.array = comm.empty(n_bytes + mmap.PAGESIZE, np.uint8)
        self.offset = -self.array.addresses[comm.rank] % mmap.PAGESIZE
        self.local = self.array.local[self.offset : self.offset + n_bytes]
        self.array.local[:] = 1


class Xccl(Library):
    """A communicator."""

    def __init__(self, comm: xccl.Communicator) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.version = xccl.__version__
        self.barrier = comm.barrier

    def sendrecv(self, n_bytes: int) -> Work:
        """Blocking send and recv through the rings."""
        send, recv, peer = self.comm.send, self.comm.recv, 1 - self.rank
        return ping_pong(self.rank, n_bytes, lambda source: send(source, peer, 0), lambda out: recv(out, peer, 0))

    def put_signal(self, n_bytes: int) -> Work:
        """put_signal and wait_until."""
        comm, peer, rank = self.comm, 1 - self.rank, self.rank
        target, signals, source = Target(comm, n_bytes), comm.signals(1), page_aligned(n_bytes)
        array, offset = target.array, target.offset
        epoch = 0

        def ping(n: int) -> None:
            nonlocal epoch
            for value in range(epoch + 1, epoch + n + 1):
                comm.put_signal(array, source, peer, signals, 0, value, "set", offset)
                comm.wait_until(signals, 0, "ge", value)
            epoch += n

        def pong(n: int) -> None:
            nonlocal epoch
            for value in range(epoch + 1, epoch + n + 1):
                comm.wait_until(signals, 0, "ge", value)
                comm.put_signal(array, source, peer, signals, 0, value, "set", offset)
            epoch += n

        run = pong if rank else ping

        def check() -> int:
            source[:], target.local[:] = pattern(n_bytes, rank), 0
            comm.barrier()
            run(1)
            return count_wrong(target.local, pattern(n_bytes, 1 - rank))

        def close() -> None:
            array.free()
            signals.free()

        return Work(run, check, 0.5, close)

    def stream(self, n_bytes: int) -> Work:
        """Windows of isend and irecv."""

        def windows(start: Callable[..., xccl.Request]) -> Callable[[Array, int], None]:
            def window(buffer: Array, count: int) -> None:
                for request in [start(buffer, 1 - self.rank, event) for event in range(count)]:
                    request.wait()

            return window

        return one_way(self.rank, n_bytes, windows(self.comm.isend), windows(self.comm.irecv))

    def put(self, n_bytes: int) -> Work:
        """Windows of put to one place, and quiet."""
        comm, target, source = self.comm, Target(self.comm, n_bytes), page_aligned(n_bytes)
        array, offset, window = target.array, target.offset, window_of(n_bytes)

        def puts() -> None:
            if comm.rank == 0:
                for _ in range(window):
                    comm.put(array, source, 1, offset)
                comm.quiet()

        def check() -> int:
            source[:], target.local[:] = pattern(n_bytes, 0), 0
            comm.barrier()
            puts()
            comm.barrier()
            return count_wrong(target.local, pattern(n_bytes, 0)) if comm.rank else 0

        return Work(repeat(puts), check, 1 / window, array.free)

    def collective(self, op: str, n_bytes: int, variant: str) -> Work:
        """The method of that name, into the caller's array; of alltoallv with what is to come known, as in MPI."""
        comm, root = self.comm, self.rank == 0
        counts = np.full(self.size, n_bytes)
        calls: dict[str, Call] = {
            "allreduce": lambda x, out: comm.allreduce(x, out=out),
            "allgather": lambda x, out: comm.allgather(x, out=out),
            "alltoall": lambda x, out: comm.alltoall(x, out=out),
            "alltoallv": lambda x, out: comm.alltoallv(x, counts, out=out, recv_counts=counts),
            "reduce-scatter": lambda x, out: comm.reduce_scatter(x, out=out),
            "broadcast": lambda x, _: comm.broadcast(x, 0),
            "gather": lambda x, out: comm.gather(x, 0, out=out if root else None),
            "scatter": lambda x, out: comm.scatter(x if root else None, 0, out=out),
        }
        allocate = self._symmetric if variant == SYMMETRIC else plain
        return collective(self.rank, self.size, op, n_bytes, calls[op], allocate, rows=op != "alltoallv")

    def _symmetric(self, n_bytes: int) -> tuple[Array, Callable[[], None]]:
        target = Target(self.comm, n_bytes)
        return target.local, target.array.free

    def moe(self, cell: Cell, variant: str) -> Work:
        """ExpertParallel."""
        shape = Shape.of(cell)
        options: dict[str, Any] = {"quant": "none"} | _MOE.get(variant, {"protocol": variant})
        ep = xccl.ExpertParallel(
            self.comm, num_experts=shape.experts, hidden=shape.hidden, top_k=shape.topk, max_tokens=shape.tokens,
            dtype=BF16, **options,
        )  # fmt: skip
        inputs, is_dedup = Inputs.of(shape, self.rank), variant == "dedup"
        x, topk_idx, weights = inputs.x.view(BF16), inputs.topk_idx, inputs.weights
        sent_weights: dict[str, Any] = {"topk_weights": weights} if is_dedup else {}
        late_weights = () if is_dedup else (weights,)
        rows = len(ep.dispatch(x, topk_idx, **sent_weights).tokens)
        memory = Target(self.comm, int(self.comm.allgather(np.array([rows])).max()) * inputs.x[0].nbytes)
        outputs = memory.local[: rows * inputs.x[0].nbytes].view(BF16).reshape(rows, shape.hidden)
        outputs[:] = 1
        # As with the peers, experts work in place where outputs are like rows, and peers can read them there.
        in_place = ep.protocol in ("direct", "push") and variant not in ("dedup", "int8")

        def round_trip() -> None:
            d = ep.dispatch(x, topk_idx, **sent_weights)
            ep.combine(d.tokens if in_place else outputs, d, *late_weights)

        def check() -> int:
            d = ep.dispatch(x, topk_idx, **sent_weights)
            values = as_float(d.tokens.view(np.uint16)) if d.scales is None else d.tokens * d.scales[:, None]
            local = np.repeat(self.rank * shape.local_experts + np.arange(shape.local_experts), d.counts)
            factor = expert_factor(local, shape)
            if is_dedup:
                factor = np.bincount(d.index["row"], d.weights * factor, len(values)).astype(np.float32)
            made = d.tokens if in_place else outputs
            made[:] = as_bits(values * factor[:, None]).view(BF16)
            y = ep.combine(made, d, *late_weights)
            return inputs.count_wrong(y.view(np.uint16), shape, tolerance=0.03 if variant == "int8" else 0.02)

        def close() -> None:
            ep.free()
            memory.array.free()

        return Work(repeat(round_trip), check, close=close, note=f"protocol {ep.protocol}")
