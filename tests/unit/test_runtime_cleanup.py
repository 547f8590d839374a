"""Names that a killed session has left are found and removed; nothing else in /dev/shm is touched."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from xccl.fabric.segment import Segment, segment_name
from xccl.layout import segment as layout
from xccl.layout.segment import Geometry
from xccl.runtime import cleanup
from xccl.runtime.cleanup import StaleSegment, find_segments, find_stale, remove_session, remove_stale

SHM_DIR = Path("/dev/shm")
GEOMETRY = Geometry(ranks=2, app_bytes=4096, heap_bytes=4096)
PATIENCE_S = 30.0


@pytest.fixture
def session() -> Iterator[bytes]:
    session_id = secrets.token_bytes(16)
    yield session_id
    remove_session(session_id, 4)


def path_of(session: bytes, rank: int = 0) -> Path:
    return SHM_DIR / segment_name(session, rank)[1:]


def found(session: bytes, look: Callable[[], list[StaleSegment]]) -> list[StaleSegment]:
    """Of this session: other tests may run on this machine."""
    return [segment for segment in look() if session.hex() in segment.name]


class Owner:
    """A process that makes a segment, and waits to be killed."""

    def __init__(self, session: bytes, rank: int = 0, *, grandchild: bool = False) -> None:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self._main, args=(theirs, session, rank, grandchild))
        self.process.start()
        theirs.close()
        assert ours.poll(PATIENCE_S)
        self.grandchild: int = ours.recv()
        ours.close()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @staticmethod
    def _main(connection: Connection, session: bytes, rank: int, grandchild: bool) -> None:
        segment = Segment.create(session, rank, GEOMETRY)
        pid = 0
        if grandchild and (pid := os.fork()) == 0:
            time.sleep(PATIENCE_S)
            os._exit(0)
        connection.send(pid)
        time.sleep(PATIENCE_S)
        del segment

    def kill(self, *, reap: bool = True) -> None:
        os.kill(self.pid, signal.SIGKILL)
        # Readable as soon as the process has ended, reaped or not.
        fd = os.pidfd_open(self.pid)
        assert multiprocessing.connection.wait([fd], PATIENCE_S)
        os.close(fd)
        if reap:
            self.reap()

    def reap(self) -> None:
        self.process.join()
        self.process.close()


@pytest.fixture
def owner(session: bytes) -> Iterator[Owner]:
    made = Owner(session)
    yield made
    try:
        made.process.kill()
        made.reap()
    except ValueError:
        pass  # the test has ended it


def test_a_live_one_is_not_touched(session: bytes, owner: Owner) -> None:
    (segment,) = found(session, find_segments)
    assert segment.name == path_of(session).name
    assert segment.owner_pid == owner.pid
    assert segment.alive
    assert GEOMETRY.fixed_bytes <= segment.size_bytes < 1 << 20
    assert not found(session, find_stale)
    assert not found(session, remove_stale)
    assert path_of(session).exists()


@pytest.mark.parametrize("reap", [True, False], ids=["gone", "zombie"])
def test_one_whose_owner_was_killed_is_removed(session: bytes, owner: Owner, reap: bool) -> None:
    owner.kill(reap=reap)
    (segment,) = found(session, find_stale)
    assert (segment.owner_pid, segment.alive) == (owner.pid, False)
    assert found(session, remove_stale) == [segment]
    assert not path_of(session).exists()
    assert not found(session, remove_stale)


def test_only_that_of_the_dead_rank_is_removed(session: bytes, owner: Owner) -> None:
    other = Owner(session, 1)
    other.kill()
    assert [segment.name for segment in found(session, remove_stale)] == [path_of(session, 1).name]
    assert path_of(session).exists()


def test_the_lock_counts_where_pids_say_nothing(session: bytes, owner: Owner) -> None:
    """In another pid namespace, which shares /dev/shm, the owner's pid is nobody's or somebody else's."""
    with open(path_of(session), "r+b") as file:
        header = np.fromfile(file, np.int64, layout.HEADER.size_bytes // 8)
        header[layout.HDR_OWNER_PID // 8] = (1 << 22) + 1  # above the largest pid
        file.seek(0)
        file.write(header.tobytes())
    assert not found(session, remove_stale)
    owner.kill()
    assert len(found(session, remove_stale)) == 1


def test_a_reused_pid_is_not_taken_for_the_owner(session: bytes) -> None:
    segment = Segment.create(session, 0, GEOMETRY)
    words = segment.view(0, layout.HEADER.size_bytes).view(np.int64)
    words[layout.HDR_OWNER_START // 8] -= 1  # this process, but it was started at another time
    fcntl.flock(segment._fd, fcntl.LOCK_UN)
    assert not found(session, find_segments)[0].alive
    assert len(found(session, remove_stale)) == 1
    segment.close()


def test_a_child_of_the_owner_holds_it_too(session: bytes) -> None:
    """It has the owner's memory, and its lock: the name waits for its end."""
    owner = Owner(session, grandchild=True)
    try:
        owner.kill()
        assert not found(session, remove_stale)
    finally:
        os.kill(owner.grandchild, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while not found(session, remove_stale):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("size", [0, 100, GEOMETRY.total_bytes])
def test_one_that_is_being_made_is_left_alone_for_a_while(session: bytes, size: int) -> None:
    """Created, and not yet locked or described; or its owner was killed just then."""
    path = path_of(session)
    path.touch(0o600)
    os.truncate(path, size)
    assert found(session, find_segments)[0].alive
    assert not found(session, remove_stale)
    long_ago = time.time() - cleanup._GRACE_S - 1
    os.utime(path, (long_ago, long_ago))
    (removed,) = found(session, remove_stale)
    assert (removed.owner_pid, removed.alive) == (0, False)
    assert not path.exists()


def test_a_name_that_was_made_again_in_the_meantime_is_left_alone(
    session: bytes, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions of `init` may be started again under their old names; several processes clean up at the same time."""
    owner.kill()
    stale = found(session, find_stale)
    path_of(session).unlink()
    segment = Segment.create(session, 0, GEOMETRY)
    monkeypatch.setattr(cleanup, "find_stale", lambda: stale)  # what this process saw before that
    assert remove_stale() == []
    assert path_of(session).exists()
    segment.close()


def test_foreign_files_are_not_touched(session: bytes) -> None:
    """Not even those whose names begin like ours."""
    long_ago = time.time() - 1000
    hexadecimal = session.hex()
    names = [
        f"xccl-{hexadecimal}", f"xccl-{hexadecimal}-", f"xccl-{hexadecimal}-x", f"xccl-{hexadecimal[:-1]}-0",
        f"xccl-notes-{hexadecimal}", f"xccl2-{hexadecimal}-0", f"sem.xccl-{hexadecimal}-0", f"psm_{hexadecimal[:8]}",
        f"xccl-{hexadecimal}-0.txt",
    ]  # fmt: skip
    paths = [SHM_DIR / name for name in names]
    # Of the right name, but something else has written it.
    content = SHM_DIR / f"xccl-{hexadecimal}-3"
    paths.append(content)
    try:
        for path in paths:
            path.write_bytes(b"somebody else's data" * 400)
            os.utime(path, (long_ago, long_ago))
        assert not found(session, find_segments)
        assert not found(session, remove_stale)
        for path in paths:
            assert path.read_bytes() == b"somebody else's data" * 400
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


@pytest.mark.timeout(20)
def test_pipes_links_and_directories_do_not_hold_it_up(session: bytes, tmp_path: Path) -> None:
    """Anyone may put them there, under a name of ours. A pipe that nobody writes to would block who opens it."""
    precious = tmp_path / "precious"
    precious.write_bytes(bytes(8192))
    long_ago = time.time() - 1000
    os.utime(precious, (long_ago, long_ago))
    pipe, link, directory = (path_of(session, rank) for rank in range(3))
    try:
        os.mkfifo(pipe)
        link.symlink_to(precious)
        directory.mkdir()
        assert not found(session, find_segments)
        assert not found(session, remove_stale)
        assert precious.exists()
        assert link.is_symlink()
    finally:
        pipe.unlink()
        link.unlink()
        directory.rmdir()


def test_remove_session_takes_only_its_names(session: bytes) -> None:
    other = bytes(reversed(session))
    for name in (path_of(session, 0), path_of(session, 1), path_of(other, 0)):
        name.touch(0o600)
    try:
        remove_session(session, 2)
        assert not path_of(session, 0).exists()
        assert not path_of(session, 1).exists()
        assert path_of(other, 0).exists()
    finally:
        remove_session(other, 1)
