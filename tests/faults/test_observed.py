"""What `xccl top` sees of ranks that have died, failed or stopped, and of sessions that end while it looks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import xccl
from tests.faults.support import PATIENCE_S, segment_names
from xccl.cli import top_report
from xccl.cli.top_waits import Analysis, analyse
from xccl.runtime.sessions import ObservedSession, take_snapshot


def sessions_of(pid: int) -> list[ObservedSession]:
    """Those in which this process is a rank."""
    return [s for s in take_snapshot().sessions if any(rank.pid == pid for rank in s.ranks)]


def eventually(condition: Callable[[ObservedSession, Analysis], Any]) -> tuple[ObservedSession, Analysis]:
    """The own session and what is seen of it, when the condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        (session,) = sessions_of(os.getpid())
        seen = analyse(session)
        if condition(session, seen):
            return session, seen
        assert time.monotonic() < deadline, f"this is all that was seen: {session}"


def root_of(seen: Analysis, rank: int) -> str:
    return next((root.why for root in seen.roots if root.rank == rank), "")


def test_a_rank_that_was_killed_is_dead() -> None:
    """It died in a wait, and the one that looks is in no call, in which it would notice."""
    said: list[Any] = []

    def main(comm: xccl.Communicator) -> None:
        comm.barrier()
        if comm.rank == 0:
            session, _ = eventually(lambda session, seen: seen.waits[1])
            os.kill(session.ranks[1].pid, signal.SIGKILL)
            session, seen = eventually(lambda session, seen: session.ranks[1].process.activity == "dead")
            comm.report((root_of(seen, 1), top_report.findings(session, seen, time.monotonic_ns())))
        comm.barrier()

    with pytest.raises(xccl.PeerDied, match="rank 1 was killed"):
        xccl.launch(main, 3, on_report=lambda rank, message: said.append(message))
    ((why, findings),) = said
    assert why == "died, in barrier (event 2)"
    assert "rank 1 died, in barrier (event 2)" in findings


def test_a_rank_that_was_stopped_is_the_root() -> None:
    def main(comm: xccl.Communicator) -> None:
        comm.barrier()
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif comm.rank == 0:
            session, _ = eventually(lambda session, seen: session.ranks[1].process.activity == "stopped")
            try:
                comm.barrier(timeout_s=1.0)
            except xccl.WaitTimeout:
                pass
            eventually(lambda session, seen: root_of(seen, 1) == "is stopped, by a signal or a debugger")
            os.kill(session.ranks[1].pid, signal.SIGCONT)
        comm.barrier()

    xccl.launch(main, 3)


def test_a_rank_that_failed_is_quoted() -> None:
    said: list[list[str]] = []

    def main(comm: xccl.Communicator) -> None:
        comm.barrier()
        if comm.rank == 2:
            raise ValueError("no such page")
        if comm.rank == 0:
            session, seen = eventually(lambda session, seen: session.ranks[0].abort)
            comm.report(top_report.findings(session, seen, time.monotonic_ns()))
        comm.barrier()

    with pytest.raises(ValueError, match="no such page"):
        xccl.launch(main, 3, on_report=lambda rank, message: said.append(message))
    (findings,) = said
    assert "aborted, since rank 2 raised ValueError: no such page" in findings


def test_sessions_may_begin_and_end_while_somebody_looks() -> None:
    """The observer sees them or not, and neither fails nor holds anything back."""
    over = threading.Event()
    errors: list[BaseException] = []
    looks = 0

    def look() -> None:
        nonlocal looks
        while not over.is_set():
            try:
                snapshot = take_snapshot()
                top_report.plain(snapshot, "", 8)
                top_report.to_json(snapshot, [], "")
                looks += 1
            except BaseException as error:
                errors.append(error)
                return

    observer = threading.Thread(target=look)
    observer.start()
    try:
        for i in range(12):

            def main(comm: xccl.Communicator, i: int = i) -> int:
                comm.barrier()
                return i

            assert xccl.launch(main, 1 + i % 5) == [i] * (1 + i % 5)
    finally:
        over.set()
        observer.join()
    assert not errors
    assert looks > 12
    assert not segment_names()
