"""The cells in xccl."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np

import xccl
from bench.peers.moe import BF16, Inputs, Shape, as_bits, as_float, expert_factor, rows_of
from bench.peers.work import (
    Array,
    Cell,
    Library,
    NotComparableError,
    Work,
    collective,
    count_wrong,
    one_way,
    page_aligned,
    pattern,
    ping_pong,
    reduction,
    repeat,
    window_of,
)

#: What the variants of dispatch and combine ask for; the first protocol that this version has.
_MOE: dict[str, dict[str, Any]] = {
    "auto": {"quant": "none", "protocol": ("auto", "direct", "pull")},
    "dedup": {"quant": "none", "protocol": ("auto", "direct", "pull"), "rows": "dedup"},
    "int8": {"quant": "int8", "protocol": ("auto", "direct", "pull")},
    "pull": {"quant": "none", "protocol": ("pull",)},
    "push": {"quant": "none", "protocol": ("push",)},
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

    def send_recv(self, n_bytes: int) -> Work:
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

    def allreduce(self, n_bytes: int) -> Work:
        """Into another array."""
        call = self._collective("allreduce")
        return reduction(self.rank, self.size, n_bytes, lambda x, out: call(x, "sum", out=out))

    def allgather(self, n_bytes: int) -> Work:
        """Into an array of the caller's."""
        call = self._collective("allgather")
        shape = (self.size, n_bytes)
        return collective(self.rank, self.size, "allgather", n_bytes, lambda x, out: call(x, out=out.reshape(shape)))

    def alltoall(self, n_bytes: int) -> Work:
        """Into an array of the caller's."""
        call = self._collective("alltoall")
        shape = (self.size, n_bytes)
        return collective(
            self.rank, self.size, "alltoall", n_bytes, lambda x, out: call(x.reshape(shape), out=out.reshape(shape))
        )

    def alltoallv(self, n_bytes: int) -> Work:
        """With what is to come known, as in MPI."""
        call, counts = self._collective("alltoallv"), np.full(self.size, n_bytes)
        return collective(
            self.rank, self.size, "alltoallv", n_bytes, lambda x, out: call(x, counts, out=out, recv_counts=counts)
        )

    def _collective(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] | None = getattr(self.comm, name, None)
        if method is None:
            raise NotComparableError(f"this version of xccl has no {name}")
        return method

    def moe(self, cell: Cell, variant: str) -> Work:
        """ExpertParallel."""
        shape = Shape.of(cell)
        ep = self._expert_parallel(shape, **_MOE[variant])
        inputs, is_dedup = Inputs.of(shape, self.rank), variant == "dedup"
        x, topk_idx, weights = inputs.x.view(BF16), inputs.topk_idx, inputs.weights
        sent_weights = {"topk_weights": weights} if is_dedup else {}
        late_weights = () if is_dedup else (weights,)
        d = ep.dispatch(x, topk_idx, **sent_weights)
        outputs = rows_of(len(d.tokens), shape.hidden).view(BF16)
        del d

        def round_trip() -> None:
            ep.combine(outputs, ep.dispatch(x, topk_idx, **sent_weights), *late_weights)

        def check() -> int:
            d = ep.dispatch(x, topk_idx, **sent_weights)
            values = as_float(d.tokens.view(np.uint16)) if d.scales is None else d.tokens * d.scales[:, None]
            local = np.repeat(self.rank * shape.local_experts + np.arange(shape.local_experts), d.counts)
            factor = expert_factor(local, shape)
            if is_dedup:
                factor = np.bincount(d.index["row"], d.weights * factor, len(values)).astype(np.float32)
            y = ep.combine(as_bits(values * factor[:, None]).view(BF16), d, *late_weights)
            return inputs.count_wrong(y.view(np.uint16), shape, tolerance=0.03 if variant == "int8" else 0.02)

        return Work(repeat(round_trip), check, close=ep.free, note=f"protocol {ep.protocol}")

    def _expert_parallel(self, shape: Shape, *, protocol: tuple[str, ...], **options: Any) -> xccl.ExpertParallel:
        """The first protocol that there is; all ranks find the same."""
        problem = ""
        for name in protocol:
            try:
                return xccl.ExpertParallel(
                    self.comm, num_experts=shape.experts, hidden=shape.hidden, top_k=shape.topk,
                    max_tokens=shape.tokens, dtype=BF16, protocol=name, **options,
                )  # fmt: skip
            except (xccl.UsageError, TypeError) as error:  # the options of another version
                problem = str(error)
        raise NotComparableError(f"this version of xccl does not have it: {problem}")
