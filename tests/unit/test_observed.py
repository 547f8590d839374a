"""Segments seen from outside: status records, torn ones, segments half made or of another version, and strangers' files."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xccl.comm.core import Waiting
from xccl.comm.status import REFRESH_NS, SHOWN_AFTER_NS, StatusBoard
from xccl.fabric.segment import Segment, start_ticks
from xccl.kernels import status as kernels, warm, words
from xccl.layout import segment as layout, status as status_layout
from xccl.layout.segment import CONTROL_OFFSET, STATUS_END, STATUS_OFFSET, Geometry
from xccl.layout.status import MAX_PEERS, STATUS, STATUS_SLOTS
from xccl.runtime import observed, sessions
from xccl.runtime.launch import MAX_RANKS
from xccl.runtime.observed import Observed, process_of, untorn, wait_of
from xccl.runtime.sessions import take_snapshot

SMALL = Geometry(ranks=3, app_bytes=1 << 16, heap_bytes=1 << 16)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file of the size of a header, control area and status records, all zeros."""
    opened = os.open(tmp_path / "segment", os.O_RDWR | os.O_CREAT)
    os.truncate(opened, 1 << 16)
    yield opened
    os.close(opened)


class Memory:
    """The same file, mapped."""

    def __init__(self, fd: int) -> None:
        self.map = mmap.mmap(fd, 1 << 16)
        self.base = np.frombuffer(self.map, np.uint8).ctypes.data

    def board(self, members: range | list[int], *, is_shared: bool = True) -> StatusBoard:
        return StatusBoard(self.base + CONTROL_OFFSET, members, is_shared=is_shared)


@pytest.fixture
def memory(fd: int) -> Memory:
    """The file, mapped as long as a test needs it."""
    return Memory(fd)


def waits(fd: int) -> list[observed.Wait]:
    return list(Observed(fd)._waits())


# -- records ------------------------------------------------------------------------------------------------------------


def test_every_rank_has_a_bit_and_the_records_take_no_page_of_their_own() -> None:
    assert MAX_RANKS <= MAX_PEERS
    assert Geometry(ranks=1).app_offset == 2 * layout.PAGE_BYTES


def test_a_long_wait_is_shown_until_it_ends(fd: int, memory: Memory) -> None:
    board = memory.board(range(8))
    shown = board.wait(3, deadline_ns=7_000_000_000, timeout_s=5.0)
    waiting = Waiting("dispatch, await-fields", 9, 5, 4, 2, missing=lambda: [5, 7])
    shown.show(waiting, 2_000_000_000 + SHOWN_AFTER_NS - 1)
    assert not waits(fd)
    shown.show(waiting, 2_000_000_000 + SHOWN_AFTER_NS)
    (wait,) = waits(fd)
    assert (wait.operation, wait.event, wait.who, wait.ranks) == ("dispatch, await-fields", 9, "all", (5, 7))
    assert (wait.expected, wait.seen, wait.since_ns, wait.until_ns) == (4, 2, 2_000_000_000, 7_000_000_000)
    assert wait.thread == os.getpid()
    shown.end()
    assert not waits(fd)


def test_it_is_brought_up_to_date_now_and_then(fd: int, memory: Memory) -> None:
    shown = memory.board(range(8)).wait(0, 10**10, 9.0)
    at = 10**9 + SHOWN_AFTER_NS
    for peer, now_ns, seen in ((1, at, (1,)), (2, at + REFRESH_NS - 1, (1,)), (3, at + REFRESH_NS, (3,))):
        shown.show(Waiting("recv", 1, peer), now_ns)
        assert [wait.ranks for wait in waits(fd)] == [seen]
    shown.end()


@pytest.mark.parametrize(
    ("waiting", "who", "ranks"),
    [
        (Waiting("recv", None, 2), "all", (2,)),
        (Waiting("barrier", 1, None, 4, 2, everyone=True), "some", (0, 2, 3)),
        (Waiting("wait_until", None, None, 4, 2), "any", (0, 2, 3)),
        (Waiting("dispatch", None, 2, missing=list), "all", (2,)),  # it has come just now
    ],
)
def test_for_whom(fd: int, memory: Memory, waiting: Waiting, who: str, ranks: tuple[int, ...]) -> None:
    shown = memory.board(range(4)).wait(1, 10**10, 9.0)
    shown.show(waiting, 2 * 10**9)
    (wait,) = waits(fd)
    assert (wait.who, wait.ranks) == (who, ranks)
    assert wait.event == waiting.event
    assert (wait.expected is None) == (waiting.expected is None)
    shown.end()


def test_ranks_of_a_group_are_those_of_the_session(fd: int, memory: Memory) -> None:
    session = memory.board(range(1024))
    group = session.of_group([1023, 7, 500])
    shown, other = group.wait(1, 10**10, 9.0), session.wait(7, 10**10, 8.0)
    shown.show(Waiting("barrier", 1, None, 3, 1, everyone=True), 2 * 10**9)
    other.show(Waiting("recv", 1, 500), 3 * 10**9)
    assert [wait.ranks for wait in waits(fd)] == [(500, 1023), (500,)]
    shown.end()
    other.end()


def test_more_threads_than_records(fd: int, memory: Memory) -> None:
    board = memory.board(range(4))
    shown = [board.wait(0, 10**10, 9.0) for _ in range(STATUS_SLOTS + 2)]
    for wait in shown:
        wait.show(Waiting("recv", 1, 2), 2 * 10**9)
    assert len(waits(fd)) == STATUS_SLOTS
    for wait in shown:
        wait.end()
    assert not waits(fd)
    assert len(set(board.free)) == STATUS_SLOTS


def test_long_text_is_cut_and_control_characters_are_not_shown(fd: int, memory: Memory) -> None:
    shown = memory.board(range(4)).wait(0, 10**10, 9.0)
    shown.show(Waiting("\033[2J" + 200 * "x", None, 1), 2 * 10**9)
    (wait,) = waits(fd)
    assert wait.operation == " [2J" + (status_layout.OPERATION_BYTES - 4) * "x"
    shown.end()


def test_threads_of_one_process_show_nothing(fd: int, memory: Memory) -> None:
    shown = memory.board(range(4), is_shared=False).wait(0, 10**10, 9.0)
    shown.show(Waiting("recv", None, 1), 2 * 10**9)
    shown.end()
    assert not any(os.pread(fd, 1 << 16, 0))


# -- torn records -------------------------------------------------------------------------------------------------------


def test_a_record_that_stays_odd_is_not_taken(fd: int, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rank was killed while it wrote."""
    monkeypatch.setattr(observed, "_PAUSE_S", 0.0)
    words.store(memory.base + STATUS_OFFSET, 3)
    assert untorn(fd, STATUS_OFFSET) is None
    assert not waits(fd)


def test_a_record_that_changed_while_it_was_read_is_read_again(
    fd: int, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = memory.base + STATUS_OFFSET
    pread, changes = os.pread, iter([10, 11, 12])

    def interrupted(file: int, n_bytes: int, offset: int) -> bytes:
        data = pread(file, n_bytes, offset)
        if n_bytes == STATUS.size_bytes and (value := next(changes, None)) is not None:
            source = np.full(2, value, np.int64)
            kernels.publish.call(at, source.ctypes.data, 2)
        return data

    monkeypatch.setattr(observed.os, "pread", interrupted)
    data = untorn(fd, STATUS_OFFSET)
    assert data is not None
    assert np.frombuffer(data, np.int64)[:3].tolist() == [6, 12, 12]


def _write_for_ever(path: str, stop: Any) -> None:
    """All words of a record are the same number, the next one each time."""
    with Path(path).open("r+b") as file:
        memory = Memory(file.fileno())
        source = np.zeros(STATUS.size_bytes // 8 - 1, np.int64)
        while not stop.is_set():
            for _ in range(100):
                source += 1
                kernels.publish.call(memory.base + STATUS_OFFSET, source.ctypes.data, len(source))
                sum(range(300))  # some microseconds, in which a reader has a chance


def test_no_torn_record_is_taken(fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a process that writes without end."""
    warm()
    monkeypatch.setattr(observed, "_PAUSE_S", 0.0)
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    writer = context.Process(target=_write_for_ever, args=(str(tmp_path / "segment"), stop))
    writer.start()
    taken = []
    try:
        deadline = time.monotonic() + 30.0
        while len(taken) < 2000 and time.monotonic() < deadline:
            data = untorn(fd, STATUS_OFFSET)
            if data is not None:
                taken.append(np.frombuffer(data, np.int64)[1:])
    finally:
        stop.set()
        writer.join()
    assert len(taken) == 2000
    assert all((record == record[0]).all() for record in taken)
    assert taken[-1][0] > taken[0][0]


# -- segments -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def session_id() -> Iterator[bytes]:
    number = secrets.token_bytes(16)
    yield number
    for path in Path("/dev/shm").glob(f"xccl-{number.hex()}-*"):
        path.unlink()


def seen(session_id: bytes) -> sessions.ObservedSession | None:
    return next(iter(take_snapshot(session_id.hex()).sessions), None)


def test_a_session_that_starts_lacks_ranks(session_id: bytes) -> None:
    segment = Segment.create(session_id, 1, SMALL)
    try:
        session = seen(session_id)
        assert session is not None
        assert (session.size, session.missing, [rank.rank for rank in session.ranks]) == (3, [0, 2], [1])
        (rank,) = session.ranks
        assert (rank.pid, rank.state, rank.attached) == (os.getpid(), "starting", 0)
        assert rank.process.activity == "running"
        assert rank.process.threads >= 1
        assert rank.memory_bytes == os.stat(f"/dev/shm{segment.name}").st_blocks * 512 > 0
        assert session.command
        assert session.age_s is not None
        assert session.age_s >= 0
        words.store(segment.base + layout.CONTROL_OFFSET + layout.CTL_STATE, layout.STATE_LEFT)
        assert seen(session_id) is None  # although the segment is there
    finally:
        segment.close()


def test_reading_takes_no_memory_and_writes_nothing(session_id: bytes) -> None:
    segment = Segment.create(session_id, 0, SMALL)
    path = Path(f"/dev/shm{segment.name}")
    try:
        before = path.stat(), segment.view(0, STATUS_END).tobytes()
        for _ in range(3):
            assert seen(session_id) is not None
        after = path.stat(), segment.view(0, STATUS_END).tobytes()
        assert (before[0].st_blocks, before[0].st_mtime_ns) == (after[0].st_blocks, after[0].st_mtime_ns)
        assert before[1] == after[1]
    finally:
        segment.close()


def test_another_version_is_said_to_be_one(session_id: bytes) -> None:
    segment = Segment.create(session_id, 0, SMALL)
    try:
        words.store(segment.base + layout.HDR_VERSION, layout.LAYOUT_VERSION + 1)
        words.store(segment.base + layout.CONTROL_OFFSET + layout.CTL_ABORT, 1)  # who knows what is there
        session = seen(session_id)
        assert session is not None
        assert not session.is_readable
        assert session.layout_version == layout.LAYOUT_VERSION + 1
        assert [(rank.pid, rank.abort, rank.waits) for rank in session.ranks] == [(os.getpid(), None, ())]
    finally:
        segment.close()


def test_a_segment_whose_owner_is_dead_is_no_session(session_id: bytes) -> None:
    """The doctor lists it."""
    segment = Segment.create(session_id, 0, SMALL)
    try:
        words.store(segment.base + layout.HDR_OWNER_START, start_ticks(os.getpid()) + 1)
        assert seen(session_id) is None
    finally:
        segment.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 100, b"x" * 10000, layout.MAGIC.to_bytes(8, "little"), os.urandom(8192)],
    ids=["empty", "short", "no segment", "half made", "noise"],
)
def test_files_that_are_no_segments_do_no_harm(session_id: bytes, content: bytes) -> None:
    Path(f"/dev/shm/xccl-{session_id.hex()}-0").write_bytes(content)
    assert seen(session_id) is None


@pytest.mark.parametrize("word", [layout.HDR_RANKS, layout.HDR_APP_BYTES, layout.HDR_RING_SLOTS])
@pytest.mark.parametrize("value", [-1, 1 << 62, 0])
def test_a_wrong_header_does_no_harm(session_id: bytes, word: int, value: int) -> None:
    segment = Segment.create(session_id, 0, SMALL)
    try:
        words.store(segment.base + word, value)
        seen(session_id)
    finally:
        segment.close()


def test_links_and_pipes_are_not_opened(session_id: bytes, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(bytes(8192))
    Path(f"/dev/shm/xccl-{session_id.hex()}-0").symlink_to(tmp_path / "target")
    os.mkfifo(f"/dev/shm/xccl-{session_id.hex()}-1")
    assert seen(session_id) is None


def test_segments_of_other_users_are_counted(session_id: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = Segment.create(session_id, 0, SMALL)
    try:
        uid = os.stat(f"/dev/shm{segment.name}").st_uid
        monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
        monkeypatch.setattr(sessions, "_processes", lambda: iter(()))  # root may look into all of them
        snapshot = take_snapshot(session_id.hex())
        assert snapshot.sessions == ()
        assert snapshot.others_segments == 1
    finally:
        segment.close()


def test_processes() -> None:
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    assert process_of(os.getpid(), ticks).activity == "running"
    assert process_of(os.getpid(), ticks + 1).activity == "dead"  # the number was given to another one
    child = os.fork()
    if child == 0:
        os._exit(0)
    child_ticks = start_ticks(child)
    assert child_ticks is not None
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert process_of(child, child_ticks).activity == "dead"  # a zombie
    os.waitpid(child, 0)
    assert process_of(child, child_ticks).activity == "dead"


def test_an_empty_record_says_nothing() -> None:
    assert wait_of(bytes(STATUS.size_bytes)) is None
