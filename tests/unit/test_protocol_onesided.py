"""Descriptions of put, get, signal, wait and barrier."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.described import check, written_by
from xccl.errors import UsageError
from xccl.protocol import onesided
from xccl.trace.entry import Entry


def test_a_put_is_the_source_s_work() -> None:
    put = onesided.put(3, 0, 2, 100)
    check(put)
    assert put.entries(0) == [Entry("put", "transfer", "data", 2, -1, 1, 100)]
    assert put.entries(1) == put.entries(2) == []
    assert (put.payload_bytes.tolist(), put.lanes) == ([100, 0, 0], 1)


def test_a_get_is_the_destination_s_work() -> None:
    get = onesided.get(3, 0, 2, 100)
    check(get)
    assert get.entries(2) == [Entry("get", "transfer", "data", 0, -1, 1, 100)]
    assert get.entries(0) == []
    assert get.payload_bytes.tolist() == [100, 0, 0]


def test_an_empty_put_is_a_put() -> None:
    assert onesided.put(2, 0, 1, 0).entries(0) == [Entry("put", "transfer", "data", 1, -1, 1, 0)]


def test_a_put_to_oneself_sends_nothing() -> None:
    assert onesided.put(2, 1, 1, 100).payload_bytes.tolist() == [0, 0]


def test_many_puts_at_once() -> None:
    """A ring of puts of different sizes, one column each."""
    every = np.arange(768)
    put = onesided.put(768, every, (every + 1) % 768, 8 * every)
    check(put)
    assert put.payload_bytes.tolist() == (8 * every).tolist()


def test_the_signal_follows_the_put() -> None:
    described = onesided.put_signal(2, 0, 1, 64, op="add")
    check(described)
    (stage,) = described.stages
    assert stage.signals[0].atomic
    assert described.entries(0) == [
        Entry("put-signal", "signal", "signal", 1, -1, 1, 8),
        Entry("put-signal", "transfer", "data", 1, -1, 1, 64),
    ]


def test_signal_and_wait() -> None:
    signal = onesided.signal(4, 3, 1)
    check(signal)
    assert signal.entries(3) == [Entry("signal", "signal", "signal", 1, -1, 1, 8)]
    assert not signal.stages[0].signals[0].atomic
    assert onesided.wait_until(4, 1).entries(1) == [Entry("wait", "wait", "signal", -1, -1, 1, 0)]


@pytest.mark.parametrize("ranks", [1, 2, 5, 768])
@pytest.mark.parametrize("last", [None, 0])
def test_a_barrier_has_one_arrival_and_one_release_a_rank(ranks: int, last: int | None) -> None:
    barrier = onesided.barrier(ranks, last)
    if ranks < 10:
        check(barrier)
    arrivals, releases = (barrier.stage(name).signals[0] for name in ("arrive", "release"))
    assert written_by(arrivals, ranks).tolist() == [1] * ranks
    assert (arrivals.destination == 0).all()
    assert arrivals.atomic
    assert arrivals.fetches
    assert written_by(releases, ranks)[ranks - 1 if last is None else last] == ranks
    assert sorted(releases.destination.tolist()) == list(range(ranks))


def test_there_is_no_such_rank() -> None:
    for make in (onesided.put, onesided.get, onesided.put_signal):
        with pytest.raises(UsageError):
            make(2, 0, 2, 8)
    with pytest.raises(UsageError):
        onesided.barrier(2, last=2)
    with pytest.raises(UsageError):
        onesided.wait_until(2, -1)
