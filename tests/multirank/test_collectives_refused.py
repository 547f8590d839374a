"""What is wrong with a collective call is an error at once, at all ranks, and the communicator stays usable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xccl
from tests.multirank.support import error_of, launch

Call = Callable[[xccl.Communicator], Any]
A8, A9 = np.zeros(8, np.float32), np.zeros(9, np.float32)

#: By what ranks disagree in: what rank 1 calls, and what all others do.
DISAGREEMENTS: dict[str, tuple[Call, Call]] = {
    "bytes": (lambda c: c.allreduce(A9), lambda c: c.allreduce(A8)),
    "bytes, in one and several steps": (lambda c: c.allgather(np.zeros(99_999)), lambda c: c.allgather(np.zeros(2))),
    "dtype": (lambda c: c.allgather(A8.view(np.int32)), lambda c: c.allgather(A8)),
    "op": (lambda c: c.allreduce(A8, "max"), lambda c: c.allreduce(A8, "sum")),
    "root": (lambda c: c.broadcast(A8.copy(), 1), lambda c: c.broadcast(A8.copy(), 0)),
    "algorithm": (lambda c: c.allreduce(A8, algorithm="two-step"), lambda c: c.allreduce(A8, algorithm="mesh")),
    "the call": (lambda c: c.allgather(A8), lambda c: c.allreduce(A8)),
    "dtype, of rows": (
        lambda c: c.alltoallv(A8[:0].reshape(0, 2), [0] * c.size),
        lambda c: c.alltoallv(A8[:0], [0] * c.size),
    ),
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
@pytest.mark.parametrize("ranks", [2, 4, 36])
def test_disagreement(fabric: str, what: str, ranks: int) -> None:
    theirs, ours = DISAGREEMENTS[what]

    def main(comm: xccl.Communicator) -> tuple[BaseException | None, float]:
        error = error_of(theirs if comm.rank == 1 else ours, comm)
        return error, float(comm.allreduce(np.ones(1))[0])

    for error, total in launch(main, ranks, "local" if ranks > 4 else fabric):
        assert isinstance(error, xccl.UsageError)
        assert f"disagree in {what.split(',')[0]}" in str(error)
        assert "at rank 1" in str(error)
        assert total == ranks


def _read_only() -> np.ndarray:
    array = np.zeros(8, np.float32)
    array.flags.writeable = False
    return array


#: What rank 1 is given, and a word of its error.
IMPOSSIBLE: dict[str, tuple[Call, str]] = {
    "no array": (lambda c: c.allreduce([1, 2]), "NumPy"),  # type: ignore[arg-type]
    "objects": (lambda c: c.allgather(np.array([None])), "objects"),
    "operator": (lambda c: c.allreduce(A8, "mean"), "mean"),
    "dtype": (lambda c: c.allreduce(A8.astype(np.complex64)), "complex64"),
    "bool": (lambda c: c.allreduce(A8 > 0), "bool"),
    "root": (lambda c: c.broadcast(A8.copy(), 2), "root"),
    "negative root": (lambda c: c.gather(A8, -1), "root"),
    "parts": (lambda c: c.alltoall(A9), r"\[2, ...\]"),
    "no parts": (lambda c: c.reduce_scatter(np.zeros(())), r"\[2, ...\]"),
    "algorithm": (lambda c: c.allgather(A8, algorithm="ring"), "ring"),
    "algorithm of another": (lambda c: c.allgather(A8, algorithm="two-step"), "two-step"),
    "out too small": (lambda c: c.allgather(A8, out=A8.copy()), "16 elements"),
    "out of another dtype": (lambda c: c.allreduce(A8, out=np.zeros(8, np.int32)), "int32"),
    "out read-only": (lambda c: c.allreduce(A8, out=_read_only()), "read-only"),
    "out strided": (lambda c: c.allreduce(A8, out=np.zeros(16, np.float32)[::2]), "contiguous"),
    "broadcast into read-only": (lambda c: c.broadcast(_read_only(), 0), "read-only"),
    "scatter without out": (lambda c: c.scatter(None, 0), "out"),
    "scatter from two": (lambda c: c.scatter(np.zeros((2, 8)), 0, out=np.zeros(8)), "None elsewhere"),
    "counts that do not sum up": (lambda c: c.alltoallv(A8, [4, 5]), "sum to 9"),
    "negative counts": (lambda c: c.alltoallv(A8, [9, -1]), "-1"),
    "counts of another size": (lambda c: c.alltoallv(A8, [8]), "2 integers"),
    "rows of nothing": (lambda c: c.alltoallv(np.zeros((8, 0)), [4, 4]), "no bytes"),
    "fractions": (lambda c: c.alltoallv(A8, [4.0, 4.0]), "integers"),
    "timeout": (lambda c: c.allreduce(A8, timeout_s=0.0), "timeout"),
}  # fmt: skip


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_impossible_argument(fabric: str, what: str) -> None:
    """Rank 1 hears of it at once, also when rank 0 comes late; rank 0 when it calls; then all goes on."""
    call, message = IMPOSSIBLE[what]

    def main(comm: xccl.Communicator) -> tuple[BaseException | None, float]:
        if comm.rank == 1:
            error = error_of(call, comm)
            comm.barrier()
        else:
            comm.barrier()  # rank 1 has its error before this rank calls
            error = error_of(comm.allgather, A8)
        return error, float(comm.allreduce(np.ones(1))[0])

    (theirs, total), (mine, same) = launch(main, 2, fabric)
    assert isinstance(mine, xccl.UsageError)
    with pytest.raises(xccl.UsageError, match=message):
        raise mine
    assert isinstance(theirs, xccl.UsageError)
    assert "rank 1 was given an impossible argument" in str(theirs)
    assert (total, same) == (2, 2)


def test_two_refusals_in_a_row(fabric: str) -> None:
    """A rank that refuses twice waits, before the second time, for what it owes the first time."""

    def main(comm: xccl.Communicator) -> float:
        for _ in range(5):
            bad = error_of(comm.allreduce, A8, "mean" if comm.rank == 1 else "sum")
            assert isinstance(bad, xccl.UsageError)
        return float(comm.allreduce(np.ones(1))[0])

    assert launch(main, 3, fabric) == [3.0] * 3


def test_other_numbers_of_rows_than_expected(fabric: str) -> None:
    """Only the rank that expects others knows; the rows that were sent to the others arrive."""

    def main(comm: xccl.Communicator) -> tuple[BaseException | None, float]:
        x = np.full(3, comm.rank, np.int32)
        options: dict[str, Any] = {"recv_counts": [2, 2]} if comm.rank == 1 else {}
        error = error_of(comm.alltoallv, x, [1, 2] if comm.rank == 0 else [2, 1], **options)
        small = {"out": np.zeros(2, np.int32)} if comm.rank == 0 else {}
        second = error_of(comm.alltoallv, x, [2, 1], **small)
        return (error or second), float(comm.allreduce(np.ones(1))[0])

    (first, a), (second, b) = launch(main, 2, fabric)
    assert isinstance(second, xccl.UsageError)
    assert "rank 1 sends 1 rows to rank 1, which expects 2" in str(second)
    assert isinstance(first, xccl.UsageError)
    assert "out has room for 2 rows, 4 come" in str(first)
    assert (a, b) == (2, 2)


def test_no_room_for_a_staging_area(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> BaseException | None:
        return error_of(comm.allgather, np.zeros(1000))

    for error in launch(main, 4, fabric, heap_bytes=4096):
        assert error is None
    for error in launch(main, 34, "local", heap_bytes=4096):
        assert isinstance(error, xccl.CapacityError)
        assert error.needed_bytes == 512 * 34


def test_one_rank_has_no_room(fabric: str) -> None:
    """Its heap is taken: a CapacityError at all ranks, and what needs no staging area goes on."""

    def main(comm: xccl.Communicator) -> tuple[BaseException | None, float]:
        if comm.rank == 2:
            comm.heap_allocator.alloc((1 << 16) - 256)
        return error_of(comm.allgather, np.zeros(1000)), float(comm.allreduce(np.ones(1))[0])

    results = launch(main, 3, fabric, heap_bytes=1 << 16)
    for rank, (error, total) in enumerate(results):
        assert isinstance(error, xccl.CapacityError), rank
        assert total == 3
    assert "rank 2 has no room" in str(results[0][0])


def test_deadline_names_the_missing_rank(fabric: str) -> None:
    """And then no collective is possible any more; point to point goes on."""

    def main(comm: xccl.Communicator) -> tuple[BaseException | None, BaseException | None]:
        late, unusable = None, None
        if comm.rank != 1:
            late = error_of(comm.allreduce, np.ones(1), timeout_s=0.2)
            unusable = error_of(comm.allreduce, np.ones(1))
        comm.barrier()
        return late, unusable

    results = launch(main, 3, fabric)
    for rank in (0, 2):
        late, unusable = results[rank]
        assert isinstance(late, xccl.WaitTimeout)
        assert (late.operation, late.rank, late.peer) == ("allreduce", rank, 1)
        assert isinstance(unusable, xccl.FabricError)


@pytest.mark.parametrize("ranks", [3, 36])
def test_a_rank_that_leaves_or_fails(fabric: str, ranks: int) -> None:
    def leaves(comm: xccl.Communicator) -> BaseException | None:
        return None if comm.rank == 1 else error_of(comm.allreduce, np.ones(1))

    results = launch(leaves, ranks, "local" if ranks > 3 else fabric)
    assert all(isinstance(error, xccl.PeerDied) and error.peer == 1 for r, error in enumerate(results) if r != 1)

    def fails(comm: xccl.Communicator) -> None:
        if comm.rank == 1:
            raise RuntimeError("on purpose")
        with pytest.raises(xccl.SessionAborted, match="on purpose"):
            comm.allgather(np.ones(1))

    with pytest.raises(RuntimeError, match="on purpose"):
        launch(fails, ranks, "local" if ranks > 3 else fabric)
