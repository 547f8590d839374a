"""Results as lines and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from bench.peers.driver import CellResult, Entry
from bench.peers.names import COPY, PEERS, XCCL
from bench.peers.statistics import Ratio, ratio
from bench.peers.table import Comparison, Contestant, differences, size_name
from xccl.cli.environment import environment

SCHEMA: Final = 2

HEADER: Final = (
    f"{'operation':25} {'ranks':>5} {'size':>10}  {'way':9} {'xccl us':>9} {'of copy':>7}  {'peer':15} {'us':>9}  "
    f"{'xccl / peer, 95% interval':>25}  {'target':11}  others"
)


@dataclass(frozen=True)
class Line:
    """A way of xccl beside its peers in a cell.

    Attributes:
        result: the cell.
        comparison: the way.
        ratios: to each peer that took part; None if one of the two has no figure.
        against: the peer that the limit is for: the fastest of those it names that have a figure.
    """

    result: CellResult
    comparison: Comparison
    ratios: dict[str, Ratio | None]
    against: str | None

    @property
    def ours(self) -> Entry:
        """The entry of xccl."""
        return self.result.entries[Contestant(XCCL, self.comparison.ours)]

    def theirs(self, peer: str) -> Entry:
        """The entry of a peer."""
        return self.result.entries[Contestant(peer, self.comparison.theirs)]

    @property
    def limit(self) -> float | None:
        """Of the ratio to `against`."""
        return None if self.against is None else self.comparison.limit(self.result.cell)

    @property
    def ratio(self) -> Ratio | None:
        """That the limit is for."""
        return None if self.against is None else self.ratios[self.against]

    @property
    def verdict(self) -> str:
        """Of the limit, if this line has one."""
        return self.ratio.verdict(self.limit) if self.ratio and self.limit is not None else ""

    @property
    def of_copy(self) -> float | None:
        """The time of a copy of what has to move over that of xccl."""
        floor = self.result.entries.get(Contestant(COPY, self.comparison.floor))
        copy_us, ours_us = floor and floor.median_us, self.ours.median_us
        return copy_us / ours_us if copy_us and ours_us else None

    @property
    def name(self) -> str:
        """The cell and the way."""
        operation, cell = self.result.operation, self.result.cell
        return f"{operation.title:25} {cell.ranks:5} {size_name(cell):>10}  {self.comparison.ours:9}"

    def __str__(self) -> str:
        first = self.against or next(iter(self.ratios), "")
        found = self.ratios.get(first)
        others = (f"{peer} {found.value:.2f}" for peer, found in self.ratios.items() if found and peer != first)
        wrong = {XCCL: self.ours.wrong} | {peer: self.theirs(peer).wrong for peer in self.ratios}
        return (
            f"{self.name} {_us(self.ours.median_us):>9} {'-' if self.of_copy is None else f'{self.of_copy:.0%}':>7}  "
            f"{first:15} {_us(self.theirs(first).median_us) if first else '-':>9}  "
            f"{f'{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]' if found else '-':>25}  "
            f"{'' if self.limit is None else f'{self.limit:.2f} {self.verdict}':11}  {', '.join(others)}"
            f"{''.join(f'  {name}: {count} WRONG' for name, count in wrong.items() if count)}"
        ).rstrip()


def lines_of(result: CellResult) -> list[Line]:
    """One for each way of xccl that took part."""
    taking_part = result.entries
    return [
        _line(result, comparison)
        for comparison in result.operation.comparisons
        if Contestant(XCCL, comparison.ours) in taking_part
    ]


def _line(result: CellResult, comparison: Comparison) -> Line:
    ours = result.entries[Contestant(XCCL, comparison.ours)]
    theirs = {peer: entry for peer in PEERS if (entry := result.entries.get(Contestant(peer, comparison.theirs)))}
    ratios = {
        peer: ratio(ours.turns_us, entry.turns_us) if ours.turns_us and entry.turns_us else None
        for peer, entry in theirs.items()
    }
    medians = {peer: us for peer, entry in theirs.items() if ratios[peer] and (us := entry.median_us) is not None}
    fastest = min((peer for peer in comparison.against if peer in medians), key=medians.__getitem__, default=None)
    return Line(result, comparison, ratios, fastest)


def closing(results: Sequence[CellResult]) -> list[str]:
    """What the table does not say.

    Targets counted, and those missed, farthest first; what was disturbed; what has no figure and why; what cannot be
    compared.
    """
    lines = [line for result in results for line in lines_of(result)]
    counts = Counter(line.verdict for line in lines if line.verdict)
    met, missed, unsure = (counts[verdict] for verdict in ("met", "missed", "unsure"))
    texts = [f"targets: {met} met, {missed} missed, {unsure} unsure (the limit lies in the interval)"]
    behind = [
        (line.ratio.value / line.limit, line)
        for line in lines
        if line.verdict == "missed" and line.ratio and line.limit
    ]
    texts += [
        f"missed: {line.name} {times:.2f} times the limit" for times, line in sorted(behind, key=lambda pair: -pair[0])
    ]
    turns = sum(int(np.isfinite(entry.turns_us).sum()) for result in results for entry in result.entries.values())
    disturbed = sum(entry.disturbed for result in results for entry in result.entries.values())
    if disturbed:
        texts.append(f"disturbed: in {disturbed} of {turns} turns other processes took a core in every block")
    return [*texts, *_reasons_and_notes(results), *(f"not quite the same: {text}" for text in _differences(results))]


def _reasons_and_notes(results: Sequence[CellResult]) -> list[str]:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    notes: dict[str, None] = {}
    for result in results:
        cell = result.cell
        for contestant, entry in result.entries.items():
            if entry.reason and contestant.library != COPY:
                cells = reasons.setdefault((str(contestant), cell.op, entry.reason), [])
                cells.append(f"{size_name(cell)} on {cell.ranks}")
            elif entry.note:
                notes[f"{contestant}, {cell.op}: {entry.note}"] = None
    return [
        *(
            f"no figure: {who}, {op} ({cells[0] if len(cells) == 1 else f'{len(cells)} cells'}): {reason}"
            for (who, op, reason), cells in reasons.items()
        ),
        *(f"note: {note}" for note in notes),
    ]


def _differences(results: Sequence[CellResult]) -> list[str]:
    return differences((result.cell.op, contestant.library) for result in results for contestant in result.entries)


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
                    {
                        **asdict(entry),
                        "library": c.library,
                        "variant": c.variant,
                        "median_us": entry.median_us,
                        "turns_us": [_finite(us) for us in entry.turns_us],
                    }
                    for c, entry in result.entries.items()
                ],
                "comparisons": [
                    {
                        "xccl": line.comparison.ours,
                        "variant": line.comparison.theirs,
                        "ratios": {peer: found and _ratio(found) for peer, found in line.ratios.items()},
                        "against": line.against,
                        "limit": line.limit,
                        "verdict": line.verdict or None,
                        "of_copy": line.of_copy,
                    }
                    for line in lines_of(result)
                ],
            }
            for result in results
        ],
        "differences": _differences(results),
    }


def _finite(number: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return number if math.isfinite(number) else None


def _ratio(found: Ratio) -> dict[str, float | None]:
    return {name: _finite(number) for name, number in asdict(found).items()}


def _us(us: float | None) -> str:
    if us is None:
        return "-"
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}" if us >= 10 else f"{us:.3f}"
