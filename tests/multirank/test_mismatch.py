"""Ranks that disagree about a collective call: all of them get a UsageError that says who passed what, and none hangs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xccl
from tests.multirank.support import BF16, FP16, FP32, assert_same, error_of, launch
from xccl.errors import EventMismatch, PeerDied, UsageError, WaitTimeout

RANKS = 3
#: A mismatch is known as soon as all ranks have called; it must not need a deadline.
AT_ONCE_S = 5.0


def works(comm: xccl.Communicator) -> None:
    """The session is as good as new: allocation, expert parallelism, barrier."""
    a = comm.empty((3, 5), np.int32)
    comm.put(a, np.full(15, comm.rank, np.int32), peer=(comm.rank + 1) % comm.size)
    comm.barrier()
    assert (a.local == (comm.rank - 1) % comm.size).all()
    ep = xccl.ExpertParallel(comm, num_experts=comm.size, hidden=4, top_k=1, max_tokens=2, dtype=FP32, quant="none")
    x = np.full((2, 4), comm.rank, np.float32)
    d = ep.dispatch(x, np.full((2, 1), (comm.rank + 1) % comm.size))
    assert (d.tokens == (comm.rank - 1) % comm.size).all()
    assert_same(ep.combine(d.tokens, d, np.ones((2, 1), np.float32)), x)
    a.free()


def disagree(fabric: str, call: Callable[[xccl.Communicator, Any], Any], arguments: list[Any]) -> list[Any]:
    """Each rank makes the call with its own argument; the errors by rank, after a check that the session goes on."""

    def main(comm: xccl.Communicator) -> tuple[BaseException | None, float]:
        comm.barrier()
        start = time.monotonic()
        error = error_of(call, comm, arguments[comm.rank])
        seconds = time.monotonic() - start
        if isinstance(error, UsageError):
            works(comm)
        return error, seconds

    results = launch(main, RANKS, fabric)
    for rank, (error, seconds) in enumerate(results):
        assert isinstance(error, UsageError), f"rank {rank}: {error!r}"
        assert seconds < AT_ONCE_S
    return [error for error, _ in results]


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        ([(4, 4), (4, 4), (4, 5)], "shape[1]"),
        ([(4, 4), (4,), (4, 4)], "ndim"),
        ([(16,), (4, 4), (2, 8)], "ndim"),
        ([(0,), (1,), (1,)], "shape[0]"),
        ([1 << 20, 1 << 20, 1], "shape[0]"),
    ],
)
def test_empty_of_different_shapes(fabric: str, shapes: list[Any], name: str) -> None:
    for error in disagree(fabric, lambda comm, shape: comm.empty(shape, np.float32), shapes):
        assert name in str(error)
        assert "rank" in str(error)


@pytest.mark.parametrize(
    "dtypes",
    [
        [np.float32, np.float32, np.int32],
        ["<i4", ">i4", "<i4"],
        [FP16, BF16, BF16],
        [np.dtype([("a", "i4")]), np.dtype([("b", "i4")]), np.dtype([("a", "i4")])],
    ],
    ids=["kind", "byte order", "bf16", "names"],
)
def test_empty_of_different_dtypes(fabric: str, dtypes: list[Any]) -> None:
    for error in disagree(fabric, lambda comm, dtype: comm.empty(8, dtype), dtypes):
        assert "dtype" in str(error)


def test_different_numbers_of_signals(fabric: str) -> None:
    for error in disagree(fabric, lambda comm, count: comm.signals(count), [8, 8, 9]):
        assert "count" in str(error)
        assert "8 at ranks 0, 1" in str(error)
        assert "9 at rank 2" in str(error)


def test_different_calls(fabric: str) -> None:
    def call(comm: xccl.Communicator, name: str) -> None:
        if name == "empty":
            comm.empty(8, np.int64)
        elif name == "signals":
            comm.signals(8)
        else:
            xccl.ExpertParallel(comm, num_experts=3, hidden=8, top_k=1, max_tokens=8, dtype=FP32)

    for names in (["empty", "signals", "empty"], ["ExpertParallel", "ExpertParallel", "empty"],
                  ["signals", "empty", "ExpertParallel"]):  # fmt: skip
        for error in disagree(fabric, call, names):
            for name in names:
                assert name in str(error)


def test_free_of_different_arrays(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> BaseException | None:
        a, b = comm.empty(8, np.int64), comm.empty(8, np.int64)
        a.local[:], b.local[:] = 1, 2
        error = error_of((a if comm.rank else b).free)
        # Nothing was freed.
        comm.barrier()
        c = comm.empty(8, np.int64)
        c.local[:] = 3
        assert (a.local == 1).all()
        assert (b.local == 2).all()
        works(comm)
        a.free()
        b.free()
        return error

    for error in launch(main, RANKS, fabric):
        assert isinstance(error, UsageError)
        assert "free" in str(error)


def test_free_and_empty(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> BaseException | None:
        a = comm.empty(8, np.int64)
        error = error_of(a.free) if comm.rank else error_of(comm.empty, 8, np.int64)
        a.local[:] = 5
        works(comm)
        return error

    for error in launch(main, RANKS, fabric):
        assert isinstance(error, UsageError)
        assert "free" in str(error)
        assert "empty" in str(error)


EXPERT_PARALLEL: dict[str, Any] = {
    "num_experts": 6, "hidden": 16, "top_k": 2, "max_tokens": 8, "dtype": FP32, "quant": "none",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_experts", [6, 6, 9]),
        ("hidden", [16, 32, 16]),
        ("top_k", [2, 2, 3]),
        ("max_tokens", [8, 9, 10]),
        ("dtype", [FP32, FP32, BF16]),
        ("quant", ["int8", "none", "none"]),
    ],
)
def test_expert_parallel_of_different_arguments(fabric: str, name: str, values: list[Any]) -> None:
    def make(comm: xccl.Communicator, value: Any) -> None:
        xccl.ExpertParallel(comm, **(EXPERT_PARALLEL | {name: value}))

    for error in disagree(fabric, make, values):
        assert name in str(error)
        if name not in ("dtype", "quant"):
            assert all(str(value) in str(error) for value in values)


@pytest.mark.parametrize(
    ("name", "values"),
    [("num_experts", [6, 6, 7]), ("hidden", [16, 0, 16]), ("dtype", [FP32, np.float64, FP32]), ("quant", ["int4"] + ["none"] * 2)],
)  # fmt: skip
def test_an_argument_that_is_impossible_at_one_rank(fabric: str, name: str, values: list[Any]) -> None:
    """Ranks differ, and one of the values is wrong by itself: still all ranks hear of it, at once."""

    def make(comm: xccl.Communicator, value: Any) -> None:
        xccl.ExpertParallel(comm, **(EXPERT_PARALLEL | {name: value}))

    disagree(fabric, make, values)


def test_empty_that_is_impossible_at_one_rank(fabric: str) -> None:
    disagree(fabric, lambda comm, shape: comm.empty(shape, np.int64), [4, -4, 4])


def test_a_barrier_against_a_collective_call_ends_at_the_deadline(fabric: str) -> None:
    """A barrier says nothing of itself, so that it is fast: all ranks get a WaitTimeout."""

    def main(comm: xccl.Communicator) -> BaseException | None:
        comm.barrier()
        comm.op_timeout_s = 0.3
        # A rank that has given up must not leave before the others have: they would be told that it has left.
        error = error_of(comm.barrier) if comm.rank == 1 else error_of(comm.empty, 4, np.int64)
        time.sleep(0.3)
        return error

    for rank, error in enumerate(launch(main, RANKS, fabric)):
        assert isinstance(error, WaitTimeout)
        assert error.operation == ("barrier" if rank == 1 else "empty")


def test_dispatch_against_combine_ends_at_the_deadline(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> BaseException | None:
        ep = xccl.ExpertParallel(comm, **EXPERT_PARALLEL)
        x, idx = np.zeros((3, 16), np.float32), np.zeros((3, 2), np.int64)
        d = ep.dispatch(x, idx)
        comm.barrier()
        comm.op_timeout_s = 0.3
        out = np.zeros((len(d.source), 16), np.float32)
        error = error_of(ep.dispatch, x, idx) if comm.rank else error_of(ep.combine, out, d, np.zeros((3, 2)))
        time.sleep(0.3)
        return error

    for rank, error in enumerate(launch(main, RANKS, fabric)):
        assert isinstance(error, WaitTimeout)
        assert ("dispatch" if rank else "combine") in str(error)
        assert error.peer is not None


def test_a_rank_that_never_calls(fabric: str) -> None:
    """The others are told which rank has left without the call."""

    def main(comm: xccl.Communicator) -> BaseException | None:
        comm.barrier()
        return None if comm.rank == 2 else error_of(comm.empty, 4, np.int64)

    errors = launch(main, RANKS, fabric)
    for error in errors[:2]:
        assert isinstance(error, PeerDied)
        assert error.peer == 2
        assert "left" in str(error)


def test_too_many_tokens_at_one_rank_do_not_hang_the_others(fabric: str) -> None:
    """That rank is told at once, may dispatch fewer tokens instead, and nobody notices."""

    def main(comm: xccl.Communicator) -> BaseException | None:
        ep = xccl.ExpertParallel(comm, **EXPERT_PARALLEL)
        error = None
        if comm.rank == 1:
            error = error_of(ep.dispatch, np.zeros((9, 16), np.float32), np.zeros((9, 2), np.int64))
        d = ep.dispatch(np.ones((8, 16), np.float32), np.zeros((8, 2), np.int64))
        assert len(d.source) == (48 if comm.rank == 0 else 0)
        return error

    _, error, _ = launch(main, RANKS, fabric)
    assert error is not None
    assert "9" in str(error)
    assert "8" in str(error)


def test_ranks_that_mean_different_transfers(fabric: str) -> None:
    """Three ranks in a ring, one of them with a wrong event, one with a wrong size: both ends of each transfer are told."""

    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        right, left = (comm.rank + 1) % RANKS, (comm.rank - 1) % RANKS
        buffer = np.zeros(10 if comm.rank != 1 else 11, np.int64)
        out = np.zeros(10, np.int64)
        send = comm.isend(buffer, dst=right, event_id=5 if comm.rank != 2 else 6)
        receive = comm.irecv(out, src=left, event_id=5)
        return [error_of(send.wait), error_of(receive.wait)]

    results = launch(main, RANKS, fabric)
    assert [type(e) for e in results[0]] == [type(None), EventMismatch]
    assert [type(e) for e in results[1]] == [UsageError, type(None)]
    assert [type(e) for e in results[2]] == [EventMismatch, UsageError]
