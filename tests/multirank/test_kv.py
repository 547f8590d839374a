"""KV-cache transfers: what arrives, when, and what becomes of the pages of requests that do not come to their end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xccl
from tests.multirank.support import Array, assert_same, error_of, launch
from xccl import reference

LAYERS, PAGES = 3, 24
BLOCK = (5, 2)


def filled(rank: int, layers: int = LAYERS) -> Array:
    """What the pool of a rank holds at first."""
    return np.random.default_rng(rank).integers(0, 1 << 30, (layers, PAGES, *BLOCK)).astype(np.float32)


def make(comm: xccl.Communicator, **options: Any) -> xccl.KVTransfer:
    """A transfer between filled pools."""
    pool = comm.empty((LAYERS, PAGES, *BLOCK), np.float32)
    pool.local[...] = filled(comm.rank)
    kv = xccl.KVTransfer(comm, pool, **options)
    comm.barrier()
    return kv


def eventually(condition: Callable[[], bool]) -> bool:
    """Does it come true soon?"""
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


@pytest.mark.parametrize("engine", ["dma", "mte"])
@pytest.mark.parametrize("first", [0, 1])
def test_blocks_go_from_page_to_page(fabric: str, engine: Any, first: int) -> None:
    """Whichever side comes first; pages that are not named keep what they hold."""
    here, there = [3, 23, 0, 7], [11, 2, 3, 23]

    def main(comm: xccl.Communicator) -> Array:
        kv = make(comm)
        if comm.rank != first:
            time.sleep(0.05)
        request = kv.isend(here, 1, 7, engine=engine) if comm.rank == 0 else kv.irecv(there, 0, 7)
        request.wait()
        assert request.done
        assert request.test()
        assert not kv.under_way
        kv.free()
        return kv.pool.local.copy()

    want = reference.kv_transfer([filled(0), filled(1)], [reference.PagedCopy(0, 1, here, there)])
    for rank, got in enumerate(launch(main, 2, fabric)):
        assert_same(got, want[rank], f"pool of rank {rank}")


def test_a_sender_in_no_call_sends(fabric: str) -> None:
    """The DMA engine finds the announcement by itself, and the receiver sees the layers come without any call of its peer."""

    def main(comm: xccl.Communicator) -> None:
        kv = make(comm)
        told = comm.signals(1)
        if comm.rank == 0:
            request = kv.isend(range(8), 1, 1)
            while told.read(0) == 0:  # computes, and makes no call that drives anything
                time.sleep(0.001)
            assert request.layers_sent == LAYERS
            request.wait()
        else:
            time.sleep(0.05)
            request = kv.irecv(range(8, 16), 0, 1)
            assert eventually(lambda: request.layers_arrived == LAYERS)
            assert_same(kv.pool.local[:, 8:16], filled(0)[:, :8])
            comm.signal(told, 0, 1, peer=0)
            request.wait()

    launch(main, 2, fabric)


@pytest.mark.parametrize("engine", ["dma", "mte"])
def test_layers_come_when_they_are_ready_and_not_before(fabric: str, engine: Any) -> None:
    def main(comm: xccl.Communicator) -> None:
        kv = make(comm)
        asked, seen = comm.signals(1), []
        if comm.rank == 0:
            pages = np.array([1, 2], np.int32)
            request = kv.isend(pages, 1, 9, by_layer=True, engine=engine)
            pages[:] = 17  # the list is the caller's again
            for layer in range(LAYERS):
                comm.wait_until(asked, 0, "ge", layer + 1)
                assert request.layers_sent == layer
                kv.pool.local[layer, 1:3] = 1000 + layer  # written as late as it may be
                request.ready(layer)
                request.ready(0)  # changes nothing
            request.wait()
            request.ready()  # neither does this
            assert request.layers_sent == LAYERS
        else:
            request = kv.irecv([5, 4], 0, 9)
            for layer in range(LAYERS):
                seen.append(request.layers_arrived)
                assert not request.test()
                comm.signal(asked, 0, layer + 1, peer=0)
                request.wait_layer(layer)
                assert (kv.pool.local[layer, 4:6] == 1000 + layer).all()
            request.wait()
            assert seen == list(range(LAYERS))
            assert request.layers_arrived == LAYERS

    launch(main, 2, fabric)


@pytest.mark.parametrize("late", ["layer", "announcement"])
def test_nobody_polls(fabric: str, late: str) -> None:
    """A receiver that waits, a DMA engine without an announcement and one without a layer take next to no time of a core."""
    delay_s = 0.5

    def main(comm: xccl.Communicator) -> float:
        kv = make(comm)
        comm.barrier()
        began_s = time.process_time()
        if comm.rank == 0:
            request = kv.isend([1], 1, 1, by_layer=True)
            if late == "layer":
                request.ready(0)
                time.sleep(delay_s)
            request.ready()
            request.wait()
        else:
            if late == "announcement":
                time.sleep(delay_s)
            receive = kv.irecv([2], 0, 1)
            receive.wait_layer(1)
            receive.wait()
        return time.process_time() - began_s

    for used_s in launch(main, 2, fabric):
        assert used_s < delay_s / 4


def test_a_request_without_blocks_is_complete_when_both_have_named_it(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> int:
        kv = make(comm)
        request: Any = kv.isend([], 1, 0, by_layer=True) if comm.rank == 0 else kv.irecv([], 0, 0)
        if comm.rank == 0:
            request.ready()
        request.wait()
        return int(np.sum(kv.pool.local != filled(comm.rank)))

    assert launch(main, 2, fabric) == [0, 0]


def test_many_requests_in_any_order_and_slots_are_used_again(fabric: str) -> None:
    """Both directions at once; more requests than slots, one after the other, named in different orders."""
    rounds, at_once = 20, 4

    def main(comm: xccl.Communicator) -> None:
        kv = make(comm, max_pages=3, max_requests=at_once)
        peer, rng = 1 - comm.rank, np.random.default_rng(comm.rank)
        for number in range(rounds):
            ids = [number * at_once + i for i in range(at_once)]
            requests: list[Any] = [kv.isend([i], peer, ids[i]) for i in rng.permutation(at_once)]
            requests += [kv.irecv([12 + i], peer, ids[i]) for i in rng.permutation(at_once)]
            for request in (requests[i] for i in rng.permutation(len(requests))):
                request.wait()
            assert_same(kv.pool.local[:, 12 : 12 + at_once], filled(peer)[:, :at_once])
            kv.pool.local[:, 12:] = 0
        kv.free()

    launch(main, 2, fabric)


def test_one_block_to_many_and_to_oneself(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        kv = make(comm)
        request = kv.irecv([20 + comm.rank, 10], 0, 5)
        if comm.rank == 0:
            sends = [kv.isend([0, 1], dst, 5) for dst in range(comm.size)]
            assert [r.peer for r in kv.under_way if isinstance(r, xccl.KVSend)] in ([0, 1, 2], [1, 2], [2], [])
            for send in sends:
                send.wait()
        request.wait()
        assert_same(kv.pool.local[:, [20 + comm.rank, 10]], filled(0)[:, [0, 1]])
        comm.barrier()

    launch(main, 3, fabric)


def test_in_a_group(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        pair = comm.group([comm.rank % 2, 2 + comm.rank % 2])
        kv = make(pair)
        if pair.rank == 0:
            kv.isend([1], 1, 3).wait()
        else:
            kv.irecv([2], 0, 3).wait()
            assert_same(kv.pool.local[:, 2], filled(0)[:, 1])
        open_request = kv.isend([1], 1 - pair.rank, 4)
        assert isinstance(error_of(pair.free), xccl.UsageError)  # a request is under way
        assert open_request.cancel()
        pair.free()

    launch(main, 4, fabric)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_arguments(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> list[str]:
        kv = make(comm, max_pages=6, max_requests=2)
        a = kv.irecv([1, 2], 1, 1)
        kv.irecv([3], 1, 2)
        b = kv.isend([10], 1, 8)
        calls: list[Callable[[], object]] = [
            lambda: kv.irecv([PAGES], 1, 3),
            lambda: kv.isend([-1], 1, 3),
            lambda: kv.isend(range(7), 1, 3),
            lambda: kv.isend([0.5], 1, 3),
            lambda: kv.isend([[1]], 1, 3),
            lambda: kv.irecv([4, 5, 4], 1, 3),
            lambda: kv.irecv([2], 1, 3),
            lambda: kv.irecv([10], 1, 3),
            lambda: kv.isend([11, 1], 1, 3),
            lambda: kv.irecv([5], 1, 1),
            lambda: kv.isend([5], 1, 8),
            lambda: kv.irecv([5], 2, 3),
            lambda: kv.isend([5], 1, -1),
            lambda: kv.isend([5], 1, 3, engine="gpu"),  # type: ignore[arg-type]
            lambda: b.ready(LAYERS),
            lambda: a.wait_layer(LAYERS),
            lambda: kv.irecv([5], 1, 3),
        ]
        errors = [error_of(call) for call in calls]
        assert all(isinstance(error, xccl.UsageError) for error in errors[:-1]), errors
        assert isinstance(errors[-1], xccl.CapacityError)
        assert len(kv.under_way) == 3
        for request in kv.under_way:
            assert request.cancel()
        kv.free()
        errors.append(error_of(lambda: kv.isend([5], 1, 3)))
        return [str(error) for error in errors]

    messages = launch(main, 2, fabric)[0]
    parts = [
        "no page 24", "no page -1", "7 pages are too many", "float64", "shape (1, 1)", "page 4 is in the list twice",
        "page 2 is in use: request 1 is being received from rank 1", "page 10 is in use: request 8 is being sent to",
        "page 1 is in use", "request 1 from rank 1 is under way", "request 8 to rank 1 is under way", "src is 2",
        "request_id is -1", "engine must be one of", "layer is 3", "layer is 3", "2 requests from rank 1 are under way",
        "was freed",
    ]  # fmt: skip
    for message, part in zip(messages, parts, strict=True):
        assert part in message


def test_bad_construction_fails_at_all_ranks(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> list[str]:
        pools = [comm.empty((2, 4, 8), np.uint8) for _ in range(2)]
        flat = comm.empty(16, np.uint8)
        calls: list[Callable[[], object]] = [
            lambda: xccl.KVTransfer(comm, flat),
            lambda: xccl.KVTransfer(comm, pools[comm.rank]),
            lambda: xccl.KVTransfer(comm, pools[0], max_pages=1 + comm.rank),
            lambda: xccl.KVTransfer(comm, pools[0], max_pages=5 if comm.rank else 4),
            lambda: xccl.KVTransfer(comm, np.zeros((2, 4)) if comm.rank else pools[0]),  # type: ignore[arg-type]
            lambda: xccl.KVTransfer(comm, pools[0], max_requests=0),
        ]
        errors = [error_of(call) for call in calls]
        assert all(isinstance(error, xccl.UsageError) for error in errors), errors
        xccl.KVTransfer(comm, pools[0]).free()
        return [str(error) for error in errors]

    for messages in launch(main, 2, fabric):
        assert "ranks disagree in pool" in messages[1]
        assert "ranks disagree in max_pages" in messages[2]


def test_different_numbers_of_pages_are_refused_at_both_sides(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> str:
        kv = make(comm)
        request: Any = kv.isend([1, 2, 3], 1, 6) if comm.rank == 0 else kv.irecv([7, 8], 0, 6)
        error = error_of(request.wait)
        assert isinstance(error, xccl.UsageError)
        assert_same(kv.pool.local, filled(comm.rank), "nothing was written")
        if comm.rank == 0:  # the pair goes on
            kv.isend([4], 1, 6).wait()
        else:
            kv.irecv([7], 0, 6).wait()
            assert_same(kv.pool.local[:, 7], filled(0)[:, 4])
        return str(error)

    sender, receiver = launch(main, 2, fabric)
    assert "rank 0 sends 3 pages, but rank 1 announced 2" in sender
    assert "rank 1 announced 2 pages, but rank 0 sends 3" in receiver


# -- giving up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["dma", "mte"])
def test_a_receiver_cancels_in_the_middle(fabric: str, engine: Any) -> None:
    """When `cancel` returns, nobody writes into the pages, and they can be used again at once."""

    def main(comm: xccl.Communicator) -> None:
        kv = make(comm)
        cancelled = comm.signals(1)
        if comm.rank == 0:
            request = kv.isend([1, 2], 1, 6, by_layer=True, engine=engine)
            request.ready(0)
            error = error_of(request.wait)
            assert isinstance(error, xccl.FabricError)
            assert "rank 1 has cancelled it" in str(error)
            assert request.layers_sent == 1
            request.ready()  # too late, and no error
            comm.wait_until(cancelled, 0, "ge", 1)
            kv.isend([3, 4], 1, 6).wait()
        else:
            request = kv.irecv([9, 8], 0, 6)
            request.wait_layer(0)
            assert request.cancel()
            assert not request.cancel()
            before = kv.pool.local.copy()
            kv.pool.local[:, 8:10] = 0
            assert "cancelled by this rank" in str(error_of(request.wait))
            assert_same(before[0, [9, 8]], filled(0)[0, [1, 2]])
            comm.signal(cancelled, 0, 1, peer=0)
            kv.irecv([8, 9], 0, 6).wait()
            assert_same(kv.pool.local[:, [8, 9]], filled(0)[:, [3, 4]])

    launch(main, 2, fabric)


def test_an_announcement_that_nobody_has_accepted_is_taken_back(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        kv = make(comm, max_requests=1)
        for number in range(3):  # the slot is free each time
            if comm.rank == 1:
                assert kv.irecv([5], 0, number).cancel()
        comm.barrier()
        if comm.rank == 0:
            request = kv.isend([1], 1, 2)
            error = error_of(lambda: request.wait(0.1))
            assert isinstance(error, xccl.WaitTimeout)
            assert "not announced" in str(error)
            assert not request.done
            assert request.cancel()
            assert not request.cancel()
        comm.barrier()
        assert_same(kv.pool.local, filled(comm.rank))

    launch(main, 2, fabric)


@pytest.mark.parametrize("layers", [0, 2])
def test_a_sender_cancels(fabric: str, layers: int) -> None:
    def main(comm: xccl.Communicator) -> None:
        kv = make(comm)
        if comm.rank == 0:
            comm.barrier()  # the pages are announced
            request = kv.isend([1], 1, 6, by_layer=True)
            if layers:
                request.ready(layers - 1)
                assert eventually(lambda: request.layers_sent == layers)
            assert request.cancel()
            assert isinstance(error_of(request.wait), xccl.FabricError)
            kv.pool.local[:, 1] = 0
        else:
            request = kv.irecv([9], 0, 6)
            comm.barrier()
            error = error_of(lambda: request.wait_layer(2))
            assert isinstance(error, xccl.FabricError)
            assert "rank 0 has cancelled it" in str(error)
            assert not request.cancel()
        kv.free()

    launch(main, 2, fabric)


def test_a_cancel_that_is_not_answered_leaves_the_pages_in_use(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        kv = make(comm)
        told = comm.signals(1)
        if comm.rank == 0:
            comm.wait_until(told, 0, "ge", 1)
            request = kv.isend([1], 1, 6, by_layer=True, engine="mte")  # accepts, and then computes
            comm.signal(told, 0, 1, peer=1)
            while told.read(0) < 2:
                time.sleep(0.001)
            assert isinstance(error_of(request.wait), xccl.FabricError)
        else:
            request = kv.irecv([9], 0, 6)
            comm.signal(told, 0, 1, peer=0)
            comm.wait_until(told, 0, "ge", 1)
            assert isinstance(error_of(lambda: request.cancel(0.1)), xccl.WaitTimeout)
            assert isinstance(error_of(lambda: kv.irecv([9], 0, 7)), xccl.UsageError)
            comm.signal(told, 0, 2, peer=0)
            assert request.cancel()
            assert kv.irecv([9], 0, 7).cancel()

    launch(main, 2, fabric)


def test_cancelled_at_any_moment(fabric: str) -> None:
    """Either it is complete or it is not, and afterwards the pages keep what their owner writes."""
    rounds = 100

    def main(comm: xccl.Communicator) -> None:
        kv = make(comm)
        over = comm.signals(1)
        for number in range(rounds):
            if comm.rank == 0:
                request: Any = kv.isend(range(12), 1, number)
                comm.wait_until(over, 0, "ge", number + 1)
                request.cancel()  # the receiver may have taken back what the sender had not seen yet
                assert request.done
            else:
                request = kv.irecv(range(12, 24), 0, number)
                time.sleep(float(np.random.default_rng(number).random()) * 3e-4)
                if request.cancel():
                    kv.pool.local[:, 12:] = 7
                    time.sleep(1e-4)
                    assert (kv.pool.local[:, 12:] == 7).all()
                else:
                    assert_same(kv.pool.local[:, 12:], filled(0)[:, :12])
                    kv.pool.local[:, 12:] = 0
                comm.signal(over, 0, number + 1, peer=0)

    launch(main, 2, fabric)


# -- the end ----------------------------------------------------------------------------------------------------------


def test_nobody_leaves_or_frees_with_a_request_under_way(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        kv = make(comm)
        request = kv.irecv([1], 0, 1) if comm.rank == 1 else None
        errors = [error_of(kv.free)]
        assert isinstance(errors[0], xccl.UsageError)
        if request is not None:
            assert "1 requests are under way" in str(errors[0])
            assert "requests are under way" in str(error_of(comm.close))
            assert request.cancel()
        kv.free()

    launch(main, 2, fabric)


@pytest.mark.parametrize("waits", ["wait", "wait_layer"])
def test_a_peer_that_has_left_is_not_waited_for(fabric: str, waits: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        kv = make(comm)
        if comm.rank == 1:
            receive, send = kv.irecv([1], 0, 1), kv.isend([2], 0, 1)
            error = error_of(receive.wait if waits == "wait" else lambda: receive.wait_layer(0))
            assert isinstance(error, xccl.PeerDied)
            assert isinstance(error_of(send.wait), xccl.PeerDied)
            assert isinstance(error_of(receive.wait), xccl.PeerDied)
            assert not kv.under_way

    launch(main, 2, fabric)


def test_deadlines_name_the_request(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        kv = make(comm)
        if comm.rank == 1:
            request = kv.irecv([1], 0, 44)
            for call in (lambda: request.wait(0.05), lambda: request.wait_layer(1, 0.05)):
                error = error_of(call)
                assert isinstance(error, xccl.WaitTimeout)
                assert "event 44" in str(error)
                assert "rank 0" in str(error)
            assert request.cancel()
        comm.barrier()

    launch(main, 2, fabric)
