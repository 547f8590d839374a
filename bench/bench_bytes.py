"""put, get, put_signal and send/receive: each of two ranks to or from the other, at the same time."""

from __future__ import annotations

import pytest

from bench.measure import Run
from xccl.cli.options import BenchOptions

#: Bytes and iterations.
SIZES = pytest.mark.parametrize(
    ("n_bytes", "iters"),
    [pytest.param(8, 1000, id="8B"), pytest.param(64 << 10, 500, id="64KiB"), pytest.param(1 << 20, 200, id="1MiB")],
)


def _options(op: str, n_bytes: int, iters: int) -> BenchOptions:
    return BenchOptions(op=op, ranks=2, min_bytes=n_bytes, max_bytes=n_bytes, iters=iters, warmup=20)


@SIZES
def bench_put(run: Run, n_bytes: int, iters: int) -> None:
    run(_options("put", n_bytes, iters))


@SIZES
def bench_get(run: Run, n_bytes: int, iters: int) -> None:
    run(_options("get", n_bytes, iters))


@SIZES
def bench_put_signal(run: Run, n_bytes: int, iters: int) -> None:
    run(_options("put-signal", n_bytes, iters))


@SIZES
def bench_sendrecv(run: Run, n_bytes: int, iters: int) -> None:
    run(_options("sendrecv", n_bytes, iters))
