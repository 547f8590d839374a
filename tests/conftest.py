"""For all tests: hypothesis profiles, the fabrics, and a check that no test leaves anything behind.

Ranks are forked from the test's own process, so their functions may be closures. What they assert fails the test all
the same: `launch` raises a rank's exception again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from xccl.runtime.cleanup import find_segments, remove_stale

SHM_DIR = Path("/dev/shm")
#: Processes that have exited, threads that end, and names of sessions that are just starting may need a moment.
GRACE_S = 3.0

#: In the command of processes that outlive a test: Python's own, for start method spawn, which ends with pytest; and
#: servers of a module's tests, which end with the module.
LASTING = ("multiprocessing.resource_tracker", "serves all tests of its module")

# An example launches ranks, and the first one may compile kernels: time says nothing about the code.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
# In CI the same examples every time: a failure there is due to the change.
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default"))


@pytest.fixture(params=["shm", "local"], scope="module")
def fabric(request: pytest.FixtureRequest) -> str:
    """Name of a fabric; a test that asks for it runs on each."""
    name: str = request.param
    return name


@pytest.fixture(params=["pull", "push", "direct"], scope="module")
def protocol(request: pytest.FixtureRequest) -> str:
    """Name of a protocol of dispatch and combine; a test that asks for it runs with each."""
    name: str = request.param
    return name


@pytest.fixture(autouse=True, scope="session")
def clean_start() -> None:
    """What an earlier, killed run has left in /dev/shm is not the fault of this one."""
    remove_stale()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No name in /dev/shm, no process and no rank's thread is there before a test, or after it."""
    before = _lasting(_leftovers)
    assert not before, f"there before the test: {before}"
    yield
    after = _lasting(_leftovers)
    if after:
        for path in SHM_DIR.glob("xccl-*"):  # so that the next test is judged by what it does itself
            if any(path.name in line for line in after):
                path.unlink(missing_ok=True)
    assert not after, f"left by the test: {after}"


def _lasting(look: Callable[[], list[str]]) -> list[str]:
    """What is still there at the end of the grace period."""
    deadline = time.monotonic() + GRACE_S
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def _leftovers() -> list[str]:
    return [*_segments(), *_child_processes(), *_rank_threads()]


def _segments() -> list[str]:
    """Names in /dev/shm, but not those of sessions that live in other processes of this machine."""
    if not any(SHM_DIR.glob("xccl-*")):
        return []
    ours = {os.getpid(), *_children()}
    return [
        f"segment {segment.name} of process {segment.owner_pid}"
        for segment in find_segments()
        if not segment.alive or segment.owner_pid in ours
    ]


def _children() -> list[int]:
    """All children of this process, whichever thread forked them, zombies too."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            found += [int(pid) for pid in path.read_text().split()]
        except OSError:
            pass  # the thread has ended
    return found


def _child_processes() -> list[str]:
    lines = []
    for pid in _children():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
        except OSError:
            continue  # reaped meanwhile
        if not any(known in command for known in LASTING):
            lines.append(f"process {pid} ({command or 'zombie'})")
    return lines


def _rank_threads() -> list[str]:
    return [f"thread {thread.name}" for thread in threading.enumerate() if thread.name.startswith("xccl rank")]
