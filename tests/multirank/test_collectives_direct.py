"""Collectives that are made again go straight into a kernel: the same results and errors as by the long way, and few calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import xccl
from tests.multirank.support import Array, assert_same, error_of, launch
from xccl import reference
from xccl.layout.calls import KNOWN_CALLS

Call = Callable[[], Any]
RANKS = 2


def calls_in(call: Call) -> tuple[int, int]:
    """Python functions that a call enters, and C functions that these call."""
    seen = {"call": 0, "c_call": 0}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event in seen and argument is not sys.setprofile:
            seen[event] += 1

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen["call"] - 1, seen["c_call"]


def usual(comm: xccl.Communicator) -> dict[str, Call]:
    """A call of each collective with plain arrays, and an output of one's own where it has one."""
    rank, size = comm.rank, comm.size
    x, part = np.ones((size, 3), np.float32), np.ones(3, np.float32)
    out, whole = np.zeros(3, np.float32), np.zeros((size, 3), np.float32)
    rows, counts = np.ones((2 * size, 3), np.float32), np.full(size, 2)
    to = np.zeros((2 * size, 3), np.float32)
    return {
        "allgather": lambda: comm.allgather(part, out=whole),
        "allreduce": lambda: comm.allreduce(part, out=out),
        "allreduce in place": lambda: comm.allreduce(out, "max", out=out),
        "reduce_scatter": lambda: comm.reduce_scatter(x, out=out),
        "alltoall": lambda: comm.alltoall(x, out=whole),
        "broadcast": lambda: comm.broadcast(out, 1),
        "gather": lambda: comm.gather(part, 0, out=whole if rank == 0 else None),
        "scatter": lambda: comm.scatter(x if rank == 1 else None, 1, out=out),
        "barrier": comm.barrier,
        "alltoallv": lambda: comm.alltoallv(rows, counts, out=to, recv_counts=counts),
    }


#: The most that a call enters: Python functions, and C functions, a kernel among them. Alltoallv copies the numbers.
BOUNDS = {"alltoallv": (1, 2)}


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_usual_call_is_one_call_of_a_kernel(fabric: str, ranks: int) -> None:
    def main(comm: xccl.Communicator) -> dict[str, tuple[int, int]]:
        found = {}
        for name, call in usual(comm).items():
            call()
            # A wait that takes longer than a slice goes on in Python: the best of several.
            found[name] = min(calls_in(call) for _ in range(5))
        return found

    for of_rank in launch(main, ranks, fabric):
        for name, (python_calls, c_calls) in of_rank.items():
            most_python, most_c = BOUNDS.get(name, (1, 1))
            assert python_calls <= most_python, name
            assert 1 <= c_calls <= most_c, name


def test_unusual_calls_do_not_push_out_usual_ones(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> tuple[int, int]:
        call = usual(comm)["allreduce"]
        call()
        for _ in range(2 * KNOWN_CALLS):
            comm.allreduce(np.ones(5), timeout_s=20.0)
        return min(calls_in(call) for _ in range(5))

    assert launch(main, RANKS, fabric) == [(1, 1)] * RANKS


def test_direct_calls_keep_nothing(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> list[int]:
        calls = list(usual(comm).values())
        for call in calls:
            call()
        before = sys.getallocatedblocks(), sys.getrefcount(None), sys.getrefcount(0)
        for _ in range(1000):
            for call in calls:
                call()
        after = sys.getallocatedblocks(), sys.getrefcount(None), sys.getrefcount(0)
        comm.barrier()  # the other rank, if it is a thread, allocates as well
        return [b - a for a, b in zip(before, after, strict=True)]

    for grown in launch(main, RANKS, fabric):
        assert max(grown) < 900, grown


def _strings(text: str) -> str:
    """Another object with the same letters."""
    return "".join(list(text))


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    """Calls that are as usual, or unusual in some way, in any order."""
    kinds = st.sampled_from(["allreduce", "allgather", "reduce_scatter", "alltoall", "broadcast", "gather", "scatter"])
    dtypes = st.sampled_from([np.dtype(ml_dtypes.bfloat16), np.dtype(np.int64), np.dtype("longlong"), np.dtype("f4")])
    ways = st.sampled_from(
        ["usual", "usual", "no out", "strided", "other strings", "int64 root", "deadline", "subclass"]
    )
    return draw(
        st.lists(
            st.tuples(kinds, st.sampled_from([0, 1, 5]), dtypes, ways, st.sampled_from(["sum", "max"])),
            min_size=8, max_size=30,
        )
    )  # fmt: skip


class _Subclass(np.ndarray[Any, Any]):
    pass


@settings(max_examples=25)
@given(program=programs(), seed=st.integers(0, 1 << 20))
def test_usual_and_unusual_calls_mix(fabric: str, program: list[tuple[Any, ...]], seed: int) -> None:
    def inputs(i: int, kind: str, count: int, dtype: np.dtype[Any], ranks: int) -> list[Array]:
        shape = (ranks, count) if kind in ("reduce_scatter", "alltoall", "scatter") else (count,)
        rng = np.random.default_rng((seed, i))
        return [rng.integers(-9, 9, shape).astype(dtype) for _ in range(ranks)]

    def main(comm: xccl.Communicator) -> None:
        rank, size = comm.rank, comm.size
        for i, (kind, count, dtype, way, op) in enumerate(program):
            xs, root = inputs(i, kind, count, dtype, size), i % size
            oracle: Any = getattr(reference, kind)
            options: dict[str, Any] = {}
            if kind in ("allreduce", "reduce_scatter"):
                want = oracle(xs, op)[rank]
                options["op"] = _strings(op) if way == "other strings" else op
            elif kind in ("broadcast", "gather", "scatter"):
                want = (oracle(xs[root], size) if kind == "scatter" else oracle(xs, root))[rank]
                options["root"] = np.int64(root) if way == "int64 root" else root
            else:
                want = oracle(xs)[rank]
            if way == "other strings":
                options["algorithm"] = _strings("auto")
            if way == "deadline":
                options["timeout_s"] = 20.0
            x: Any = xs[rank]
            if way == "strided" and kind != "broadcast":
                x = np.repeat(x, 2, axis=-1)[..., ::2]
            if way == "subclass":
                x = x.view(_Subclass)
            if kind == "scatter" and rank != root:
                x = None
            if kind != "broadcast" and want is not None and (way != "no out" or x is None):
                options["out"] = np.zeros(want.shape, dtype)
            got = getattr(comm, kind)(x, **options)
            assert_same(None if got is None else np.asarray(got), want, f"call {i}: {kind}, {way}, rank {rank}")
            if "out" in options:
                assert got is options["out"]

    launch(main, 3, fabric)


def test_more_calls_than_are_known(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        for _ in range(2):
            for count in range(3 * KNOWN_CALLS):
                x = np.full(count, comm.rank + 1)
                assert_same(comm.allreduce(x, out=np.zeros_like(x)), np.full(count, 3))
        rows = np.arange(4 * KNOWN_CALLS)
        for width in (1, 2, 4) * KNOWN_CALLS:
            x = rows.reshape(-1, width)
            half = len(x) // 2
            want = np.concatenate([x[half * comm.rank :][:half]] * 2)
            assert_same(comm.alltoallv(x, np.array([half, half]), out=np.zeros_like(x))[0], want)

    launch(main, RANKS, fabric)


F4 = np.float32
#: What rank 1 passes instead of a plain array for input or output, after calls as usual: the word in its error.
WRONG: dict[str, tuple[Callable[[xccl.Communicator], Any], str]] = {
    "read-only out": (lambda c: c.allreduce(np.ones(3, F4), out=_frozen(3)), "writ"),
    "small out": (lambda c: c.allreduce(np.ones(3, F4), out=np.zeros(2, F4)), "3 elements"),
    "out of another dtype": (lambda c: c.allreduce(np.ones(3, F4), out=np.zeros(3, np.int32)), "3 elements"),
    "strided out": (lambda c: c.allreduce(np.ones(3, F4), out=np.zeros(6, F4)[::2]), "contiguous"),
    "parts of the wrong number": (lambda c: c.alltoall(np.ones((3, c.size), F4), out=np.zeros((c.size, 3), F4)), "2"),
    "no array": (lambda c: c.allreduce([1.0, 1.0, 1.0], out=np.zeros(3, F4)), "NumPy"),  # type: ignore[arg-type]
    "no such rank": (lambda c: c.broadcast(np.ones(3, F4), 7), "root"),
    "no such operator": (lambda c: c.allreduce(np.ones(3, F4), "mean", out=np.zeros(3, F4)), "mean"),
    "no such algorithm": (lambda c: c.allreduce(np.ones(3, F4), out=np.zeros(3, F4), algorithm="ring"), "ring"),
    "no deadline": (lambda c: c.allreduce(np.ones(3, F4), out=np.zeros(3, F4), timeout_s=0), "timeout"),
    "too few rows": (lambda c: c.alltoallv(np.ones((3, 3), F4), np.full(2, 2)), "sum to 4"),
    "negative counts": (lambda c: c.alltoallv(np.ones((4, 3), F4), np.array([5, -1])), "-1"),
    "counts for others": (lambda c: c.alltoallv(np.ones((6, 3), F4), np.full(3, 2)), "2 integers"),
    "counts in two dimensions": (lambda c: c.alltoallv(np.ones((4, 3), F4), np.full((1, 2), 2)), "2 integers"),
    "fractions": (lambda c: c.alltoallv(np.ones((4, 3), F4), np.full(2, 2.0)), "integers"),
    "rows of another shape": (
        lambda c: c.alltoallv(np.ones((4, 3), F4), np.full(2, 2), out=np.zeros((6, 2), F4)),
        "rows",
    ),
}


def _frozen(count: int) -> Array:
    array = np.zeros(count, F4)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_after_good_input(fabric: str, what: str) -> None:
    wrong, word = WRONG[what]

    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        calls = usual(comm)
        for call in calls.values():
            call()
        name = next(name for name in ("alltoallv", "alltoall", "broadcast", "allreduce") if name in _source(what))
        error = error_of(wrong, comm) if comm.rank == 1 else error_of(calls[name])
        for _ in range(2):
            for call in calls.values():
                call()
        return [error]

    for rank, (error,) in enumerate(launch(main, RANKS, fabric)):
        assert isinstance(error, xccl.UsageError), (rank, error)
        if rank == 1:
            assert word in str(error)
        else:
            assert "rank 1 was given an impossible argument" in str(error)


def _source(what: str) -> tuple[str, ...]:
    """Names that the wrong call mentions."""
    return WRONG[what][0].__code__.co_names


def test_numbers_of_rows_that_do_not_fit(fabric: str) -> None:
    """They are an error at the receiver alone, also by the direct way; and what was given has gone out."""

    def main(comm: xccl.Communicator) -> None:
        x, send = np.arange(6) + 10 * comm.rank, np.array([2, 4])
        came = np.full(2, send[comm.rank])
        want = np.concatenate(
            [np.arange(6)[:2] + 10 * r if comm.rank == 0 else np.arange(2, 6) + 10 * r for r in (0, 1)]
        )
        out = np.zeros(len(want), np.int64)
        for _ in range(3):
            out[:] = -1
            got, numbers = comm.alltoallv(x, send, out=out, recv_counts=came)
            assert got is out
            assert_same(got, want)
            assert_same(numbers, came)
            numbers[:] = 0  # the caller's own
            expected = came + (comm.rank == 1)
            out[:] = -1
            error = error_of(comm.alltoallv, x, send, out=out, recv_counts=expected)
            assert (error is None) == (comm.rank == 0)
            assert comm.rank == 0 or (isinstance(error, xccl.UsageError) and (out == -1).all())
            room = np.full(8 if comm.rank == 0 else 7, -1)
            error = error_of(comm.alltoallv, x, send, out=room)
            assert (error is None) == (comm.rank == 0)
            assert comm.rank == 1 or room.tolist() == [*want, -1, -1, -1, -1]
            wide = np.full(len(want) + 1, -1)
            got, numbers = comm.alltoallv(x, send, out=wide, recv_counts=came)
            assert_same(got, want)
            assert_same(numbers, came)
            assert wide[-1] == -1
            assert comm.rank == 0 or (room == -1).all()

    launch(main, RANKS, fabric)


def test_rows_without_an_output_of_ones_own(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        for i in range(6):
            send = np.array([i, 2 * i]) if comm.rank == 0 else np.array([1, 0])
            x = np.arange(3 * send.sum(), dtype=np.int16).reshape(-1, 3)
            rows, numbers = comm.alltoallv(x, send if i % 2 else send.tolist())
            assert numbers.tolist() == ([i, 1] if comm.rank == 0 else [2 * i, 0])
            assert rows.shape == (numbers.sum(), 3)

    launch(main, RANKS, fabric)
