"""What `xccl top` says of a snapshot: lines, rows of a table, and a JSON document."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from xccl.cli.environment import environment
from xccl.cli.top_waits import Analysis, Blocked, analyse, describe, ending, named, ranges
from xccl.layout.segment import ABORT_DIED, ABORT_INTERRUPT, LAYOUT_VERSION
from xccl.runtime.observed import ObservedRank, Wait
from xccl.runtime.sessions import ObservedSession, Snapshot

SCHEMA: Final = 1
#: Digits of a session's number that are shown.
_DIGITS: Final = 8
#: Of lines of one kind.
_MOST_LINES: Final = 8
_RANGES_CHARS: Final = 40

#: Title, unit, and whether it stands to the left.
COLUMNS: Final[tuple[tuple[str, str, bool], ...]] = (
    ("rank", "", False), ("pid", "", False), ("process", "", True), ("waits in", "", True), ("for", "", True),
    ("since", "s", False), ("ends in", "s", False), ("barriers", "", False), ("chunks in", "", False),
    ("acked", "", False), ("wake-ups", "", False), ("memory", "", False),
)  # fmt: skip


@dataclass(frozen=True)
class RankRow:
    """One line of the table.

    Attributes:
        cells: as in `COLUMNS`.
        kind: "ended", "root", "waits" or "".
    """

    cells: tuple[str, ...]
    kind: str


def title(snapshot: Snapshot, version: str) -> str:
    """How many sessions there are."""
    count = len(snapshot.sessions)
    sessions = "no live sessions" if count == 0 else f"{count} live session{'s' * (count > 1)}"
    others = snapshot.others_segments
    unseen = f"; {others} segment{'s' * (others > 1)} of other users that are starting sessions" if others else ""
    return f"xccl {version} top: {sessions}{unseen}"


def headline(session: ObservedSession) -> str:
    """What session it is."""
    ranks = f"{session.size} rank{'s' * (session.size != 1)}" if session.size else "no rank is ready"
    age = "" if session.age_s is None else f", {state_of(session)} for {session.age_s:.0f} s"
    memory = f", {_size(sum(rank.memory_bytes for rank in session.ranks))}"
    command = f", {session.command}" if session.command else ""
    return f"session {session.session_id[:_DIGITS]}: {ranks}{age}{memory}{command}"


def state_of(session: ObservedSession) -> str:
    """One word for the whole session."""
    if not session.is_readable:
        return "running"
    if any(rank.abort is not None for rank in session.ranks):
        return "aborted"
    return "starting" if is_starting(session) else "running"


def is_starting(session: ObservedSession) -> bool:
    """Has not every rank seen all others yet?"""
    return not session.size or bool(session.missing) or any(rank.state == "starting" for rank in session.ranks)


def findings(session: ObservedSession, analysis: Analysis, now_ns: int) -> list[str]:
    """The lines that say who waits for whom, and why."""
    if not session.is_readable:
        return [f"its layout has version {session.layout_version}, and this xccl reads {LAYOUT_VERSION}: use its own"]
    lines = []
    if is_starting(session):
        waits = f"{named(session.missing)} missing" if session.missing else "not all are known to all others"
        lines.append(f"starting: {len(session.ranks)} of {session.size or '?'} ranks are there, {waits}")
    lines += _first(sorted({abort for rank in session.ranks if (abort := _why_aborted(rank, session))}), "reasons")
    lines += _first([_blocked(blocked, now_ns) for blocked in analysis.blocked], "kinds of waits")
    if analysis.cycle:
        chain = " -> ".join(map(str, (*analysis.cycle, analysis.cycle[0])))
        lines.append(f"ranks wait for each other: {chain}")
    lines += _first([f"rank {root.rank} {root.why}" for root in analysis.roots], "ranks like that")
    return lines or ["no rank has waited for long"]


def _first(lines: list[str], noun: str) -> list[str]:
    rest = len(lines) - _MOST_LINES
    return lines if rest <= 0 else [*lines[:_MOST_LINES], f"... and {rest} more {noun}"]


def _blocked(blocked: Blocked, now_ns: int) -> str:
    wait = blocked.wait
    wait_or_waits = "wait" if len(blocked.ranks) > 1 else "waits"
    whom = named(wait.ranks)
    if wait.who == "any":
        whom = "any rank"
    elif wait.who == "some" and wait.expected is not None and wait.seen is not None:
        whom = f"{wait.expected - wait.seen} of {whom}"
    values = f": expected {wait.expected}, seen {wait.seen}," if wait.who == "any" and wait.expected is not None else ""
    waited_s = (now_ns - wait.since_ns) / 1e9
    return f"{named(blocked.ranks)} {wait_or_waits} for {whom} in {describe(wait)}{values} since {waited_s:.1f} s"


def _why_aborted(rank: ObservedRank, session: ObservedSession) -> str:
    if rank.abort is None:
        return ""
    kind, culprit = rank.abort
    said = next((other.last_words for other in session.ranks if other.rank == culprit), "")
    if kind == ABORT_DIED:
        said = "died"
    return f"aborted, since rank {culprit} {said or ('was interrupted' if kind == ABORT_INTERRUPT else 'failed')}"


def rows(session: ObservedSession, analysis: Analysis, now_ns: int, limit: int) -> tuple[list[RankRow], int]:
    """At most `limit` rows of the table, and how many ranks are left out.

    By rank if there is room for all; otherwise those first that hold others up, and then those that wait longest.
    """
    roots = {root.rank for root in analysis.roots}
    ranks = list(session.ranks)
    made = {rank.rank: list(_rows_of(rank, analysis, rank.rank in roots, now_ns)) for rank in ranks}
    if sum(map(len, made.values())) > limit:
        waits = analysis.waits
        ranks.sort(
            key=lambda rank: (
                rank.rank not in roots,
                min((wait.since_ns for wait in waits[rank.rank]), default=now_ns),
                rank.rank,
            )
        )
    found: list[RankRow] = []
    for shown, rank in enumerate(ranks):
        if len(found) + len(made[rank.rank]) > limit:
            return found, len(ranks) - shown
        found += made[rank.rank]
    return found, 0


def _rows_of(rank: ObservedRank, analysis: Analysis, is_root: bool, now_ns: int) -> Iterator[RankRow]:
    waits = analysis.waits[rank.rank]
    kind = "ended" if ending(rank) else "root" if is_root else "waits" if waits else ""
    doing = rank.state if rank.state != "running" else rank.process.activity
    if rank.process.activity == "dead" and rank.state != "left":
        doing = "dead"
    numbers: tuple[int | None, ...] = (
        rank.barriers, rank.chunks_received, rank.chunks_acknowledged, rank.wakeups
    )  # fmt: skip
    counters = (*("-" if number is None else str(number) for number in numbers), _size(rank.memory_bytes))
    for i, wait in enumerate(waits or (None,)):
        left = (str(rank.rank), str(rank.pid), doing) if i == 0 else ("", "", "")
        yield RankRow((*left, *_wait_cells(wait, now_ns), *(counters if i == 0 else ("",) * len(counters))), kind)


def _wait_cells(wait: Wait | None, now_ns: int) -> tuple[str, ...]:
    if wait is None:
        return "-", "-", "-", "-"
    whom = "any" if wait.who == "any" else ranges(wait.ranks)
    if len(whom) > _RANGES_CHARS:
        whom = whom[:_RANGES_CHARS].rpartition(",")[0] + ", ..."
    return describe(wait), whom, f"{(now_ns - wait.since_ns) / 1e9:.1f}", f"{(wait.until_ns - now_ns) / 1e9:.1f}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**10:.0f} KiB" if n_bytes < 2**20 else f"{n_bytes / 2**20:.1f} MiB"


def plain(snapshot: Snapshot, version: str, limit: int) -> list[str]:
    """The whole report as lines of text."""
    lines = [f"# {title(snapshot, version)}"]
    for session in snapshot.sessions:
        analysis = analyse(session)
        lines.append(headline(session))
        lines += [f"  {line}" for line in findings(session, analysis, snapshot.now_ns)]
        if session.ranks and session.is_readable:
            found, left_out = rows(session, analysis, snapshot.now_ns, limit)
            lines += _table([row.cells for row in found])
            if left_out:
                lines.append(f"# and {left_out} more ranks; --json has all of them")
    return lines


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    titles = [f"{name} ({unit})" if unit else name for name, unit, _ in COLUMNS]
    widths = [max(len(line[i]) for line in (titles, *cells)) for i in range(len(COLUMNS))]

    def line(texts: Sequence[str]) -> str:
        columns = zip(texts, widths, COLUMNS, strict=True)
        aligned = (text.ljust(width) if is_left else text.rjust(width) for text, width, (_, _, is_left) in columns)
        return "  ".join(aligned).rstrip()

    return [f"# {line(titles)}", *(f"  {line(texts)}" for texts in cells)]


def to_json(snapshot: Snapshot, command: Sequence[str], version: str) -> str:
    """The document: results are sessions."""
    document = {
        "schema": SCHEMA, "version": version, "command": list(command), "environment": environment(),
        "results": [_session_json(session, snapshot.now_ns) for session in snapshot.sessions],
        "others_segments": snapshot.others_segments,
    }  # fmt: skip
    return json.dumps(document, indent=2) + "\n"


def _session_json(session: ObservedSession, now_ns: int) -> dict[str, Any]:
    analysis = analyse(session)
    return {
        "session": session.session_id,
        "ranks": session.size,
        "state": state_of(session),
        "layout_version": session.layout_version,
        "command": session.command,
        "age_s": session.age_s,
        "missing": session.missing,
        "findings": findings(session, analysis, now_ns),
        "blocked": [{"ranks": list(b.ranks)} | _wait_json(b.wait, now_ns) for b in analysis.blocked],
        "roots": [
            {"rank": r.rank, "why": r.why, "awaited_s": None if r.since_ns is None else _seconds(now_ns - r.since_ns)}
            for r in analysis.roots
        ],
        "cycle": list(analysis.cycle),
        "members": [_rank_json(rank, analysis.waits[rank.rank], now_ns) for rank in session.ranks],
    }


def _rank_json(rank: ObservedRank, waits: Sequence[Wait], now_ns: int) -> dict[str, Any]:
    process = rank.process
    return {
        "rank": rank.rank, "pid": rank.pid, "state": rank.state, "process": process.activity,
        "threads": process.threads, "cpu_s": process.cpu_s, "memory_bytes": rank.memory_bytes,
        "barriers": rank.barriers, "chunks_received": rank.chunks_received,
        "chunks_acknowledged": rank.chunks_acknowledged, "wakeups": rank.wakeups, "last_words": rank.last_words,
        "waits": [_wait_json(wait, now_ns) for wait in waits],
    }  # fmt: skip


def _wait_json(wait: Wait, now_ns: int) -> dict[str, Any]:
    return {
        "operation": wait.operation, "event": wait.event, "who": wait.who, "awaited": list(wait.ranks),
        "expected": wait.expected, "seen": wait.seen, "thread": wait.thread,
        "since_s": _seconds(now_ns - wait.since_ns), "ends_in_s": _seconds(wait.until_ns - now_ns),
    }  # fmt: skip


def _seconds(ns: int) -> float:
    return round(ns / 1e9, 3)
