"""KV-cache transfers of one pair: blocks of a few sizes, by the DMA engine and by the rank itself."""

from __future__ import annotations

from typing import Literal

import pytest

from bench.measure import Run
from xccl.cli.options import BenchOptions

#: Bytes of a block in one layer, blocks and layers of a request.
SHAPES = pytest.mark.parametrize(
    ("block_bytes", "blocks", "layers"),
    [pytest.param(4 << 10, 256, 4, id="4KiB"), pytest.param(64 << 10, 64, 4, id="64KiB")],
)
ENGINES = pytest.mark.parametrize("engine", ["dma", "mte"])


@SHAPES
@ENGINES
def bench_kv(run: Run, engine: Literal["dma", "mte"], block_bytes: int, blocks: int, layers: int) -> None:
    run(
        BenchOptions(
            op="kv", ranks=2, min_bytes=block_bytes, max_bytes=block_bytes, iters=30, warmup=3, blocks=blocks,
            layers=layers, engine=engine,
        )
    )  # fmt: skip
