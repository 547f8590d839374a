"""No wait is for ever: each ends at its deadline, with an error that says who waited for what, and what was there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xccl
from tests.faults.support import LOOPS, PATIENCE_S, at_most
from xccl.fabric.shm import ShmFabric
from xccl.layout.segment import Geometry

TIMEOUT_S = 0.1
#: How much later than its deadline a wait may end, on a busy machine.
LATE_S = 0.5

EXPERTS = {"num_experts": 6, "hidden": 8, "top_k": 1, "max_tokens": 4, "dtype": np.float32, "quant": "none"}


def at_the_deadline(
    prepare: Callable[[xccl.Communicator], Callable[[], Any]], fabric: str, ranks: int = 2, **options: Any
) -> xccl.WaitTimeout:
    """All ranks prepare, then rank 0 makes a call that the others do not make: the error."""

    def main(comm: xccl.Communicator) -> tuple[float, xccl.WaitTimeout] | None:
        call = prepare(comm)
        comm.barrier()
        if comm.rank:
            time.sleep(TIMEOUT_S + 0.2)  # in the session, but not in the call
            return None
        start = time.monotonic()
        with pytest.raises(xccl.WaitTimeout) as caught:
            call()
        return time.monotonic() - start, caught.value

    options = {"timeout_s": PATIENCE_S, "op_timeout_s": TIMEOUT_S} | options
    try:
        taken_s, error = xccl.launch(main, ranks, fabric=fabric, **options)[0]
    except xccl.WaitTimeout:
        # The preparation took too long: a deadline of a tenth of a second, on a machine that does something else.
        options["op_timeout_s"] = 3 * TIMEOUT_S
        taken_s, error = xccl.launch(main, ranks, fabric=fabric, **options)[0]
    timeout_s = error.timeout_s
    assert timeout_s is not None
    assert TIMEOUT_S <= timeout_s <= taken_s < timeout_s + LATE_S
    assert error.rank == 0
    assert isinstance(error, TimeoutError)
    assert f"rank 0: no success within {timeout_s:g} s in {error.operation}" in str(error)
    culprit = "another rank" if error.peer is None else f"rank {error.peer}"
    assert f"either {culprit} has not made the matching call, or it needs a longer deadline" in str(error)
    return error


@pytest.mark.parametrize(("comparison", "value", "seen"), [("ge", 5, 2), ("ne", 2, 2)])
def test_wait_until(fabric: str, comparison: str, value: int, seen: int) -> None:
    def prepare(comm: xccl.Communicator) -> Callable[[], Any]:
        signals = comm.signals(3)
        comm.signal(signals, 1, 2, peer=comm.rank)
        return lambda: comm.wait_until(signals, 1, comparison, value, timeout_s=TIMEOUT_S)

    error = at_the_deadline(prepare, fabric)
    assert error.operation == f"wait_until signal 1 {comparison} {value}"
    assert (error.peer, error.expected, error.seen) == (None, value, seen)
    assert f"expected {value}, seen {seen}" in str(error)


def test_recv(fabric: str) -> None:
    into = np.zeros(100_000)
    error = at_the_deadline(lambda comm: lambda: comm.recv(into, src=1, event_id=7, timeout_s=TIMEOUT_S), fabric)
    assert (error.operation, error.event, error.peer) == ("recv", 7, 1)
    assert (error.expected, error.seen) == (1, 0)  # chunks; nothing has come that would say how many there are
    assert "recv (event 7), waiting for rank 1: expected 1, seen 0" in str(error)


def test_send(fabric: str) -> None:
    """Four slots are written, and then there is no room."""
    out = np.zeros(10 * 4096, np.uint8)
    error = at_the_deadline(
        lambda comm: lambda: comm.send(out, dst=1, event_id=8, lanes=1, timeout_s=TIMEOUT_S, mode="ring"),
        fabric, ring_slots=4, slot_bytes=4096,
    )  # fmt: skip
    assert (error.operation, error.event, error.peer) == ("send", 8, 1)
    assert (error.expected, error.seen) == (10, 4)
    assert "send (event 8), waiting for rank 1: expected 10, seen 4" in str(error)


def test_send_that_fits_but_is_not_received(fabric: str) -> None:
    error = at_the_deadline(lambda comm: lambda: comm.send(np.zeros(4), dst=1, event_id=9, timeout_s=TIMEOUT_S), fabric)
    assert error.operation is not None
    assert error.operation.startswith("send (all chunks written, not acknowledged")
    assert (error.event, error.peer) == (9, 1)


@pytest.mark.parametrize("sending", [True, False])
def test_request(fabric: str, sending: bool) -> None:
    def prepare(comm: xccl.Communicator) -> Callable[[], Any]:
        if comm.rank:
            return lambda: None
        request = (comm.isend if sending else comm.irecv)(np.zeros(4), 1, event_id=3)
        return lambda: request.wait(timeout_s=TIMEOUT_S)

    def main(comm: xccl.Communicator) -> xccl.WaitTimeout | None:
        wait = prepare(comm)
        comm.barrier()
        error = None
        if comm.rank == 0:
            with pytest.raises(xccl.WaitTimeout) as caught:
                wait()
            error = caught.value
        comm.barrier()
        # The transfer is still under way, and must end before rank 0 may leave.
        if comm.rank == 0:
            wait()
        else:
            (comm.recv if sending else comm.send)(np.zeros(4), 0, event_id=3)
        return error

    error = xccl.launch(main, 2, fabric=fabric, timeout_s=PATIENCE_S)[0]
    assert error.operation.split(" (")[0] == ("send" if sending else "recv")
    assert (error.event, error.rank, error.peer, error.timeout_s) == (3, 0, 1, TIMEOUT_S)


def test_barrier(fabric: str) -> None:
    error = at_the_deadline(lambda comm: lambda: comm.barrier(timeout_s=TIMEOUT_S), fabric, ranks=3)
    assert (error.operation, error.event) == ("barrier", 2)


def test_barrier_by_default(fabric: str) -> None:
    error = at_the_deadline(lambda comm: comm.barrier, fabric)
    assert (error.operation, error.event) == ("barrier", 2)


@pytest.mark.parametrize(
    ("call", "operation"),
    [
        (lambda comm: comm.empty(4, np.int8), "empty"),
        (lambda comm: comm.signals(4), "signals"),
        (lambda comm: xccl.ExpertParallel(comm, **EXPERTS), "ExpertParallel"),
    ],
    ids=["empty", "signals", "ExpertParallel"],
)
def test_collective_constructors(fabric: str, call: Callable[[Any], Any], operation: str) -> None:
    error = at_the_deadline(lambda comm: lambda: call(comm), fabric, ranks=3)
    assert (error.operation, error.event, error.peer) == (operation, 1, 1)
    assert (error.expected, error.seen) == (1, 0)


def test_free(fabric: str) -> None:
    error = at_the_deadline(lambda comm: comm.empty(4, np.int8).free, fabric)
    assert (error.operation, error.event, error.peer, error.expected) == ("free", 2, 1, 2)
    assert error.seen is not None
    assert error.seen < 2


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
@pytest.mark.parametrize(
    ("stops_at", "operation_after", "step"),
    [("await-pulled", 0, "step 5 (fields of all ranks)"), ("release", 1, "step 0 (peers pull the one before)")],
    ids=["fields", "pulled"],
)
def test_expert_parallel(fabric: str, operation: str, stops_at: str, operation_after: int, step: str) -> None:
    """Rank 1 stops before it announces its part, or before it says that it has pulled."""

    def main(comm: xccl.Communicator) -> xccl.WaitTimeout | None:
        ep = xccl.ExpertParallel(comm, **EXPERTS)
        x, idx, weights = np.zeros((2, 8), np.float32), np.array([[0], [5]]), np.ones((2, 1), np.float32)
        d = ep.dispatch(x, idx) if operation == "combine" else None

        def call() -> None:
            if d is None:
                ep.dispatch(x, idx)
            else:
                ep.combine(d.tokens, d, weights)

        if comm.rank == 1:
            ep.on_step = lambda _, name: time.sleep(TIMEOUT_S + 0.3 if name == stops_at else 0.0)
            call()
            return None
        for _ in range(operation_after):
            call()
        comm.op_timeout_s = TIMEOUT_S
        with pytest.raises(xccl.WaitTimeout) as caught:
            call()
        return caught.value

    error = xccl.launch(main, 2, fabric=fabric, timeout_s=PATIENCE_S)[0]
    assert error.operation == f"{operation}, {step}"
    assert (error.rank, error.peer, error.timeout_s) == (0, 1, TIMEOUT_S)
    assert (error.event, error.expected, error.seen) == (1, 1, 0)


@pytest.mark.parametrize(
    ("calls", "stops_at", "step"),
    [
        ("d", "send", "dispatch, await-flags (of all ranks)"),
        ("dc", "send", "combine, await-flags (token 1)"),
        ("dd", "release", "dispatch, await-taken (peers read what came before)"),
        ("dcc", "release", "combine, await-taken (peers read what came before)"),
    ],
)
def test_push(fabric: str, calls: str, stops_at: str, step: str) -> None:
    """Rank 1 stops in the last of these calls before it sends, or before it says that it has read."""

    def main(comm: xccl.Communicator) -> xccl.WaitTimeout | None:
        ep = xccl.ExpertParallel(comm, **EXPERTS, protocol="push")
        x, idx, weights = np.zeros((2, 8), np.float32), np.array([[0], [5]]), np.ones((2, 1), np.float32)
        for call in calls[:-1]:
            if call == "d":
                d = ep.dispatch(x, idx)
            else:
                ep.combine(d.tokens, d, weights)
        comm.barrier()

        def last() -> object:
            return ep.dispatch(x, idx) if calls[-1] == "d" else ep.combine(d.tokens, d, weights)

        if comm.rank == 1:
            ep.on_step = lambda _, name: time.sleep(TIMEOUT_S + 0.3 if name == stops_at else 0.0)
            with contextlib.suppress(xccl.PeerDied):  # the other one has given up and left
                last()
            return None
        comm.op_timeout_s = TIMEOUT_S
        with pytest.raises(xccl.WaitTimeout) as caught:
            last()
        return caught.value

    error = xccl.launch(main, 2, fabric=fabric, timeout_s=PATIENCE_S)[0]
    assert error.operation == step
    assert (error.rank, error.peer, error.timeout_s) == (0, 1, TIMEOUT_S)
    assert error.expected is not None
    assert error.seen == error.expected - (1 if stops_at == "send" else error.expected)


@pytest.mark.parametrize(
    ("operation", "stops_at", "stage"),
    [
        ("dispatch", "announce", "await-counts"),
        ("dispatch", "notify", "await-rows"),
        ("combine", "announce", "await-ready"),
        ("combine", "release", "await-read"),
    ],
)
@pytest.mark.parametrize("watched", [False, True])
def test_direct(fabric: str, operation: str, stops_at: str, stage: str, watched: bool) -> None:
    """Rank 1 stops before a rank may go on; each wait has the whole deadline, in one call of the kernel as in several."""

    def main(comm: xccl.Communicator) -> xccl.WaitTimeout | None:
        ep = xccl.ExpertParallel(comm, **EXPERTS, protocol="direct")
        x, idx, weights = np.zeros((2, 8), np.float32), np.array([[0], [5]]), np.ones((2, 1), np.float32)
        d = ep.dispatch(x, idx) if operation == "combine" else None

        def call() -> object:
            return ep.dispatch(x, idx) if d is None else ep.combine(d.tokens, d, weights)

        call()
        comm.barrier()
        if comm.rank == 1:
            ep.on_step = lambda _, name: time.sleep(TIMEOUT_S + 0.3 if name == stops_at else 0.0)
            with contextlib.suppress(xccl.PeerDied):
                call()
            return None
        comm.op_timeout_s = TIMEOUT_S
        if watched:
            ep.on_step = lambda operation, step: None
        with pytest.raises(xccl.WaitTimeout) as caught:
            call()
        return caught.value

    error = xccl.launch(main, 2, fabric=fabric, timeout_s=PATIENCE_S)[0]
    assert error.operation == f"{operation}, {stage} (of all ranks)"
    assert (error.rank, error.peer, error.timeout_s) == (0, 1, TIMEOUT_S)
    assert (error.event, error.expected, error.seen) == (2, 2, 1)


def test_after_a_timeout_in_the_middle_the_object_says_so(fabric: str) -> None:
    """What was given up in the middle cannot be used again, and never hangs."""

    def main(comm: xccl.Communicator) -> list[Exception]:
        ep = xccl.ExpertParallel(comm, **EXPERTS)
        comm.barrier()
        if comm.rank:
            time.sleep(TIMEOUT_S + 0.3)
            return []
        comm.op_timeout_s = TIMEOUT_S
        errors: list[Exception] = []
        for call in (
            lambda: ep.dispatch(np.zeros((0, 8), np.float32), np.zeros((0, 1), int)),
            lambda: ep.dispatch(np.zeros((0, 8), np.float32), np.zeros((0, 1), int)),
            lambda: comm.empty(1, np.int8),
            lambda: comm.barrier(),
        ):
            try:
                call()
            except xccl.XcclError as error:
                errors.append(error)
        return errors

    with at_most(5.0):
        errors = xccl.launch(main, 2, fabric=fabric, timeout_s=PATIENCE_S)[0]
    assert [type(error) for error in errors] == [
        xccl.WaitTimeout, xccl.FabricError, xccl.WaitTimeout, xccl.FabricError
    ]  # fmt: skip
    assert "given up in the middle (WaitTimeout)" in str(errors[1])
    assert "given up in the middle (WaitTimeout)" in str(errors[3])


def test_a_rank_that_never_joins() -> None:
    geometry = Geometry(ranks=2, app_bytes=4096, heap_bytes=4096)
    with at_most(TIMEOUT_S + LATE_S), pytest.raises(xccl.WaitTimeout) as caught:
        ShmFabric(b"nobody else here", 1, geometry, join_timeout_s=TIMEOUT_S)
    error = caught.value
    assert (error.operation, error.rank, error.peer, error.timeout_s) == ("join", 1, 0, TIMEOUT_S)
    assert "waited 0.1 s for the segment of rank 0" in str(error)
    assert isinstance(error.__cause__, xccl.SegmentError)
    assert error.__cause__.reason == "absent"


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), "soon", None])
def test_impossible_deadlines(timeout_s: Any) -> None:
    for name, call in (
        ("timeout_s", lambda: xccl.launch(lambda comm: None, 1, timeout_s=timeout_s)),
        ("op_timeout_s", lambda: xccl.launch(lambda comm: None, 1, op_timeout_s=timeout_s)),
        ("join_timeout_s", lambda: xccl.init(0, 1, "x", join_timeout_s=timeout_s)),
        ("op_timeout_s", lambda: xccl.init(0, 1, "x", op_timeout_s=timeout_s)),
    ):
        with pytest.raises(xccl.UsageError, match=rf"^{name} must be"):
            call()


def test_impossible_deadlines_of_calls(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        signals = comm.signals(1)
        for timeout_s in (0, -1.0, float("nan"), float("inf"), "soon"):
            for call in (
                lambda t: comm.barrier(timeout_s=t),
                lambda t: comm.wait_until(signals, 0, "ge", 1, timeout_s=t),
                lambda t: comm.recv(np.zeros(1), 0, 1, timeout_s=t),
                lambda t: comm.send(np.zeros(1), 0, 1, timeout_s=t),
            ):
                with pytest.raises(xccl.UsageError, match=r"^timeout_s must be"):
                    call(timeout_s)
        comm.barrier()

    xccl.launch(main, 2, fabric=fabric, timeout_s=PATIENCE_S)


def test_the_deadline_holds_while_peers_ring(fabric: str) -> None:
    """Wake-ups for something else must not put it off."""

    def main(comm: xccl.Communicator) -> float | None:
        signals = comm.signals(2)
        comm.barrier()
        start = time.monotonic()
        if comm.rank:
            while time.monotonic() < start + 4 * TIMEOUT_S:
                comm.signal(signals, 1, 1, peer=0, op="add")
            return None
        with pytest.raises(xccl.WaitTimeout):
            comm.wait_until(signals, 0, "ge", 1, timeout_s=TIMEOUT_S)
        return time.monotonic() - start

    taken_s = xccl.launch(main, 2, fabric=fabric, timeout_s=PATIENCE_S)[0]
    assert TIMEOUT_S <= taken_s < TIMEOUT_S + LATE_S


@pytest.mark.parametrize("operation", LOOPS)
def test_every_operation_keeps_the_default_deadline_when_a_rank_hangs(fabric: str, operation: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        step = LOOPS[operation](comm)
        comm.barrier()
        if comm.rank == 2:
            time.sleep(0.5)  # alive, and in no call
            return
        comm.op_timeout_s = TIMEOUT_S
        try:
            while True:
                step()
        except xccl.WaitTimeout as error:
            comm.report(error)
            time.sleep(0.4)  # the others reach their deadlines before this rank ends the session
            raise

    errors: dict[int, xccl.WaitTimeout] = {}
    with at_most(3.0), pytest.raises(xccl.WaitTimeout):
        xccl.launch(main, 4, fabric=fabric, timeout_s=PATIENCE_S, on_report=errors.__setitem__)
    assert sorted(errors) == [0, 1, 3]
    for rank, error in errors.items():
        assert (error.rank, error.timeout_s) == (rank, TIMEOUT_S)
