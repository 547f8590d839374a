"""Dispatch and combine at their limits, and when ranks disagree."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

import xccl
from tests.multirank.support import (
    BF16,
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
def test_combines_of_different_dispatches(fabric: str, protocol: str, same_counts: bool) -> None:
    shape = Shape(num_experts=3, protocol=protocol)
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


def test_a_handle_of_another_object(fabric: str, protocol: str) -> None:
    shape = Shape(protocol=protocol)
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


def test_the_managed_area_is_a_limit_for_all(fabric: str, protocol: str) -> None:
    """An object that does not fit is refused at all ranks, and leaves all of the area to the next one."""

    def main(comm: xccl.Communicator) -> BaseException | None:
        big = Shape(num_experts=2, hidden=4096, top_k=8, max_tokens=128, protocol=protocol)
        small = Shape(num_experts=2, hidden=64, top_k=2, max_tokens=32, protocol=protocol)
        error = error_of(big.expert_parallel, comm)
        r = small.round(0, [32, 32])
        r.run(comm.rank, small.expert_parallel(comm))
        return error

    for error in launch(main, 2, fabric, heap_bytes=1 << 20):
        assert isinstance(error, CapacityError)
        assert error.needed_bytes is not None
        assert error.needed_bytes > 128 * 8 * 4096 * 2
        assert error.available_bytes == 1 << 20
        assert str(error.needed_bytes) in str(error)
        assert str(1 << 20) in str(error)


def test_max_tokens_zero(fabric: str, protocol: str) -> None:
    shape = Shape(max_tokens=0, protocol=protocol)
    r = shape.round(0, [0, 0])

    def main(comm: xccl.Communicator) -> None:
        r.run(comm.rank, shape.expert_parallel(comm))

    launch(main, 2, fabric)


# --- the buffers of push ---------------------------------------------------------------------------------------------

PUSH: dict[str, Any] = {
    "num_experts": 4, "hidden": 24, "top_k": 3, "max_tokens": 16, "dtype": BF16, "protocol": "push",
}  # fmt: skip


def hint(ranks: int, quant: reference.Quant = "int8", **changes: Any) -> xccl.BufferSize:
    """The size of the buffers for `PUSH`."""
    arguments = {"local_batch": 16, "top_k": 3, "experts_per_die": -(-4 // ranks), "hidden": 24} | changes
    return xccl.buffer_size_hint(ranks=ranks, quant=quant, **arguments)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_size_hint_is_enough_and_no_less_is(fabric: str, quant: reference.Quant, ranks: int) -> None:
    """For any choices that name no expert twice: all tokens of all ranks to the same experts of one rank."""
    needed_bytes = hint(ranks, quant).total_bytes
    shape = Shape(4, 24, 3, 16, BF16, quant)
    choices = np.tile([1, 0, 2], (16, 1))
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((16, 24), np.float32).astype(BF16) for _ in range(ranks)]
    weights = [rng.random((16, 3), np.float32) for _ in range(ranks)]
    r = shape.round_of(xs, [choices] * ranks, weights)

    def main(comm: xccl.Communicator) -> BaseException | None:
        error = error_of(xccl.ExpertParallel, comm, **PUSH, quant=quant, buffer_bytes=needed_bytes - 1)
        r.run(comm.rank, xccl.ExpertParallel(comm, **PUSH, quant=quant, buffer_bytes=needed_bytes))
        r.run(comm.rank, xccl.ExpertParallel(comm, **PUSH, quant=quant))
        return error

    for error in launch(main, ranks, fabric):
        assert isinstance(error, CapacityError)
        assert (error.needed_bytes, error.available_bytes) == (needed_bytes, needed_bytes - 1)
        assert str(needed_bytes) in str(error)
        assert str(needed_bytes - 1) in str(error)


def test_an_expert_named_more_than_once_may_take_larger_buffers(fabric: str) -> None:
    """At the rank that asks for it, before it sends anything; the others still wait, and it may ask for less."""

    def main(comm: xccl.Communicator) -> BaseException | None:
        ep = xccl.ExpertParallel(comm, **PUSH, quant="none")
        x = np.full((16, 24), comm.rank, BF16)
        error = error_of(ep.dispatch, x, np.zeros((16, 3), int)) if comm.rank == 1 else None
        d = ep.dispatch(x, np.full((16, 3), [0, -1, -1]))
        assert len(d.tokens) == (64 if comm.rank == 0 else 0)
        if error is not None:
            assert isinstance(error, CapacityError)
            assert error.needed_bytes is not None
        needed = xccl.buffer_size_hint(
            ranks=4, local_batch=16, top_k=3, experts_per_die=3, hidden=24, quant="none"
        ).total_bytes
        larger = xccl.ExpertParallel(comm, **PUSH, quant="none", buffer_bytes=needed)
        d = larger.dispatch(x, np.zeros((16, 3), int))
        assert len(d.tokens) == (192 if comm.rank == 0 else 0)
        y = larger.combine(d.tokens, d, np.ones((16, 3), np.float32))
        assert (y == 3 * comm.rank).all()
        return error and CapacityError(str(error), needed_bytes=error.needed_bytes - needed)

    errors = launch(main, 4, fabric)
    assert [error is None for error in errors] == [True, False, True, True]
    assert errors[1].needed_bytes == 0
    assert "buffer_bytes" in str(errors[1])


def test_bad_buffer_bytes(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        needed = hint(2).total_bytes
        tries: list[dict[str, Any]] = [
            {"protocol": "pull", "buffer_bytes": needed},
            {"buffer_bytes": -1},
            {"buffer_bytes": 1e9},
            {"buffer_bytes": needed + comm.rank},
            {"buffer_bytes": needed - comm.rank},
            {"protocol": ("pull", "push")[comm.rank]},
            {"rows": ("expanded", "dedup")[comm.rank]},
            {"protocol": "shove"},
            {"protocol": "auto", "buffer_bytes": needed},
            {"rows": "some"},
        ]
        return [error_of(xccl.ExpertParallel, comm, **(PUSH | changes)) for changes in tries]

    for errors in launch(main, 2, fabric):
        assert [type(error) for error in errors] == [UsageError] * 10
        assert "ranks disagree in buffer_bytes" in str(errors[4])
        assert "ranks disagree in protocol" in str(errors[5])
        assert "ranks disagree in rows" in str(errors[6])


def test_buffers_take_memory_only_where_rows_land() -> None:
    """Ranks that talk in pairs, of buffers of 100 MB each: a segment has what its two peers have sent, and no more."""

    def main(comm: xccl.Communicator) -> tuple[int, int]:
        ep = xccl.ExpertParallel(
            comm, num_experts=8, hidden=4096, top_k=2, max_tokens=512, dtype=BF16, quant="int8", protocol="push",
        )  # fmt: skip
        before = committed_bytes(comm)
        x, idx = np.zeros((8, 4096), BF16), np.tile([comm.rank, comm.rank ^ 1], (8, 1))
        for _ in range(3):
            d = ep.dispatch(x, idx)
            ep.combine(np.zeros((len(d.source), 4096), BF16), d, np.ones((8, 2), np.float32))
        comm.barrier()
        return before, committed_bytes(comm)

    reserved_bytes = xccl.buffer_size_hint(
        ranks=8, local_batch=512, top_k=2, experts_per_die=1, hidden=4096
    ).total_bytes  # fmt: skip
    for before, after in launch(main, 8, "shm"):
        assert after - before < 3 << 20
        assert reserved_bytes > 40 << 20


def committed_bytes(comm: xccl.Communicator) -> int:
    """Memory behind this rank's segment."""
    (descriptor,) = (s._fd for rank, s in comm.core.fabric._segments.items() if rank == comm.rank)
    return os.fstat(descriptor).st_blocks * 512
