"""From the raw times of all ranks to the figures of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

#: Of these each rank keeps its own share (on average, for MoE).
_ALL_TO_ALL: Final = frozenset(
    {"dispatch", "combine", "moe", "allgather", "reduce-scatter", "alltoall", "alltoallv", "gather", "scatter"}
)


@dataclass(frozen=True)
class TimeStats:
    """Times of the iterations of one row, each that of its slowest rank, in microseconds."""

    min: float
    p50: float
    p90: float
    p99: float
    max: float
    mean: float

    @classmethod
    def of(cls, times_ns: Sequence[npt.NDArray[Any]]) -> TimeStats:
        """From the times of each rank, [iterations] nanoseconds each."""
        slowest_us = np.max(np.stack(times_ns), axis=0) / 1e3
        p50, p90, p99 = np.percentile(slowest_us, (50, 90, 99)).tolist()
        return cls(float(slowest_us.min()), p50, p90, p99, float(slowest_us.max()), float(slowest_us.mean()))


def bandwidth_gbps(size_bytes: float, time_us: float) -> float:
    """10^9 bytes a second; 0 when there is nothing to divide."""
    return size_bytes / time_us / 1e3 if time_us > 0 else 0.0


def bus_factor(op: str, ranks: int) -> float:
    """The part of the bytes that leaves a rank, which is busbw / algbw; as in nccl-tests."""
    if op == "allreduce":
        return 2 * (ranks - 1) / ranks
    return (ranks - 1) / ranks if op in _ALL_TO_ALL else 1.0
