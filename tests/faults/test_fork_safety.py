"""Launching from parents that do other things at the same time, and many times over."""

from __future__ import annotations

import gc
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xccl
from tests.faults.support import PATIENCE_S, at_most, children_left, rank_number, run_for_ever


@pytest.fixture
def busy_threads() -> Iterator[None]:
    """Threads that compute, allocate, log and hold locks of their own."""
    stop = threading.Event()
    lock = threading.Lock()
    messages: queue.Queue[int] = queue.Queue(maxsize=10)

    def work() -> None:
        a = np.random.default_rng(0).random((64, 64))
        while not stop.is_set():
            with lock:
                np.dot(a, a)
            try:
                messages.put_nowait(1)
            except queue.Full:
                messages.get_nowait()
            time.sleep(0.0001)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()


def exchange(comm: xccl.Communicator) -> float:
    a = comm.empty(100, np.float64)
    comm.put(a, np.full(100, float(comm.rank)), peer=(comm.rank + 1) % comm.size)
    comm.barrier()
    into = np.zeros(100)
    request = comm.isend(a.local, (comm.rank + 1) % comm.size, event_id=1)
    comm.recv(into, (comm.rank - 1) % comm.size, event_id=1)
    request.wait()
    return float(into.sum())


EXPECTED = [100.0 * ((rank - 2) % 4) for rank in range(4)]


@pytest.mark.usefixtures("busy_threads")
def test_launch_beside_other_threads(fabric: str) -> None:
    for _ in range(10):
        assert xccl.launch(exchange, 4, fabric=fabric, timeout_s=PATIENCE_S) == EXPECTED


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    results: dict[int, Any] = {}

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return [results[i] for i in range(len(calls))]


def test_launch_from_another_thread(fabric: str) -> None:
    (results,) = in_threads([lambda: xccl.launch(exchange, 4, fabric=fabric, timeout_s=PATIENCE_S)])
    assert results == EXPECTED


def test_launches_at_the_same_time(fabric: str) -> None:
    calls = [lambda: xccl.launch(exchange, 4, fabric=fabric, timeout_s=PATIENCE_S)] * 4
    assert in_threads(calls) == [EXPECTED] * 4


def test_a_failure_concerns_one_launch_only(fabric: str) -> None:
    """Ranks that were forked at the same time hold descriptors of each other's launches."""

    def fail(comm: xccl.Communicator) -> None:
        comm.barrier()
        if comm.rank == 1:
            if fabric == "shm":
                os._exit(3)
            raise ValueError("alone")
        run_for_ever(comm)

    def last(comm: xccl.Communicator) -> float:
        time.sleep(0.5)
        return exchange(comm)

    start = time.monotonic()
    ends: list[float] = []

    def failing() -> None:
        try:
            xccl.launch(fail, 4, fabric=fabric, timeout_s=PATIENCE_S)
        finally:
            ends.append(time.monotonic() - start)

    results = in_threads([
        lambda: xccl.launch(last, 4, fabric=fabric, timeout_s=PATIENCE_S),
        failing,
        lambda: xccl.launch(last, 4, fabric=fabric, timeout_s=PATIENCE_S),
        failing,
    ])  # fmt: skip
    assert results[0] == results[2] == EXPECTED
    for error in (results[1], results[3]):
        assert type(error) is (xccl.PeerDied if fabric == "shm" else ValueError)
    assert max(ends) < 2.0
    assert not children_left()


def test_a_rank_may_launch(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> list[float]:
        inner: list[float] = xccl.launch(exchange, 4, fabric=fabric, timeout_s=PATIENCE_S)
        comm.barrier()
        return inner

    assert xccl.launch(main, 2, fabric=fabric, timeout_s=PATIENCE_S) == [EXPECTED] * 2


def test_a_rank_that_launches_and_dies_takes_its_ranks_along() -> None:
    pids: list[int] = []

    def inner(comm: xccl.Communicator) -> None:
        comm.report(os.getpid())
        run_for_ever(comm)

    def main(comm: xccl.Communicator) -> None:
        if comm.rank == 0:
            run_for_ever(comm)

        def on_report(rank: int, pid: int) -> None:
            comm.report(pid)
            inner_pids.append(pid)
            if len(inner_pids) == 2:
                os.kill(os.getpid(), 9)

        inner_pids: list[int] = []
        xccl.launch(inner, 2, timeout_s=PATIENCE_S, on_report=on_report)

    with at_most(2.5), pytest.raises(xccl.PeerDied, match="rank 1 was killed by signal 9"):
        xccl.launch(main, 2, timeout_s=PATIENCE_S, on_report=lambda rank, pid: pids.append(pid))
    assert len(pids) == 2
    deadline = time.monotonic() + 2.0
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a rank of the inner launch lives on"
        time.sleep(0.01)


def test_one_after_the_other_with_failures_in_between(fabric: str) -> None:
    def fail(comm: xccl.Communicator) -> None:
        if comm.rank == 2:
            raise ValueError("once more")
        comm.barrier()

    for _ in range(5):
        with pytest.raises(ValueError, match="once more"):
            xccl.launch(fail, 4, fabric=fabric, timeout_s=PATIENCE_S)
        assert xccl.launch(exchange, 4, fabric=fabric, timeout_s=PATIENCE_S) == EXPECTED


def held() -> dict[str, int]:
    """What a launch could leave behind in its process."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "mappings": len(maps),
        "gigabytes": sum(_size(line) for line in maps) >> 30,
        "threads": threading.active_count(),
        "children": len(children_left()),
    }


def _size(line: str) -> int:
    start, end = (int(word, 16) for word in line.split()[0].split("-"))
    return end - start


def test_launches_leave_nothing_behind(fabric: str) -> None:
    def fail(comm: xccl.Communicator) -> None:
        exchange(comm)
        if comm.rank == 2:
            raise ValueError("left behind?")

    def launches(n: int) -> None:
        for i in range(n):
            if i % 4 == 3:
                with pytest.raises(ValueError, match="left behind"):
                    xccl.launch(fail, 4, fabric=fabric, timeout_s=PATIENCE_S)
            else:
                xccl.launch(exchange, 4, fabric=fabric, timeout_s=PATIENCE_S)

    launches(4)
    before = held()
    launches(20)
    after = held()
    # A segment of the default size is 36 GiB of address space: not one of the eighty is still there.
    assert after["gigabytes"] - before["gigabytes"] < 8
    assert after["mappings"] - before["mappings"] < 10  # the C library may have made an arena or two
    for what in ("descriptors", "threads", "children"):
        assert after[what] <= before[what], (what, before, after)


def test_spawn() -> None:
    start = time.monotonic()
    assert xccl.launch(rank_number, 2, args=(5,), start_method="spawn", timeout_s=PATIENCE_S) == [5, 6]
    assert xccl.launch(rank_number, 1, kwargs={"plus": 1}, start_method="spawn", timeout_s=PATIENCE_S) == [1]
    assert time.monotonic() - start < PATIENCE_S


def test_spawn_of_something_that_does_not_pickle() -> None:
    before = held()
    with pytest.raises(Exception, match="pickle"):
        xccl.launch(lambda comm: None, 2, start_method="spawn", timeout_s=PATIENCE_S)
    assert held()["descriptors"] <= before["descriptors"]
    assert not children_left()


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third fork fails: the first two ranks end, and nothing is left."""
    before = held()
    fork = os.fork
    forks: list[int] = []

    def limited() -> int:
        if len(forks) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        pid = fork()
        forks.append(pid)
        return pid

    with monkeypatch.context() as patch, at_most(2.0), pytest.raises(OSError, match="temporarily unavailable"):
        patch.setattr(os, "fork", limited)
        xccl.launch(run_for_ever, 4, timeout_s=PATIENCE_S)
    # Two pipes are lost in Python's own multiprocessing, which makes them before it forks.
    assert held()["descriptors"] <= before["descriptors"] + 4
    assert not children_left()
