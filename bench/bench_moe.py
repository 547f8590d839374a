"""Dispatch, combine, and both in turn, in the shape of DeepSeek-R1 but for the number of experts.

All three are measured in one launch, by whichever of them comes first.
"""

from __future__ import annotations

import pytest

from bench.measure import Run
from xccl.cli.options import BenchOptions

#: Ranks, tokens of a rank, quantisation: INT8 everywhere, and none where most is sent.
SHAPES = pytest.mark.parametrize(
    ("ranks", "tokens", "quant"),
    [(ranks, tokens, "int8") for ranks in (2, 4, 8) for tokens in (8, 128)] + [(8, 8, "none"), (8, 128, "none")],
)


def _options(ranks: int, tokens: int, quant: str, protocol: str = "pull") -> BenchOptions:
    iters = 100 if tokens <= 8 else 30
    return BenchOptions(
        op="moe", ranks=ranks, tokens=(tokens,), hidden=7168, experts=32, topk=8, quant=quant, iters=iters,
        protocol=protocol,
    )  # fmt: skip


@SHAPES
def bench_dispatch(run: Run, ranks: int, tokens: int, quant: str) -> None:
    run(_options(ranks, tokens, quant), "dispatch")


@SHAPES
def bench_combine(run: Run, ranks: int, tokens: int, quant: str) -> None:
    run(_options(ranks, tokens, quant), "combine")


@SHAPES
def bench_moe(run: Run, ranks: int, tokens: int, quant: str) -> None:
    run(_options(ranks, tokens, quant), "moe")


@SHAPES
def bench_moe_direct(run: Run, ranks: int, tokens: int, quant: str) -> None:
    run(_options(ranks, tokens, quant, "direct"), "moe")
