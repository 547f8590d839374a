"""The cells in gloo, through torch.distributed on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.peers.collectives import Call, collective
from bench.peers.moe import Moe, Shape
from bench.peers.work import Array, Cell, Library, NotComparableError, Work, one_way, ping_pong

_START_TIMEOUT_S = 60


class Gloo(Library):
    """The default process group; ranks find each other through a file."""

    def __init__(self, rank: int, ranks: int, folder: Path) -> None:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder / 'gloo'}", rank=rank, world_size=ranks,
            timeout=timedelta(seconds=_START_TIMEOUT_S),
        )  # fmt: skip
        self.rank, self.size, self.version = rank, ranks, f"torch {version('torch')}"
        self.barrier = dist.barrier

    def sendrecv(self, n_bytes: int) -> Work:
        """Blocking send and recv."""
        peer = 1 - self.rank
        return ping_pong(
            self.rank, n_bytes, lambda x: dist.send(_tensor(x), peer), lambda x: dist.recv(_tensor(x), peer)
        )

    def stream(self, n_bytes: int) -> Work:
        """Windows of isend and irecv."""

        def windows(start: Callable[..., Any]) -> Callable[[Array, int], None]:
            def window(buffer: Array, count: int) -> None:
                tensor = _tensor(buffer)
                for request in [start(tensor, 1 - self.rank) for _ in range(count)]:
                    request.wait()

            return window

        return one_way(self.rank, n_bytes, windows(dist.isend), windows(dist.irecv))

    def put_signal(self, n_bytes: int) -> Work:
        """Not there."""
        raise NotComparableError("gloo has no one-sided operations")

    put = put_signal

    def collective(self, op: str, n_bytes: int, variant: str) -> Work:
        """The function of that name; allreduce is in place, there is no other."""
        size, root = self.size, self.rank == 0
        counts = [n_bytes] * size

        def parts(array: Array) -> Any:
            return list(_tensor(array).chunk(size)) if root else None

        calls: dict[str, Call] = {
            "allreduce": lambda _, out: dist.all_reduce(_tensor(out)),
            "allgather": lambda x, out: dist.all_gather_into_tensor(_tensor(out), _tensor(x)),
            "alltoall": lambda x, out: dist.all_to_all_single(_tensor(out), _tensor(x)),
            "alltoallv": lambda x, out: dist.all_to_all_single(_tensor(out), _tensor(x), counts, counts),
            "reduce-scatter": lambda x, out: dist.reduce_scatter_tensor(_tensor(out), _tensor(x)),
            "broadcast": lambda x, _: dist.broadcast(_tensor(x), 0),
            "gather": lambda x, out: dist.gather(_tensor(x), parts(out), 0),
            "scatter": lambda x, out: dist.scatter(_tensor(out), parts(x), 0),
        }
        return collective(self.rank, size, op, n_bytes, calls[op])

    def moe(self, cell: Cell, variant: str) -> Work:
        """all_to_all_single and numba."""
        return Moe(self, Shape.of(cell), variant).work()

    def exchange_counts(self, send: Array, recv: Array) -> None:
        """Without splits."""
        dist.all_to_all_single(_tensor(recv), _tensor(send))

    def exchange_rows(self, send: Array, sent: Array, recv: Array, received: Array) -> None:
        """With splits, on the part of the tensors that is used."""
        dist.all_to_all_single(
            _tensor(recv[: received.sum()]), _tensor(send[: sent.sum()]), received.tolist(), sent.tolist()
        )


def _tensor(array: Array) -> Any:
    """The same memory; 16-bit elements as float16, the only ones that gloo moves."""
    return torch.from_numpy(array.view(np.float16) if array.dtype == np.uint16 else array)
