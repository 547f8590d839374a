"""Published measurements: what the model is calibrated on, and compared with."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class PublishedRow:
    """One published figure.

    Attributes:
        source: paper and table.
        operation: dispatch or combine.
        implementation: what was measured.
        ep: number of ranks.
        tokens: tokens of each rank.
        hidden: elements of a token.
        top_k: experts of a token.
        latency_us: the figure.
    """

    source: str
    operation: str
    implementation: str
    ep: int
    tokens: int
    hidden: int
    top_k: int
    latency_us: float


def published_rows(implementation: str | None = None) -> list[PublishedRow]:
    """All rows of published.csv, or those of one implementation."""
    text = (resources.files(__package__) / "published.csv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    rows = [
        PublishedRow(
            source=row["source"],
            operation=row["operation"],
            implementation=row["implementation"],
            ep=int(row["ep"]),
            tokens=int(row["batch_per_rank"]),
            hidden=int(row["hidden"]),
            top_k=int(row["top_k"]),
            latency_us=float(row["latency_us"]),
        )
        for row in csv.DictReader(lines)
    ]
    return [row for row in rows if implementation in (None, row.implementation)]
