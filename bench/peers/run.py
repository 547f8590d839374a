"""Runs cells: sessions by number of ranks, budgets by the time that is left, lines as they come."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.peers import report
from bench.peers.driver import CellResult, Driver, Entry
from bench.peers.moe import compile_loops
from bench.peers.table import XCCL, Contestant, Operation
from bench.peers.work import Cell
from xccl.cli.environment import environment

_MOST_CELL_S: Final = 8.0
_LEAST_CELL_S: Final = 0.5
#: The part of a cell's time that is for turns; the rest is data, checks and estimates. The clock corrects this guess.
_TURNS_PART: Final = 0.7
_NO_TIME: Final = "no time was left: give it more --minutes"


@dataclass
class Plan:
    """What to run.

    Attributes:
        cells: with their operation.
        peers: names of the libraries beside xccl.
        limit_s: time for all of it; cells get shorter to keep it.
        ways: of xccl; all if empty.
        say: prints a line.
    """

    cells: list[tuple[Operation, Cell]]
    peers: list[str]
    limit_s: float
    ways: tuple[str, ...] = ()
    say: Callable[[str], None] = print
    versions: dict[str, str] = field(default_factory=dict)

    def contestants(self, operation: Operation) -> list[Contestant]:
        """Of an operation."""
        found = operation.contestants(self.peers)
        if not self.ways:
            return found
        kept = [comparison for comparison in operation.comparisons if comparison.ours in self.ways]
        theirs = {comparison.theirs for comparison in kept}
        return [c for c in found if c.variant in (self.ways if c.library == XCCL else theirs)]


def run(plan: Plan) -> list[CellResult]:
    """Measure, and print a line for each comparison as soon as it is known."""
    begin, results = time.monotonic(), list[CellResult]()
    cells = sorted(plan.cells, key=lambda pair: pair[1].ranks)  # one number of ranks after the other
    say_machine(plan.say)
    plan.say(report.HEADER)
    if any(cell.op == "moe" for _, cell in cells):
        compile_loops()
    for ranks in dict.fromkeys(cell.ranks for _, cell in cells):
        with Driver(ranks) as driver:
            for operation, cell in cells:
                if cell.ranks != ranks:
                    continue
                left_s = plan.limit_s - (time.monotonic() - begin)
                contestants = plan.contestants(operation)
                if left_s > 0:
                    budget_s = min(max(_TURNS_PART * left_s / (len(cells) - len(results)), _LEAST_CELL_S), _MOST_CELL_S)
                    result = driver.measure(operation, cell, contestants, budget_s)
                else:
                    result = CellResult(operation, cell, {c: Entry(reason=_NO_TIME) for c in contestants})
                results.append(result)
                for line in report.lines_of(result):
                    plan.say(str(line))
            plan.versions |= driver.versions
    for line in report.closing(results):
        plan.say(line)
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    plan.say(f"{time.monotonic() - begin:.0f} s; {versions}; load {os.getloadavg()[0]:.1f}")
    return results


def say_machine(say: Callable[[str], None]) -> None:
    """What the figures were measured on."""
    machine = environment()
    load = os.getloadavg()[0]
    say(
        f"emulated times, measured on {machine['cpu']}, {machine['usable_cores']} cores, load {load:.1f}: medians of "
        "turns; below 1 xccl is faster"
    )
    if load > 0.5:
        say("this machine is busy: only the ratios mean something")


def write_json(path: Path, results: Sequence[CellResult], versions: dict[str, str], command: Sequence[str]) -> None:
    """Write all figures."""
    path.write_text(json.dumps(report.to_json(results, versions, command), indent=2) + "\n")
