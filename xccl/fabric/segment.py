"""A POSIX shared-memory segment: create, validate, attach, commit, unlink.

Life of a name. The owner creates it exclusively with mode 0600 under an unguessable name, holds a shared lock (flock)
on it for as long as it lives, and unlinks it as soon as all peers have attached. A name whose lock can be taken
exclusively has lost its owner (see runtime.cleanup).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import posix_ipc

from ..errors import CapacityError, FabricError, SegmentError, SegmentProblem
from ..kernels import words
from ..layout import segment as layout
from ..layout.segment import Geometry

SHM_DIR = "/dev/shm"
NAME_PREFIX = "xccl-"


def segment_name(session_id: bytes, rank: int) -> str:
    """Name of a rank's segment: the session's 128 random bits make it unguessable."""
    return f"/{NAME_PREFIX}{session_id.hex()}-{rank}"


def start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, or None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return int(stat.read().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return None


@dataclass(frozen=True)
class Header:
    """What the header of a segment says of its owner."""

    rank: int
    owner_pid: int
    owner_start_ticks: int


def free_bytes() -> int:
    """Free bytes in /dev/shm."""
    stats = os.statvfs(SHM_DIR)
    return stats.f_bavail * stats.f_frsize


class Segment:
    """One mapped segment. Use `create` or `attach`."""

    def __init__(self, name: str, fd: int, size_bytes: int, *, owned: bool) -> None:
        self.name = name
        self._fd = fd
        self._owned = owned
        try:
            self._map = mmap.mmap(fd, size_bytes)
        except OSError as error:
            raise CapacityError(
                f"cannot map segment {name} of {size_bytes} bytes ({error}): too little address space (ulimit -v); "
                f"lower app_bytes or heap_bytes",
                needed_bytes=size_bytes,
            ) from error
        self.base: int = np.frombuffer(self._map, np.uint8, 1).ctypes.data

    @classmethod
    def create(cls, session_id: bytes, rank: int, geometry: Geometry) -> Self:
        """Create, commit and describe the segment of this rank; `ready` is published last.

        Raises:
            CapacityError: /dev/shm has no room for the fixed part.
            FabricError: the name exists already: another rank of the session claims the same number.
        """
        name = segment_name(session_id, rank)
        try:
            memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=geometry.total_bytes)
        except posix_ipc.ExistentialError as error:
            raise FabricError(f"rank {rank} of this session exists already (segment {name})", rank=rank) from error
        try:
            fcntl.flock(memory.fd, fcntl.LOCK_SH)
            _commit(memory.fd, 0, geometry.fixed_bytes, name)
            segment = cls(name, memory.fd, geometry.total_bytes, owned=True)
        except BaseException:
            os.close(memory.fd)
            posix_ipc.unlink_shared_memory(name)
            raise
        header = segment.view(0, layout.HEADER.size_bytes).view(np.int64)
        for offset, value in _described(session_id, rank, geometry).items():
            header[offset // 8] = value
        pid = os.getpid()
        header[layout.HDR_OWNER_PID // 8] = pid
        header[layout.HDR_OWNER_START // 8] = start_ticks(pid) or 0
        # SYNC POINT segment-ready: released after the header; `attach` acquires it.
        words.store(segment.base + layout.HDR_READY, 1)
        return segment

    @classmethod
    def attach(cls, session_id: bytes, rank: int, geometry: Geometry) -> Self:
        """Attach the segment of another rank, after checking that it is what this rank expects.

        Raises:
            SegmentError: `reason` is "absent" (no such name), "not_ready" (still being made), "wrong_magic",
                "wrong_version",
                "wrong_size" (the owner has another geometry) or "wrong_session".
        """
        name = segment_name(session_id, rank)
        try:
            memory = posix_ipc.SharedMemory(name)
        except posix_ipc.ExistentialError:
            raise _problem(name, rank, "absent", "there is no such segment") from None
        except posix_ipc.PermissionsError as error:
            raise FabricError(f"segment {name} belongs to another user", rank=rank) from error
        try:
            if os.fstat(memory.fd).st_uid != os.geteuid():
                raise FabricError(f"segment {name} belongs to another user", rank=rank)
            _check_header(name, rank, memory.fd, session_id, geometry)
            return cls(name, memory.fd, geometry.total_bytes, owned=False)
        except BaseException:
            os.close(memory.fd)
            raise

    @classmethod
    def attach_control(cls, session_id: bytes, rank: int) -> Self:
        """Attach header and control area of a rank of this session that has another geometry, to tell it so."""
        name = segment_name(session_id, rank)
        try:
            memory = posix_ipc.SharedMemory(name)
        except posix_ipc.ExistentialError:
            raise _problem(name, rank, "absent", "there is no such segment") from None
        try:
            return cls(name, memory.fd, layout.CONTROL_END, owned=False)
        except BaseException:
            os.close(memory.fd)
            raise

    def view(self, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes of the segment; the view keeps the mapping alive."""
        return np.frombuffer(self._map, np.uint8, n_bytes, offset)

    def header(self) -> Header:
        """The owner, as the header says."""
        header = self.view(0, layout.HEADER.size_bytes).view(np.int64)
        return Header(
            rank=int(header[layout.HDR_RANK // 8]),
            owner_pid=int(header[layout.HDR_OWNER_PID // 8]),
            owner_start_ticks=int(header[layout.HDR_OWNER_START // 8]),
        )

    def commit(self, offset: int, n_bytes: int) -> None:
        """Back a part of the segment with memory.

        Raises:
            CapacityError: /dev/shm is full. Without this, touching the page would be SIGBUS.
        """
        _commit(self._fd, offset, n_bytes, self.name)

    def release(self, start: int, length: int) -> None:
        """Take whole pages out of the file; they read as 0, and must be committed again before they are touched."""
        self._map.madvise(mmap.MADV_REMOVE, start, length)

    def unlink(self) -> None:
        """Remove the name, if this rank made it; the memory lives on while it is mapped."""
        if self._owned:
            self._owned = False
            with contextlib.suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_shared_memory(self.name)

    def close(self) -> None:
        """Unlink if owned, and close the descriptor. The mapping goes with its last view."""
        self.unlink()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _commit(fd: int, offset: int, n_bytes: int, name: str) -> None:
    if n_bytes <= 0:
        return
    while True:
        try:
            os.posix_fallocate(fd, offset, n_bytes)
            return
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise
            available_bytes = free_bytes()
            raise CapacityError(
                f"{SHM_DIR} is full: segment {name} needs {n_bytes} more bytes, {available_bytes} are free; "
                f"use fewer ranks or tokens, or enlarge it (mount -o remount,size=..., docker --shm-size)",
                needed_bytes=n_bytes,
                available_bytes=available_bytes,
            ) from error


def _described(session_id: bytes, rank: int, geometry: Geometry) -> dict[int, int]:
    """The header's words that both sides can compute, by offset."""
    session = np.frombuffer(session_id, np.int64)
    return {
        layout.HDR_MAGIC: layout.MAGIC,
        layout.HDR_VERSION: layout.LAYOUT_VERSION,
        layout.HDR_SESSION: int(session[0]),
        layout.HDR_SESSION + 8: int(session[1]),
        layout.HDR_RANK: rank,
        layout.HDR_RANKS: geometry.ranks,
        layout.HDR_TOTAL_BYTES: geometry.total_bytes,
        layout.HDR_APP_OFFSET: geometry.app_offset,
        layout.HDR_APP_BYTES: geometry.app_bytes,
        layout.HDR_METADATA_OFFSET: geometry.metadata_offset,
        layout.HDR_METADATA_BYTES: geometry.managed_offset - geometry.metadata_offset,
        layout.HDR_MANAGED_OFFSET: geometry.managed_offset,
        layout.HDR_MANAGED_BYTES: geometry.total_bytes - geometry.managed_offset,
        layout.HDR_RING_SLOTS: geometry.ring_slots,
        layout.HDR_SLOT_BYTES: geometry.slot_bytes,
    }


def _problem(name: str, rank: int, reason: SegmentProblem, text: str) -> SegmentError:
    return SegmentError(f"segment {name} of rank {rank}: {text}", reason=reason, name=name, rank=rank)


def _check_header(name: str, rank: int, fd: int, session_id: bytes, geometry: Geometry) -> None:
    size_bytes = os.fstat(fd).st_size
    if size_bytes < layout.HEADER.size_bytes:
        raise _problem(name, rank, "not_ready", f"it is still being made ({size_bytes} bytes)")
    with mmap.mmap(fd, layout.HEADER.size_bytes) as page:
        header = np.frombuffer(page, np.int64)
        # SYNC POINT segment-ready: acquires the header that `create` released.
        ready = words.load(header.ctypes.data + layout.HDR_READY)
        found = header.copy()
        del header
    magic = int(found[layout.HDR_MAGIC // 8])
    if not ready and magic in (0, layout.MAGIC):
        raise _problem(name, rank, "not_ready", "its owner has not finished making it")
    if magic != layout.MAGIC:
        raise _problem(name, rank, "wrong_magic", f"this is no xccl segment (magic {magic:#x})")
    version = int(found[layout.HDR_VERSION // 8])
    if version != layout.LAYOUT_VERSION:
        text = f"layout version {version}, this xccl has {layout.LAYOUT_VERSION}; all ranks need the same xccl"
        raise _problem(name, rank, "wrong_version", text)
    for offset, value in _described(session_id, rank, geometry).items():
        seen = int(found[offset // 8])
        if seen == value:
            continue
        field = next(f.name for f in layout.HEADER.fields if f.offset_bytes <= offset < f.offset_bytes + f.size_bytes)
        reason: SegmentProblem = "wrong_session" if field in ("session_id", "rank") else "wrong_size"
        raise _problem(name, rank, reason, f"{field} is {seen}, expected {value}; all ranks need the same options")
    if size_bytes != geometry.total_bytes:
        raise _problem(name, rank, "wrong_size", f"it has {size_bytes} bytes, expected {geometry.total_bytes}")
