"""Export to the trace event format of Chrome, which Perfetto (ui.perfetto.dev) reads as well.

A rank is a process; it has a track for operations and their stages, and one for each lane that is named in an entry.
Slices of a track nest, or follow one another, as the format demands; where stages or operations overlap otherwise
(several requests under way, a pipeline in a modelled run) a track gets a second line. What was emulated and what is
projected never share a process, and the projected one says so in its name.

The format: "Trace Event Format", Google, 2016: complete events ("ph": "X") with times in microseconds, and metadata
("M").
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from os import PathLike
from typing import Any, Final, Literal, NamedTuple

from .entry import Entry
from .record import Operation

Source = Literal["emulated", "projected"]

#: Lines of a track, so that their numbers are not those of the next track.
_LINES: Final = 1000
#: Process numbers of projected ranks start here.
_PROJECTED: Final = 1_000_000

Json = dict[str, Any]


class _Slice(NamedTuple):
    begin_ns: int
    end_ns: int
    name: str
    args: Json


class _Track:
    """Lines of slices: each nests in what its operation has there, or begins after all else has ended."""

    def __init__(self) -> None:
        #: By line: ends of the slices that are open, and the operation that they belong to.
        self._open: list[tuple[int, list[int]]] = []

    def line(self, piece: _Slice, operation: int, first: int = 0) -> int:
        """A line for a slice; slices come in the order of their begin, the longer one first."""
        for i in range(first, len(self._open)):
            owner, ends = self._open[i]
            while ends and ends[-1] <= piece.begin_ns:
                ends.pop()
            if not ends or (owner == operation and piece.end_ns <= ends[-1]):
                ends.append(piece.end_ns)
                self._open[i] = (operation, ends)
                return i
        self._open.append((operation, [piece.end_ns]))
        return len(self._open) - 1


def chrome_trace(emulated: Iterable[Operation] = (), projected: Iterable[Operation] = ()) -> Json:
    """The trace as an object, ready for `json.dump`.

    Args:
        emulated: operations of any number of ranks, as they were recorded.
        projected: those of a modelled run.
    """
    events = [*_events(list(emulated), "emulated"), *_events(list(projected), "projected")]
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": {"producer": "xccl"}}


def write_chrome_trace(
    path: str | PathLike[str], emulated: Iterable[Operation] = (), projected: Iterable[Operation] = ()
) -> None:
    """Write the trace to a JSON file."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(chrome_trace(emulated, projected), file, separators=(",", ":"), allow_nan=False)


def _events(operations: list[Operation], source: Source) -> list[Json]:
    if not operations:
        return []
    start_ns = min(operation.begin_ns for operation in operations)
    last_ns = max(max(o.begin_ns, o.end_ns, *(s.end_ns for s in o.stages), 0) for o in operations)
    tracks: dict[tuple[int, int], _Track] = {}
    seen: dict[tuple[int, int], str] = {}
    events: list[Json] = []
    # Sorted for the tracks' sake: by begin, and the longer one first.
    ordered = sorted(enumerate(operations), key=lambda item: (item[1].begin_ns, -_end(item[1].end_ns, last_ns)))
    for index, operation in ordered:
        rank = operation.rank
        process = rank + (_PROJECTED if source == "projected" else 0)
        whole, stages, by_lane = _slices(operation, last_ns)
        base = tracks.setdefault((rank, -1), _Track()).line(whole, index)
        placed = [(-1, base, whole)]
        placed += [(-1, tracks[rank, -1].line(piece, index, base), piece) for piece in stages]
        for lane, pieces in by_lane.items():
            track = tracks.setdefault((rank, lane), _Track())
            placed += [(lane, track.line(piece, index), piece) for piece in pieces]
        for lane, line, piece in placed:
            thread = (lane + 1) * _LINES + line
            seen[process, thread] = "operations" if lane < 0 else f"lane {lane}"
            start_us, length_us = (piece.begin_ns - start_ns) / 1e3, (piece.end_ns - piece.begin_ns) / 1e3
            where = {"pid": process, "tid": thread, "ts": start_us, "dur": length_us}
            events.append({"name": piece.name, "cat": source, "ph": "X", **where, "args": piece.args})
    return [*_names(seen, source), *events]


def _slices(operation: Operation, last_ns: int) -> tuple[_Slice, list[_Slice], dict[int, list[_Slice]]]:
    """The operation, its stages, and what its lanes did in them."""
    by_stage: dict[str, list[Entry]] = {}
    for entry in operation.entries:
        by_stage.setdefault(entry.stage, []).append(entry)
    title = operation.name if operation.number is None else f"{operation.name} {operation.number}"
    args: Json = {} if operation.is_finished else {"finished": False}
    whole = _Slice(operation.begin_ns, _end(operation.end_ns, last_ns), title, args)
    stages: list[_Slice] = []
    by_lane: dict[int, list[_Slice]] = {}
    for stage in sorted(operation.stages, key=lambda s: (s.begin_ns, -_end(s.end_ns, last_ns))):
        entries = by_stage.get(stage.name, [])
        times = (stage.begin_ns, _end(stage.end_ns, last_ns), stage.name)
        stages.append(_Slice(*times, _summary(entries)))
        for lane in sorted({entry.lane for entry in entries if entry.lane >= 0}):
            mine = [entry for entry in entries if entry.lane == lane]
            by_lane.setdefault(lane, []).append(_Slice(*times, _summary(mine)))
    return whole, stages, by_lane


def _summary(entries: list[Entry]) -> Json:
    """Peers, units and bytes by kind: what all peers of 768 ranks did would be too much for a viewer."""
    found: dict[str, Json] = {}
    for entry in entries:
        key = f"{entry.kind} {entry.what}"
        sums = found.setdefault(key, {"units": 0, "bytes": 0, "peers": 0, "peer": entry.peer})
        sums["units"] += entry.units
        sums["bytes"] += entry.n_bytes
    for key, sums in found.items():
        peers = {entry.peer for entry in entries if f"{entry.kind} {entry.what}" == key}
        sums["peers"] = len(peers)
        if len(peers) != 1:
            del sums["peer"]
    return found


def _names(seen: dict[tuple[int, int], str], source: Source) -> list[Json]:
    """Names of processes and tracks, in their order."""
    events: list[Json] = []

    def name(kind: str, process: int, thread: int, text: str, index: int) -> None:
        where = {"ph": "M", "pid": process, "tid": thread}
        events.append({"name": f"{kind}_name", **where, "args": {"name": text}})
        events.append({"name": f"{kind}_sort_index", **where, "args": {"sort_index": index}})

    for process in sorted({process for process, _ in seen}):
        rank = process % _PROJECTED
        name("process", process, 0, f"rank {rank}" + (" (projected)" if source == "projected" else ""), process)
    for (process, thread), text in sorted(seen.items()):
        name("thread", process, thread, text if thread % _LINES == 0 else f"{text} ({thread % _LINES + 1})", thread)
    return events


def _end(end_ns: int, last_ns: int) -> int:
    """Where to draw the end of what has none: as far as the trace goes."""
    return last_ns if end_ns < 0 else end_ns
