"""The living sessions of this machine, found and read from outside: nothing is written, locked or left behind.

Where they are. A segment has a name only until all ranks have attached it. After that it is an open file of all ranks,
and of nobody else: so the open files of processes are looked through, and those of one rank lead to all segments of its
session, also to those of ranks that have died. Names in /dev/shm are looked at, too, for sessions that are starting.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..fabric.segment import NAME_PREFIX, SHM_DIR
from ..layout import segment as layout
from .observed import Observed, ObservedRank, printable

_FILE: Final = re.compile(rf"(?:^|/){re.escape(NAME_PREFIX)}([0-9a-f]{{32}})-(\d+)(?: \(deleted\))?$")
#: What a rank's process calls itself is cut off here.
_COMMAND_CHARS: Final = 200


@dataclass(frozen=True)
class ObservedSession:
    """A session that lives.

    Attributes:
        session_id: hexadecimal, 32 digits.
        size: number of ranks; 0 if no rank has said so yet.
        layout_version: of its segments; of another one than that of this xccl, no more is known than its processes.
        ranks: those whose segments are there, by number.
        command: command line of one of its processes.
        age_s: how long its first process has run; None if it is not known.
    """

    session_id: str
    size: int
    layout_version: int
    ranks: tuple[ObservedRank, ...]
    command: str
    age_s: float | None

    @property
    def is_readable(self) -> bool:
        """Is it of the layout that this xccl knows?"""
        return self.layout_version == layout.LAYOUT_VERSION

    @property
    def missing(self) -> list[int]:
        """Ranks without a segment: they have not come yet, or have left before the others came."""
        found = {rank.rank for rank in self.ranks}
        return [rank for rank in range(self.size) if rank not in found]


@dataclass(frozen=True)
class Snapshot:
    """All that was seen at about one time.

    Attributes:
        now_ns: that time, by CLOCK_MONOTONIC.
        sessions: by age, the youngest last.
        others_segments: named segments of other users, which this one may not read.
    """

    now_ns: int
    sessions: tuple[ObservedSession, ...]
    others_segments: int = 0


def take_snapshot(prefix: str = "") -> Snapshot:
    """Look at all sessions of this user (of all users, for root) whose number starts with `prefix`.

    Ranks go on meanwhile, so what is said of one may be some milliseconds older than what is said of another.
    """
    paths, same_pids, others = _find_segments(prefix)
    sessions = (_session(key, by_rank, same_pids=same_pids.get(key, True)) for key, by_rank in paths.items())
    living = [session for session in sessions if session is not None]
    living.sort(key=lambda session: (-(session.age_s or 0.0), session.session_id))
    return Snapshot(time.monotonic_ns(), tuple(living), others)


def _find_segments(prefix: str) -> tuple[dict[str, dict[int, str]], dict[str, bool], int]:
    """Paths of segments by session and rank; whether process ids of a session are those of this one; foreign names."""
    paths: dict[str, dict[int, str]] = {}
    same_pids: dict[str, bool] = {}
    owners: set[int] = set()
    here = _pid_namespace("self")
    for pid in _processes():
        if pid in owners:
            continue  # it is a rank of a session that is known: with 768 ranks, each has the same 1536 files open
        for key, by_rank in _open_segments(pid, prefix).items():
            known = paths.setdefault(key, {})
            for rank, path in by_rank.items():
                known.setdefault(rank, path)
            same_pids[key] = same_pids.get(key, False) or _pid_namespace(pid) == here
            if same_pids[key]:
                owners |= {_owner(path) for path in by_rank.values()}
    others = 0
    for key, rank, entry in _named_segments(prefix):
        if os.geteuid() not in (0, entry.stat(follow_symlinks=False).st_uid):
            others += 1  # also if it may be read: what strangers call a segment is none of this user's
        else:
            paths.setdefault(key, {}).setdefault(rank, entry.path)
    return paths, same_pids, others


def _named_segments(prefix: str) -> Iterator[tuple[str, int, os.DirEntry[str]]]:
    with contextlib.suppress(OSError):
        for entry in os.scandir(SHM_DIR):
            match = _FILE.search(entry.name)
            if match and match[1].startswith(prefix):
                with contextlib.suppress(OSError):  # it may be gone by now
                    yield match[1], int(match[2]), entry


def _processes() -> Iterator[int]:
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            yield int(entry.name)


def _open_segments(pid: int, prefix: str) -> dict[str, dict[int, str]]:
    """Segments among the open files of a process, by session and rank; none if it is another user's, or has ended."""
    found: dict[str, dict[int, str]] = {}
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                match = _FILE.search(str(Path(entry.path).readlink()))
                if match and match[1].startswith(prefix):
                    found.setdefault(match[1], {})[int(match[2])] = entry.path
    return found


def _pid_namespace(pid: int | str) -> str:
    with contextlib.suppress(OSError):
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    return ""


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Observed | None]:
    """A segment, opened for reading; None if it has gone, or another file has taken its place."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags if path.startswith("/proc/") else flags | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        segment = Observed(fd) if stat.S_ISREG(os.fstat(fd).st_mode) else None
        yield segment if segment is not None and segment.is_segment else None
    finally:
        os.close(fd)


def _owner(path: str) -> int:
    with _opened(path) as segment:
        return 0 if segment is None else segment.header(layout.HDR_OWNER_PID)


def _session(key: str, paths: dict[int, str], *, same_pids: bool) -> ObservedSession | None:
    """A session; None if none of its ranks goes on."""
    ranks: list[ObservedRank] = []
    size, version, begun_s = 0, layout.LAYOUT_VERSION, []
    command = ""
    for rank, path in sorted(paths.items()):
        with _opened(path) as segment:
            if segment is None or not segment.is_ready:
                continue
            size, version = segment.header(layout.HDR_RANKS), segment.version
            observed = segment.rank(rank, same_pids=same_pids)
        ranks.append(observed)
        if observed.process.started_s:
            begun_s.append(observed.process.started_s)
            command = command or _command(observed.pid)
    # Whoever holds arrays of a session holds its segments, also when it has left.
    if ranks and all(rank.state in ("left", "failed") or rank.process.activity == "dead" for rank in ranks):
        return None
    if not ranks and not any(path.startswith("/proc/") for path in paths.values()):
        return None  # a name without an owner: `xccl doctor` lists what is stale
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - min(begun_s) if begun_s else None
    return ObservedSession(key, size, version, tuple(ranks), command, age_s)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return printable(b" ".join(words))[:_COMMAND_CHARS].strip()
    return ""
