"""Run an operation of `xccl bench` on ranks, and give the times measured inside them to pytest-benchmark.

What is measured. Ranks are processes, and launching them takes longer than most operations. So a whole batch of
iterations runs inside the ranks, by the very code of `xccl bench`: warm-up, then for each iteration a barrier, a look
at the clock, the operation, a look at the clock. The time of an iteration is that of its slowest rank. Launch, set-up,
barrier and check are outside of it.

How it gets to pytest-benchmark. Its clock is replaced, by the documented `timer` option, with `ranks_clock`: time that
ranks spent in operations. One round of a benchmark is one iteration, whose target moves that clock on by what was
measured (`replay`). So min, median and all other columns are over iterations, and mean the same as in `xccl bench`. The
alternative, ranks that live on and are told to run one more iteration in each round, would wake them from sleep in
between, and measure cold caches.

Every batch ends with an iteration on fresh data that is checked against the oracle; a rank that fails or dies makes
`measure` raise at once, as `xccl.launch` does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

import xccl
from xccl.cli.bench_rank import run_rank
from xccl.cli.options import BenchOptions
from xccl.cli.results import Measurement, Row

#: A batch that takes longer than this hangs. Less than the time limit of a test, so that ranks say where they are.
_LAUNCH_TIMEOUT_S = 100.0
_OP_TIMEOUT_S = 20.0

#: What the fixture `run` gives to a benchmark: called with options, and the row to report if not the operation's own.
Run = Callable[..., None]

_ranks_time_s = 0.0


def ranks_clock() -> float:
    """Seconds that the slowest ranks of the iterations replayed so far spent in them: a timer for pytest-benchmark."""
    return _ranks_time_s


def replay(times_s: npt.NDArray[np.float64]) -> Callable[[], None]:
    """A benchmark target whose calls take the given times on `ranks_clock`, in turn, and again from the start."""
    remaining = itertools.cycle(times_s.tolist())

    def target() -> None:
        global _ranks_time_s
        _ranks_time_s += next(remaining)

    return target


@dataclass(frozen=True)
class Batch:
    """Iterations of one operation, measured.

    Attributes:
        row: what `xccl bench` says of them.
        times_s: [iterations], the slowest rank of each.
    """

    row: Row
    times_s: npt.NDArray[np.float64]

    @classmethod
    def of(cls, options: BenchOptions, measurements: list[Measurement]) -> Batch:
        """From what all ranks measured of the same iterations."""
        slowest_ns = np.max(np.stack([m.times_ns for m in measurements]), axis=0)
        return cls(Row.of(options, measurements), slowest_ns / 1e9)

    def extra_info(self) -> dict[str, Any]:
        """What tells this benchmark from others, and figures that follow from the median."""
        row = self.row
        moe = row.tokens is not None
        info: dict[str, Any] = {
            "op": row.op, "ranks": row.ranks, "fabric": row.fabric, "bytes": row.bytes, "dtype": row.dtype,
            "shape": [row.tokens, row.hidden] if moe else [row.bytes],
        }  # fmt: skip
        if moe:
            names = ("tokens", "hidden", "experts", "topk", "quant", "protocol", "routing", "tokens_per_s")
            info |= {name: getattr(row, name) for name in names}
        if row.bytes:
            info["algbw_gbps"] = row.algbw_gbps
        return info


@cache
def measure(options: BenchOptions) -> dict[str, Batch]:
    """Run and check a batch on new ranks, by name of the operation.

    The same options are measured once only: those of "moe" give the batches of dispatch, combine and both.

    Raises:
        Exception: what `xccl.launch` raises, for example a rank's own exception.
    """
    by_op: dict[str, list[Measurement]] = {}
    xccl.launch(
        run_rank,
        options.ranks,
        args=(options,),
        fabric=options.fabric,
        timeout_s=_LAUNCH_TIMEOUT_S,
        op_timeout_s=_OP_TIMEOUT_S,
        on_report=lambda _rank, measurement: by_op.setdefault(measurement.op, []).append(measurement),
    )
    return {op: Batch.of(options, measurements) for op, measurements in by_op.items()}
