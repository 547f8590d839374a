"""The comparison with other libraries, without any of them: statistics, limits, turns, and what becomes of failures."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.peers import report
from bench.peers.driver import CellResult, Driver, Entry
from bench.peers.session import NotThereError, SessionError
from bench.peers.statistics import Ratio, ratio
from bench.peers.table import OPERATIONS, Contestant, operation_of
from bench.peers.work import Cell

FIGURES = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=12)

# --- statistics -------------------------------------------------------------------------------------------------------


@given(FIGURES, FIGURES)
@settings(max_examples=50, deadline=None)
def test_ratio_is_that_of_the_medians_and_lies_in_its_interval(ours: list[float], theirs: list[float]) -> None:
    found = ratio(ours, theirs)
    turns = min(len(ours), len(theirs))
    assert found.value == np.median(ours[:turns]) / np.median(theirs[:turns])
    assert found.low <= found.high
    assert found == ratio(ours, theirs)


def test_interval_narrows_with_turns_and_holds_the_truth() -> None:
    rng = np.random.default_rng(1)
    held, widths = 0, []
    for turns in (5, 80):
        for _ in range(40):
            found = ratio(rng.lognormal(0.0, 0.3, turns), 2 * rng.lognormal(0.0, 0.3, turns))
            held += found.low <= 0.5 <= found.high
            widths.append(found.high - found.low)
    assert held >= 68  # of 80, 95% of which are 76
    assert np.median(widths[40:]) < np.median(widths[:40])


def test_one_turn_says_nothing_of_the_interval() -> None:
    assert ratio([1.0], [2.0]) == Ratio(0.5, 0.0, float("inf"))
    with pytest.raises(ValueError, match="a turn of both"):
        ratio([], [1.0])


def test_verdict_needs_the_whole_interval() -> None:
    found = Ratio(0.5, 0.4, 0.6)
    assert [found.verdict(limit) for limit in (0.6, 0.5, 0.3)] == ["met", "unsure", "missed"]


# --- the table --------------------------------------------------------------------------------------------------------


def test_no_contestant_takes_part_twice() -> None:
    for operation in OPERATIONS:
        contestants = operation.contestants(["openmpi", "gloo"])
        assert len(set(contestants)) == len(contestants)


def test_limits_by_size_and_ranks() -> None:
    def limits(op: str, *cells: Cell) -> list[float]:
        return [operation_of(op).comparisons[0].limit(cell) for cell in cells]

    assert limits("stream", Cell("stream", 2, 4 << 20), Cell("stream", 2, 16 << 20)) == [0.65, 0.9]
    assert limits("barrier", Cell("barrier", 2), Cell("barrier", 8)) == [0.9, 0.6]
    assert limits("moe", Cell("moe", 2, 8), Cell("moe", 2, 64)) == [0.25, 0.4]


def result_of(ours: list[float], **theirs: list[float]) -> CellResult:
    entries = {Contestant("xccl"): Entry(ours, wrong=0)}
    entries |= {Contestant(name): Entry(turns, wrong=0) for name, turns in theirs.items()}
    return CellResult(operation_of("allreduce"), Cell("allreduce", 2, 8), entries)


def test_the_limit_is_for_the_faster_of_two() -> None:
    lines = report.lines_of(result_of([1.0] * 5, openmpi=[3.0] * 5, mpich=[2.0] * 5, gloo=[0.5] * 5))
    assert {line.peer: line.limit for line in lines} == {"openmpi": None, "mpich": 0.7, "gloo": None}
    assert next(line for line in lines if line.peer == "mpich").verdict == "met"


def test_what_has_no_figure_says_why() -> None:
    result = result_of([1.0] * 5, openmpi=[2.0] * 5)
    result.entries[Contestant("gloo")] = Entry(reason="not comparable: it is different")
    assert any("gloo" in line and "it is different" in line for line in report.closing([result]))
    document = json.loads(json.dumps(report.to_json([result], {}, [])))
    assert [c["verdict"] for c in document["cells"][0]["comparisons"]] == ["met", None]


# --- the driver -------------------------------------------------------------------------------------------------------


class FakeSession:
    """Answers at once; `log` notes the turns, `broken` makes it fail when it is timed."""

    version = "1"

    def __init__(self, library: str, log: list[str], broken: bool = False) -> None:
        self.library, self.log, self.broken = library, log, broken

    def prepare(self, *_: Any) -> tuple[int, str] | str:
        return "it has none" if self.library == "gloo" else (0, "")

    def time(self, _cell: Cell, _variant: str, operations: int, blocks: int, _timeout_s: float) -> list[float]:
        if self.broken:
            raise SessionError("a rank ended")
        self.log.append(self.library)
        return [1e-3] * blocks

    def close_work(self, *_: Any) -> None:
        pass

    def close(self) -> None:
        self.log.append(f"{self.library} closed")

    abort = close


def measured(make: Any, *libraries: str) -> dict[str, Entry]:
    operation, cell = operation_of("barrier"), Cell("barrier", 2)
    with Driver(2, make) as driver:
        result = driver.measure(operation, cell, [Contestant(library) for library in libraries], 1.0)
    return {contestant.library: entry for contestant, entry in result.entries.items()}


def test_libraries_take_turns() -> None:
    log: list[str] = []
    entries = measured(lambda library, _: FakeSession(library, log), "xccl", "openmpi")
    turns = [name for name in log if not name.endswith("closed")][-40:]
    assert turns == ["xccl", "openmpi"] * 20
    assert [len(entry.turns_us) for entry in entries.values()] == [20, 20]
    assert sorted(log[-2:]) == ["openmpi closed", "xccl closed"]


def test_failures_have_reasons_and_others_go_on() -> None:
    log: list[str] = []

    def make(library: str, _: int) -> FakeSession:
        if library == "multiprocessing":
            raise NotThereError("it is not installed")
        return FakeSession(library, log, broken=library == "mpich")

    entries = measured(make, "xccl", "mpich", "gloo", "multiprocessing")
    assert len(entries["xccl"].turns_us) == 20
    assert entries["mpich"].reason == "failed: a rank ended"
    assert entries["gloo"].reason == "not comparable: it has none"
    assert entries["multiprocessing"].reason == "it is not installed"
    assert "mpich closed" in log
