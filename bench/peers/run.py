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
from bench.peers.table import Operation, contestants
from bench.peers.work import Cell
from xccl.cli.environment import environment

_MOST_CELL_S: Final = 30.0
_LEAST_CELL_S: Final = 0.5
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
        versions: of the libraries, once they have started.
    """

    cells: list[tuple[Operation, Cell]]
    peers: list[str]
    limit_s: float
    ways: tuple[str, ...] = ()
    say: Callable[[str], None] = print
    versions: dict[str, str] = field(default_factory=dict)


def run(plan: Plan) -> list[CellResult]:
    """Measure, and print a line for each way of xccl as soon as it is known."""
    begin, results = time.monotonic(), list[CellResult]()
    # One number of ranks after the other, and what has no target last: time may run out.
    cells = sorted(plan.cells, key=lambda pair: (pair[1].ranks, not _has_target(*pair)))
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
                taking_part = contestants(operation.ways(cell, plan.ways), plan.peers)
                if left_s > 0:
                    share_s = left_s * weight(cell) / sum(weight(rest) for _, rest in cells[len(results) :])
                    result = driver.measure(
                        operation, cell, taking_part, min(max(share_s, _LEAST_CELL_S), _MOST_CELL_S)
                    )
                else:
                    result = CellResult(operation, cell, {c: Entry(reason=_NO_TIME) for c in taking_part})
                results.append(result)
                for line in report.lines_of(result):
                    plan.say(str(line))
            plan.versions |= driver.versions
    for text in report.closing(results):
        plan.say(text)
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    plan.say(f"{time.monotonic() - begin:.0f} s; {versions}; load {os.getloadavg()[0]:.1f}")
    return results


def _has_target(operation: Operation, cell: Cell) -> bool:
    return any(comparison.limit(cell) is not None for comparison in operation.comparisons)


def weight(cell: Cell) -> int:
    """How much of the time a cell gets: MoE has many ways, and the longest operations."""
    return 4 if cell.op == "moe" else 1


def say_machine(say: Callable[[str], None]) -> None:
    """What the figures were measured on."""
    machine = environment()
    load = os.getloadavg()[0]
    say(
        f"emulated times, measured on {machine['cpu']}, {machine['usable_cores']} cores, load {load:.1f}: medians of "
        "turns; below 1 xccl is faster; of copy: how close xccl comes to a copy of the bytes that must move"
    )
    if load > 0.5:
        say("this machine is busy: only the ratios mean something")


def write_json(path: Path, results: Sequence[CellResult], versions: dict[str, str], command: Sequence[str]) -> None:
    """Write all figures."""
    path.write_text(json.dumps(report.to_json(results, versions, command), indent=2, allow_nan=False) + "\n")
