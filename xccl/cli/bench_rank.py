"""What each rank of a benchmark runs: warm up, time, check, report; for every row."""

from __future__ import annotations

import gc
from collections.abc import Callable
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from xccl.cli.bench_ops import BENCHMARKS
from xccl.cli.options import BenchOptions
from xccl.cli.results import Measurement
from xccl.trace.record import Operation as TracedOperation

if TYPE_CHECKING:
    from xccl.comm.communicator import Communicator


def run_rank(comm: Communicator, options: BenchOptions) -> None:
    """Run all cases; measurements go to the parent as they are made."""
    benchmark = BENCHMARKS[options.op]
    cases = benchmark.cases(options)
    operation = benchmark.make(comm, options, cases)
    for case in cases:
        for part in operation.parts(case):
            for _ in range(options.warmup):
                part.step()
            times_ns = _timed(comm, part.step, options.iterations(case), options.back_to_back)
            comm.barrier()
            wrong = part.check() if options.check else None
            traced = _traced(comm, part.step, options.traced) if options.traced else None
            reach, size = comm.core.fabric.reached, part.payload_bytes
            comm.report(Measurement(part.op, case, times_ns, size, part.rows_received, wrong, traced, reach))


def _traced(comm: Communicator, step: Callable[[], object], iters: int) -> list[TracedOperation]:
    """The operations of so many iterations, without the barriers between them."""
    found: list[TracedOperation] = []
    for _ in range(iters):
        comm.barrier()
        with comm.trace() as recorder:
            step()
        found += recorder.operations
    return found


def _timed(comm: Communicator, step: Callable[[], object], iters: int, back_to_back: bool) -> npt.NDArray[Any]:
    """Nanoseconds of each iteration, [iters], or of the mean iteration, [1]."""
    collecting = gc.isenabled()
    gc.disable()  # as timeit does: a collection is not part of the operation
    try:
        if back_to_back:
            comm.barrier()
            start = perf_counter_ns()
            for _ in range(iters):
                step()
            return np.array([(perf_counter_ns() - start) / iters])
        times_ns = np.zeros(iters, np.int64)
        for i in range(iters):
            comm.barrier()
            start = perf_counter_ns()
            step()
            times_ns[i] = perf_counter_ns() - start
        return times_ns
    finally:
        if collecting:
            gc.enable()
