"""The barrier."""

from __future__ import annotations

import pytest

from bench.measure import Run
from xccl.cli.options import BenchOptions


@pytest.mark.parametrize("ranks", [2, 4, 8])
def bench_barrier(run: Run, ranks: int) -> None:
    run(BenchOptions(op="barrier", ranks=ranks, iters=1000, warmup=20))
