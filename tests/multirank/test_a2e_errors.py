"""Wrong calls of A2E and E2A: a clear error at once, with the numbers; nothing is lost, and the object stays usable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import xccl
from tests.multirank.a2e_support import Layout, run_turns
from tests.multirank.support import BF16, FP32, error_of, launch
from xccl.errors import CapacityError, EventMismatch, FabricError, UsageError, WaitTimeout

ROUTES = pytest.mark.parametrize("route", ["direct", "trampoline"])
LAYOUT = Layout(attention=2, experts=3, hidden=8, top_k=2, max_tokens=4)
GOOD: dict[str, Any] = {
    "attention": 1, "experts": 2, "num_experts": 4, "hidden": 8, "top_k": 2, "max_tokens": 4, "dtype": BF16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": 0}, "attention is 0"),
        ({"attention": 2}, "experts is 2, but only 1 of the 3 ranks are free"),
        ({"domains": 2, "attention": 2}, "attention is 2 for each of 2 domains, but only 3 of the 3 ranks are free"),
        ({"domains": 0}, "domains is 0"),
        ({"attention": [0, 1], "experts": [1, 2]}, "rank 1 is listed both"),
        ({"attention": [1, 0]}, "attention must list at least one rank, each once, in ascending order"),
        ({"attention": []}, "attention must list at least one rank"),
        ({"attention": [0, 3]}, r"attention\[1\] is 3, allowed are 0 to 2"),
        ({"attention": "0"}, "attention must be an integer"),
        ({"attention": [0], "domains": 2}, "attention lists 1 ranks, which 2 domains do not divide"),
        ({"num_experts": 5}, "a multiple of the 2 expert dies, got 5 [+] 0"),
        ({"shared": 1}, "a multiple of the 2 expert dies, got 4 [+] 1"),
        ({"shared": -2}, "shared is -2"),
        ({"hidden": 0}, "hidden is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 1 << 20, "top_k": 1 << 10, "attention": [0], "trampolines": 1, "shared": 2}, None),
        ({"dtype": np.int32}, "dtype must be one of bf16, fp16, fp32"),
        ({"quant": "int4"}, "quant must be one of int8, none"),
        ({"route": "scenic"}, "route must be one of trampoline, direct"),
        ({"trampolines": 2}, "trampolines is 2, allowed are 1 to 1"),
        ({"trampolines": 1, "route": "direct"}, "trampolines is 1, but route is direct"),
        ({"microbatches": 4}, "microbatches is 4, allowed are 1 to 3"),
    ],
)
def test_impossible_arguments(change: dict[str, Any], message: str | None) -> None:
    """The same at all ranks, so each refuses by itself; the session goes on."""

    def main(comm: xccl.Communicator) -> BaseException | None:
        error = error_of(xccl.Disaggregated, comm, **{**GOOD, **change})
        comm.barrier()
        dis = xccl.Disaggregated(comm, **GOOD)
        dis.free()
        return error

    for error in launch(main, 3, "local"):
        if message is None:  # more rows than fit the managed area
            assert isinstance(error, (UsageError, CapacityError))
        else:
            with pytest.raises(UsageError, match=message):
                raise error


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention", [1]), ("num_experts", 6), ("hidden", 9), ("top_k", 1), ("max_tokens", 5), ("dtype", FP32),
        ("quant", "none"), ("shared", 2), ("route", "direct"), ("microbatches", 2),
    ],
)  # fmt: skip
def test_ranks_that_disagree(fabric: str, name: str, value: Any) -> None:
    def main(comm: xccl.Communicator) -> BaseException | None:
        options = {**GOOD, "experts": [2, 3]}
        error = error_of(xccl.Disaggregated, comm, **{**options, **({name: value} if comm.rank == 1 else {})})
        xccl.Disaggregated(comm, **options).free()
        return error

    called = {"attention": "roles", "route": "trampolines"}.get(name, name)
    for error in launch(main, 4, fabric):
        assert isinstance(error, UsageError)
        assert f"ranks disagree in {called}" in str(error)


@ROUTES
def test_calls_of_the_other_role_and_wrong_arrays(fabric: str, route: str) -> None:
    """All of them refused, and then the deployment works."""
    layout = Layout(attention=2, experts=3, hidden=8, top_k=2, max_tokens=4, route=route)
    turns = [[[layout.round(0, t)]] for t in range(2)]
    x, idx, w = np.zeros((3, 8), BF16), np.zeros((3, 2), np.int64), np.ones((3, 2), np.float32)

    def main(comm: xccl.Communicator) -> list[tuple[type[BaseException], str]]:
        dis, other = layout.make(comm), layout.make(comm)
        found: list[BaseException | None] = []
        if dis.role == "attention":
            foreign = other.a2e(x, idx)
            handle = dis.a2e(x, idx)
            wrong_idx = idx.copy()
            wrong_idx[2, 1] = 3
            found = [
                error_of(dis.a2e),
                error_of(dis.a2e, x),
                error_of(dis.a2e, x.astype(np.float32), idx),
                error_of(dis.a2e, x[:, :7], idx),
                error_of(dis.a2e, x, idx[:2]),
                error_of(dis.a2e, x, wrong_idx),
                error_of(dis.a2e, x, idx - 2),
                error_of(dis.a2e, x, idx.astype(np.float32)),
                error_of(dis.a2e, np.zeros((5, 8), BF16), np.zeros((5, 2), np.int64)),
                error_of(dis.e2a, foreign, w),
                error_of(dis.e2a, x, handle),
                error_of(dis.e2a, handle, w[:2]),
                error_of(dis.e2a, handle, idx),
            ]
            other.e2a(foreign, w)
            dis.e2a(handle, w)
        else:
            foreign_batch, batch = other.a2e(), dis.a2e()
            out = np.zeros((len(batch.source), 8), BF16)
            found = [
                error_of(dis.a2e, x, idx),
                error_of(dis.e2a, out, foreign_batch),
                error_of(dis.e2a, batch, out),
                error_of(dis.e2a, out.astype(np.float32), batch),
                error_of(dis.e2a, np.zeros((len(out) + 1, 8), BF16), batch),
            ]
            other.e2a(out, foreign_batch)
            dis.e2a(out, batch)
        run_turns(comm.rank, dis, turns, done=1)
        return [(type(error), str(error)) for error in found]

    results = launch(main, layout.ranks, fabric)
    attention = [
        (UsageError, "is an attention die: call a2e(x, topk_idx)"),
        (UsageError, "is an attention die: call a2e(x, topk_idx)"),
        (UsageError, "x must be bfloat16, got float32"),
        (UsageError, "x must have shape [tokens, 8], got (3, 7)"),
        (UsageError, "topk_idx must have shape (3, 2), got (2, 2)"),
        (UsageError, "topk_idx[2, 1] is 3, allowed are -1 to 2"),
        (UsageError, "topk_idx[0, 0] is -2, allowed are -1 to 2"),
        (UsageError, "topk_idx must be integers, got float32"),
        (CapacityError, "x has 5 tokens, max_tokens is 4"),
        (UsageError, "is an attention die: e2a(handle, topk_weights) needs what a2e(x, topk_idx) of the same"),
        (UsageError, "is an attention die: e2a(handle, topk_weights) needs"),
        (UsageError, "topk_weights must have shape (3, 2), got (2, 2)"),
        (UsageError, "topk_weights must be floating point, got int64"),
    ]
    expert = [
        (UsageError, "is an expert die: it has no tokens to send, call a2e()"),
        (UsageError, "is an expert die: e2a(expert_out, batch) needs what a2e() of the same"),
        (UsageError, "is an expert die: e2a(expert_out, batch) needs"),
        (UsageError, "expert_out must be bfloat16, got float32"),
        (UsageError, "expert_out must have shape"),
    ]
    for rank, found in enumerate(results):
        expected = attention if rank < layout.attention else expert
        assert len(found) == len(expected)
        for (kind, text), (expected_kind, part) in zip(found, expected, strict=True):
            assert kind is expected_kind, text
            assert part in text


def test_a_choice_beyond_the_routed_experts() -> None:
    """A replica of the shared expert cannot be chosen; its number would be an expert's if it were not checked."""

    def main(comm: xccl.Communicator) -> BaseException | None:
        dis = xccl.Disaggregated(comm, **{**GOOD, "num_experts": 3, "shared": 1})
        if dis.role == "attention":
            return error_of(dis.a2e, np.zeros((2, 8), BF16), np.array([[0, 1], [2, 3]]))
        return None

    with pytest.raises(UsageError, match=r"topk_idx\[1, 1\] is 3, allowed are -1 to 2"):
        raise launch(main, 3, "local")[0]


def test_a_rank_without_a_role(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        dis = xccl.Disaggregated(comm, **{**GOOD, "attention": [0], "experts": [1, 3]})
        found = [error_of(dis.a2e), error_of(dis.e2a, 1, 2)] if comm.rank == 2 else []
        assert (dis.role is None) == (comm.rank == 2)
        comm.barrier()
        dis.free()
        found.append(error_of(dis.a2e))
        return found

    for rank, found in enumerate(launch(main, 4, fabric)):
        assert isinstance(found[-1], UsageError)
        assert "it was freed" in str(found[-1])
        if rank == 2:
            assert all(isinstance(error, UsageError) for error in found[:2])
            assert "rank 2 is neither an attention die nor an expert die: it has no part in a2e" in str(found[0])


@ROUTES
def test_outputs_of_another_a2e(fabric: str, route: str) -> None:
    """An expert die returns its batches in the wrong order: whoever sees it says so, and none hangs."""
    layout = Layout(attention=1, experts=2, hidden=8, top_k=2, max_tokens=4, route=route, microbatches=2)
    rounds = [layout.round(0, seed, [4], no_expert=0.0) for seed in range(2)]

    def main(comm: xccl.Communicator) -> BaseException | None:
        dis = layout.make(comm)
        if dis.role == "attention":
            handles = [r.send(comm.rank, dis) for r in rounds]
            error = error_of(dis.e2a, handles[0], rounds[0].weights[0])
        else:
            batches = [dis.a2e() for _ in rounds]
            batch = batches[1 if comm.rank == 2 else 0]
            error = error_of(dis.e2a, np.zeros((len(batch.source), 8), BF16), batch)
        comm.op_timeout_s = 20
        comm.barrier()
        return error

    attention, first, second = launch(main, 3, fabric, op_timeout_s=2.0)
    seen = attention if route == "direct" else first
    assert isinstance(seen, EventMismatch)
    assert (seen.event_id, seen.peer_event_id, seen.peer) == (1, 2, 2)
    assert second is None
    if route == "trampoline":  # nothing was handed on
        assert isinstance(attention, WaitTimeout)


@ROUTES
def test_a_die_that_does_not_call(fabric: str, route: str) -> None:
    """The deadline names the step, the peer and the epoch; the object is unusable then, and says why."""
    layout = Layout(attention=1, experts=2, hidden=8, route=route)

    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        dis = layout.make(comm)
        found: list[BaseException | None] = []
        if dis.role == "expert":
            found = [error_of(dis.a2e), error_of(dis.a2e)]
        comm.op_timeout_s = 20
        comm.barrier()
        return found

    _, *experts = launch(main, 3, fabric, op_timeout_s=0.3)
    for rank, (late, unusable) in enumerate(experts, start=1):
        assert isinstance(late, WaitTimeout)
        assert "await-fields" in str(late)
        assert (late.rank, late.peer, late.expected, late.seen) == (
            rank,
            0 if route == "direct" or rank == 1 else 1,
            1,
            0,
        )
        assert isinstance(unusable, FabricError)
        assert "a2e was given up in the middle (WaitTimeout)" in str(unusable)


def test_no_memory_for_the_managed_area(fabric: str) -> None:
    """More than the area has: all ranks hear of it, and a smaller one fits then."""

    def main(comm: xccl.Communicator) -> BaseException | None:
        error = error_of(xccl.Disaggregated, comm, **{**GOOD, "max_tokens": 1 << 16})
        LAYOUT_3 = {**GOOD, "max_tokens": 8}
        xccl.Disaggregated(comm, **LAYOUT_3).free()
        return error

    for error in launch(main, 3, fabric, heap_bytes=1 << 20):
        assert isinstance(error, CapacityError)
        assert error.needed_bytes is None or error.needed_bytes > 1 << 20
