"""Dispatch and combine at their limits, and when ranks disagree."""

from __future__ import annotations

import pytest

import xccl
from tests.multirank.support import (
    Shape,
    error_of,
    launch,
)
from xccl import reference
from xccl.errors import CapacityError, EventMismatch, FabricError, UsageError

QUANTS: list[reference.Quant] = ["int8", "none"]
RAGGED = [5, 0, 16, 1]


# --- disagreement and limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_counts", [True, False])
def test_combines_of_different_dispatches(fabric: str, same_counts: bool) -> None:
    shape = Shape(num_experts=3)
    first = shape.round(0, [8, 8, 8])
    second = first if same_counts else shape.round(1, [2, 16, 9])

    def main(comm: xccl.Communicator) -> tuple[BaseException | None, ...]:
        ep, other = shape.expert_parallel(comm), shape.expert_parallel(comm)
        handles = [first.dispatch(comm.rank, ep), second.dispatch(comm.rank, ep)]
        mine = 1 if comm.rank == 2 else 0
        r = second if mine else first
        error = error_of(ep.combine, r.outs[comm.rank], handles[mine], r.weights[comm.rank])
        again = error_of(ep.combine, r.outs[comm.rank], handles[mine], r.weights[comm.rank])
        first.run(comm.rank, other)  # the other object is not concerned
        return error, again

    for rank, (error, again) in enumerate(launch(main, 3, fabric)):
        assert isinstance(error, EventMismatch)
        mine, theirs = (2, 1) if rank == 2 else (1, 2)
        assert (error.operation, error.rank, error.event_id, error.peer_event_id) == ("combine", rank, mine, theirs)
        assert (error.peer == 2) == (rank != 2)
        assert isinstance(again, FabricError)


def test_a_handle_of_another_object(fabric: str) -> None:
    shape = Shape()
    r = shape.round(0, [4, 4])

    def main(comm: xccl.Communicator) -> None:
        ep, other = shape.expert_parallel(comm), shape.expert_parallel(comm)
        d = r.dispatch(comm.rank, ep)
        for handle in (d, None, "d"):
            error = error_of(other.combine, r.outs[comm.rank], handle, r.weights[comm.rank])
            assert isinstance(error, UsageError)
        r.combine(comm.rank, ep, d)
        r.run(comm.rank, other)

    launch(main, 2, fabric)


def test_the_managed_area_is_a_limit_for_all(fabric: str) -> None:
    """An object that does not fit is refused at all ranks, and leaves all of the area to the next one."""

    def main(comm: xccl.Communicator) -> BaseException | None:
        big = Shape(num_experts=2, hidden=4096, top_k=8, max_tokens=128)
        small = Shape(num_experts=2, hidden=64, top_k=8, max_tokens=128)
        error = error_of(big.expert_parallel, comm)
        r = small.round(0, [128, 128])
        r.run(comm.rank, small.expert_parallel(comm))
        return error

    for error in launch(main, 2, fabric, heap_bytes=1 << 20):
        assert isinstance(error, CapacityError)
        assert error.needed_bytes is not None
        assert error.needed_bytes > 128 * 8 * 4096 * 2
        assert error.available_bytes == 1 << 20
        assert str(error.needed_bytes) in str(error)
        assert str(1 << 20) in str(error)


def test_max_tokens_zero(fabric: str) -> None:
    shape = Shape(max_tokens=0)
    r = shape.round(0, [0, 0])

    def main(comm: xccl.Communicator) -> None:
        r.run(comm.rank, shape.expert_parallel(comm))

    launch(main, 2, fabric)
