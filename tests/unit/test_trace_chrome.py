"""The export to Chrome's trace format: valid, complete, and one track a rank and lane."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, strategies as st

import xccl
from tests.multirank.support import Shape, launch
from xccl.trace.chrome import chrome_trace, write_chrome_trace
from xccl.trace.entry import Entry
from xccl.trace.record import Operation, Recorder

NUMBER = (int, float)


def validate(trace: Any) -> None:
    """What Chrome and Perfetto ask of a trace, after a round trip through JSON."""
    trace = json.loads(json.dumps(trace, allow_nan=False))
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    named: defaultdict[str, set[Any]] = defaultdict(set)
    lines: defaultdict[tuple[int, int], list[Any]] = defaultdict(list)
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert type(event["pid"]) is type(event["tid"]) is int
        assert isinstance(event["args"], dict)
        if event["ph"] == "M":
            where = event["pid"] if event["name"].startswith("process") else (event["pid"], event["tid"])
            assert where not in named[event["name"]]
            named[event["name"]].add(where)
            continue
        assert event["ph"] == "X"
        assert event["cat"] in ("emulated", "projected")
        assert isinstance(event["ts"], NUMBER)
        assert isinstance(event["dur"], NUMBER)
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        lines[event["pid"], event["tid"]].append(event)
    assert named["thread_name"] == named["thread_sort_index"] == set(lines)
    assert named["process_name"] == named["process_sort_index"] == {process for process, _ in lines}
    for events in lines.values():
        open_until: list[int] = []
        for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
            begin = round(event["ts"] * 1000)
            end = begin + round(event["dur"] * 1000)
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or end <= open_until[-1], "slices of a track nest, or follow one another"
            open_until.append(end)


def tracks(trace: Any) -> dict[int, list[str]]:
    """Names of each process's tracks."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["name"] == "thread_name":
            found[event["pid"]].append(event["args"]["name"])
    return dict(found)


def slices(trace: Any, name: str) -> list[Any]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["name"] == name]


def test_emulated_ranks(fabric: str, tmp_path: Path) -> None:
    """Dispatch, combine, and a send over three lanes, of four ranks."""
    shape = Shape(num_experts=4, quant="int8")
    inputs = shape.round(0, [4, 0, 7, 2])

    def main(comm: xccl.Communicator) -> Recorder:
        ep = shape.expert_parallel(comm)
        with comm.trace() as recorder:
            inputs.run(comm.rank, ep)
            data = np.zeros(2000, np.uint8)
            if comm.rank == 0:
                comm.send(data, 3, event_id=9, lanes=3)
            if comm.rank == 3:
                comm.recv(data, 0, event_id=9, lanes=3)
        return recorder

    recorders = launch(main, 4, fabric)
    operations = [operation for recorder in recorders for operation in recorder.operations]
    trace = chrome_trace(operations)
    validate(trace)
    lanes = ["operations", "lane 0", "lane 1"]  # 2000 bytes over three lanes are two chunks of 1024
    assert tracks(trace) == {0: lanes, 1: ["operations"], 2: ["operations"], 3: lanes}
    assert len(slices(trace, "dispatch 1")) == 4
    pulled = sum(event["args"].get("transfer rows", {"units": 0})["units"] for event in slices(trace, "pull"))
    assert pulled == 2 * sum(int((idx >= 0).sum()) for idx in inputs.topk_idxs)
    assert [e["args"]["transfer chunks"]["bytes"] for e in slices(trace, "copy")] == [2000, 1024, 976]
    assert slices(trace, "copy")[0]["args"]["wait data field"] == {"units": 2, "bytes": 0, "peers": 1, "peer": 0}
    path = tmp_path / "trace.json"
    write_chrome_trace(path, operations)
    assert json.loads(path.read_text()) == trace


def test_emulated_and_projected_are_kept_apart() -> None:
    done = Operation(0, "dispatch", 1, begin_ns=1000)
    done.add_stage("write", 1000, 3000)
    done.finish(lambda: [Entry("write", "transfer", "rows", 0, -1, 2, 30)], end_ns=4000)
    trace = chrome_trace(emulated=[done], projected=[done])
    validate(trace)
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert names == ["rank 0", "rank 0 (projected)"]
    assert [(e["cat"], e["ts"], e["dur"]) for e in slices(trace, "write")] == [
        ("emulated", 0.0, 2.0),
        ("projected", 0.0, 2.0),
    ]


def test_what_overlaps_gets_a_line_of_its_own() -> None:
    """A modelled pipeline, and requests that are under way at the same time."""
    operations = []
    for begin in (0, 5):
        operation = Operation(0, "send", begin, begin_ns=begin)
        operation.add_stage("write", begin, begin + 10)
        operation.add_stage("announce", begin + 2, begin + 12)
        operation.finish(list, end_ns=begin + 12)
        operations.append(operation)
    trace = chrome_trace(projected=operations)
    validate(trace)
    assert tracks(trace) == {1_000_000: [f"operations{line}" for line in ("", " (2)", " (3)", " (4)")]}


def test_what_has_no_end_is_drawn_to_the_end_of_the_trace() -> None:
    stuck = Operation(1, "barrier", 2, begin_ns=10)
    stuck.begin_stage("await-release")
    done = Operation(0, "put", begin_ns=0)
    done.finish(list, end_ns=stuck.stages[0].begin_ns + 500)
    trace = chrome_trace([done, stuck])
    validate(trace)
    (event,) = slices(trace, "barrier 2")
    assert event["args"] == {"finished": False}
    assert round((event["ts"] + event["dur"]) * 1000) == done.end_ns


def test_nothing_was_recorded() -> None:
    validate(chrome_trace())
    assert chrome_trace([])["traceEvents"] == []


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.integers(0, 50),
            st.integers(0, 30),
            st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(-1, 2)), max_size=4),
        ),
        max_size=8,
    )
)
def test_any_operations_make_a_valid_trace(drawn: list[tuple[int, int, int, list[tuple[int, int, int]]]]) -> None:
    """However they overlap; every operation and every stage is there once."""
    operations = []
    for rank, begin, length, stages in drawn:
        operation = Operation(rank, "op", begin_ns=begin)
        entries = []
        for i, (offset, duration, lane) in enumerate(stages):
            offset = min(offset, length)
            operation.add_stage(f"s{i}", begin + offset, begin + min(offset + duration, length))
            entries.append(Entry(f"s{i}", "transfer", "rows", 0, lane, 1, 8))
        operation.finish(lambda entries=entries: entries, end_ns=begin + length)  # type: ignore[misc]
        operations.append(operation)
    trace = chrome_trace(operations)
    validate(trace)
    assert len(slices(trace, "op")) == len(operations)
    drawn_slices = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["name"] != "op"]
    assert len(drawn_slices) == sum(len(s) + sum(lane >= 0 for _, _, lane in s) for _, _, _, s in drawn)
