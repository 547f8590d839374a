"""Point to point in groups: rings, zero-copy messages and the DMA engine, in several communicators of a pair at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest

import xccl
from tests.multirank.support import assert_same, error_of, launch
from tests.property.test_traced_is_described import entries_of, pieces_pushed
from xccl.protocol import onesided, p2p
from xccl.trace.record import Recorder

INTS = np.dtype(np.int64)
MODES: list[Literal["ring", "zero_copy"]] = ["ring", "zero_copy"]
ENGINES: list[Literal["mte", "dma"]] = ["mte", "dma"]


def message(comm: xccl.Communicator, tag: int, size: int) -> np.ndarray:
    """What a rank sends; other ranks and tags have other contents."""
    return np.arange(size) * 100 + tag * 10 + comm.world.rank


def other_of(comm: xccl.Communicator) -> int:
    return 1 - comm.rank


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ENGINES)
def test_messages_of_any_kind_never_mix(
    fabric: str, mode: Literal["ring", "zero_copy"], engine: Literal["mte", "dma"]
) -> None:
    """The same pair and events in three communicators, all under way at once, received in another order."""

    def main(comm: xccl.Communicator) -> None:
        comms = [comm, comm.group([0, 1]), comm.group([1, 0])]
        sizes = [40_000, 3, 200_000]
        rooms = [each.empty(size, INTS) for each, size in zip(comms, sizes, strict=True)]
        requests = []
        for event in (5, 6):
            for tag, (each, room) in enumerate(zip(comms, rooms, strict=True)):
                room.local[:] = message(each, tag, sizes[tag])
                requests.append(each.isend(room.local, other_of(each), event, mode=mode, engine=engine))
        for event in (5, 6):
            for tag in (2, 0, 1):
                got = np.zeros(sizes[tag], INTS)
                comms[tag].recv(got, other_of(comms[tag]), event, engine=engine)
                assert_same(got, message(comm, tag, sizes[tag]) - comm.rank + 1 - comm.rank)
        for request in requests:
            request.wait()

    launch(main, 2, fabric)


def test_direct_calls_of_several_communicators(fabric: str) -> None:
    """Blocking calls and signals back and forth, with the rank's numbers of each communicator."""

    def main(comm: xccl.Communicator) -> None:
        if comm.rank == 1:
            return
        pair = comm.group([2, 0])
        again = pair.group([1, 0])
        for each in (pair, again) * 50:
            data = np.full(20, each.rank)
            calls = [each.send, each.recv] if each.rank == 0 else [each.recv, each.send]
            for call in calls:
                call(data if call == each.send else (got := np.zeros(20, INTS)), other_of(each), event_id=4)
            assert (got == other_of(each)).all()
        arrays, signals = [each.empty(4, INTS) for each in (pair, again)], [each.signals(2) for each in (pair, again)]
        for turn in range(1, 51):
            for tag, each in enumerate((pair, again)):
                here = each.world_ranks[each.rank]
                each.put_signal(arrays[tag], np.full(2, here + turn), other_of(each), signals[tag], 1, turn, offset=2)
                assert each.wait_until(signals[tag], 1, "ge", turn) == turn
                there = each.world_ranks[other_of(each)]
                assert_same(arrays[tag].local[2:], np.full(2, there + turn))
                each.get(got[:2], arrays[tag], other_of(each), 2)
                assert_same(got[:2], np.full(2, here + turn))
                each.barrier()

    launch(main, 3, fabric)


def test_a_request_of_one_group_is_driven_by_waits_in_others(fabric: str) -> None:
    """Rank 1 has all of the message before it answers in another group; rank 0 waits there, and nowhere else."""

    def main(comm: xccl.Communicator) -> None:
        first, second = comm.group([0, 1]), comm.group([1, 0])
        signals = second.signals(1)
        data = message(first, 0, 100_000)
        waits: list[Callable[[], Any]] = [
            lambda: second.wait_until(signals, 0, "ge", 1),
            lambda: second.recv(np.zeros(5), 0, event_id=1),
            lambda: comm.recv(np.zeros(5), 1, event_id=1),
        ]
        answers: list[Callable[[], Any]] = [
            lambda: second.signal(signals, 0, 1, 1),
            lambda: second.send(np.zeros(5), 1, event_id=1),
            lambda: comm.send(np.zeros(5), 0, event_id=1),
        ]
        for wait, answer in zip(waits, answers, strict=True):
            if comm.rank == 0:
                request = first.isend(data, 1, event_id=8, mode="ring")
                wait()
                request.wait()
            else:
                got = np.zeros_like(data)
                first.recv(got, 0, event_id=8)
                assert_same(got, data - 1)
                answer()

    launch(main, 2, fabric, ring_slots=4, slot_bytes=4096)


@pytest.mark.parametrize("engine", ENGINES)
def test_groups_come_and_go(fabric: str, engine: Literal["mte", "dma"]) -> None:
    """Each finds channels as new, though records and memory were those of groups before it; others have work meanwhile."""

    def main(comm: xccl.Communicator) -> None:
        other = 1 - comm.rank
        for turn in range(12):
            group = comm.group([0, 1] if turn % 3 else [1, 0])
            array = group.empty(3000, INTS)
            outer = comm.isend(message(comm, 1, 20_000), other, turn, engine=engine)
            data = message(group, 2, 5000)
            requests = [group.isend(data, other_of(group), 1, lanes=turn % 4 + 1, mode="ring", engine=engine)]
            requests.append(group.isend(data, other_of(group), 1, engine=engine))
            requests.append(group.iput(array, data[:3000], other_of(group), engine=engine))
            for lanes in (turn % 4 + 1, 2):
                got = np.zeros(5000, INTS)
                group.recv(got, other_of(group), 1, lanes)
                assert_same(got, data - comm.rank + other)
            for request in requests:
                request.wait()
            group.barrier()
            assert_same(array.local, data[:3000] - comm.rank + other)
            group.free()
            got = np.zeros(20_000, INTS)
            comm.recv(got, other, turn, engine=engine)
            assert_same(got, message(comm, 1, 20_000) - comm.rank + other)
            outer.wait()
            assert isinstance(error_of(group.send, got, 0, 1), xccl.UsageError)
            assert isinstance(error_of(group.put, array, got[:1], 0), xccl.UsageError)

    launch(main, 2, fabric, ring_slots=8, slot_bytes=4096)


def test_memory_of_another_communicator_is_refused(fabric: str) -> None:
    """It counts ranks differently, and may have fewer."""

    def main(comm: xccl.Communicator) -> None:
        group = comm.group([comm.rank])
        mine, all_of_us = group.empty(4, INTS), comm.empty(4, INTS)
        signals, of_all = group.signals(1), comm.signals(1)
        data = np.ones(4, INTS)
        for call in (
            lambda: comm.put(mine, data, 1),
            lambda: group.put(all_of_us, data, 0),
            lambda: group.get(data, all_of_us, 0),
            lambda: comm.iput(mine, data, 1),
            lambda: comm.signal(signals, 0, 1, 1),
            lambda: group.signal(of_all, 0, 1, 0),
            lambda: group.wait_until(of_all, 0, "eq", 0),
            lambda: group.put_signal(mine, data, 0, of_all, 0, 1),
            lambda: group.put_signal(all_of_us, data, 0, signals, 0, 1),
        ):
            error = error_of(call)
            assert isinstance(error, xccl.UsageError)
            assert "another communicator" in str(error)
        comm.barrier()
        assert of_all.read(0) == signals.read(0) == 0

    launch(main, 2, fabric)


def test_nothing_works_in_a_group_of_a_session_that_was_left() -> None:
    """Direct calls too; the segments may be gone."""

    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        group = comm.group([1, 0])
        array, signals, data = group.empty(4, INTS), group.signals(1), np.ones(4, INTS)
        if group.rank:
            group.send(data, 0, 1)
        else:
            group.recv(data, 1, 1)
        group.put(array, data, 0)
        comm.barrier()
        comm.close()
        return [
            error_of(call)
            for call in (
                lambda: group.put(array, data, 0),
                lambda: group.get(data, array, 0),
                lambda: group.signal(signals, 0, 1, 0),
                lambda: group.wait_until(signals, 0, "eq", 0),
                lambda: group.send(data, other_of(group), 1),
                lambda: group.recv(data, other_of(group), 1),
                lambda: group.isend(data, 0, 1),
            )
        ]

    for errors in launch(main, 2, "local"):
        assert all(isinstance(error, xccl.UsageError) and "has left" in str(error) for error in errors), errors


@pytest.mark.parametrize("engine", ENGINES)
def test_traces_are_described(fabric: str, engine: Literal["mte", "dma"]) -> None:
    """In the numbers of the group: a zero-copy message, a put."""

    def main(comm: xccl.Communicator) -> Recorder:
        group = comm.group([2, 0, 1])
        array, data = group.empty(1000, np.uint8), np.zeros(100_000, np.uint8)
        with group.trace() as recorder:
            if group.rank == 0:
                group.send(data, 1, event_id=1, mode="zero_copy", engine=engine)
                group.iput(array, data[:300], 2, engine=engine).wait()
            if group.rank == 1:
                group.recv(data, 0, event_id=1, engine=engine)
        return recorder

    recorders = launch(main, 3, fabric)
    sender, receiver = recorders[2], recorders[0]
    pushed = pieces_pushed(sender.operations[0])
    described = p2p.zero_copy(3, 0, 1, 100_000, engine=engine, pushed=pushed)
    put = onesided.put(3, 0, 2, 300)
    assert entries_of(sender) == [("send", described.entries(0)), ("put", put.entries(0))]
    assert entries_of(receiver) == [("recv", described.entries(1))]
