"""Send and receive when two ranks disagree, or one comes too late: both hear of it, and the rest goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import xccl
from tests.multirank.messages import RINGS, TINY, guarded, message
from tests.multirank.support import assert_same, error_of, launch
from xccl.errors import EventMismatch, FabricError, UsageError, WaitTimeout

# --- disagreement ----------------------------------------------------------------------------------------------------


def exchange(comm: xccl.Communicator, event: int, n: int = 3000) -> None:
    """A transfer in each direction, checked: the channels work."""
    peer = 1 - comm.rank
    request = comm.isend(message(n, event + comm.rank), dst=peer, event_id=event, lanes=3)
    out = np.zeros(n, np.uint8)
    comm.recv(out, src=peer, event_id=event, lanes=3)
    assert_same(out, message(n, event + peer))
    request.wait()


@pytest.mark.parametrize("ring", [{}, TINY], ids=["default", "2x64"])
@pytest.mark.parametrize("n", [0, 100, 50_000])
@pytest.mark.parametrize("blocking", [True, False])
def test_another_event_is_a_mismatch_on_both_sides(fabric: str, ring: dict[str, int], n: int, blocking: bool) -> None:
    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        errors = []
        for i in range(3):
            buffer = np.zeros(n, np.uint8)
            event = 7 + i if comm.rank == 0 else 1000 + i
            if blocking:
                call = comm.send if comm.rank == 0 else comm.recv
                errors.append(error_of(call, buffer, 1 - comm.rank, event))
            else:
                start = comm.isend if comm.rank == 0 else comm.irecv
                request = start(buffer, 1 - comm.rank, event)
                errors.append(error_of(request.wait))
                assert repr(error_of(request.wait)) == repr(errors[-1])
                assert repr(error_of(request.test)) == repr(errors[-1])
            assert not buffer.any()
            exchange(comm, 50 + i)
        return errors

    sender, receiver = launch(main, 2, fabric, **ring)
    for i in range(3):
        for error, rank, operation, mine, theirs in (
            (sender[i], 0, "send", 7 + i, 1000 + i), (receiver[i], 1, "recv", 1000 + i, 7 + i),
        ):  # fmt: skip
            assert isinstance(error, EventMismatch)
            assert (error.rank, error.peer, error.operation) == (rank, 1 - rank, operation)
            assert (error.event_id, error.peer_event_id) == (mine, theirs)
            assert str(mine) in str(error)
            assert str(theirs) in str(error)


@pytest.mark.parametrize("ring", [{}, TINY], ids=["default", "2x64"])
@pytest.mark.parametrize(("sent", "lanes_sent"), [(100, 2), (0, 2), (50_000, 2), (3000, 5), (3000, 48)])
def test_another_size_or_number_of_lanes_is_an_error_on_both_sides(
    fabric: str, ring: dict[str, int], sent: int, lanes_sent: int
) -> None:
    def main(comm: xccl.Communicator) -> BaseException | None:
        if comm.rank == 0:
            error = error_of(comm.send, np.ones(sent, np.uint8), dst=1, event_id=4, lanes=lanes_sent)
        else:
            out, check = guarded(3000)
            error = error_of(comm.recv, out, src=0, event_id=4, lanes=2)
            check()
            assert (out == 0xA7).all()
        exchange(comm, 50)
        return error

    for error in launch(main, 2, fabric, **ring):
        assert isinstance(error, UsageError)
        for number in (sent, 3000, lanes_sent, 2):
            assert str(number) in str(error)


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("n", [0, 10, 2000])
def test_a_refusal_concerns_one_message_only(fabric: str, ring: dict[str, int], n: int) -> None:
    """Those sent behind it, written into the ring already or not even started, arrive as if it had not been."""
    count = 12

    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        if comm.rank == 0:
            requests = [comm.isend(message(n, i), dst=1, event_id=i, lanes=1 + i) for i in range(count)]
            comm.barrier()
            errors = [error_of(request.wait) for request in requests]
        else:
            comm.barrier()
            errors = [error_of(comm.recv, np.zeros(n, np.uint8), src=0, event_id=500)]
            for i in range(1, count):
                out = np.zeros(n, np.uint8)
                comm.recv(out, src=0, event_id=i, lanes=1 + i)
                assert_same(out, message(n, i), f"message {i}")
        exchange(comm, 60)
        return errors

    sender, receiver = launch(main, 2, fabric, **ring)
    for error, mine, theirs in ((sender[0], 0, 500), (receiver[0], 500, 0)):
        assert isinstance(error, EventMismatch)
        assert (error.event_id, error.peer_event_id) == (mine, theirs)
    assert sender[1:] == [None] * (count - 1)


@pytest.mark.parametrize("ring", RINGS)
def test_random_refusals(fabric: str, ring: dict[str, int]) -> None:
    """Messages in both directions, of which a third are refused, for their event, size or lanes: exactly those fail."""
    count = 150
    rng = np.random.default_rng(4)
    largest = 6 * ring.get("slot_bytes", 4096) * ring.get("ring_slots", 2)
    sizes = rng.integers(0, largest, (2, count)) // rng.choice([1, 7, 1000], (2, count))
    lanes = rng.integers(1, 9, (2, count))
    wrong = rng.choice(["", "event", "size", "lanes"], (2, count), p=[0.67, 0.11, 0.11, 0.11])
    kinds = {"": type(None), "event": EventMismatch, "size": UsageError, "lanes": UsageError}

    def main(comm: xccl.Communicator) -> None:
        me, peer = comm.rank, 1 - comm.rank
        under_way: list[tuple[int, xccl.Request, Any]] = []

        def finish(keep: int) -> None:
            while len(under_way) > keep:
                i, request, expected = under_way.pop(0)
                error = error_of(request.wait)
                what = f"message {i} from rank {me if request.channel.sending else peer}"
                owner = me if request.channel.sending else peer
                assert type(error) is kinds[wrong[owner, i]], f"{what}: {error!r}, wrong {wrong[owner, i]!r}"
                if isinstance(error, EventMismatch):
                    mine, theirs = (i, 1000 + i) if request.channel.sending else (1000 + i, i)
                    assert (error.event_id, error.peer_event_id) == (mine, theirs), what
                elif expected is not None and error is None:
                    assert_same(request.buffer, expected, what)

        for i in range(count):
            size, n_lanes = int(sizes[me, i]), int(lanes[me, i])
            under_way.append((i, comm.isend(message(size, i + 1000 * me), dst=peer, event_id=i, lanes=n_lanes), None))
            size, n_lanes, how = int(sizes[peer, i]), int(lanes[peer, i]), wrong[peer, i]
            out = np.zeros(size + (how == "size"), np.uint8)
            event = i + 1000 * (how == "event")
            request = comm.irecv(out, src=peer, event_id=event, lanes=n_lanes + (how == "lanes"))
            under_way.append((i, request, message(size, i + 1000 * peer)))
            finish(keep=i % 20)
        finish(keep=0)
        exchange(comm, 5000)

    launch(main, 2, fabric, **ring)


def test_a_refusal_with_several_receives_posted(fabric: str) -> None:
    """The receive that met the wrong message fails; those behind it get the messages that come after."""

    def main(comm: xccl.Communicator) -> BaseException | None:
        if comm.rank == 0:
            error = error_of(comm.send, np.zeros(9, np.uint8), dst=1, event_id=1)
            for i in range(2, 6):
                comm.send(message(9, i), dst=1, event_id=i)
            return error
        outs = [np.zeros(9, np.uint8) for _ in range(6)]
        first = comm.irecv(outs[0], src=0, event_id=77)
        requests = [comm.irecv(outs[i], src=0, event_id=i) for i in range(2, 6)]
        error = error_of(first.wait)
        for i, request in enumerate(requests, start=2):
            request.wait()
            assert_same(outs[i], message(9, i), f"message {i}")
        return error

    for error in launch(main, 2, fabric):
        assert isinstance(error, EventMismatch)


@pytest.mark.parametrize("ring", [{}, TINY], ids=["default", "2x64"])
def test_hundreds_of_refusals(fabric: str, ring: dict[str, int]) -> None:
    """One after another on the same few slots, with a good message in between now and then."""

    def main(comm: xccl.Communicator) -> None:
        buffer = np.zeros(150, np.uint8)
        for i in range(300):
            call = comm.send if comm.rank == 0 else comm.recv
            error = error_of(call, buffer, 1 - comm.rank, 2 * i + comm.rank, 1 + i % 3)
            assert isinstance(error, EventMismatch), (i, error)
            assert (error.event_id, error.peer_event_id) == (2 * i + comm.rank, 2 * i + 1 - comm.rank), i
            if i % 7 == 0:
                exchange(comm, i, 200)

    launch(main, 2, fabric, **ring)


def test_other_channels_do_not_notice_a_refusal(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> BaseException | None:
        n = 5000
        outs = {p: np.zeros(n, np.uint8) for p in range(3)}
        others = [p for p in range(3) if p != comm.rank]
        sends = {p: comm.isend(message(n, 3 * comm.rank + p), dst=p, event_id=10 + comm.rank) for p in others}
        # Rank 0 expects something else from rank 1, and from nobody else.
        receives = {p: comm.irecv(outs[p], src=p, event_id=99 if (comm.rank, p) == (0, 1) else 10 + p) for p in others}
        errors = [error_of(request.wait) for request in [*sends.values(), *receives.values()]]
        for p in others:
            if (comm.rank, p) != (0, 1):
                assert_same(outs[p], message(n, 3 * p + comm.rank), f"from {p}")
        (error,) = [e for e in errors if e is not None] or [None]
        return error

    errors = launch(main, 3, fabric, **TINY)
    assert isinstance(errors[0], EventMismatch)
    assert isinstance(errors[1], EventMismatch)
    assert errors[2] is None


# --- deadlines -------------------------------------------------------------------------------------------------------


def test_a_timeout_makes_the_channel_unusable(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        buffer = np.zeros(1000, np.uint8)
        call = comm.send if comm.rank == 0 else comm.recv
        other = comm.recv if comm.rank == 0 else comm.send
        errors = [error_of(call, buffer, 2, 5, timeout_s=0.05)] if comm.rank < 2 else []
        comm.barrier()
        if comm.rank < 2:
            errors += [error_of(call, buffer, 2, 6), error_of(call, buffer, 2, 6)]
        # Other channels work, also the one in the other direction between the same ranks.
        if comm.rank < 2:
            other(buffer, 2, 9)
            call(buffer, 1 - comm.rank, 10)
        else:
            comm.send(buffer, 0, 9)
            comm.recv(buffer, 1, 9)
        comm.barrier()
        return errors

    sender, receiver, _ = launch(main, 3, fabric, **TINY)
    for rank, errors, operation in ((0, sender, "send"), (1, receiver, "recv")):
        error = errors[0]
        assert isinstance(error, WaitTimeout)
        assert (error.rank, error.peer, error.event, error.timeout_s) == (rank, 2, 5, 0.05)
        assert error.operation is not None
        assert error.operation.startswith(operation)
        assert "event 5" in str(error)
        for later in errors[1:]:
            assert isinstance(later, FabricError)
            assert "unusable" in str(later)
            assert "event 5" in str(later)


def test_a_timeout_ends_the_requests_behind_it(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        errors: list[BaseException | None] = []
        if comm.rank == 0:
            before = comm.irecv(np.zeros(4, np.uint8), src=1, event_id=1)
            errors.append(error_of(comm.recv, np.zeros(4, np.uint8), src=1, event_id=2, timeout_s=0.05))
            errors.append(error_of(before.wait))
            errors.append(error_of(before.test))
        comm.barrier()
        return errors

    timed_out, *rest = launch(main, 2, fabric)[0]
    assert isinstance(timed_out, WaitTimeout)
    for error in rest:
        assert isinstance(error, FabricError)


def test_a_request_may_be_waited_for_again_after_a_timeout(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        n = 10_000
        errors: list[BaseException | None] = []
        if comm.rank == 0:
            requests = [comm.irecv(np.zeros(n, np.uint8), src=1, event_id=i) for i in range(2)]
            errors = [error_of(requests[1].wait, timeout_s=0.03), error_of(requests[0].wait, timeout_s=0.03)]
            comm.barrier()
            for i, request in enumerate(requests):
                request.wait()
                assert_same(request.buffer, message(n, i), f"message {i}")
        else:
            comm.barrier()
            for i in range(2):
                comm.send(message(n, i), dst=0, event_id=i)
        return errors

    for error in launch(main, 2, fabric, **TINY)[0]:
        assert isinstance(error, WaitTimeout)


def test_send_to_self_without_a_receive_is_refused(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> Any:
        return error_of(comm.send, np.zeros(1), dst=comm.rank, event_id=0)

    for error in launch(main, 2, fabric):
        assert isinstance(error, UsageError)
        assert "itself" in str(error)
