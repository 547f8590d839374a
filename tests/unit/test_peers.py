"""The comparison with other libraries, without any of them: statistics, limits, turns, and what becomes of failures."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from bench.peers import report
from bench.peers.__main__ import main
from bench.peers.collectives import PARTS, collective
from bench.peers.driver import CellResult, Driver, Entry
from bench.peers.floor import bytes_to_copy
from bench.peers.moe import Inputs, Shape, as_bits, as_float, expert_factor
from bench.peers.names import COPY, XCCL
from bench.peers.session import NotThereError, SessionError
from bench.peers.statistics import Ratio, ratio
from bench.peers.table import OPERATIONS, Contestant, contestants, differences, operation_of
from bench.peers.work import Block, Cell, Prepared, pattern
from xccl.comm.moe import PROTOCOLS

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
    with pytest.raises(ValueError, match="a round of both"):
        ratio([], [1.0])


def test_rounds_that_one_did_not_take_part_in_do_not_count() -> None:
    assert ratio([1.0, 9.0, 1.0, 1.0], [2.0, np.nan, 2.0, np.nan]) == Ratio(0.5, 0.5, 0.5)


def test_verdict_needs_the_whole_interval() -> None:
    found = Ratio(0.5, 0.4, 0.6)
    assert [found.verdict(limit) for limit in (0.6, 0.5, 0.3)] == ["met", "unsure", "missed"]


# --- the table --------------------------------------------------------------------------------------------------------


def test_no_contestant_takes_part_twice() -> None:
    for operation in OPERATIONS:
        for cell in operation.cells():
            taking_part = contestants(operation.ways(cell), ["openmpi", "gloo"])
            assert len(set(taking_part)) == len(taking_part)
            assert {contestant.library for contestant in taking_part} == {XCCL, "openmpi", "gloo", COPY}


def test_every_protocol_of_dispatch_has_its_row() -> None:
    ways = {comparison.ours for comparison in operation_of("moe").comparisons}
    assert ways == {*PROTOCOLS, "dedup", "int8"}


def test_cells_of_other_sizes_and_ranks() -> None:
    assert list(operation_of("sendrecv").cells([2, 3], [16])) == [Cell("sendrecv", 2, 16)]
    assert list(operation_of("barrier").cells([3], [16])) == [Cell("barrier", 3)]
    assert [c.size for c in operation_of("alltoall").cells([5])] == [8, 64 << 10, 1 << 20]


def test_chosen_ways_and_small_cells_leave_others_out() -> None:
    allgather = operation_of("allgather")
    assert [c.ours for c in allgather.ways(Cell("allgather", 2, 8))] == [""]
    assert [c.ours for c in allgather.ways(Cell("allgather", 2, 8 << 10))] == ["", "symmetric"]
    assert not allgather.ways(Cell("allgather", 2, 8), ["symmetric"])


def test_limits_by_size_and_ranks() -> None:
    def limits(op: str, *cells: Cell) -> list[float | None]:
        return [operation_of(op).comparisons[0].limit(cell) for cell in cells]

    assert limits("stream", Cell("stream", 2, 4 << 20), Cell("stream", 2, 16 << 20)) == [0.65, 0.9]
    assert limits("barrier", Cell("barrier", 2), Cell("barrier", 8)) == [0.9, 0.6]
    by_way = {
        way.ours: [way.limit(Cell("moe", 2, tokens)) for tokens in (8, 64)] for way in operation_of("moe").comparisons
    }
    assert by_way["dedup"] == [0.5, 0.5]
    assert by_way["int8"] == [0.35, 0.35]
    assert by_way["push"] == [0.55, 0.55]


def result_of(ours: list[float], **theirs: list[float]) -> CellResult:
    entries = {Contestant("xccl"): Entry(ours, wrong=0)}
    entries |= {Contestant(name): Entry(turns, wrong=0) for name, turns in theirs.items()}
    return CellResult(operation_of("allreduce"), Cell("allreduce", 2, 8), entries)


def test_the_limit_is_for_the_faster_of_two() -> None:
    (line,) = report.lines_of(result_of([1.0] * 5, openmpi=[4.0] * 5, mpich=[2.0] * 5, gloo=[0.5] * 5))
    assert (line.against, line.limit, line.verdict) == ("mpich", 0.7, "met")
    found = {peer: one.value for peer, one in line.ratios.items() if one is not None}
    assert found == {"openmpi": 0.25, "mpich": 0.5, "gloo": 2}


def test_a_line_shows_the_figures_that_its_ratio_is_of() -> None:
    result = result_of([3.0] * 5, openmpi=[2.0] * 5, gloo=[100.0] * 5)
    result.entries[Contestant(COPY)] = Entry([0.75] * 5)
    words = str(report.lines_of(result)[0]).split()
    assert words == [
        "allreduce",
        "2",
        "8",
        "B",
        "3.000",
        "25%",
        "openmpi",
        "2.000",
        "1.50",
        "[1.50,",
        "1.50]",
        "0.70",
        "missed",
        "gloo",
        "0.03",
    ]
    assert any("missed: allreduce" in line and "2.14 times the limit" in line for line in report.closing([result]))


def test_differences_are_told_of_what_was_measured() -> None:
    assert [text[:6] for text in differences([("barrier", "gloo"), ("allreduce", "copy")])] == ["C Open"]
    of_gloo = differences([("allreduce", "gloo")])
    assert any("in place" in text for text in of_gloo)
    assert of_gloo != differences([("allreduce", "mpich")])


def test_what_has_no_figure_says_why() -> None:
    result = result_of([1.0] * 5, openmpi=[2.0] * 5)
    result.entries[Contestant("gloo")] = Entry(reason="not comparable: it is different")
    result.entries[Contestant("mpich")] = Entry([4.0, float("nan")])
    assert any("gloo" in line and "it is different" in line for line in report.closing([result]))
    document = json.loads(json.dumps(report.to_json([result], {}, []), allow_nan=False))
    (comparison,) = document["cells"][0]["comparisons"]
    assert comparison["verdict"] == "met"
    assert comparison["ratios"] == {
        "openmpi": {"value": 0.5, "low": 0.5, "high": 0.5}, "mpich": {"value": 0.25, "low": 0, "high": None}, "gloo": None,
    }  # fmt: skip
    assert document["cells"][0]["entries"][-1]["turns_us"] == [4.0, None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--only allreduce --sizes 6", "--sizes has 6: allreduce is of float32"),
        ("--only moe --ranks 3", "--experts is 32: it must be a multiple of the ranks (3)"),
        ("--only moe --experts 4 --ranks 2", "and 8 or more"),
        ("--only sendrecv --ranks 4", "no such cells"),
        ("--only get", "invalid choice"),
    ],
)
def test_cells_that_there_are_not(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["peers", *words.split()])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


# --- what is checked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", PARTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_collective_that_does_nothing_is_wrong(op: str, rank: int) -> None:
    wrong = collective(rank, 2, op, 64, lambda x, out: None).check()
    is_left_alone = (op, rank) in (("gather", 1), ("broadcast", 0))  # no result, or the root's own
    assert (wrong == 0) == is_left_alone


def test_a_collective_that_does_its_work_is_right() -> None:
    def allgather_of_2(x: Any, out: Any) -> None:
        out[:] = np.concatenate([pattern(64, 0, 0), x])

    assert collective(1, 2, "allgather", 64, allgather_of_2).check() == 0
    assert collective(0, 1, "reduce-scatter", 64, lambda x, out: np.copyto(out, x)).check() == 0


def test_one_wrong_element_of_a_layer_is_counted() -> None:
    shape = Shape(ranks=1, tokens=3, hidden=16, experts=8)
    inputs = Inputs.of(shape, 0)
    scale = (inputs.weights * expert_factor(inputs.topk_idx, shape)).sum(axis=1)
    y = as_bits(as_float(inputs.x) * scale[:, None])
    assert inputs.count_wrong(y, shape, 0.02) == 0
    y[1, 5] = as_bits(np.float32(99))
    assert inputs.count_wrong(y, shape, 0.02) == 1


def test_bytes_to_copy() -> None:
    def total(op: str, size: int, variant: str = "", ranks: int = 2) -> int:
        cell = Cell(op, ranks, size, experts=16, hidden=100)
        return sum(bytes_to_copy(cell, variant, rank) for rank in range(ranks))

    assert [total(op, 64) for op in ("sendrecv", "put", "barrier", "broadcast")] == [64, 64, 0, 64]
    assert total("allgather", 64, ranks=4) == 4 * 4 * 64
    assert total("reduce-scatter", 64, ranks=4) == 4 * (4 + 1) * 64 // 2
    # 3 tokens of 200 bytes at each of 2 ranks: read, 8 rows of each written, read again, and the sums written.
    assert total("moe", 3, "expanded") == 2 * 3 * (1 + 8 + 8 + 1) * 200 // 2
    assert total("moe", 3, "int8") == 2 * 3 * (2 * 200 + 8 * (104 + 200)) // 2
    assert 2 * 3 * (1 + 1) * 200 <= total("moe", 3, "dedup") <= 2 * 3 * (1 + 2) * 200


# --- the driver -------------------------------------------------------------------------------------------------------


class FakeSession:
    """Answers at once; `log` notes the turns, `broken` makes it fail when it is timed."""

    version = "1"

    def __init__(self, library: str, log: list[str], broken: bool = False, disturbed: int = 0) -> None:
        self.library, self.log, self.broken, self.disturbed = library, log, broken, disturbed

    def prepare(self, *_: Any) -> Prepared | str:
        return "it has none" if self.library == "gloo" else Prepared(0, 0.5, "")

    def time(self, _cell: Cell, _variant: str, _operations: int, blocks: int, _timeout_s: float) -> list[Block]:
        if self.broken:
            raise SessionError("a rank ended")
        self.log.append(self.library)
        return [Block(9e-3 if at < self.disturbed else 1e-3, at < self.disturbed) for at in range(blocks)]

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
    turns = [name for name in log if not name.endswith("closed")][-120:]
    assert turns == ["xccl", "openmpi"] * 60
    assert all(entry.turns_us == [500.0] * 60 for entry in entries.values())
    assert sorted(log[-2:]) == ["openmpi closed", "xccl closed"]


def test_peers_without_a_target_take_fewer_turns() -> None:
    log: list[str] = []
    entries = measured(lambda library, _: FakeSession(library, log), "xccl", "multiprocessing", "openmpi")
    turns = [name for name in log if not name.endswith("closed")][-120 - 15 :]
    assert turns == ["xccl", "multiprocessing", "openmpi", *["xccl", "openmpi"] * 3] * 15
    assert np.isfinite(entries["multiprocessing"].turns_us).tolist() == [True, False, False, False] * 15
    assert entries["multiprocessing"].median_us == 500.0


def test_disturbed_blocks_count_only_if_there_are_no_others() -> None:
    some = measured(lambda library, _: FakeSession(library, [], disturbed=2), "xccl")["xccl"]
    assert (some.turns_us, some.disturbed) == ([500.0] * 60, 0)
    every = measured(lambda library, _: FakeSession(library, [], disturbed=99), "xccl")["xccl"]
    assert (every.turns_us, every.disturbed) == ([4500.0] * 60, 60)


def test_failures_have_reasons_and_others_go_on() -> None:
    log: list[str] = []

    def make(library: str, _: int) -> FakeSession:
        if library == "multiprocessing":
            raise NotThereError("it is not installed")
        return FakeSession(library, log, broken=library == "mpich")

    entries = measured(make, "xccl", "mpich", "gloo", "multiprocessing")
    assert len(entries["xccl"].turns_us) == 60
    assert entries["mpich"].reason == "failed: a rank ended"
    assert entries["gloo"].reason == "not comparable: it has none"
    assert entries["multiprocessing"].reason == "it is not installed"
    assert "mpich closed" in log
