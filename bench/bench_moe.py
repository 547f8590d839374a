"""Dispatch, combine, and both in turn, in the shape of DeepSeek-R1 but for the number of experts.

All three are measured in one launch, by whichever of them comes first.
"""

from __future__ import annotations

import pytest

from bench.measure import Run
from xccl.cli.options import BenchOptions

#: Ranks, tokens of a rank, quantisation, protocol, rows: INT8 pull everywhere, others where few or most are sent.
SHAPES = pytest.mark.parametrize(
    ("ranks", "tokens", "quant", "protocol", "rows"),
    [(ranks, tokens, "int8", "pull", "expanded") for ranks in (2, 4, 8) for tokens in (8, 128)]
    + [(8, tokens, "none", "pull", "expanded") for tokens in (8, 128)]
    + [(ranks, tokens, "int8", "push", "expanded") for ranks in (2, 8) for tokens in (8, 128)]
    + [(8, 128, "int8", protocol, "dedup") for protocol in ("pull", "push", "direct")]
    + [(ranks, tokens, "none", "direct", "expanded") for ranks in (2, 8) for tokens in (8, 128)],
)


def _options(ranks: int, tokens: int, quant: str, protocol: str, rows: str) -> BenchOptions:
    iters = 100 if tokens <= 8 else 30
    return BenchOptions(
        op="moe", ranks=ranks, tokens=(tokens,), hidden=7168, experts=32, topk=8, quant=quant, iters=iters,
        protocol=protocol, rows=rows,
    )  # fmt: skip


@SHAPES
def bench_dispatch(run: Run, ranks: int, tokens: int, quant: str, protocol: str, rows: str) -> None:
    run(_options(ranks, tokens, quant, protocol, rows), "dispatch")


@SHAPES
def bench_combine(run: Run, ranks: int, tokens: int, quant: str, protocol: str, rows: str) -> None:
    run(_options(ranks, tokens, quant, protocol, rows), "combine")


@SHAPES
def bench_moe(run: Run, ranks: int, tokens: int, quant: str, protocol: str, rows: str) -> None:
    run(_options(ranks, tokens, quant, protocol, rows), "moe")
