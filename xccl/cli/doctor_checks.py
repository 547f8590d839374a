"""The checks of `xccl doctor`. Each looks at one thing, says what it found, and what to do if that is not good."""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import resource
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

import posix_ipc

from xccl.cli.environment import cpu_model, package_versions, usable_cores

SHM: Final = Path("/dev/shm")
#: Less than this is not enough for a session of a few ranks; containers often have 64 MB.
_SHM_ENOUGH_BYTES: Final = 512 * 2**20
_FILES_ENOUGH: Final = 1024


class Status(Enum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    BROKEN = "BROKEN"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found, and lines of advice or detail."""

    name: str
    status: Status
    found: str
    notes: tuple[str, ...] = ()


def checks() -> Iterator[Check]:
    """All checks of the machine."""
    yield versions()
    yield cores()
    yield shared_memory_size()
    yield shared_memory_works()
    yield kernel_cache()
    yield open_files()


def versions() -> Check:
    """Versions of the system, of Python and of packages."""
    found = package_versions()
    missing = [name for name, version in found.items() if version == "absent"]
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    text = ", ".join([system, *(f"{name} {version}" for name, version in found.items())])
    if missing:
        return Check("versions", Status.BROKEN, text, (f"install {', '.join(missing)}",))
    return Check("versions", Status.OK, text)


def cores() -> Check:
    """Processor and cores."""
    count = usable_cores()
    text = f"{count} usable of {os.cpu_count()}, {cpu_model()}"
    if count < 2:
        return Check(
            "cores",
            Status.WARNING,
            text,
            ("ranks take turns on one core: correct, but latencies are of the scheduler",),
        )
    return Check("cores", Status.OK, text)


def shared_memory_size() -> Check:
    """Size of /dev/shm and what is free of it."""
    try:
        stat = os.statvfs(SHM)
    except OSError as error:
        return Check(
            "shared memory", Status.BROKEN, f"{SHM}: {error.strerror}", ("mount a tmpfs there, or use --fabric local",)
        )
    size, free = stat.f_frsize * stat.f_blocks, stat.f_frsize * stat.f_bavail
    text = f"{SHM}: {free / 2**20:.0f} MiB free of {size / 2**20:.0f} MiB"
    if free < _SHM_ENOUGH_BYTES:
        advice = "enlarge it: docker run --shm-size=8g, or mount -o remount,size=8G /dev/shm"
        return Check("shared memory", Status.WARNING, text, (advice,))
    return Check("shared memory", Status.OK, text)


def shared_memory_works() -> Check:
    """Whether a segment can be made, filled and removed, as a rank does it."""
    name = "permissions"
    try:
        segment = posix_ipc.SharedMemory(f"/xccl-doctor-{secrets.token_hex(8)}", posix_ipc.O_CREX, mode=0o600)
        try:
            os.posix_fallocate(segment.fd, 0, mmap.PAGESIZE)
            with contextlib.closing(mmap.mmap(segment.fd, mmap.PAGESIZE)) as memory:
                memory[0] = 1
        finally:
            segment.close_fd()
            segment.unlink()
    except (OSError, posix_ipc.Error) as error:
        advice = f"need read and write permission on {SHM}, and free space there"
        return Check(name, Status.BROKEN, f"cannot make a segment: {error}", (advice,))
    return Check(name, Status.OK, f"segments can be made in {SHM}")


def kernel_cache() -> Check:
    """Where compiled kernels are kept."""
    from xccl.kernels._jit import cache_dir

    name = "kernel cache"
    path = cache_dir()
    advice = "set XCCL_CACHE_DIR to a directory that lasts and that you may write to"
    if not os.access(path, os.W_OK):
        return Check(name, Status.BROKEN, f"{path} is not writable", (advice,))
    compiled = len(list(path.rglob("*.nbc")))
    text = f"{path}: {compiled} compiled kernels"
    if not compiled:
        return Check(name, Status.OK, text, ("the first run compiles them, which takes some seconds",))
    return Check(name, Status.OK, text)


def open_files() -> Check:
    """How many files a process may open: the launcher holds some for each rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} (at most {hard})"
    if soft != resource.RLIM_INFINITY and soft < _FILES_ENOUGH:
        return Check("open files", Status.WARNING, text, (f"ulimit -n {_FILES_ENOUGH} for many ranks",))
    return Check("open files", Status.OK, text)


def stale_segments(*, clean: bool) -> Check:
    """Segments whose owners are dead; removes them if asked."""
    from xccl.runtime.cleanup import find_stale, remove_stale

    name = "stale segments"
    stale = [segment for segment in find_stale() if not segment.alive]
    if not stale:
        return Check(name, Status.OK, "none")
    lines = tuple(f"{s.name}: {s.size_bytes / 2**20:.1f} MiB, owner {s.owner_pid} is dead" for s in stale)
    if clean:
        remove_stale()
        return Check(name, Status.OK, f"{len(stale)} removed", lines)
    return Check(name, Status.WARNING, f"{len(stale)}", (*lines, "remove them with: xccl doctor --clean"))
