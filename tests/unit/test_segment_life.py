"""Life of a segment: locks and descriptors, and what is left when making or attaching one fails."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xccl.errors import CapacityError, FabricError, SegmentError
from xccl.fabric import segment as module
from xccl.fabric.segment import Segment, free_bytes, segment_name, start_ticks
from xccl.layout import segment as layout
from xccl.layout.segment import Geometry

SHM_DIR = Path("/dev/shm")
GEOMETRY = Geometry(ranks=2, app_bytes=1 << 16, heap_bytes=1 << 16)


@pytest.fixture
def session() -> Iterator[bytes]:
    session_id = secrets.token_bytes(16)
    yield session_id
    (SHM_DIR / segment_name(session_id, 0)[1:]).unlink(missing_ok=True)


def path_of(session: bytes) -> Path:
    return SHM_DIR / segment_name(session, 0)[1:]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def can_be_locked(path: Path) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_the_owner_holds_a_lock_for_as_long_as_it_lives(session: bytes) -> None:
    segment = Segment.create(session, 0, GEOMETRY)
    link = path_of(session).with_name(f"kept-{session.hex()}")
    os.link(path_of(session), link)
    try:
        assert not can_be_locked(link)
        segment.unlink()
        assert not can_be_locked(link)
        segment.close()
        del segment  # the mapping keeps a copy of the descriptor
        assert can_be_locked(link)
    finally:
        link.unlink()


def test_unlink_and_close_may_be_called_twice(session: bytes) -> None:
    before = descriptors()
    segment = Segment.create(session, 0, GEOMETRY)
    view = segment.view(GEOMETRY.app_offset - 64, 64)
    segment.unlink()
    assert not path_of(session).exists()
    path_of(session).touch()  # somebody else's, by now
    segment.unlink()
    segment.close()
    segment.close()
    assert path_of(session).exists()
    view[:] = 3
    assert (view == 3).all()  # the memory is there as long as a view of it
    del segment, view
    assert descriptors() == before


def test_names_differ_by_rank_and_session(session: bytes) -> None:
    names = {segment_name(s, rank) for s in (session, secrets.token_bytes(16)) for rank in (0, 1, 11)}
    assert len(names) == 6
    assert all(name.startswith("/xccl-") for name in names)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError(errno.EIO, "Input/output error"),
        KeyboardInterrupt(),
    ],
    ids=["ENOSPC", "ENOMEM", "EIO", "Ctrl-C"],
)
def test_a_segment_that_cannot_be_made_leaves_nothing(
    session: bytes, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(os, "posix_fallocate", fail)
    before = descriptors()
    is_full = isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.ENOMEM)
    with pytest.raises(CapacityError if is_full else type(failure)) as caught:
        Segment.create(session, 0, GEOMETRY)
    if is_full:
        assert isinstance(caught.value, CapacityError)
        assert caught.value.needed_bytes == GEOMETRY.fixed_bytes
        assert caught.value.available_bytes == pytest.approx(free_bytes(), abs=1 << 30)
        assert caught.value.__cause__ is failure
    assert not path_of(session).exists()
    assert descriptors() == before


def test_too_little_address_space_leaves_nothing(session: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(module.mmap, "mmap", fail)
        with pytest.raises(CapacityError, match="ulimit -v") as caught:
            Segment.create(session, 0, GEOMETRY)
    assert caught.value.needed_bytes == GEOMETRY.total_bytes
    assert not path_of(session).exists()
    assert descriptors() == before


def test_an_interrupted_commit_goes_on(session: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    original = os.posix_fallocate

    def interrupted_once(*args: int) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise InterruptedError(errno.EINTR, "Interrupted system call")
        original(*args)

    monkeypatch.setattr(os, "posix_fallocate", interrupted_once)
    Segment.create(session, 0, GEOMETRY).close()
    assert len(calls) == 2
    assert calls[0] == calls[1]


def test_a_failed_attach_leaves_no_descriptor(session: bytes) -> None:
    segment = Segment.create(session, 0, GEOMETRY)
    before = descriptors()
    segment.view(0, 4096).view(np.int64)[layout.HDR_VERSION // 8] = 99
    with pytest.raises(SegmentError) as caught:
        Segment.attach(session, 0, GEOMETRY)
    assert (caught.value.reason, caught.value.name) == ("wrong_version", segment.name)
    assert "layout version 99" in str(caught.value)
    with pytest.raises(FabricError, match="exists already"):
        Segment.create(session, 0, GEOMETRY)
    assert descriptors() == before
    segment.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_segment_of_another_user_is_not_attached(session: bytes) -> None:
    segment = Segment.create(session, 0, GEOMETRY)
    os.chown(path_of(session), 12345, 12345)
    with pytest.raises(FabricError, match="another user"):
        Segment.attach(session, 0, GEOMETRY)
    segment.close()


def test_start_ticks_tell_processes_apart() -> None:
    own = start_ticks(os.getpid())
    assert own is not None
    assert own == start_ticks(os.getpid())
    assert start_ticks((1 << 22) + 1) is None
    first = start_ticks(1)
    assert first is None or first <= own
