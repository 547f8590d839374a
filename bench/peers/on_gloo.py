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

from bench.peers.moe import Moe, Shape
from bench.peers.work import Array, Cell, Library, NotComparableError, Work, collective, one_way, ping_pong, reduction

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

    def send_recv(self, n_bytes: int) -> Work:
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

    def allreduce(self, n_bytes: int) -> Work:
        """In place: gloo has no other."""
        return reduction(self.rank, self.size, n_bytes, lambda _, out: dist.all_reduce(_tensor(out)))

    def allgather(self, n_bytes: int) -> Work:
        """Into one tensor."""
        return collective(
            self.rank, self.size, "allgather", n_bytes,
            lambda x, out: dist.all_gather_into_tensor(_tensor(out), _tensor(x)),
        )  # fmt: skip

    def alltoall(self, n_bytes: int) -> Work:
        """all_to_all_single without splits."""
        return collective(
            self.rank, self.size, "alltoall", n_bytes, lambda x, out: dist.all_to_all_single(_tensor(out), _tensor(x))
        )

    def alltoallv(self, n_bytes: int) -> Work:
        """all_to_all_single with splits."""
        counts = [n_bytes] * self.size
        return collective(
            self.rank, self.size, "alltoallv", n_bytes,
            lambda x, out: dist.all_to_all_single(_tensor(out), _tensor(x), counts, counts),
        )  # fmt: skip

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
