"""kill -9 of any rank at any moment: all others notice, the launcher names it, and nothing is left."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import Any

import pytest

import xccl
from tests.faults.support import (
    LOOPS,
    NOTICE_S,
    PATIENCE_S,
    SESSION_OVER,
    children_left,
    run_for_ever,
    segment_names,
    wait_for,
)
from xccl.fabric.shm import ShmFabric
from xccl.runtime import processes

#: 9 operations x 5 seeds x 5 kills = 225 kills.
SEEDS = range(5)
KILLS = 5


@pytest.fixture
def session_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The common part of the names of each session that is launched here; other tests may run on this machine."""
    prefixes: list[str] = []
    token_bytes = processes.secrets.token_bytes

    def recorded(n: int) -> bytes:
        session_id = token_bytes(n)
        prefixes.append(f"xccl-{session_id.hex()}-")
        return session_id

    monkeypatch.setattr(processes.secrets, "token_bytes", recorded)
    return prefixes


def assert_nothing_left(session_names: list[str]) -> None:
    left = [name for name in segment_names() if name.startswith(tuple(session_names))]
    assert not left
    assert not children_left()


def loop_and_tell(comm: xccl.Communicator, operation: str) -> None:
    """Loop until the session is over, and tell when and how that was seen."""
    step = LOOPS[operation](comm)
    comm.barrier()
    comm.report(("running", os.getpid()))
    try:
        while True:
            step()
    except SESSION_OVER as error:
        comm.report(("over", time.monotonic(), error))
        if comm.rank % 2:
            raise


class Killer:
    """Kills one rank once all of them run, and keeps what the others say."""

    def __init__(self, ranks: int, victim: int, after_s: float) -> None:
        self.ranks = ranks
        self.victim = victim
        self.after_s = after_s
        self.killed_at = 0.0
        self.pids: dict[int, int] = {}
        self.noticed: dict[int, tuple[float, xccl.PeerDied | xccl.SessionAborted]] = {}

    def __call__(self, rank: int, message: tuple[Any, ...]) -> None:
        if message[0] == "over":
            self.noticed[rank] = message[1], message[2]
            return
        self.pids[rank] = message[1]
        if len(self.pids) == self.ranks:
            time.sleep(self.after_s)
            self.killed_at = time.monotonic()
            os.kill(self.pids[self.victim], signal.SIGKILL)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("operation", LOOPS)
def test_kill_a_random_rank_at_a_random_moment(operation: str, seed: int, session_names: list[str]) -> None:
    rng = random.Random(f"{operation} {seed}")
    for _ in range(KILLS):
        ranks = rng.choice((5, 6, 7))
        killer = Killer(ranks, rng.randrange(ranks), rng.uniform(0.0, 0.02))
        with pytest.raises(
            xccl.PeerDied, match=rf"^rank {killer.victim} was killed by signal 9 \(SIGKILL\)$"
        ) as caught:
            xccl.launch(loop_and_tell, ranks, args=(operation,), timeout_s=PATIENCE_S, on_report=killer)
        assert_nothing_left(session_names)
        assert (caught.value.peer, caught.value.rank) == (killer.victim, None)
        assert sorted(killer.noticed) == [rank for rank in range(ranks) if rank != killer.victim]
        for rank, (at, error) in killer.noticed.items():
            assert at - killer.killed_at < NOTICE_S, f"rank {rank} noticed late: {error}"
            assert (error.rank, error.peer) == (rank, killer.victim)


@pytest.mark.parametrize("operation", LOOPS)
def test_several_die_at_once(operation: str, session_names: list[str]) -> None:
    """All but one: nobody is left to tell it."""
    survivor = 2

    def on_report(rank: int, message: tuple[Any, ...]) -> None:
        killer(rank, message)
        if killer.killed_at and message[0] == "running":
            for other, pid in killer.pids.items():
                if other not in (survivor, killer.victim):
                    os.kill(pid, signal.SIGKILL)

    killer = Killer(5, 4, 0.003)
    with pytest.raises(xccl.PeerDied, match="was killed by signal 9"):
        xccl.launch(loop_and_tell, 5, args=(operation,), timeout_s=PATIENCE_S, on_report=on_report)
    assert_nothing_left(session_names)
    at, error = killer.noticed[survivor]
    assert at - killer.killed_at < NOTICE_S
    assert error.peer != survivor


@pytest.mark.parametrize("seed", range(5))
def test_kill_at_a_random_moment_of_the_start(seed: int, session_names: list[str]) -> None:
    rng = random.Random(seed)
    ranks = 5
    which, after_s = rng.randrange(ranks), rng.uniform(0.0, 0.015)
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: len(children_left()) > which, "child to kill")
        time.sleep(after_s)
        killed.append(sorted(children_left())[which])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(xccl.PeerDied, match="was killed by signal 9"):
            xccl.launch(run_for_ever, ranks, timeout_s=PATIENCE_S)
    finally:
        killer.join()
    assert killed
    assert_nothing_left(session_names)


@pytest.mark.parametrize(
    ("method", "name_is_left"), [("__init__", False), ("_attach", True), ("_await_attached", True)]
)
def test_kill_at_each_stage_of_the_start(
    method: str, name_is_left: bool, session_names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it has a segment, before it attaches the others, before its name goes: nothing stays."""
    victim = 1
    original = getattr(ShmFabric, method)
    read_end, write_end = os.pipe()

    def deadly(self: ShmFabric, *args: Any, **kwargs: Any) -> Any:
        rank = args[1] if method == "__init__" else self.rank
        if rank == victim:
            time.sleep(0.02)  # the others get as far as they can without it
            os.write(write_end, b"yes" if f"{session_names[-1]}{victim}" in segment_names() else b"no")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ShmFabric, method, deadly)  # the ranks are forked with it
    start = time.monotonic()
    with pytest.raises(xccl.PeerDied, match=f"^rank {victim} was killed by signal 9") as caught:
        xccl.launch(run_for_ever, 4, timeout_s=PATIENCE_S)
    assert time.monotonic() - start < NOTICE_S
    assert caught.value.peer == victim
    os.close(write_end)
    assert os.read(read_end, 100) == (b"yes" if name_is_left else b"no")
    os.close(read_end)
    assert_nothing_left(session_names)
