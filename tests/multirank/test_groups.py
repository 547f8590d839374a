"""Groups: made in any way, overlapping and nested, with everything that a session's communicator has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import xccl
from tests.multirank.support import BF16, Shape, assert_same, error_of, launch
from tests.property.test_traced_is_described import entries_of
from xccl.protocol import collectives, onesided, p2p
from xccl.trace.record import Recorder

INTS = np.dtype(np.int64)


def test_numbering(fabric: str) -> None:
    """The given order, strides, colors and keys; of groups of groups too."""

    def main(comm: xccl.Communicator) -> None:
        assert comm.world_ranks == tuple(range(6))
        rank = comm.rank
        backwards = comm.group(range(5, -1, -1))
        assert (backwards.rank, backwards.size, backwards.world_ranks) == (5 - rank, 6, (5, 4, 3, 2, 1, 0))
        thirds = backwards.split(backwards.rank % 3, key=rank)
        assert thirds is not None
        assert thirds.world_ranks == tuple(r for r in range(6) if (5 - r) % 3 == (5 - rank) % 3)
        assert thirds.world is comm
        if rank % 2:
            odd = comm.stride(1, 2, 3)
            assert (odd.rank, odd.world_ranks) == (rank // 2, (1, 3, 5))
            if rank != 3:
                ends = odd.group(np.array([2, 0]))
                assert ends.world_ranks == (5, 1)
                assert_same(ends.allgather(np.array([rank])), np.array([[5], [1]]))
        assert (comm.split(None if rank else -1) is None) == (comm.split(-1) is None)
        alone = comm.group([rank])
        assert (alone.rank, alone.size) == (0, 1)
        alone.barrier()
        assert_same(alone.allreduce(np.array([rank])), np.array([rank]))

    launch(main, 6, fabric)


def test_everything_works_in_a_group(fabric: str) -> None:
    """One-sided, signals, send and receive, dispatch and combine, collectives, barrier; allocators that differ."""
    shape = Shape(num_experts=6, hidden=40)
    each = shape.round(1, [5, 0, 9])

    def main(comm: xccl.Communicator) -> None:
        for _ in range(comm.rank):  # every rank has other holes and heights
            comm.group([comm.rank]).empty(1000 * comm.rank, np.uint8)
        if comm.rank == 2:
            return
        group = comm.group([4, 0, 3] if comm.rank in (0, 3, 4) else [1, 5])
        rank, size = group.rank, group.size
        array, signals = group.empty((4, 50), INTS), group.signals(3)
        array.local[:] = comm.rank
        group.barrier()
        for peer in range(size):
            assert (array.peer(peer) == group.world_ranks[peer]).all()
            got = np.zeros(50, INTS)
            group.get(got, array, peer, offset=150)
            assert (got == group.world_ranks[peer]).all()
        group.barrier()
        following = (rank + 1) % size
        group.put_signal(array, np.full(10, 100 + rank), following, signals, 1, rank + 1, offset=20)
        previous = (rank - 1) % size
        assert group.wait_until(signals, 1, "ne", 0) == previous + 1
        assert (array.local.reshape(-1)[20:30] == 100 + previous).all()
        request = group.isend(np.arange(30_000), following, event_id=7)
        message = np.zeros(30_000, INTS)
        group.recv(message, previous, event_id=7)
        request.wait()
        assert_same(message, np.arange(30_000))
        assert_same(group.allreduce(np.ones(9)), np.full(9, float(size)))
        if size == 3:
            ep = shape.expert_parallel(group)
            each.run(rank, ep)
            each.run(rank, ep)
            ep.free()
        signals.free()
        array.free()
        group.free()

    launch(main, 6, fabric)


def test_messages_of_two_groups_never_mix(fabric: str) -> None:
    """The same pair, the same event, both directions, in three communicators at once; received in another order."""

    def main(comm: xccl.Communicator) -> None:
        comms = [comm, comm.group([0, 1]), comm.group([1, 0])]
        sizes = [100, 40_000, 3]
        requests = []
        for number, each in enumerate(comms):
            data = np.full(sizes[number], 10 * number + comm.rank)
            requests.append(each.isend(data, each.world_ranks.index(1 - comm.rank), event_id=1))
        for number in (2, 0, 1):
            each = comms[number]
            got = np.zeros(sizes[number], INTS)
            each.recv(got, each.world_ranks.index(1 - comm.rank), event_id=1)
            assert (got == 10 * number + 1 - comm.rank).all()
        for request in requests:
            request.wait()

    launch(main, 2, fabric)


def test_a_send_in_one_group_goes_on_during_a_collective_of_another(fabric: str) -> None:
    """Rank 0 waits in a collective; rank 2 can only come to it when it has all of the message of rank 0."""

    def main(comm: xccl.Communicator) -> None:
        if comm.rank == 1:
            comm.group([0, 1, 2]).barrier()
            return
        pair, everyone = comm.group([0, 2]), comm.group([0, 1, 2])
        message = np.arange(200_000)
        if comm.rank == 0:
            request = pair.isend(message, 1, event_id=3)
            everyone.barrier()
            request.wait()
        else:
            got = np.zeros_like(message)
            pair.recv(got, 0, event_id=3)
            assert_same(got, message)
            everyone.barrier()

    def in_order(comm: xccl.Communicator) -> None:
        # Both groups hold rank 0 and 2, so these two make them in the same order.
        main(comm)

    launch(in_order, 3, fabric, ring_slots=4, slot_bytes=1024)


def test_memory_of_freed_groups_is_used_again(fabric: str) -> None:
    """Hundreds of groups one after the other, in areas that hold few; and free memory reads as 0."""

    def main(comm: xccl.Communicator) -> None:
        for number in range(150):
            group = comm.group([0, 1, 2] if number % 2 else [2, 1, 0])
            signals = group.signals(4)
            assert [signals.read(i) for i in range(4)] == [0] * 4
            group.barrier()
            group.signal(signals, number % 4, number + 1, (group.rank + 1) % 3)
            group.wait_until(signals, number % 4, "eq", number + 1)
            array = group.empty(500, np.uint8)
            array.local[:] = 7
            buffer = np.full(8, number)
            if group.rank == 0:
                group.send(buffer, 1, event_id=number)
            elif group.rank == 1:
                got = np.zeros(8, INTS)
                group.recv(got, 0, event_id=number)
                assert_same(got, buffer)
            assert_same(group.allgather(buffer), np.stack([buffer] * 3))
            group.free()

    launch(main, 3, fabric, heap_bytes=16 << 20, ring_slots=4, slot_bytes=4096)


def test_a_freed_group_is_an_error(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        group = comm.group([1, 0])
        array, signals = group.empty(3, np.uint8), group.signals(1)
        with group:
            group.barrier()
        calls: list[Any] = [
            group.barrier, group.free, lambda: group.empty(3, np.uint8), lambda: group.allreduce(np.ones(1)),
            lambda: group.group([0]), lambda: group.split(0), lambda: group.put(array, np.ones(1, np.uint8), 0),
            lambda: group.wait_until(signals, 0, "eq", 0), lambda: group.isend(np.ones(1), 0, 1), lambda: array.local,
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(xccl.UsageError, match="freed"):
                call()
        with pytest.raises(xccl.UsageError, match="closed, not freed"):
            comm.free()
        assert comm.group([0, 1]).allreduce(np.ones(1))[0] == 2

    launch(main, 2, fabric)


def test_a_group_is_not_freed_while_requests_are_under_way(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        group, other = comm.group([0, 1]), comm.group([0, 1])
        elsewhere = other.isend(np.ones(1000), 1 - comm.rank, event_id=1)
        if comm.rank == 0:
            request = group.isend(np.ones(100_000), 1, event_id=1)
        with pytest.raises(xccl.UsageError, match="under way" if comm.rank == 0 else "impossible argument"):
            group.free()
        if comm.rank == 0:
            request.wait()
        else:
            group.recv(np.zeros(100_000), 0, event_id=1)
        group.free()  # what is under way in another communicator does not matter
        other.recv(np.zeros(1000), 1 - comm.rank, event_id=1)
        elsewhere.wait()

    launch(main, 2, fabric, ring_slots=4, slot_bytes=1024)


IMPOSSIBLE: dict[str, tuple[Any, str]] = {
    "not a sequence": (lambda c: c.group(1), "sequence"),
    "no such rank": (lambda c: c.group([0, 2]), "allowed are 0 to 1"),
    "twice": (lambda c: c.group([0, 1, 0]), "more than once"),
    "not a member": (lambda c: c.group([1 - c.rank]), "not in the group"),
    "nobody": (lambda c: c.group([]), "not in the group"),
    "not a number": (lambda c: c.group(["a"]), "integer"),
    "stride": (lambda c: c.stride(0, 0, 1), "stride is 0"),
    "stride too long": (lambda c: c.stride(0, 2, 2), "allowed are 0 to 1"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_impossible_group(fabric: str, what: str) -> None:
    call, message = IMPOSSIBLE[what]

    def main(comm: xccl.Communicator) -> float:
        with pytest.raises(xccl.UsageError, match=message):
            call(comm)
        return float(comm.group([0, 1]).allreduce(np.ones(1))[0])

    assert launch(main, 2, fabric) == [2, 2]


def test_members_that_name_different_groups(fabric: str) -> None:
    """Those that see it say so; then they may make others."""

    def main(comm: xccl.Communicator) -> BaseException | None:
        error = error_of(comm.group, [0, 1, 2] if comm.rank != 1 else [0, 2, 1])
        assert comm.group([0, 1, 2]).allreduce(np.ones(1))[0] == 3
        return error

    for error in launch(main, 3, fabric):
        assert isinstance(error, xccl.UsageError)
        assert "same ranks in the same order" in str(error)


def test_a_bad_color_is_heard_of_by_all(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> BaseException | None:
        error = error_of(comm.split, "red" if comm.rank == 1 else 0)
        group = comm.split(comm.rank % 2)
        assert group is not None
        assert group.world_ranks == tuple(range(comm.rank % 2, 3, 2))
        return error

    for rank, error in enumerate(launch(main, 3, fabric)):
        assert isinstance(error, xccl.UsageError)
        assert ("integer" if rank == 1 else "rank 1 was given an impossible argument") in str(error)


def test_disagreement_in_a_group(fabric: str) -> None:
    """As in the session: an error at all members, and the group goes on."""

    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        group = comm.group([2, 1, 0])
        size = 10 + (comm.rank == 1)
        errors = [
            error_of(group.empty, size, np.float32),
            error_of(group.allgather, np.zeros(size)),
            error_of(group.empty, -1 if comm.rank == 1 else 5, np.float32),
            error_of(group.signals, 3) if comm.rank == 1 else error_of(group.empty, 5, np.float32),
            error_of(group.signals, 3) if comm.rank == 1 else error_of(group.allgather, np.zeros(5)),
        ]
        assert group.empty(7, BF16).size == 7
        assert group.allreduce(np.ones(1))[0] == 3
        return errors

    for errors in launch(main, 3, fabric):
        assert all(isinstance(error, xccl.UsageError) for error in errors), errors


def test_no_room_in_one_segment(fabric: str) -> None:
    """One member's area is full: a CapacityError at all members, of groups as well as of what they allocate."""

    def main(comm: xccl.Communicator) -> tuple[BaseException | None, BaseException | None]:
        group = comm.group([1, 0])
        if comm.rank == 1:
            comm.app_allocator.alloc(60_000)
        first = error_of(group.empty, 8000, np.uint8)
        assert group.empty(800, np.uint8).size == 800
        if comm.rank == 0:
            with pytest.raises(xccl.CapacityError):
                for n_bytes in (60 << 20, *[4096] * 2000):
                    comm.metadata_allocator.alloc(n_bytes)
        return first, error_of(comm.group, [0, 1])

    for number, errors in enumerate(launch(main, 2, fabric, app_bytes=1 << 16)):
        for error in errors:
            assert isinstance(error, xccl.CapacityError), (number, error)


def test_errors_name_ranks_of_the_session(fabric: str) -> None:
    def late(comm: xccl.Communicator) -> BaseException | None:
        error = None
        if comm.rank != 0:
            group = comm.group([3, 1, 2])
            if comm.rank != 1:
                error = error_of(group.allreduce, np.ones(1), timeout_s=0.2)
        comm.barrier()
        return error

    errors = launch(late, 4, fabric)
    for rank in (2, 3):
        error = errors[rank]
        assert isinstance(error, xccl.WaitTimeout)
        assert (error.peer, error.details["world_peer"], error.details["world_rank"]) == (1, 1, rank)
        assert f"rank {error.rank} is rank {rank} of the session" in str(error)

    def leaves(comm: xccl.Communicator) -> BaseException | None:
        group = comm.group([2, 1, 0])
        return None if comm.rank == 2 else error_of(group.barrier)

    for error in launch(leaves, 3, fabric)[:2]:
        assert isinstance(error, xccl.PeerDied)
        assert "rank 0 is rank 2 of the session" in str(error)

    def fails(comm: xccl.Communicator) -> None:
        group = comm.group([2, 1, 0])
        if comm.rank == 2:
            raise RuntimeError("on purpose")
        with pytest.raises(xccl.SessionAborted, match="rank 2 raised RuntimeError: on purpose"):
            group.recv(np.zeros(1), 0, event_id=1)

    with pytest.raises(RuntimeError, match="on purpose"):
        launch(fails, 3, fabric)


def test_a_barrier_that_timed_out_goes_on(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        group = comm.group([1, 0])
        if comm.rank == 0:
            for _ in range(3):
                with pytest.raises(xccl.WaitTimeout):
                    group.barrier(timeout_s=0.02)
        comm.barrier()
        group.barrier()
        group.barrier()

    launch(main, 2, fabric)


def test_traces_of_a_group_are_described(fabric: str) -> None:
    """In the numbers of the group; what other communicators do is not in it."""

    def main(comm: xccl.Communicator) -> Recorder | None:
        if comm.rank == 2:
            comm.barrier()
            return None
        group = comm.group([3, 1, 0])
        with group.trace() as recorder:
            comm.barrier()
            group.allgather(np.zeros(1000, np.uint8))
            if group.rank < 2:
                call = group.send if group.rank == 0 else group.recv
                call(np.zeros(5000, np.uint8), 1 - group.rank, event_id=1)
            group.barrier()
        return recorder

    recorders = launch(main, 4, fabric)
    for rank, world in enumerate([3, 1, 0]):
        found = entries_of(recorders[world])
        assert found[0] == ("allgather", collectives.describe("allgather", 3, 1000).entries(rank))
        if rank < 2:
            assert found[1] == ("send" if rank == 0 else "recv", p2p.send_recv(3, 0, 1, 5000).entries(rank))
        last = [
            r for r, w in enumerate([3, 1, 0]) if any(e.stage == "release" for e in entries_of(recorders[w])[-1][1])
        ]
        assert found[-1] == ("barrier", onesided.barrier(3, last[0]).entries(rank))


def test_a_group_of_many(fabric: str) -> None:
    """More members than write to each other, where arrivals are counted."""

    def main(comm: xccl.Communicator) -> None:
        group = comm.group(range(comm.size - 1, -1, -1))
        array = group.empty(3, INTS)
        array.local[:] = group.rank
        got = group.allgather(array.local)
        assert_same(got[:, 0], np.arange(group.size))
        halves = group.split(group.rank // 20)
        assert halves is not None
        assert halves.allreduce(np.ones(1))[0] == 20
        halves.free()
        group.free()

    launch(main, 40, "local")
