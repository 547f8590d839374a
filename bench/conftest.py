"""The fixture that all benchmarks use."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.measure import Run, measure, ranks_clock, replay
from xccl.cli.options import BenchOptions


@pytest.fixture(autouse=True)
def _clock(request: pytest.FixtureRequest) -> None:
    """What ranks run is timed inside the ranks; comes before `benchmark`, which looks for the marker."""
    if "run" not in request.fixturenames:
        return
    request.node.add_marker(pytest.mark.benchmark(timer=ranks_clock))


@pytest.fixture
def run(benchmark: BenchmarkFixture) -> Run:
    """Measure an operation, check its results, and report it; a single iteration if benchmarks are off."""

    def run(options: BenchOptions, row: str | None = None) -> None:
        row = row or options.op
        if benchmark.disabled:
            options = replace(options, iters=1, warmup=0)
        batch = measure(options)[row]
        assert batch.row.wrong == 0, f"{batch.row.wrong} wrong elements in {row}"
        benchmark.group = row
        benchmark.extra_info.update(batch.extra_info())
        rounds = len(batch.times_s)
        benchmark.pedantic(replay(batch.times_s), rounds=rounds, iterations=1)  # type: ignore[no-untyped-call]

    return run
