"""Segments that lost their owner: names in /dev/shm whose session was killed before it could unlink them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..fabric.segment import NAME_PREFIX, SHM_DIR, segment_name, start_ticks
from ..layout import segment as layout

#: A younger segment without a ready flag may be one that is just being made.
_GRACE_S = 5.0
#: What `segment_name` makes. Other files are none of ours, whatever their prefix.
_NAME = re.compile(rf"{re.escape(NAME_PREFIX)}[0-9a-f]{{32}}-\d+")


@dataclass(frozen=True)
class StaleSegment:
    """A named segment of xccl in /dev/shm.

    Attributes:
        name: file name in /dev/shm.
        size_bytes: memory that it takes.
        owner_pid: process that made it, 0 if it never said.
        alive: whether that process still runs.
    """

    name: str
    size_bytes: int
    owner_pid: int
    alive: bool


def find_segments() -> list[StaleSegment]:
    """All named segments of xccl on this machine that this user may read, stale or not."""
    found = []
    for path in sorted(Path(SHM_DIR).glob(f"{NAME_PREFIX}*")):
        if not _NAME.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError), _opened(path) as fd:
            segment = _inspect(path.name, fd)
            if segment is not None:
                found.append(segment)
    return found


def find_stale() -> list[StaleSegment]:
    """Named segments whose owners are dead."""
    return [segment for segment in find_segments() if not segment.alive]


def remove_stale() -> list[StaleSegment]:
    """Unlink the names of segments whose owners are dead; what was removed."""
    removed = []
    for segment in find_stale():
        path = Path(SHM_DIR) / segment.name
        with contextlib.suppress(OSError), _opened(path) as fd:
            # Under the owner's lock, and only if the name still means the same file: a session that is started again
            # under its old name (`init`) may have removed this one, and made its own, in the meantime.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.stat(follow_symlinks=False)):
                path.unlink()
                removed.append(segment)
    return removed


def remove_session(session_id: bytes, ranks: int) -> None:
    """Unlink whatever names of a session are left. Only for its launcher, after all its ranks have ended."""
    for rank in range(ranks):
        with contextlib.suppress(FileNotFoundError):
            Path(SHM_DIR + segment_name(session_id, rank)).unlink()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file; anyone may have put a pipe or a link there, which must not hold up a launch."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{path} is no regular file")
        yield fd
    finally:
        os.close(fd)


def _inspect(name: str, fd: int) -> StaleSegment | None:
    """What an open file says of itself; None if it is no segment."""
    status = os.fstat(fd)
    header = np.zeros(layout.HEADER.size_bytes // 8, np.int64)
    data = os.pread(fd, layout.HEADER.size_bytes, 0)
    header[: len(data) // 8] = np.frombuffer(data[: len(data) // 8 * 8], np.int64)
    if header[layout.HDR_MAGIC // 8] not in (0, layout.MAGIC):
        return None
    pid = int(header[layout.HDR_OWNER_PID // 8])
    ticks = int(header[layout.HDR_OWNER_START // 8])
    young = time.time() - status.st_mtime < _GRACE_S
    if header[layout.HDR_READY // 8]:
        owned = start_ticks(pid) == ticks and not _is_zombie(pid)
    else:
        owned = young  # being made right now, or its owner was killed while it made it
    # The lock outlives what a pid can tell: it works across pid namespaces.
    alive = owned or _is_locked(fd)
    return StaleSegment(name, status.st_blocks * 512, pid, alive)


def _is_locked(fd: int) -> bool:
    """Does a living process hold the owner's lock?"""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in ("Z", "X")
    except (OSError, IndexError):
        return True
