"""Whether the kernel is slow at reading another process's memory, and what collectives make of that."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from xccl.fabric.reading import reads_slowly
from xccl.kernels import copy, processes
from xccl.layout.ring import REACH_DIRECT, REACH_KERNEL, REACH_NONE, REACH_SLOWLY
from xccl.protocol.collective_cuts import Kind, cut

KIB = 1 << 10


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """The answer is kept by the process: not that of these tests."""
    reads_slowly.cache_clear()
    yield
    reads_slowly.cache_clear()


@pytest.mark.parametrize(("read_s", "copy_s", "slow"), [(0.0005, 0.0001, True), (0.0003, 0.0001, False)])
def test_ratio(monkeypatch: pytest.MonkeyPatch, read_s: float, copy_s: float, slow: bool) -> None:
    """Five copies are slow, three are not; one disturbed try does not count."""
    now_s, calls = [0.0], [0]

    def take(seconds: float) -> int:
        calls[0] += 1
        now_s[0] += seconds if calls[0] > 2 else 1.0
        return 1

    monkeypatch.setattr(processes, "read", lambda *_: take(read_s))
    monkeypatch.setattr(copy, "copy", lambda *_: take(copy_s))
    monkeypatch.setattr("xccl.fabric.reading.perf_counter_ns", lambda: int(now_s[0] * 1e9))
    assert reads_slowly() is slow
    assert calls[0] > 2


def test_it_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel does read, or its time would say nothing; asked twice, it is measured once."""
    done = []
    read = processes.read
    monkeypatch.setattr(processes, "read", lambda *arguments: done.append(read(*arguments)))
    start_s = time.monotonic()
    first, tries = reads_slowly(), len(done)
    assert reads_slowly() is first
    assert len(done) == tries > 0
    assert set(done) == {1}
    assert time.monotonic() - start_s < 10


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("kind", "slow_bytes"), [("alltoall", 256 * KIB), ("allgather", 512 * KIB)])
def test_private_inputs(kind: Kind, ranks: int, slow_bytes: int) -> None:
    """Staged up to larger sizes, and read by the kernel from there on; symmetric inputs do not care."""
    by_reach = {reach: cut(kind, ranks, 1 << 20, reach=reach) for reach in (REACH_NONE, REACH_KERNEL, REACH_SLOWLY)}
    parts = ranks if kind == "alltoall" else 1
    assert by_reach[REACH_SLOWLY].expose_private_bytes == slow_bytes * parts
    assert by_reach[REACH_KERNEL].expose_private_bytes < slow_bytes * parts < by_reach[REACH_NONE].expose_private_bytes
    assert len({how.expose_bytes for how in by_reach.values()}) == 1


def test_threads_do_not_care() -> None:
    """Ranks that are threads load private memory like their own."""
    how = cut("alltoall", 2, 64 * KIB, reach=REACH_DIRECT)
    assert how.expose_private_bytes == how.expose_bytes
