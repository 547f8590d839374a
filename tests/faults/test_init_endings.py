"""Sessions of processes that something else has started: how they end."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import xccl
from tests.faults.members import SMALL, members, prefix_of, session_name, session_of
from tests.faults.support import (
    LOOPS,
    NOTICE_S,
    PATIENCE_S,
    Script,
    at_most,
    no_new_names,
    run_for_ever,
    segment_names,
    state_of,
    wait_for,
)
from xccl.runtime.cleanup import remove_stale


def test_an_unhandled_exception_ends_all() -> None:
    """Without a `with` block: by the hook for unhandled exceptions."""
    code = """
comm = xccl.init()
if comm.rank == 1:
    comm.barrier()
    raise RuntimeError("out of ideas")
start = time.monotonic()
try:
    comm.barrier()
    comm.barrier()
except xccl.SessionAborted as error:
    say(error.peer, error.reason, time.monotonic() - start)
"""
    with session_of(code, 2) as scripts:
        status, said, err = scripts[0].finish()
        assert (status, err) == (0, "")
        peer, reason, after_s = said[0]
        assert (peer, reason) == (1, "raised RuntimeError: out of ideas")
        assert after_s < NOTICE_S
        status, _, err = scripts[1].finish()
        assert status == 1
        assert err.count("Traceback") == 1
        assert err.rstrip().endswith("RuntimeError: out of ideas")


def test_an_exception_in_a_context_ends_all() -> None:
    def main(comm: xccl.Communicator) -> None:
        if comm.rank == 2:
            raise ValueError("first")
        run_for_ever(comm)

    with members(main, 4) as ranks:
        errors = [member.outcome()[1] for member in ranks]
    assert repr(errors.pop(2)) == repr(ValueError("first"))
    assert [(type(e), e.peer, e.reason) for e in errors] == [(xccl.SessionAborted, 2, "raised ValueError: first")] * 3


def test_exit_without_close() -> None:
    """A rank whose script has ended has done its work; who still waits for it is told that it has left."""
    code = """
comm = xccl.init()
comm.barrier()
if comm.rank == 0:
    try:
        comm.recv(np.zeros(1), src=1, event_id=1)
    except xccl.PeerDied as error:
        say(error.peer, error.reason)
"""
    with session_of(code, 2) as scripts:
        assert scripts[1].finish() == (0, [], "")
        with at_most(NOTICE_S):
            assert scripts[0].finish() == (0, [[1, "has finished and left the session"]], "")


@pytest.mark.parametrize("operation", LOOPS)
def test_kill(operation: str) -> None:
    before = segment_names()
    with members(lambda comm: run_for_ever(comm, operation), 4, of=lambda _: {"heap_bytes": 1 << 26}) as ranks:
        time.sleep(0.1)
        start = time.monotonic()
        os.kill(ranks[1].pid, signal.SIGKILL)
        for rank in (0, 2, 3):
            kind, error = ranks[rank].outcome()
            assert kind == "error"
            assert isinstance(error, xccl.PeerDied)
            assert error.peer == 1
        assert time.monotonic() - start < NOTICE_S
        no_new_names(before)


def test_a_zombie_is_dead() -> None:
    """Its parent does not reap it, so there is a process of its number, with its start time, and it answers to signal 0."""
    code = """
import subprocess
# A parent that has other things to do.
child = subprocess.Popen([sys.executable, "-c", "import xccl; xccl.init().barrier(); input()"], stdin=subprocess.PIPE)
say(child.pid)
time.sleep(60.0)
"""
    session = session_name()
    with Script(code, XCCL_RANK="1", XCCL_SIZE="2", XCCL_SESSION=session) as parent:
        (zombie,) = parent.hear()
        comm = xccl.init(0, 2, session, join_timeout_s=PATIENCE_S)
        try:
            comm.barrier()
            os.kill(zombie, signal.SIGKILL)
            with at_most(NOTICE_S), pytest.raises(xccl.PeerDied) as caught:
                comm.barrier()
            assert caught.value.peer == 1
            assert state_of(zombie) == "Z"
            os.kill(zombie, 0)
        finally:
            comm.close(failed=True)


def test_a_zombie_among_those_that_join() -> None:
    """Its segment has a name, and nobody behind it."""
    code = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import xccl; xccl.init()"])
say(child.pid)
time.sleep(60.0)
"""
    session = session_name()
    prefix = prefix_of(session)
    with Script(code, XCCL_RANK="1", XCCL_SIZE="2", XCCL_SESSION=session) as parent:
        (zombie,) = parent.hear()
        wait_for(lambda: f"{prefix}1" in segment_names(), "segment of rank 1")
        os.kill(zombie, signal.SIGKILL)
        wait_for(lambda: state_of(zombie) == "Z", "zombie")
        # `init` removes the stale name. A rank that had seen it before that must not take the zombie for alive.
        with pytest.MonkeyPatch.context() as patch, pytest.raises(xccl.PeerDied) as caught:
            patch.setattr(sys.modules["xccl.runtime.init"], "remove_stale", list)
            with at_most(NOTICE_S):
                xccl.init(0, 2, session, join_timeout_s=PATIENCE_S)
        assert caught.value.peer == 1
        assert f"{prefix}1" in {segment.name for segment in remove_stale()}


def test_a_child_of_a_rank_speaks_for_nobody() -> None:
    """It inherits the communicator, and its end says nothing about the rank."""
    code = """
comm = xccl.init()
comm.barrier()
if comm.rank == 1:
    for ending in (lambda: sys.exit(0), lambda: comm.close()):
        pid = os.fork()
        if pid == 0:
            ending()
            sys.exit(0)
        os.waitpid(pid, 0)
    time.sleep(0.2)
comm.barrier()
say("done")
"""
    with session_of(code, 2) as scripts:
        for script in scripts:
            assert script.finish() == (0, [["done"]], "")


def test_many_sessions_in_one_process_leave_nothing_behind() -> None:
    """Neither descriptors nor mappings, nor a longer chain of hooks."""

    def once() -> None:
        with xccl.init(0, 1, session_name(), **SMALL) as comm:
            comm.empty(1000, np.float64).local[:] = 1
            comm.barrier()

    def held() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(list(Path("/proc/self/fd").iterdir())), maps.count("/dev/shm/xccl-")

    once()
    hook = sys.excepthook
    once()
    before = held()
    for _ in range(10):
        once()
    assert held() <= before
    assert sys.excepthook is hook
