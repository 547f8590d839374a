"""Fabric `shm`: ranks are processes, segments are POSIX shared memory."""

from __future__ import annotations

import os
import secrets
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import xccl
from tests.conformance.communicator_suite import CommunicatorSuite
from tests.conformance.fabric_suite import FabricSuite
from tests.conformance.order_suite import OrderSuite
from tests.conformance.suite import Suite
from tests.multirank.support import error_of, launch
from xccl.errors import CapacityError, FabricError, SegmentError
from xccl.fabric.segment import Segment, segment_name
from xccl.layout import segment as layout
from xccl.layout.segment import Geometry

GEOMETRY = Geometry(ranks=2, app_bytes=1 << 16, heap_bytes=1 << 16)
SHM_DIR = Path("/dev/shm")


class Shm(Suite):
    """Ranks are processes; one dies by SIGKILL."""

    def run(self, main: Callable[..., Any], ranks: int = 2, **options: Any) -> list[Any]:
        return launch(main, ranks, "shm", **options)

    def die(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


class TestShmFabric(Shm, FabricSuite):
    """The interface."""

    def test_no_name_is_left_once_all_have_joined(self) -> None:
        def main(comm: xccl.Communicator) -> list[str]:
            comm.barrier()
            return [path.name for path in SHM_DIR.glob("xccl-*") if _owner(path) in pids]

        pids: list[int] = [os.getpid()]

        def main_with_pids(comm: xccl.Communicator) -> list[str]:
            a = comm.empty(comm.size, np.int64)
            for peer in range(comm.size):
                comm.put(a, np.array([os.getpid()]), peer=peer, offset=comm.rank)
            comm.barrier()
            pids.extend(a.local.tolist())
            return main(comm)

        assert self.run(main_with_pids, 3) == [[], [], []]

    @pytest.mark.parametrize("start_method", ["fork", "spawn"])
    def test_start_methods(self, start_method: str) -> None:
        results = self.run(os_pid, 2, start_method=start_method)
        assert len({os.getpid(), *results}) == 3

    def test_more_memory_than_there_is(self) -> None:
        def main(comm: xccl.Communicator) -> BaseException | None:
            error = error_of(comm.empty, 1 << 39, np.uint8)
            comm.empty(1 << 20, np.uint8).local[:] = 1
            return error

        for error in self.run(main, app_bytes=1 << 40):
            assert isinstance(error, CapacityError)
            assert error.needed_bytes == 1 << 39
            assert error.available_bytes is not None
            assert 0 < error.available_bytes < 1 << 39
            assert "/dev/shm" in str(error)
            assert str(1 << 39) in str(error)


class TestShmOrder(Shm, OrderSuite):
    """Signals, waits and barriers."""


class TestShmCommunicator(Shm, CommunicatorSuite):
    """The operations."""


def os_pid(comm: xccl.Communicator) -> int:
    """A rank's process; at the top level, since `spawn` pickles it."""
    comm.barrier()
    return os.getpid()


def _owner(path: Path) -> int:
    """Process that made a segment; -1 if it is gone, or does not say yet."""
    try:
        with path.open("rb") as file:
            header = np.frombuffer(file.read(layout.HDR_OWNER_PID + 8), np.int64)
    except OSError:
        return -1
    return int(header[-1]) if header.nbytes == layout.HDR_OWNER_PID + 8 else -1


class TestSegment:
    """One segment: how it is made, and how attaching tells apart what can be wrong with it."""

    @pytest.fixture
    def session(self) -> Iterator[bytes]:
        session_id = secrets.token_bytes(16)
        yield session_id
        for rank in range(2):
            (SHM_DIR / segment_name(session_id, rank)[1:]).unlink(missing_ok=True)

    @pytest.fixture
    def segment(self, session: bytes) -> Iterator[Segment]:
        made = Segment.create(session, 0, GEOMETRY)
        yield made
        made.close()

    @staticmethod
    def problem(session: bytes, rank: int = 0, geometry: Geometry = GEOMETRY) -> SegmentError:
        with pytest.raises(SegmentError) as caught:
            Segment.attach(session, rank, geometry)
        assert segment_name(session, rank) in str(caught.value)
        return caught.value

    def test_only_the_user_may_open_it(self, session: bytes, segment: Segment) -> None:
        status = (SHM_DIR / segment.name[1:]).stat()
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert session.hex() in segment.name
        assert status.st_size == GEOMETRY.total_bytes
        assert status.st_blocks * 512 < 1 << 20, "memory that nobody has asked for"

    def test_the_fixed_part_is_backed_from_the_start(self, segment: Segment) -> None:
        assert (SHM_DIR / segment.name[1:]).stat().st_blocks * 512 >= GEOMETRY.fixed_bytes

    def test_attach(self, session: bytes, segment: Segment) -> None:
        other = Segment.attach(session, 0, GEOMETRY)
        header = other.header()
        assert (header.rank, header.owner_pid) == (0, os.getpid())
        segment.view(GEOMETRY.app_offset, 8)[:] = 5
        assert (other.view(GEOMETRY.app_offset, 8) == 5).all()
        other.close()
        assert (SHM_DIR / segment.name[1:]).exists(), "a guest has removed its host's name"
        segment.close()
        assert not (SHM_DIR / segment.name[1:]).exists()

    def test_a_rank_number_is_taken_once(self, session: bytes, segment: Segment) -> None:
        with pytest.raises(FabricError, match="exists already"):
            Segment.create(session, 0, GEOMETRY)
        assert (SHM_DIR / segment.name[1:]).exists()

    def test_absent(self, session: bytes, segment: Segment) -> None:
        assert self.problem(session, rank=1).reason == "absent"
        segment.unlink()
        assert self.problem(session).reason == "absent"

    def test_not_ready(self, session: bytes, segment: Segment) -> None:
        header = segment.view(0, layout.HEADER.size_bytes).view(np.int64)
        header[layout.HDR_READY // 8] = 0
        assert self.problem(session).reason == "not_ready"
        header[:] = 0
        assert self.problem(session).reason == "not_ready"
        header[:] = 0
        os.truncate(SHM_DIR / segment.name[1:], 100)
        assert self.problem(session).reason == "not_ready"

    @pytest.mark.parametrize(
        ("field", "value", "reason"),
        [
            (layout.HDR_MAGIC, 0x1234, "wrong_magic"),
            (layout.HDR_VERSION, layout.LAYOUT_VERSION + 1, "wrong_version"),
            (layout.HDR_SESSION, 7, "wrong_session"),
            (layout.HDR_SESSION + 8, 7, "wrong_session"),
            (layout.HDR_RANK, 1, "wrong_session"),
            (layout.HDR_RANKS, 3, "wrong_size"),
            (layout.HDR_APP_BYTES, 1 << 17, "wrong_size"),
            (layout.HDR_RING_SLOTS, 64, "wrong_size"),
            (layout.HDR_SLOT_BYTES, 64, "wrong_size"),
            (layout.HDR_TOTAL_BYTES, 4096, "wrong_size"),
        ],
    )
    def test_wrong(self, session: bytes, segment: Segment, field: int, value: int, reason: str) -> None:
        segment.view(0, layout.HEADER.size_bytes).view(np.int64)[field // 8] = value
        error = self.problem(session)
        assert error.reason == reason
        shown = f"{value:#x}" if reason == "wrong_magic" else str(value)
        assert shown in str(error)

    def test_another_geometry(self, session: bytes, segment: Segment) -> None:
        for other in (Geometry(ranks=2, app_bytes=1 << 17, heap_bytes=1 << 16), Geometry(ranks=2)):
            error = self.problem(session, geometry=other)
            assert error.reason == "wrong_size"
            assert str(other.total_bytes) in str(error) or str(other.app_bytes) in str(error)

    def test_a_truncated_segment(self, session: bytes, segment: Segment) -> None:
        os.truncate(SHM_DIR / segment.name[1:], GEOMETRY.total_bytes - 4096)
        error = self.problem(session)
        assert error.reason == "wrong_size"
        assert str(GEOMETRY.total_bytes) in str(error)

    def test_more_than_there_is(self, segment: Segment) -> None:
        start = time.monotonic()
        with pytest.raises(CapacityError) as caught:
            segment.commit(0, 1 << 42)
        assert time.monotonic() - start < 1
        assert caught.value.needed_bytes == 1 << 42
        assert caught.value.available_bytes is not None
