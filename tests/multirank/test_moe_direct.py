"""What is special about the direct protocol: results lie in the managed area, and outputs are read where they lie.

Counts of kernel calls and of copied bytes have bounds here, so that a regression fails without anything being timed.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import xccl
from tests.multirank.support import FP32, Array, Round, Shape, assert_same, error_of, launch
from tests.multirank.test_moe_limits import committed_bytes
from xccl import reference
from xccl.errors import UsageError
from xccl.kernels import _jit
from xccl.layout.moe_direct import SLOTS

SHAPE = Shape(num_experts=6, hidden=50, top_k=3, dtype=FP32, protocol="direct")
RAGGED = [9, 0, 16]

rows = pytest.fixture(params=["expanded", "dedup"], name="rows")(lambda request: request.param)


def is_in_segment(comm: xccl.Communicator, array: Array) -> bool:
    """Does it lie in this rank's segment?"""
    fabric = comm.core.fabric
    start = array.ctypes.data - int(fabric.segments[comm.rank])
    return 0 <= start <= fabric.segment_bytes - array.nbytes


def echoed(r: Round) -> Round:
    """The round in which experts return what they were given."""
    outs = [each.tokens for each in r.dispatched]
    ys = reference.combine(outs, r.dispatched, r.weights, r.topk_idxs, shared_outs=r.shared)
    return replace(r, outs=outs, ys=ys)


# --- slots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["int8", "none"])
def test_results_lie_where_they_came_while_a_slot_is_left(fabric: str, rows: str, quant: Any) -> None:
    shape = replace(SHAPE, rows=rows, quant=quant)
    rounds = [shape.round(i, RAGGED) for i in range(2 * SLOTS)]

    def main(comm: xccl.Communicator) -> list[list[bool]]:
        ep, rank = shape.expert_parallel(comm), comm.rank
        held = [r.dispatch(rank, ep) for r in rounds]
        parts = [(d.tokens, d.scales, d.source, d.index, d.weights) for d in held]
        lie = [[is_in_segment(comm, part) for part in each if part is not None] for each in parts]
        for r, d in zip(rounds, held, strict=True):
            r.combine(rank, ep, d)
            r.check_dispatched(rank, d)
        del parts, d, held[:2]
        for r in rounds:
            again = r.dispatch(rank, ep)
            assert is_in_segment(comm, again.tokens)
            r.combine(rank, ep, again)
        return [sorted(set(each)) for each in lie]

    for lie in launch(main, 3, fabric):
        assert lie == [[True]] * (SLOTS - 1) + [[False]] * (SLOTS + 1)


def test_a_part_of_a_result_keeps_its_slot(fabric: str) -> None:
    rounds = [SHAPE.round(i, [16, 16]) for i in range(9)]

    def main(comm: xccl.Communicator) -> None:
        ep, rank = SHAPE.expert_parallel(comm), comm.rank
        part = rounds[0].dispatch(rank, ep).source["token"][1::2]
        for r in rounds:
            r.run(rank, ep)
        assert_same(part, rounds[0].dispatched[rank].source["token"][1::2])

    launch(main, 2, fabric)


def test_more_rows_than_before_take_more_memory_and_only_where_they_land() -> None:
    shape = Shape(num_experts=4, hidden=4096, top_k=1, max_tokens=256, dtype=FP32, protocol="direct")
    rng = np.random.default_rng(0)

    def main(comm: xccl.Communicator) -> list[int]:
        ep, found = shape.expert_parallel(comm), [committed_bytes(comm)]
        for tokens in (2, 60, 1, 250):
            x = rng.standard_normal((tokens, 4096), np.float32)
            d = ep.dispatch(x, np.full((tokens, 1), 3))  # an expert of rank 1
            y = ep.combine(d.tokens, d, np.ones((tokens, 1), np.float32))
            assert_same(y, x)
            comm.barrier()
            found.append(committed_bytes(comm))
        return found

    row_bytes = 4 * 4096
    nothing, most = launch(main, 2, "shm")
    assert nothing[-1] - nothing[0] < 40_000
    grown = [after - most[0] for after in most[1:]]
    assert 4 * row_bytes <= grown[0] < 12 * row_bytes
    assert 500 * row_bytes < grown[-1] < 2.5 * 625 * row_bytes


# --- outputs of experts ----------------------------------------------------------------------------------------------


def test_outputs_are_read_where_they_lie(fabric: str) -> None:
    """In the dispatched slot, or in a symmetric array; else they are copied once. The trace says which."""
    r = echoed(SHAPE.round(0, RAGGED))

    def main(comm: xccl.Communicator) -> list[tuple[int, int]]:
        ep, rank = SHAPE.expert_parallel(comm), comm.rank
        symmetric = comm.empty((3 * 16 * 3 + 1) * 4 * SHAPE.hidden, np.int8).local
        n_bytes = r.outs[rank].nbytes
        d = r.dispatch(rank, ep)
        places = [
            d.tokens,
            ep.empty_outputs(d),
            ep.empty_outputs(d),
            symmetric[:n_bytes].view(FP32).reshape(-1, SHAPE.hidden),
            np.empty_like(d.tokens),
            ep.empty_outputs(d),  # the third at once
            symmetric[1 : n_bytes + 1].view(FP32).reshape(-1, SHAPE.hidden),  # elements across words
            comm.empty((16 * 3 * 3, SHAPE.hidden), FP32).peer((rank + 1) % comm.size)[: len(d.tokens)],
        ]
        with comm.trace() as recorder:
            for at in places:
                at[...] = r.outs[rank]
                comm.barrier()
                assert_same(ep.combine(at, d, r.weights[rank]), r.ys[rank])
                comm.barrier()
        return [
            next(((e.units, e.n_bytes) for e in operation.entries if e.stage == "return"), (0, 0))
            for operation in recorder.named("combine")
        ]

    for rank, copied in enumerate(launch(main, 3, fabric)):
        rows = len(r.outs[rank])
        assert copied == [(0, 0)] * 4 + [(rows, rows * 4 * SHAPE.hidden)] * 4


def test_partial_sums_are_not_copied(fabric: str) -> None:
    """Those of deduplicated rows; and they are the caller's while it keeps them."""
    shape = replace(SHAPE, rows="dedup")
    rounds = [shape.round(i, RAGGED) for i in range(6)]

    def main(comm: xccl.Communicator) -> list[bool]:
        ep, rank = shape.expert_parallel(comm), comm.rank
        held = []
        with comm.trace() as recorder:
            for i, r in enumerate(rounds):
                assert r.partials is not None
                d = r.dispatch(rank, ep)
                sums = ep.reduce_local(r.outs[rank], d)
                if i % 2:
                    held.append((sums, r.partials[rank]))
                assert_same(ep.combine(sums, d), r.ys[rank])
                del sums
                for k in range(len(held)):
                    assert_same(*held[k])
        return [any(e.stage == "return" for e in operation.entries) for operation in recorder.named("combine")]

    for rank, copied in enumerate(launch(main, 3, fabric)):
        # Two are held from the fourth round on.
        assert copied == [False] * 4 + [len(r.dispatched[rank].tokens) > 0 for r in rounds[4:]]


def test_outputs_may_be_overwritten_when_combine_returns(fabric: str) -> None:
    """Though peers read them in place, and one of them is slow."""
    r = echoed(SHAPE.round(1, [16, 16, 16]))

    def main(comm: xccl.Communicator) -> None:
        ep, rank = SHAPE.expert_parallel(comm), comm.rank
        if rank == 2:
            ep.on_step = lambda operation, step: time.sleep(0.02 if step == "reduce" else 0)
        for _ in range(3):
            d = r.dispatch(rank, ep)
            y = ep.combine(d.tokens, d, r.weights[rank])
            d.tokens[...] = np.nan
            assert_same(y, r.ys[rank])

    launch(main, 3, fabric)


def test_the_result_over_outputs_in_place(fabric: str) -> None:
    """Peers may still read there: they are copied first."""
    r = echoed(SHAPE.round(2, [16, 16], no_expert=0))

    def main(comm: xccl.Communicator) -> None:
        ep, rank = SHAPE.expert_parallel(comm), comm.rank
        for start in (0, 3, len(r.outs[rank]) - 16):
            d = r.dispatch(rank, ep)
            y = ep.combine(d.tokens, d, r.weights[rank], out=d.tokens[start : start + 16])
            assert_same(y, r.ys[rank])

    launch(main, 2, fabric)


# --- bounds ----------------------------------------------------------------------------------------------------------


def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of kernels from now on, by name; direct ones, which are bound to a record, by this thread."""
    calls: Counter[str] = Counter()

    def note(_: object, event: str, function: Any) -> None:
        if event == "c_call" and isinstance(getattr(function, "__self__", None), int):
            calls[function.__name__] += function.__name__ in ("dispatch", "combine")

    def counted(kernel: _jit.Kernel) -> Any:
        call = kernel.call

        def count(*args: Any) -> Any:
            calls[kernel.name] += 1
            return call(*args)

        return count

    _jit.warm()
    for kernel in _jit._DECLARED:
        if isinstance(kernel, _jit.Kernel):
            monkeypatch.setattr(kernel, "call", counted(kernel))
    sys.setprofile(note)
    return calls


@pytest.mark.parametrize(("protocol", "dispatch", "combine"), [("direct", 1, 1), ("pull", 11, 7), ("push", 8, 4)])
def test_calls_of_kernels(
    protocol: str, dispatch: int, combine: int, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one rank alone, which never waits."""
    shape = replace(SHAPE, protocol=protocol, rows=rows, quant="int8")
    r = shape.round(3, [16])

    def main(comm: xccl.Communicator) -> tuple[int, int, int]:
        ep = shape.expert_parallel(comm)
        held = [r.dispatch(0, ep), r.dispatch(0, ep)]  # two slots have memory from now on
        weights = r.weights[0] if rows == "dedup" else None
        out = r.outs[0] if r.partials is None else r.partials[0]
        ep.combine(out, held.pop(), None if rows == "dedup" else r.weights[0])  # so has what outputs are copied to
        held.clear()
        calls = kernel_calls(monkeypatch)
        d = ep.dispatch(r.xs[0], r.topk_idxs[0], topk_weights=weights)
        first = calls.total()
        again = ep.dispatch(r.xs[0], handle=d)
        second = calls.total()
        ep.combine(out, again, None if rows == "dedup" else r.weights[0])
        sys.setprofile(None)
        return first, second - first, calls.total() - second

    (found,) = launch(main, 1, "local")
    if protocol == "direct":
        assert found == (1, 1, 1)
    assert found[0] <= dispatch
    assert found[1] <= dispatch
    assert found[2] <= combine


def test_bytes_that_are_moved(fabric: str) -> None:
    """A row is written once by dispatch, and by combine not at all if it lies in the slot; pull writes twice as much."""
    rounds = {name: echoed(replace(SHAPE, protocol=name).round(4, RAGGED)) for name in ("direct", "pull")}

    def main(comm: xccl.Communicator) -> dict[str, tuple[int, int]]:
        found = {}
        for name, r in rounds.items():
            ep = replace(SHAPE, protocol=name).expert_parallel(comm)
            with comm.trace() as recorder:
                d = r.dispatch(comm.rank, ep)
                r = replace(r, outs=[d.tokens] * comm.size)
                r.combine(comm.rank, ep, d)
            found[name] = tuple(
                sum(e.n_bytes for e in operation.entries if (e.kind, e.what) == ("transfer", "rows"))
                for operation in recorder.operations
            )
        return found

    for rank, found in enumerate(launch(main, 3, fabric)):
        sent = int((rounds["direct"].topk_idxs[rank] >= 0).sum()) * 4 * SHAPE.hidden
        received = rounds["direct"].outs[rank].nbytes
        assert found["direct"] == (sent, sent)
        own = int((rounds["direct"].dispatched[rank].source["rank"] == rank).sum()) * 4 * SHAPE.hidden
        assert found["pull"] == (sent - own + received, received + sent)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_what_is_held_outlives_the_object(fabric: str) -> None:
    rounds = [SHAPE.round(i, [16, 16]) for i in range(4)]

    def main(comm: xccl.Communicator) -> None:
        rank = comm.rank
        ep = SHAPE.expert_parallel(comm)
        held = rounds[0].dispatch(rank, ep) if rank == 0 else rounds[0].dispatch(rank, ep).counts
        ep.free()
        assert isinstance(error_of(rounds[1].dispatch, rank, ep), UsageError)
        group = comm.group(range(comm.size))
        other = SHAPE.expert_parallel(group)
        of_group = rounds[1].dispatch(rank, other)
        group.free()
        last = SHAPE.expert_parallel(comm)
        for r in rounds:
            r.run(rank, last)
        rounds[1].check_dispatched(rank, of_group)
        if isinstance(held, xccl.Dispatched):
            rounds[0].check_dispatched(rank, held)

    launch(main, 2, fabric)


def test_a_bad_choice_is_found_before_anything_is_sent(fabric: str) -> None:
    r = SHAPE.round(5, [8, 8])

    def main(comm: xccl.Communicator) -> None:
        ep, rank = SHAPE.expert_parallel(comm), comm.rank
        idx = r.topk_idxs[rank].copy()
        idx[5, 1] = SHAPE.num_experts
        with comm.trace() as recorder:
            if rank == 1:
                for watched in (False, True):
                    ep.on_step = (lambda operation, step: None) if watched else None
                    error = error_of(ep.dispatch, r.xs[rank], idx)
                    assert isinstance(error, UsageError)
                    assert "topk_idx[5, 1] is 6" in str(error)
            r.run(rank, ep)
        assert [operation.name for operation in recorder.operations] == ["dispatch", "combine"]

    launch(main, 2, fabric)


def test_auto_is_direct_where_there_is_room(fabric: str) -> None:
    shape = replace(SHAPE, protocol="auto", hidden=1024)
    r = shape.round(6, RAGGED)

    def main(comm: xccl.Communicator) -> str:
        ep = shape.expert_parallel(comm)
        r.run(comm.rank, ep)
        return ep.protocol

    assert launch(main, 3, fabric) == ["direct"] * 3
    assert launch(main, 3, fabric, heap_bytes=1 << 20) == ["pull"] * 3


# --- direct calls ----------------------------------------------------------------------------------------------------


def test_unusual_arguments_come_to_the_same(fabric: str, rows: str) -> None:
    """What the direct calls do not take goes the long way: strided, of another dtype, as a subclass of an array."""
    shape = replace(SHAPE, rows=rows)
    r = shape.round(5, [7, 12])
    is_dedup = rows == "dedup"

    def main(comm: xccl.Communicator) -> None:
        ep, rank = shape.expert_parallel(comm), comm.rank
        x, idx, weights = r.xs[rank], r.topk_idxs[rank], r.weights[rank]
        twice = np.repeat(x, 2, axis=1)[:, ::2]
        sent = [(twice, idx), (x, idx.astype(np.int32)), (x.view(np.recarray), idx), (x, np.asfortranarray(idx))]
        gates = [weights, weights.astype(np.float64), np.asfortranarray(weights), weights.copy()]
        out = (r.outs if r.partials is None else r.partials)[rank]
        for (tokens, chosen), late in zip(sent, gates, strict=True):
            d = ep.dispatch(tokens, chosen, topk_weights=late if is_dedup else None)
            r.check_dispatched(rank, d)
            for outputs in (out, np.repeat(out, 2, axis=1)[:, ::2], out.view(np.recarray)):
                assert_same(ep.combine(outputs, d, None if is_dedup else late), r.ys[rank])
            y = np.empty_like(r.ys[rank])
            assert ep.combine(out, d, None if is_dedup else late, out=y) is y
            assert_same(y, r.ys[rank])

    launch(main, 2, fabric)


def test_wrong_arguments_are_refused_and_leave_the_object_usable(fabric: str) -> None:
    r = SHAPE.round(6, [5, 5])

    def main(comm: xccl.Communicator) -> None:
        ep, rank = SHAPE.expert_parallel(comm), comm.rank
        x, idx = r.xs[rank], r.topk_idxs[rank]
        bad = idx.copy()
        bad[-1, -1] = SHAPE.num_experts
        too_few, flat, other = x[:, :-1].copy(), x.reshape(-1), x.astype(np.float16)
        for wrong in ((too_few, idx), (flat, idx), (other, idx), (x, idx[:-1]), (x, idx[:, :-1].copy()), (x, bad)):
            assert isinstance(error_of(ep.dispatch, *wrong), UsageError)
        d = ep.dispatch(x, idx)
        out = r.outs[rank]
        for wrong_out in (out[:-1].copy(), out[:, :-1].copy(), out.astype(np.float16)):
            assert isinstance(error_of(ep.combine, wrong_out, d, r.weights[rank]), UsageError)
        assert isinstance(error_of(ep.combine, out, d, r.weights[rank][:-1].copy()), UsageError)
        assert isinstance(error_of(ep.combine, out, d, r.weights[rank], out=np.empty_like(out[:1, :-1])), UsageError)
        r.check_dispatched(rank, d)
        assert_same(ep.combine(out, d, r.weights[rank]), r.ys[rank])

    launch(main, 2, fabric)


def test_an_unread_result_holds_its_slot(fabric: str) -> None:
    rounds = [SHAPE.round(i, RAGGED) for i in range(SLOTS + 2)]

    def main(comm: xccl.Communicator) -> None:
        ep, rank = SHAPE.expert_parallel(comm), comm.rank
        held = [r.dispatch(rank, ep) for r in rounds]  # none of their arrays was asked for
        for r, d in zip(rounds, held, strict=True):
            r.check_dispatched(rank, d)
        assert error_of(getattr, held[0], "no_such_thing") is not None

    launch(main, 3, fabric)
