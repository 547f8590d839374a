"""What a benchmark yields: measurements of single ranks, and rows made of those of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from xccl.cli.options import BenchOptions, Case
from xccl.cli.stats import TimeStats, bandwidth_gbps, bus_factor
from xccl.layout.ring import REACH_NONE
from xccl.trace.record import Operation


@dataclass(frozen=True)
class Measurement:
    """One row as one rank saw it; sent to the parent.

    Attributes:
        op: Name of the row.
        case: Its size.
        times_ns: int64 [iterations], or [1], the mean, when measured back to back.
        payload_bytes: What this rank sends in an iteration.
        rows_received: MoE only: token copies that this rank receives in an iteration.
        wrong: Wrong elements at this rank, None if not checked.
        traced: The operations of further iterations, if they are asked for.
        reach: How the other ranks reach private memory of this one: one of the REACH_ codes.
    """

    op: str
    case: Case
    times_ns: npt.NDArray[Any]
    payload_bytes: int
    rows_received: int | None
    wrong: int | None
    traced: list[Operation] | None = None
    reach: int = REACH_NONE


@dataclass(frozen=True)
class Row:
    """One line of the table: an operation at one size, over all ranks. Times are emulated: measured here."""

    op: str
    ranks: int
    fabric: str
    bytes: int
    dtype: str | None
    tokens: int | None
    hidden: int | None
    experts: int | None
    topk: int | None
    protocol: str | None
    rows: str | None
    quant: str | None
    routing: str | None
    iters: int
    back_to_back: bool
    time_us: TimeStats
    algbw_gbps: float
    busbw_gbps: float
    tokens_per_s: float | None
    load_imbalance: float | None
    wrong: int | None
    projected: dict[str, Any] | None = None

    @classmethod
    def of(cls, options: BenchOptions, measurements: Sequence[Measurement]) -> Row:
        """From the measurements of all ranks.

        `bytes` is the mean payload of a rank. `tokens_per_s` counts the tokens of all ranks; `load_imbalance` is the
        rows that the most loaded rank receives over the mean.
        """
        first = measurements[0]
        case = first.case
        moe = case.tokens is not None
        size_bytes = round(np.mean([m.payload_bytes for m in measurements]))
        stats = TimeStats.of([m.times_ns for m in measurements])
        algbw = bandwidth_gbps(size_bytes, stats.p50)
        received = [m.rows_received for m in measurements if m.rows_received is not None]
        wrong = [m.wrong for m in measurements if m.wrong is not None]
        return cls(
            op=first.op,
            ranks=options.ranks,
            fabric=options.fabric,
            bytes=size_bytes,
            dtype=options.dtype if moe or case.size_bytes is not None else None,
            tokens=case.tokens,
            hidden=options.hidden if moe else None,
            experts=options.experts if moe else None,
            topk=options.topk if moe else None,
            protocol=_protocol(options) if moe else None,
            rows=options.rows if moe else None,
            quant=options.quant if moe else None,
            routing=options.routing if moe else None,
            iters=options.iterations(case),
            back_to_back=options.back_to_back,
            time_us=stats,
            algbw_gbps=algbw,
            busbw_gbps=algbw * bus_factor(first.op, options.ranks),
            tokens_per_s=case.tokens * options.batches / stats.p50 * 1e6 if case.tokens and stats.p50 else None,
            load_imbalance=_imbalance(received) if received else None,
            wrong=sum(wrong) if wrong else None,
        )

    def as_json(self) -> dict[str, Any]:
        """The row in the JSON schema."""
        return asdict(self)


def _protocol(options: BenchOptions) -> str:
    """A deployment's protocol is its route: both are pulls."""
    return options.protocol if options.deployment is None else options.deployment.route


def _imbalance(loads: Sequence[int]) -> float:
    return max(loads) * len(loads) / sum(loads) if any(loads) else 1.0


class Collector:
    """Gathers the measurements of ranks as they come, and completes rows.

    Attributes:
        rows: those that are complete.
        measurements: what each of them was made of, by rank.
    """

    def __init__(self, options: BenchOptions, on_row: Callable[[Row], None]) -> None:
        self.rows: list[Row] = []
        self.measurements: list[list[Measurement]] = []
        self._options = options
        self._on_row = on_row
        self._by_rank: list[list[Measurement]] = [[] for _ in range(options.ranks)]

    def on_report(self, rank: int, measurement: Any) -> None:
        """Take one measurement; ranks report their rows in the same order."""
        self._by_rank[rank].append(measurement)
        at = len(self.rows)
        if all(len(measurements) > at for measurements in self._by_rank):
            of_row = [measurements[at] for measurements in self._by_rank]
            row = Row.of(self._options, of_row)
            self.measurements.append(of_row)
            self.rows.append(row)
            self._on_row(row)

    def project(self, projected: Callable[[Sequence[Measurement]], dict[str, Any]]) -> None:
        """Add to each row what a model says of it; not before the run is over, as it takes time from the ranks."""
        for at, of_row in enumerate(self.measurements):
            self.rows[at] = replace(self.rows[at], projected=projected(of_row))

    @property
    def wrong(self) -> int:
        """Wrong elements of all rows so far."""
        return sum(row.wrong or 0 for row in self.rows)
