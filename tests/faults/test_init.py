"""Sessions of processes that something else has started: how they come together, and how they end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xccl
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
from xccl.fabric.segment import segment_name
from xccl.fabric.shm import ShmFabric
from xccl.runtime.cleanup import remove_stale

SMALL: dict[str, Any] = {"app_bytes": 1 << 20, "heap_bytes": 1 << 20}

WORK = """
comm = xccl.init()
a = comm.empty(4, np.int64)
comm.put(a, np.full(4, 10 + comm.rank), peer=(comm.rank + 1) % comm.size)
comm.barrier()
say(comm.rank, comm.size, comm.fabric_name, int(a.local[0]))
"""


def session_name() -> str:
    return secrets.token_hex(8)


@contextlib.contextmanager
def session_of(code: str, ranks: int, style: str = "xccl") -> Iterator[list[Script]]:
    """A script a rank, told by environment variables who it is."""
    rank_variable, size_variable = {
        "xccl": ("XCCL_RANK", "XCCL_SIZE"),
        "torchrun": ("RANK", "WORLD_SIZE"),
    }[style]
    name = session_name()
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Script(code, **{rank_variable: str(rank), size_variable: str(ranks), "XCCL_SESSION": name})
            )
            for rank in range(ranks)
        ]


class Member:
    """A rank as a child of this process: forked with warm kernels, which a new interpreter would have to load."""

    def __init__(self, main: Callable[..., Any], rank: int, size: int, session: str, **options: Any) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        options = {"join_timeout_s": 10.0} | SMALL | options
        self.process = context.Process(target=self._main, args=(theirs, main, rank, size, session, options))
        self.process.start()
        theirs.close()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @staticmethod
    def _main(theirs: Connection, main: Callable[..., Any], rank: int, size: int, session: str, options: Any) -> None:
        try:
            with xccl.init(rank, size, session, **options) as comm:
                theirs.send(("result", main(comm)))
        except Exception as error:
            theirs.send(("error", error))

    def outcome(self) -> tuple[str, Any]:
        assert self._ours.poll(PATIENCE_S), "no word from a rank"
        word: tuple[str, Any] = self._ours.recv()
        return word

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self._ours.close()


@contextlib.contextmanager
def members(
    main: Callable[..., Any], size: int, session: str | None = None, of: Callable[[int], dict[str, Any]] | None = None
) -> Iterator[list[Member]]:
    session = session or session_name()
    made = [Member(main, rank, size, session, **(of(rank) if of else {})) for rank in range(size)]
    try:
        yield made
    finally:
        for member in made:
            member.end()


# -- coming together ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["xccl", "torchrun"])
def test_environment_variables(style: str) -> None:
    before = segment_names()
    with session_of(WORK, 2, style) as scripts:
        for rank, script in enumerate(scripts):
            status, said, err = script.finish()
            assert (status, err) == (0, "")
            assert said == [[rank, 2, "shm", 10 + (rank - 1) % 2]]
    no_new_names(before)


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing in the environment says what rank this is."""
    for name in ("XCCL_RANK", "XCCL_SIZE", "XCCL_SESSION", "RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
                 "OMPI_COMM_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {"XCCL_RANK": "0", "XCCL_SIZE": "1", "RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "7"},
    ],
    ids=["mpirun", "srun", "own ones come first"],
)
def test_variables_of_other_launchers(variables: dict[str, str], no_variables: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        no_variables.setenv(name, value)
    with xccl.init(session=session_name(), **SMALL) as comm:
        assert (comm.rank, comm.size) == (0, 1)


@pytest.mark.parametrize("missing", ["XCCL_RANK", "XCCL_SIZE", "XCCL_SESSION"])
def test_missing_variables(missing: str, no_variables: pytest.MonkeyPatch) -> None:
    for name, value in {"XCCL_RANK": "0", "XCCL_SIZE": "1", "XCCL_SESSION": "x"}.items():
        if name != missing:
            no_variables.setenv(name, value)
    with pytest.raises(xccl.UsageError, match=missing):
        xccl.init()


def test_work_in_a_context() -> None:
    def main(comm: xccl.Communicator) -> list[float]:
        into = np.zeros(3)
        request = comm.isend(np.full(3, float(comm.rank)), (comm.rank + 1) % comm.size, event_id=4)
        comm.recv(into, (comm.rank - 1) % comm.size, event_id=4)
        request.wait()
        comm.barrier()
        assert not [name for name in segment_names() if name.startswith(names)], "a name lives on after all have joined"
        return into.tolist()

    session = session_name()
    names = _prefix(session)
    with members(main, 4, session) as ranks:
        assert [member.outcome() for member in ranks] == [("result", [float((r - 1) % 4)] * 3) for r in range(4)]


def _prefix(session: str) -> str:
    """The common part of a session's names in /dev/shm."""
    seen: list[bytes] = []

    class Stop(Exception):
        pass

    def stop(self: ShmFabric, session_id: bytes, *_: Any, **__: Any) -> None:
        seen.append(session_id)
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(ShmFabric, "__init__", stop)
        xccl.init(0, 1, session)
    return segment_name(seen[0], 0)[1:-1]


def test_late_ranks_are_waited_for() -> None:
    session = session_name()
    early = Member(lambda comm: comm.barrier(), 0, 2, session)
    try:
        time.sleep(0.3)
        late = Member(lambda comm: comm.barrier(), 1, 2, session)
        try:
            assert early.outcome() == late.outcome() == ("result", None)
        finally:
            late.end()
    finally:
        early.end()


def test_join_timeout() -> None:
    before = segment_names()
    with at_most(1.0), pytest.raises(xccl.WaitTimeout) as caught:
        xccl.init(0, 3, session_name(), join_timeout_s=0.15, **SMALL)
    error = caught.value
    assert (error.operation, error.rank, error.peer, error.timeout_s) == ("join", 0, 1, 0.15)
    no_new_names(before)


@pytest.mark.parametrize(
    "options",
    [{"app_bytes": 1 << 21}, {"heap_bytes": 1 << 21}, {"ring_slots": 8}, {"slot_bytes": 4096}, {"size": 4}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_other_options_at_one_rank(options: dict[str, int], odd: int) -> None:
    """All ranks end, at once, and say why, although the odd one cannot attach the others."""
    session, size = session_name(), 3
    with at_most(NOTICE_S), contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(size):
            own = {"size": size} | (options if rank == odd else {})
            ranks.append(Member(lambda comm: None, rank, session=session, **own))
            stack.callback(ranks[-1].end)
        errors = [member.outcome()[1] for member in ranks]
    for error in errors:
        assert isinstance(error, xccl.SegmentError | xccl.SessionAborted)
        assert "all ranks need the same options" in str(error)
        if isinstance(error, xccl.SegmentError):
            assert error.reason == "wrong_size"
    assert any(isinstance(error, xccl.SegmentError) for error in errors)


def test_a_rank_number_is_taken_once() -> None:
    session = session_name()
    first = Member(lambda comm: None, 0, 2, session)
    try:
        wait_for(lambda: any(name.startswith(_prefix(session)) for name in segment_names()), "segment of rank 0")
        with pytest.raises(xccl.FabricError, match="rank 0 of this session exists already"):
            xccl.init(0, 2, session, **SMALL)
        second = Member(lambda comm: comm.rank, 1, 2, session)  # the session is none the worse for it
        try:
            assert second.outcome() == ("result", 1)
            assert first.outcome() == ("result", None)
        finally:
            second.end()
    finally:
        first.end()


def test_a_session_may_be_started_again_under_its_name() -> None:
    session = session_name()
    for _ in range(3):
        with members(lambda comm: comm.barrier(), 3, session) as ranks:
            assert [member.outcome() for member in ranks] == [("result", None)] * 3


def test_names_of_a_killed_start_are_not_in_the_way() -> None:
    """The ranks of the first start were killed while they joined; the second start uses the same names."""
    session = session_name()
    prefix = _prefix(session)
    killed = Member(lambda comm: None, 0, 2, session)
    wait_for(lambda: any(name.startswith(prefix) for name in segment_names()), "segment of rank 0")
    time.sleep(0.02)
    killed.end()
    assert any(name.startswith(prefix) for name in segment_names())
    with members(lambda comm: comm.barrier(), 2, session) as ranks:
        assert [member.outcome() for member in ranks] == [("result", None)] * 2
    assert not any(name.startswith(prefix) for name in segment_names())


# -- endings -----------------------------------------------------------------------------------------------------------


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
    prefix = _prefix(session)
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
