"""Collectives: small, middling and large, by ranks. A size is that of the larger of a rank's two buffers."""

from __future__ import annotations

import pytest

from bench.measure import Run
from xccl.cli.options import BenchOptions

#: Bytes and iterations.
SIZES = pytest.mark.parametrize(
    ("n_bytes", "iters"),
    [pytest.param(8, 500, id="8B"), pytest.param(64 << 10, 200, id="64KiB"), pytest.param(4 << 20, 20, id="4MiB")],
)
RANKS = pytest.mark.parametrize("ranks", [2, 4, 8])


def _options(op: str, ranks: int, n_bytes: int, iters: int) -> BenchOptions:
    return BenchOptions(
        op=op, ranks=ranks, min_bytes=n_bytes, max_bytes=n_bytes, iters=iters, warmup=10, dtype="fp32"
    )  # fmt: skip


@SIZES
@RANKS
@pytest.mark.parametrize(
    "op", ["allreduce", "allgather", "reduce-scatter", "alltoall", "alltoallv", "broadcast", "gather", "scatter"]
)
def bench_collective(run: Run, op: str, ranks: int, n_bytes: int, iters: int) -> None:
    run(_options(op, ranks, n_bytes, iters))
