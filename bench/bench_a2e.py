"""A2E and E2A: one domain directly and by way of trampolines, and three domains that take turns."""

from __future__ import annotations

import pytest

from bench.measure import Run
from xccl.cli.deployment import Deployment
from xccl.cli.options import BenchOptions

#: Route, domains, microbatches.
SHAPES = pytest.mark.parametrize(
    ("route", "domains", "microbatches"), [("direct", 1, 1), ("trampoline", 1, 1), ("trampoline", 3, 2)]
)


def _options(op: str, route: str, domains: int, microbatches: int) -> BenchOptions:
    deployment = Deployment(attention=2, route=route, domains=domains, microbatches=microbatches)
    return BenchOptions(
        op=op, ranks=deployment.attention_dies + 4, tokens=(96,), hidden=7168, experts=4, topk=4, iters=30,
        deployment=deployment,
    )  # fmt: skip


@SHAPES
def bench_a2e(run: Run, route: str, domains: int, microbatches: int) -> None:
    run(_options("a2e", route, domains, microbatches))


@SHAPES
def bench_e2a(run: Run, route: str, domains: int, microbatches: int) -> None:
    run(_options("e2a", route, domains, microbatches))
