"""Figures of rows, and the forms in which they are printed and written."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import numpy as np
import pytest

from xccl.cli import report
from xccl.cli.bench_data import TokenPool, clear, count_wrong, random_bits
from xccl.cli.bench_rank import _timed
from xccl.cli.options import BenchOptions, Case
from xccl.cli.results import Collector, Measurement, Row
from xccl.cli.screen import Plain, make_screen, progress_bar
from xccl.cli.stats import TimeStats, bandwidth_gbps, bus_factor
from xccl.layout.moe import SOURCE_DTYPE

PUT = BenchOptions("put", 2)
MOE = BenchOptions("moe", 2)


def test_the_slowest_rank_of_each_iteration_counts() -> None:
    stats = TimeStats.of([np.array([1000, 9000, 2000]), np.array([3000, 1000, 4000])])
    assert (stats.min, stats.p50, stats.max) == (3, 4, 9)
    assert stats.mean == pytest.approx(16 / 3)
    assert stats.p90 == pytest.approx(8)
    once = TimeStats.of([np.array([2500.0]), np.array([1500.0])])
    assert once.p50 == once.mean == once.min == once.max == once.p99 == 2.5


def test_bandwidth() -> None:
    assert bandwidth_gbps(1e9, 1e6) == 1
    assert bandwidth_gbps(8, 0) == 0
    assert bus_factor("put", 8) == 1
    assert bus_factor("moe", 8) == 7 / 8


def squeezed(line: str) -> str:
    """A line without its alignment."""
    return " ".join(line.split())


def moe_measurements() -> list[list[Measurement]]:
    """By row, then by rank."""

    def measure(op: str, us: int, size: int, received: int, wrong: int | None) -> Measurement:
        return Measurement(op, Case(tokens=10), np.array([us * 1000] * 4), size, received, wrong)

    return [
        [measure("dispatch", 100, 1000, 30, 0), measure("dispatch", 90, 3000, 10, 0)],
        [measure("combine", 200, 4000, 30, 0), measure("combine", 190, 4000, 10, 2)],
        [measure("moe", 300, 5000, 30, 0), measure("moe", 290, 7000, 10, 0)],
    ]


@pytest.fixture
def moe_rows() -> list[Row]:
    return [Row.of(MOE, measurements) for measurements in moe_measurements()]


@pytest.fixture
def put_row() -> Row:
    return Row.of(PUT, [Measurement("put", Case(size_bytes=4096), np.array([2048]), 4096, None, None)] * 2)


def test_rows(moe_rows: list[Row], put_row: Row) -> None:
    dispatch, combine, moe = moe_rows
    assert (dispatch.op, dispatch.bytes, dispatch.tokens, dispatch.wrong) == ("dispatch", 2000, 10, 0)
    assert dispatch.algbw_gbps == pytest.approx(0.02)
    assert dispatch.busbw_gbps == pytest.approx(0.01)
    assert dispatch.load_imbalance == 1.5
    assert combine.wrong == 2
    assert moe.tokens_per_s == pytest.approx(2 * 10 / 300e-6)
    assert (put_row.tokens, put_row.hidden, put_row.routing, put_row.load_imbalance) == (None, None, None, None)
    assert put_row.wrong is None
    assert put_row.algbw_gbps == put_row.busbw_gbps == 2


def test_collector_waits_for_all_ranks() -> None:
    done: list[Row] = []
    collector = Collector(MOE, done.append)
    by_row = moe_measurements()
    for measurements in by_row:
        collector.on_report(0, measurements[0])
    assert done == []
    for at, measurements in enumerate(by_row):
        collector.on_report(1, measurements[1])
        assert len(done) == at + 1
    assert [row.op for row in collector.rows] == ["dispatch", "combine", "moe"]
    assert collector.wrong == 2


def test_rows_are_projected_when_the_run_is_over() -> None:
    """The model must not take time from ranks that are being measured."""
    seen: list[str] = []

    def project(measurements: Any) -> dict[str, Any]:
        seen.append(measurements[0].op)
        return {"time_us": float(len(measurements))}

    shown: list[Row] = []
    collector = Collector(MOE, shown.append)
    for of_row in moe_measurements():
        for rank, measurement in enumerate(of_row):
            collector.on_report(rank, measurement)
    assert seen == []
    assert [row.projected for row in shown] == [None] * 3
    collector.project(project)
    assert seen == ["dispatch", "combine", "moe"]
    assert [row.projected for row in collector.rows] == [{"time_us": 2.0}] * 3
    assert [row.time_us for row in collector.rows] == [row.time_us for row in shown]


def test_json_has_the_schema(moe_rows: list[Row], put_row: Row) -> None:
    text = report.to_json([*moe_rows, put_row], ["xccl", "bench", "moe"], "1.2")
    document = json.loads(text)
    assert list(document) == ["schema", "version", "command", "environment", "results"]
    assert document["schema"] == 1
    assert document["command"] == ["xccl", "bench", "moe"]
    assert {"cpu", "cores", "python", "numpy", "numba"} <= document["environment"].keys()
    needed = {"op", "ranks", "fabric", "bytes", "tokens", "hidden", "experts", "topk", "protocol", "quant", "routing"}
    needed |= {"iters", "time_us", "algbw_gbps", "busbw_gbps", "wrong", "projected"}
    for result in document["results"]:
        assert needed <= result.keys()
        assert set(result["time_us"]) == {"min", "p50", "p90", "p99", "max", "mean"}
        assert result["projected"] is None
    assert document["results"][0]["hidden"] == 7168
    assert document["results"][3]["hidden"] is None


def test_csv_is_the_same_flat(moe_rows: list[Row], put_row: Row) -> None:
    rows = list(csv.DictReader(io.StringIO(report.to_csv([*moe_rows, put_row]))))
    assert [row["op"] for row in rows] == ["dispatch", "combine", "moe", "put"]
    assert float(rows[0]["p50_us"]) == 100
    assert rows[3]["tokens"] == ""
    assert report.to_csv([]) == "\n"


def test_plain_text_is_aligned(moe_rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    screen = make_screen(MOE, "1.2", moe=True, quiet=False)
    assert isinstance(screen, Plain)
    for row in moe_rows:
        screen.row(row)
    screen.finish(moe_rows)
    lines = capsys.readouterr().out.splitlines()
    comments = [line for line in lines if line.startswith("#")]
    rows = [line for line in lines if not line.startswith("#")]
    assert "measured on this machine" in comments[1]
    titles = squeezed(comments[3][1:])
    assert titles == "op ranks tokens bytes dtype p50 p99 max algbw busbw tokens/s imbal wrong"
    assert squeezed(rows[1]) == "combine 2 10 4000 bf16 200.0 200.0 200.0 0.02 0.01 100000 1.50 2"
    assert len({len(line) for line in [*comments[3:4], *rows]}) == 1
    assert comments[-1] == (
        "# tokens 10: dispatch 100.0 us, combine 200.0 us, round trip 300.0 us, 66667 tokens/s, load imbalance 1.50"
    )


def test_plain_text_without_check_or_bytes(put_row: Row) -> None:
    columns = report.columns_of(moe=False)
    assert squeezed(report.plain_row(put_row, columns)) == "put 2 4096 bf16 2.0 2.0 2.0 2.00 2.00 -"
    barrier = Row.of(BenchOptions("barrier", 2), [Measurement("barrier", Case(), np.array([900]), 0, None, 0)] * 2)
    assert squeezed(report.plain_row(barrier, columns)) == "barrier 2 0 - 0.9 0.9 0.9 - - 0"


def test_quiet_screen_and_no_bar(put_row: Row, capsys: pytest.CaptureFixture[str]) -> None:
    screen = make_screen(PUT, "1.2", moe=False, quiet=True)
    screen.row(put_row)
    screen.finish([put_row])
    with progress_bar(3, "put") as bar:
        bar.advance(put_row)
    assert capsys.readouterr() == ("", "")


def test_rich_table(moe_rows: list[Row]) -> None:
    from rich.console import Console

    for width, framed, complete in ((140, True, True), (100, False, True), (68, False, False)):
        console = Console(file=io.StringIO(), width=width, record=True)
        console.print(report.rich_table(moe_rows, report.columns_of(moe=True), console))
        text = console.export_text()
        assert ("╭" in text) is framed
        assert ("tokens/s" in text) is complete
        for word in ("dispatch", "busbw", "GB/s", "100.0", "wrong"):
            assert word in text
        assert "…" not in text


# --- data -------------------------------------------------------------------------------------------------------


def test_count_wrong_compares_bits() -> None:
    nan = np.array([np.nan, 0.0, 1.0], np.float32)
    assert count_wrong(nan, nan.copy()) == 0
    assert count_wrong(nan, -nan) == 3
    assert count_wrong(nan, nan[:2]) == 3
    assert count_wrong(nan, nan.astype(np.float64)) == 3
    assert count_wrong(None, None) == 0
    assert count_wrong(nan, None) == count_wrong(None, nan) == 1
    assert count_wrong(np.zeros((0, 4), np.int8), np.zeros((0, 5), np.int8)) == 1
    source = np.zeros(3, SOURCE_DTYPE)
    other = source.copy()
    other["slot"][1] = 1
    assert count_wrong(source, other) == 1


def test_data_follows_from_its_key() -> None:
    dtype = np.dtype(np.float16)
    assert random_bits(5, dtype, 1, 2).tobytes() == random_bits(5, dtype, 1, 2).tobytes()
    assert random_bits(5, dtype, 1, 2).tobytes() != random_bits(5, dtype, 1, 3).tobytes()
    pool, again = TokenPool(16, dtype, 3), TokenPool(16, dtype, 3)
    assert (pool.tokens(1, 0, 4) == again.tokens(1, 0, 4)).all()
    assert (pool.tokens(1, 0, 4) != pool.tokens(1, 1, 4)).any()
    assert pool.tokens(0, 0, 0).shape == (0, 16)


def test_clear_leaves_read_only_arrays() -> None:
    a, b = np.ones(2), np.ones(2)
    b.flags.writeable = False
    clear(a, b, None)
    assert a.tolist() == [0, 0]
    assert b.tolist() == [1, 1]


class _CountingComm:
    """A communicator that only counts barriers."""

    def __init__(self) -> None:
        self.barriers = 0

    def barrier(self) -> None:
        self.barriers += 1


@pytest.fixture
def counting() -> Any:
    return _CountingComm()


def test_timed_loops(counting: Any) -> None:
    steps: list[int] = []
    times = _timed(counting, lambda: steps.append(1), 7, back_to_back=False)
    assert (len(times), len(steps), counting.barriers) == (7, 7, 7)
    assert (times > 0).all()
    times = _timed(counting, lambda: steps.append(1), 7, back_to_back=True)
    assert (len(times), len(steps), counting.barriers) == (1, 14, 8)
