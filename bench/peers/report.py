"""Results as lines and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from bench.peers.driver import CellResult, Entry
from bench.peers.statistics import Ratio, ratio
from bench.peers.table import NOT_COMPARED, XCCL, Comparison, Contestant, size_name
from xccl.cli.environment import environment

SCHEMA: Final = 1

HEADER: Final = (
    f"{'operation':36} {'ranks':>5} {'size':>10}  {'xccl':8} {'us':>9}  {'peer':24} {'us':>9}  "
    f"{'xccl / peer, 95% interval':>26}  target"
)


@dataclass(frozen=True)
class Line:
    """xccl beside one peer in a cell; without figures if one of the two has none."""

    result: CellResult
    comparison: Comparison
    peer: str
    ratio: Ratio | None
    limit: float | None

    @property
    def ours(self) -> Entry:
        """The entry of xccl."""
        return self.result.entries[Contestant(XCCL, self.comparison.ours)]

    @property
    def theirs(self) -> Entry:
        """The entry of the peer."""
        return self.result.entries[Contestant(self.peer, self.comparison.theirs)]

    @property
    def verdict(self) -> str:
        """Of the limit, if this line has it."""
        return self.ratio.verdict(self.limit) if self.ratio and self.limit is not None else ""

    def __str__(self) -> str:
        operation, cell = self.result.operation, self.result.cell
        interval = f"{self.ratio.value:.2f} [{self.ratio.low:.2f}, {self.ratio.high:.2f}]" if self.ratio else "-"
        target = f"{self.limit:.2f} {self.verdict}" if self.limit is not None else ""
        pair = (("xccl", self.ours), ("peer", self.theirs))
        wrong = "".join(f"  {name}: {entry.wrong} WRONG" for name, entry in pair if entry.wrong)
        peer = str(Contestant(self.peer, self.comparison.theirs))
        return (
            f"{operation.title:36} {cell.ranks:5} {size_name(cell):>10}  {self.comparison.ours:8} {_us(self.ours):>9}  "
            f"{peer:24} {_us(self.theirs):>9}  {interval:>26}  {target}{wrong}"
        ).rstrip()


def lines_of(result: CellResult) -> list[Line]:
    """For each comparison a line for each peer that took part."""
    return [line for comparison in result.operation.comparisons for line in _lines(result, comparison)]


def _lines(result: CellResult, comparison: Comparison) -> Iterator[Line]:
    ours = result.entries.get(Contestant(XCCL, comparison.ours))
    if ours is None:
        return
    theirs = {
        contestant.library: entry
        for contestant, entry in result.entries.items()
        if contestant.library != XCCL and contestant.variant == comparison.theirs
    }
    medians = {name: us for name, entry in theirs.items() if (us := entry.median_us) is not None}
    fastest = min((name for name in comparison.against if name in medians), key=medians.__getitem__, default=None)
    for name, entry in theirs.items():
        has_both = bool(ours.turns_us and entry.turns_us)
        limit = comparison.limit(result.cell) if name == fastest and has_both else None
        yield Line(result, comparison, name, ratio(ours.turns_us, entry.turns_us) if has_both else None, limit)


def closing(results: Sequence[CellResult]) -> list[str]:
    """What the table does not say: targets counted, what has no figure and why, what cannot be compared."""
    counts = Counter(line.verdict for result in results for line in lines_of(result) if line.verdict)
    met, missed, unsure = (counts[verdict] for verdict in ("met", "missed", "unsure"))
    lines = [f"targets: {met} met, {missed} missed, {unsure} unsure (the limit lies in the interval)"]
    reasons: dict[tuple[str, str, str], list[str]] = {}
    notes: dict[str, None] = {}
    for result in results:
        where = f"{result.cell.ranks} ranks" if result.cell.op == "barrier" else size_name(result.cell)
        for contestant, entry in result.entries.items():
            if entry.reason:
                key = (str(contestant), result.operation.op, entry.reason)
                reasons.setdefault(key, []).append(f"{where} on {result.cell.ranks}")
            elif entry.note:
                notes[f"{contestant}, {result.operation.op}: {entry.note}"] = None
    for (contestant_name, op, reason), cells in reasons.items():
        seen = cells[0] if len(cells) == 1 else f"{len(cells)} cells"
        lines.append(f"no figure: {contestant_name}, {op} ({seen}): {reason}")
    lines += [f"note: {note}" for note in notes]
    return [*lines, *(f"not compared: {what}" for what in NOT_COMPARED)]


def to_json(results: Sequence[CellResult], versions: dict[str, str], command: Sequence[str]) -> dict[str, Any]:
    """A document of all figures, those of each turn included."""
    return {
        "schema": SCHEMA,
        "command": list(command),
        "environment": environment(),
        "versions": versions,
        "cells": [
            {
                **asdict(result.cell),
                "entries": [
                    {"library": c.library, "variant": c.variant, "median_us": entry.median_us, **asdict(entry)}
                    for c, entry in result.entries.items()
                ],
                "comparisons": [
                    {
                        "xccl": line.comparison.ours,
                        "peer": line.peer,
                        "variant": line.comparison.theirs,
                        "ratio": asdict(line.ratio) if line.ratio else None,
                        "limit": line.limit,
                        "verdict": line.verdict or None,
                    }
                    for line in lines_of(result)
                ],
            }
            for result in results
        ],
        "not_compared": list(NOT_COMPARED),
    }


def _us(entry: Entry) -> str:
    us = entry.median_us
    if us is None:
        return "-"
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}" if us >= 10 else f"{us:.3f}"
