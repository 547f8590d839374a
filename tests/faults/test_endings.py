"""However a rank ends: the others end promptly, `launch` says who and how, and nothing is left."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xccl
from tests.faults.support import (
    LOOPS,
    NOTICE_S,
    PATIENCE_S,
    SESSION_OVER,
    at_most,
    children_left,
    run_for_ever,
    runs,
    wait_for,
)

RANKS = 4
CULPRIT = 2


class Failure(Exception):
    """Pickles as it is: one argument."""


class Unpicklable(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class PicklesOneWay(Exception):
    """Can be pickled, but not loaded: its arguments are not those of its constructor."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def launch_and_fail(
    act: Callable[[xccl.Communicator], Any], fabric: str, operation: str = "barrier"
) -> tuple[BaseException, dict[int, tuple[float, Exception]]]:
    """Rank CULPRIT acts while the others work: what `launch` raises, and what the others saw, after how long."""
    noticed: dict[int, tuple[float, Exception]] = {}
    acted: list[float] = []

    def main(comm: xccl.Communicator) -> None:
        step = LOOPS[operation](comm)
        if comm.rank == CULPRIT:
            comm.barrier()
            comm.report(("acts", time.monotonic()))
            act(comm)
            return
        try:
            comm.barrier()
            while True:
                step()
        except SESSION_OVER as error:
            comm.report((time.monotonic(), error))
            raise

    def on_report(rank: int, message: Any) -> None:
        if rank == CULPRIT:
            acted.append(message[1])
        else:
            noticed[rank] = message

    with at_most(NOTICE_S), pytest.raises(BaseException) as caught:  # noqa: PT011 - the caller looks at it
        xccl.launch(main, RANKS, fabric=fabric, timeout_s=PATIENCE_S, on_report=on_report)
    assert not children_left()
    return caught.value, {rank: (at - acted[0], error) for rank, (at, error) in noticed.items()}


def raise_failure(comm: xccl.Communicator) -> None:
    raise Failure("no more coffee")


@pytest.mark.parametrize("operation", LOOPS)
def test_an_exception_is_raised_again_and_ends_the_others(fabric: str, operation: str) -> None:
    error, noticed = launch_and_fail(raise_failure, fabric, operation)
    assert type(error) is Failure
    assert error.args == ("no more coffee",)
    assert error.__notes__ == [f"raised by rank {CULPRIT}"]
    text = str(error.__cause__)
    assert f"Traceback of rank {CULPRIT}" in text
    assert 'in raise_failure\n    raise Failure("no more coffee")' in text
    assert sorted(noticed) == [0, 1, 3]
    for rank, (after_s, seen) in noticed.items():
        assert after_s < 1.0
        assert type(seen) is xccl.SessionAborted
        assert (seen.rank, seen.peer, seen.reason) == (rank, CULPRIT, "raised Failure: no more coffee")
        assert f"rank {CULPRIT} raised Failure: no more coffee" in str(seen)


def test_errors_of_xccl_keep_their_numbers(fabric: str) -> None:
    def act(comm: xccl.Communicator) -> None:
        raise xccl.CapacityError("too much", needed_bytes=7, available_bytes=3)

    error, _ = launch_and_fail(act, fabric)
    assert type(error) is xccl.CapacityError
    assert (error.needed_bytes, error.available_bytes) == (7, 3)


def test_long_last_words_are_cut(fabric: str) -> None:
    def act(comm: xccl.Communicator) -> None:
        raise Failure("é" * 5000)

    error, noticed = launch_and_fail(act, fabric)
    assert error.args == ("é" * 5000,)
    _, seen = noticed[0]
    assert isinstance(seen, xccl.SessionAborted)
    assert seen.reason is not None
    assert seen.reason.startswith("raised Failure: éééé")


@pytest.mark.parametrize(
    ("status", "words"), [(3, "status 3"), (0, "status 0"), (None, "status 0"), ("bye", "status bye")]
)
def test_sys_exit(fabric: str, status: int | str | None, words: str) -> None:
    error, noticed = launch_and_fail(lambda comm: sys.exit(status), fabric)
    assert type(error) is xccl.PeerDied
    assert str(error) == f"rank {CULPRIT} exited with {words} before its work was done"
    assert (error.peer, error.reason) == (CULPRIT, f"exited with {words} before its work was done")
    assert sorted(noticed) == [0, 1, 3]
    assert all(seen.peer == CULPRIT for _, seen in noticed.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda comm: os._exit(0), "exited with status 0 before its work was done"),
        (lambda comm: os._exit(7), "exited with status 7 before its work was done"),
        (lambda comm: os.kill(os.getpid(), signal.SIGKILL), "was killed by signal 9 (SIGKILL)"),
        (lambda comm: os.kill(os.getpid(), signal.SIGUSR1), f"was killed by signal {signal.SIGUSR1} (SIGUSR1)"),
        (lambda comm: os.kill(os.getpid(), signal.SIGRTMIN + 3), f"was killed by signal {signal.SIGRTMIN + 3} ("),
    ],
    ids=["exit-0", "exit-7", "SIGKILL", "SIGUSR1", "real-time"],
)
def test_a_process_that_ends_without_a_word(act: Callable[[Any], Any], words: str) -> None:
    error, noticed = launch_and_fail(act, "shm")
    assert type(error) is xccl.PeerDied
    assert error.peer == CULPRIT
    assert str(error).startswith(f"rank {CULPRIT} {words}")
    assert sorted(noticed) == [0, 1, 3]
    assert {type(seen) for _, seen in noticed.values()} == {xccl.PeerDied}


@pytest.mark.parametrize(
    "error", [Unpicklable("cannot be sent"), PicklesOneWay(1, 2)], ids=["unpicklable", "pickles-one-way"]
)
def test_exceptions_that_cannot_be_sent_are_told(error: Exception) -> None:
    def act(comm: xccl.Communicator) -> None:
        raise error

    seen, _ = launch_and_fail(act, "shm")
    assert type(seen) is xccl.XcclError
    assert str(seen) == f"{type(error).__name__}: {error}"
    assert "in act\n    raise error" in str(seen.__cause__)


def test_an_unpicklable_result() -> None:
    with pytest.raises(xccl.FabricError, match="result of type function cannot be sent") as caught:
        xccl.launch(lambda comm: lambda: comm.rank, 2, timeout_s=PATIENCE_S)
    assert caught.value.__notes__[0].startswith("raised by rank ")
    assert all(callable(f) for f in xccl.launch(lambda comm: lambda: comm.rank, 2, fabric="local"))


@pytest.mark.parametrize(
    "wait_for_it",
    [
        lambda comm: comm.recv(np.zeros(4), src=CULPRIT, event_id=1),
        lambda comm: comm.send(np.zeros(1 << 20), dst=CULPRIT, event_id=1),
        lambda comm: comm.irecv(np.zeros(4), src=CULPRIT, event_id=1).wait(),
        lambda comm: comm.barrier(),
        lambda comm: comm.empty(4, np.int8),
        lambda comm: comm.signals(1),
        lambda comm: LOOPS["dispatch"](comm),
    ],
    ids=["recv", "send", "irecv", "barrier", "empty", "signals", "ExpertParallel"],
)
def test_waiting_for_a_rank_that_has_left(fabric: str, wait_for_it: Callable[[Any], Any]) -> None:
    """Its work is done, and that is no failure: only who needs it fails, and at once."""

    def main(comm: xccl.Communicator) -> tuple[float, xccl.PeerDied] | None:
        comm.barrier()
        if comm.rank == CULPRIT:
            return None
        start = time.monotonic()
        with pytest.raises(xccl.PeerDied) as caught:
            wait_for_it(comm)
        return time.monotonic() - start, caught.value

    seen = xccl.launch(main, RANKS, fabric=fabric, timeout_s=PATIENCE_S)
    for rank in (0, 1, 3):
        after_s, error = seen[rank]
        assert after_s < 1.0
        assert (error.rank, error.reason) == (rank, "has finished and left the session")
        # A barrier needs all, and by now another one may have given up, and left.
        assert error.peer == CULPRIT or error.peer != rank


def test_dispatch_with_a_rank_that_has_left(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> xccl.PeerDied | None:
        step = LOOPS["dispatch"](comm)
        step()
        if comm.rank == CULPRIT:
            return None
        with pytest.raises(xccl.PeerDied) as caught:
            step()
        return caught.value

    with at_most(NOTICE_S):
        seen = xccl.launch(main, RANKS, fabric=fabric, timeout_s=PATIENCE_S)
    assert [error.peer for error in seen if error is not None] == [CULPRIT] * 3


def test_wait_until_ends_when_nobody_is_left_to_signal(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> xccl.PeerDied | None:
        signals = comm.signals(1)
        if comm.rank != CULPRIT:
            return None
        with pytest.raises(xccl.PeerDied) as caught:
            comm.wait_until(signals, 0, "ge", 1)
        return caught.value

    with at_most(NOTICE_S):
        error = xccl.launch(main, RANKS, fabric=fabric, timeout_s=PATIENCE_S)[CULPRIT]
    assert error.reason == "has finished and left the session"


def test_what_a_rank_sent_before_it_left_arrives(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> float:
        into = np.zeros(8)
        if comm.rank == 0:
            request = comm.isend(np.full(8, 7.0), dst=1, event_id=1)
            while not request.test():
                pass
        else:
            comm.recv(into, src=0, event_id=1)
            time.sleep(0.05)
        return float(into.sum())

    for _ in range(3):
        assert xccl.launch(main, 2, fabric=fabric, timeout_s=PATIENCE_S) == [0.0, 56.0]


def test_ranks_that_never_talk_may_come_and_go(fabric: str) -> None:
    """The first has left before the last has joined, which is not a death."""
    for _ in range(5):
        assert xccl.launch(lambda comm: comm.rank, 16, fabric=fabric, timeout_s=PATIENCE_S) == list(range(16))


def test_ctrl_c_in_one_rank() -> None:
    error, noticed = launch_and_fail(lambda comm: (os.kill(os.getpid(), signal.SIGINT), time.sleep(PATIENCE_S)), "shm")
    assert type(error) is KeyboardInterrupt
    assert str(error) == f"rank {CULPRIT} was interrupted"
    assert sorted(noticed) == [0, 1, 3]
    for _, seen in noticed.values():
        assert type(seen) is xccl.SessionAborted
        assert (seen.peer, seen.reason) == (CULPRIT, "was interrupted")


def test_sigterm_of_one_rank() -> None:
    """Its `finally` clauses run, and the others hear of it before its process has ended."""
    error, noticed = launch_and_fail(lambda comm: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(PATIENCE_S)), "shm")
    assert type(error) is xccl.PeerDied
    assert str(error) == f"rank {CULPRIT} exited with status 143 before its work was done"
    assert {type(seen) for _, seen in noticed.values()} == {xccl.SessionAborted}


@pytest.mark.parametrize("operation", LOOPS)
def test_ctrl_c_in_one_rank_that_waits(operation: str) -> None:
    """It comes through although the rank is in a kernel: waits are cut into slices."""
    pids: dict[int, int] = {}

    def main(comm: xccl.Communicator) -> None:
        step = LOOPS[operation](comm)
        comm.report(os.getpid())
        while True:
            step()

    def on_report(rank: int, pid: int) -> None:
        pids[rank] = pid
        if len(pids) == RANKS:
            os.kill(pids[CULPRIT], signal.SIGINT)

    with at_most(NOTICE_S), pytest.raises(KeyboardInterrupt, match=f"^rank {CULPRIT} was interrupted$"):
        xccl.launch(main, RANKS, timeout_s=PATIENCE_S, on_report=on_report)


@pytest.mark.parametrize("how", ["sleeps", "computes", "computes and will not stop"])
@pytest.mark.parametrize("fails", ["raises", "is killed"])
def test_a_rank_that_computes_while_another_fails(how: str, fails: str, tmp_path: Path) -> None:
    """It does not look at the session: SIGTERM ends it by an exception, so that its `finally` runs, else SIGKILL."""
    cleaned = tmp_path / "cleaned"

    def main(comm: xccl.Communicator) -> None:
        comm.report(os.getpid())
        comm.barrier()
        if comm.rank == CULPRIT:
            time.sleep(0.05)  # by now the others are out of the barrier, and compute
            if fails == "raises":
                raise Failure("while the others compute")
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            try:
                if how == "sleeps":
                    time.sleep(PATIENCE_S)
                else:
                    sum(range(10**9))  # Python code that looks at no session
            except BaseException:
                if how != "computes and will not stop":
                    raise
            finally:
                with open(cleaned, "a") as file:
                    file.write(f"{comm.rank}\n")

    pids: list[int] = []
    start = time.monotonic()
    with pytest.raises((Failure, xccl.PeerDied)) as caught:
        xccl.launch(main, RANKS, timeout_s=PATIENCE_S, on_report=lambda rank, pid: pids.append(pid))
    assert 1.0 < time.monotonic() - start < 2.0  # 1 s of grace, then SIGTERM, 0.3 s, SIGKILL
    if fails == "raises":
        assert type(caught.value) is Failure
    else:
        assert (type(caught.value), caught.value.peer) == (xccl.PeerDied, CULPRIT)  # type: ignore[union-attr]
    assert len(pids) == RANKS
    assert not any(map(runs, pids))
    if how == "sleeps":
        assert sorted(cleaned.read_text().split()) == ["0", "1", "3"]


def test_a_thread_that_computes_is_left_behind_until_its_next_operation() -> None:
    ended: list[Exception] = []
    go_on = threading.Event()

    def main(comm: xccl.Communicator) -> None:
        comm.barrier()
        if comm.rank == CULPRIT:
            time.sleep(0.05)  # by now the others are out of the barrier
            raise Failure("while rank 0 computes")
        if comm.rank == 0:
            go_on.wait(PATIENCE_S)
        try:
            comm.barrier()
        except xccl.SessionAborted as error:
            ended.append(error)
            raise

    with at_most(NOTICE_S), pytest.raises(Failure):
        xccl.launch(main, RANKS, fabric="local", timeout_s=PATIENCE_S)
    assert len(ended) == RANKS - 2
    go_on.set()
    wait_for(lambda: len(ended) == RANKS - 1, "end of the thread")


def test_the_death_of_a_rank_that_leaves_a_child_behind_is_noticed() -> None:
    """The child holds copies of all descriptors of the rank, so the end of the rank's pipe does not come."""
    orphans: list[int] = []

    def main(comm: xccl.Communicator) -> None:
        comm.barrier()
        if comm.rank == CULPRIT:
            pid = os.fork()
            if pid == 0:
                time.sleep(PATIENCE_S)
                os._exit(0)
            comm.report(pid)
            os.kill(os.getpid(), signal.SIGKILL)
        run_for_ever(comm)

    try:
        with at_most(1.0), pytest.raises(xccl.PeerDied, match=f"^rank {CULPRIT} was killed"):
            xccl.launch(main, RANKS, timeout_s=PATIENCE_S, on_report=lambda rank, pid: orphans.append(pid))
    finally:
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
    assert len(orphans) == 1


def test_the_error_of_a_rank_explains_more_than_its_consequences(fabric: str) -> None:
    """Others fail in their own ways because of it, and even before it is told."""

    def main(comm: xccl.Communicator) -> None:
        if comm.rank == CULPRIT:
            try:
                raise Failure("first")
            except Failure as error:
                comm.core.fail(error)
                time.sleep(0.1)  # the others are done long before
                raise
        run_for_ever(comm)

    with pytest.raises(Failure, match="first"):
        xccl.launch(main, RANKS, fabric=fabric, timeout_s=PATIENCE_S)


def test_on_report_may_raise(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        comm.report(1)
        run_for_ever(comm)

    def on_report(rank: int, message: object) -> None:
        raise Failure("in the launcher")

    with at_most(NOTICE_S), pytest.raises(Failure, match="in the launcher"):
        xccl.launch(main, RANKS, fabric=fabric, timeout_s=PATIENCE_S, on_report=on_report)
    assert not children_left()


def test_launch_timeout_names_the_missing_ranks(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        comm.barrier()
        if comm.rank != CULPRIT:
            comm.recv(np.zeros(1), src=(comm.rank + 1) % 2, event_id=1)  # 0 and 1 wait for each other, 3 for 0

    with at_most(1.5), pytest.raises(xccl.WaitTimeout) as caught:
        xccl.launch(main, RANKS, fabric=fabric, timeout_s=0.4)
    error = caught.value
    assert str(error) == "launch: no result within 0.4 s from ranks 0, 1, 3"
    assert (error.operation, error.peer, error.timeout_s) == ("launch", 0, 0.4)
    assert not children_left()


def test_output_read_slowly_is_not_lost() -> None:
    """Ranks flush before they are done; none is ended while it does."""
    read_end, write_end = os.pipe()

    def main(comm: xccl.Communicator) -> None:
        sys.stdout = os.fdopen(os.dup(write_end), "w", buffering=1 << 20)
        print("x" * 200_000)  # more than a pipe holds

    got: list[int] = []

    def read() -> None:
        time.sleep(0.4)
        while chunk := os.read(read_end, 4096):
            got.append(len(chunk))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        xccl.launch(main, 2, timeout_s=PATIENCE_S)
    finally:
        os.close(write_end)
        reader.join()
        os.close(read_end)
    assert sum(got) == 2 * 200_001
