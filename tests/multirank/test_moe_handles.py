"""What dispatch and combine take besides tokens: handles, memory for results, masks, a shared expert's output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import xccl
from tests.multirank.support import BF16, FP32, Round, Shape, assert_same, error_of, launch
from xccl.errors import CapacityError, EventMismatch, FabricError, UsageError

RAGGED = [5, 0, 16, 9]
#: Experts that the ranks do not divide.
EXPERTS = 10

rows = pytest.fixture(params=["expanded", "dedup"], name="rows")(lambda request: request.param)


def shape_of(protocol: str, rows: str = "expanded", **changes: Any) -> Shape:
    return Shape(
        **({"num_experts": EXPERTS, "hidden": 40, "top_k": 4, "quant": "int8"} | changes), protocol=protocol, rows=rows
    )


def with_tokens(shape: Shape, r: Round, seed: int) -> Round:
    """The same routing and weights, with other tokens and outputs."""
    rng = np.random.default_rng(seed)
    xs = [rng.standard_normal(x.shape, np.float32).astype(shape.dtype) for x in r.xs]
    return shape.round_of(xs, r.topk_idxs, r.weights, r.shared, rng=rng)


# --- handles ---------------------------------------------------------------------------------------------------------


def test_a_dispatch_repeated(fabric: str, protocol: str, rows: str) -> None:
    """With other tokens, several times, of a repetition too, while other dispatches go on; each is combined."""
    shape = shape_of(protocol, rows)
    first, other = shape.round(0, RAGGED), shape.round(1, RAGGED[::-1])
    again = [with_tokens(shape, first, seed) for seed in range(5)]

    def main(comm: xccl.Communicator) -> None:
        ep, rank = shape.expert_parallel(comm), comm.rank
        d = first.dispatch(rank, ep)
        held = []
        for i, r in enumerate(again):
            repeated = ep.dispatch(r.xs[rank], handle=d)
            r.check_dispatched(rank, repeated, f"repetition {i}")
            held.append(repeated)
            if i == 1:
                other.run(rank, ep)
            if i == 2:
                d = repeated
            if i != 3:
                r.combine(rank, ep, repeated, f"repetition {i}")
        again[3].combine(rank, ep, held[3], "later")
        first.combine(rank, ep, ep.dispatch(first.xs[rank], handle=held[-1]), "the first again")

    launch(main, 4, fabric)


@pytest.mark.parametrize("repeats", ["one rank", "another dispatch"])
def test_ranks_that_do_not_repeat_the_same(fabric: str, protocol: str, repeats: str) -> None:
    shape = shape_of(protocol)
    first, second = shape.round(0, [4, 4, 4]), shape.round(0, [4, 4, 4])

    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        ep, rank = shape.expert_parallel(comm), comm.rank
        handles = [first.dispatch(rank, ep), second.dispatch(rank, ep)]
        x = first.xs[rank]
        if repeats == "one rank" and rank != 1:
            error = error_of(ep.dispatch, x, first.topk_idxs[rank])
        else:
            error = error_of(ep.dispatch, x, handle=handles[rank == 1])
        return [error, error_of(ep.dispatch, x, first.topk_idxs[rank])]

    for rank, (error, again) in enumerate(launch(main, 3, fabric)):
        assert isinstance(error, EventMismatch)
        assert (error.operation, error.rank) == ("dispatch", rank)
        assert (error.peer == 1) == (rank != 1)
        mine, theirs = (2, 1) if repeats == "another dispatch" else (2, 3)
        assert (error.event_id, error.peer_event_id) == ((mine, theirs) if rank == 1 else (theirs, mine))
        assert isinstance(again, FabricError)


# --- memory for results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["int8", "none"])
def test_results_in_memory_of_the_caller(fabric: str, protocol: str, rows: str, quant: Any) -> None:
    shape = shape_of(protocol, rows, quant=quant, shared=True)
    rounds = [shape.round(i, RAGGED) for i in range(4)]

    def main(comm: xccl.Communicator) -> None:
        ep, rank = shape.expert_parallel(comm), comm.rank
        tokens, scales = np.zeros((4 * 16 * 4, shape.hidden), ep.token_dtype), np.zeros(4 * 16 * 4, np.float32)
        y = np.zeros((16, shape.hidden), BF16)
        for i, r in enumerate(rounds):
            d = r.dispatch(rank, ep, out=(tokens, scales) if quant == "int8" and i % 2 else tokens)
            assert len(d.tokens) == 0 or np.shares_memory(d.tokens, tokens)
            if d.scales is not None and len(d.scales):
                assert np.shares_memory(d.scales, scales) == (i % 2 == 1)
            n = RAGGED[rank]
            result = r.combine(rank, ep, d, out=y[:n])
            assert n == 0 or np.shares_memory(result, y)
            with_tokens(shape, r, i).check_dispatched(
                rank, ep.dispatch(with_tokens(shape, r, i).xs[rank], handle=d, out=tokens[: len(d.source)])
            )

    launch(main, 4, fabric)


def test_memory_of_the_caller_that_is_too_small(fabric: str, protocol: str, rows: str) -> None:
    """The dispatch was done all the same: the error brings its result, and nobody else notices."""
    shape = shape_of(protocol, rows)
    r = shape.round(3, [16, 9, 16])

    def main(comm: xccl.Communicator) -> None:
        ep, rank = shape.expert_parallel(comm), comm.rank
        needed = len(r.dispatched[1].source)
        small = np.zeros((needed - 1, shape.hidden), np.int8)
        options = {"topk_weights": r.weights[rank]} if rows == "dedup" else {}
        if rank != 1:
            r.run(rank, ep)
            r.run(rank, ep)
            return
        error = error_of(ep.dispatch, r.xs[1], r.topk_idxs[1], out=small, **options)
        assert isinstance(error, CapacityError)
        assert (error.needed_bytes, error.available_bytes) == (needed * shape.hidden, (needed - 1) * shape.hidden)
        assert str(needed) in str(error)
        d: xccl.Dispatched = error.dispatched  # type: ignore[attr-defined]
        r.check_dispatched(1, d)
        r.combine(1, ep, d)
        # The rows of a repetition are known before: nothing is sent, and it may be made again.
        error = error_of(ep.dispatch, r.xs[1], handle=d, out=small)
        assert isinstance(error, CapacityError)
        r.run(1, ep)

    launch(main, 3, fabric)


def test_the_result_of_combine_over_its_inputs(fabric: str, protocol: str) -> None:
    """In the memory of the shared expert's output, of the experts' outputs, or overlapping the first in part."""
    shape = shape_of(protocol, shared=True, top_k=2, num_experts=2, dtype=FP32)
    r = shape.round(0, [8, 8], no_expert=0)

    def main(comm: xccl.Communicator) -> None:
        ep, rank = shape.expert_parallel(comm), comm.rank
        d = r.dispatch(rank, ep)
        assert r.shared is not None
        memory = np.zeros((9, shape.hidden), FP32)
        for start in (0, 1):
            shared, y = memory[start : start + 8], memory[:8]
            shared[...] = r.shared[rank]
            ep.combine(r.outs[rank], d, r.weights[rank], shared_out=shared, out=y)
            assert_same(y, r.ys[rank], f"shared output {start} rows further")
        out = np.concatenate([r.outs[rank], np.zeros((8, shape.hidden), FP32)])
        ep.combine(out[: len(d.source)], d, r.weights[rank], shared_out=r.shared[rank], out=out[:8])
        assert_same(out[:8], r.ys[rank])

    launch(main, 2, fabric)


# --- masks and shared experts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mask", "number", "none of them", "all of them"])
def test_active_tokens(fabric: str, protocol: str, rows: str, kind: str) -> None:
    """The others may have any choices and any elements, and get what the shared expert made of them."""
    shape = shape_of(protocol, rows, shared=True)
    rng = np.random.default_rng(5)
    plain = shape.round(0, RAGGED)
    masks = [rng.random(n) < {"mask": 0.5, "none of them": 0, "all of them": 1}.get(kind, 0) for n in RAGGED]
    if kind == "number":
        masks = [np.arange(n) < n // 2 for n in RAGGED]
    idxs = [np.where(mask[:, None], idx, -1) for mask, idx in zip(masks, plain.topk_idxs, strict=True)]
    expected = shape.round_of(plain.xs, idxs, plain.weights, plain.shared)

    def main(comm: xccl.Communicator) -> None:
        ep, rank = shape.expert_parallel(comm), comm.rank
        mask = masks[rank]
        idx, x = plain.topk_idxs[rank].copy(), plain.xs[rank].copy()
        idx[~mask], x[~mask] = EXPERTS + 7, np.nan
        options: dict[str, Any] = {"active": int(mask.sum()) if kind == "number" else mask}
        if rows == "dedup":
            options["topk_weights"] = plain.weights[rank]
        d = ep.dispatch(x, idx, **options)
        expected.check_dispatched(rank, d)
        expected.combine(rank, ep, d)

    launch(main, 4, fabric)


def test_a_shared_expert(fabric: str, protocol: str, rows: str) -> None:
    shape = shape_of(protocol, rows, shared=True)
    rounds = [shape.round(i, np.roll(RAGGED, i).tolist(), "specials", no_expert=0.5) for i in range(4)]

    def main(comm: xccl.Communicator) -> None:
        ep = shape.expert_parallel(comm)
        for r in rounds:
            r.run(comm.rank, ep)

    launch(main, 4, fabric)


# --- deduplicated rows -----------------------------------------------------------------------------------------------


def test_deduplicated_rows_by_hand(fabric: str, protocol: str) -> None:
    """Three experts on two ranks: rank 0 has two. Rank 1 sends one token to all three, and to one of them twice."""

    def main(comm: xccl.Communicator) -> None:
        ep = xccl.ExpertParallel(
            comm, num_experts=3, hidden=2, top_k=4, max_tokens=1, dtype=np.float32, quant=None, protocol=protocol,
            rows="dedup",
        )  # fmt: skip
        assert (ep.first_expert, ep.local_experts) == ((0, 2), (2, 1))[comm.rank]
        x = np.float32([[3, 5]])[: comm.rank]
        idx, weights = np.array([[1, 2, 0, 1]])[: comm.rank], np.float32([[1, 10, 100, 1000]])[: comm.rank]
        d = ep.dispatch(x, idx, topk_weights=weights)
        assert d.index is not None
        assert d.weights is not None
        assert d.tokens.tolist() == [[3, 5]]
        if comm.rank == 0:
            assert (d.counts.tolist(), d.source.tolist()) == ([1, 2], [(1, 0, 0)])
            assert d.index.tolist() == [(0, 0, 2), (0, 1, 0), (0, 1, 3)]
            assert d.weights.tolist() == [100, 1, 1000]
        else:
            assert (d.counts.tolist(), d.source.tolist()) == ([1], [(1, 0, 1)])
            assert (d.index.tolist(), d.weights.tolist()) == ([(0, 0, 1)], [10])
        partial = ep.reduce_local(d.tokens[d.index["row"]], d)
        assert partial.tolist() == [[3 * w, 5 * w] for w in [(1101, 10)[comm.rank]]]
        assert ep.combine(partial, d).tolist() == [[3 * 1111, 5 * 1111]][: comm.rank]

    launch(main, 2, fabric)


# --- bad calls -------------------------------------------------------------------------------------------------------

_T, _K, _H = 4, 2, 8

#: What is tried, by rows, and what the message must show.
BAD: list[tuple[str, Any, list[str]]] = [
    ("expanded", lambda b: b.ep.dispatch(b.x), ["topk_idx"]),
    ("expanded", lambda b: b.ep.dispatch(b.x, b.idx, topk_weights=b.w), ["dedup"]),
    ("expanded", lambda b: b.ep.dispatch(b.x, b.idx, handle=b.d), ["handle"]),
    ("expanded", lambda b: b.ep.dispatch(b.x, active=2, handle=b.d), ["handle"]),
    ("expanded", lambda b: b.ep.dispatch(b.x[1:], handle=b.d), ["3", "4"]),
    ("expanded", lambda b: b.ep.dispatch(b.x, handle="d"), ["str"]),
    ("expanded", lambda b: b.ep.dispatch(b.x, handle=b.foreign), ["same ExpertParallel object"]),
    ("expanded", lambda b: b.ep.dispatch(b.x, b.idx, active=5), ["active", "5", "4"]),
    ("expanded", lambda b: b.ep.dispatch(b.x, b.idx, active=-1), ["active", "-1", "0"]),
    ("expanded", lambda b: b.ep.dispatch(b.x, b.idx, active=np.ones(3, bool)), ["(3,)", "4"]),
    ("expanded", lambda b: b.ep.dispatch(b.x, b.idx, active=np.ones(4)), ["float64"]),
    ("expanded", lambda b: b.ep.dispatch(b.x, b.idx, out=np.zeros((9, _H), FP32)), ["float32", "int8"]),
    ("expanded", lambda b: b.ep.dispatch(b.x, b.idx, out=np.zeros((9, 7), np.int8)), ["(9, 7)", "8"]),
    ("expanded", lambda b: b.ep.dispatch(b.x, b.idx, out=np.zeros((9, 2 * _H), np.int8)[:, ::2]), ["C-contiguous"]),
    ("expanded", lambda b: b.ep.dispatch(b.x, b.idx, out=[1]), ["list"]),
    ("expanded", lambda b: b.ep.dispatch(b.x, b.idx, out=(b.q, np.zeros(8, np.float32))), ["(8,)", "9"]),
    ("expanded", lambda b: b.ep.dispatch(b.x, b.idx, out=(b.q, np.zeros(9))), ["float64", "float32"]),
    ("expanded", lambda b: b.ep.combine(b.out, b.d), ["topk_weights"]),
    ("expanded", lambda b: b.ep.combine(b.out, b.d, b.w, shared_out=b.x[1:]), ["(3, 8)", "(4, 8)"]),
    ("expanded", lambda b: b.ep.combine(b.out, b.d, b.w, shared_out=b.x.astype(FP32)), ["float32", "bfloat16"]),
    ("expanded", lambda b: b.ep.combine(b.out, b.d, b.w, out=b.x[1:]), ["(3, 8)", "(4, 8)"]),
    ("expanded", lambda b: b.ep.combine(b.out, b.d, b.w, out=np.zeros((4, 8))), ["float64", "bfloat16"]),
    ("expanded", lambda b: b.ep.reduce_local(b.out, b.d), ["dedup"]),
    ("dedup", lambda b: b.ep.dispatch(b.x, b.idx), ["topk_weights"]),
    ("dedup", lambda b: b.ep.dispatch(b.x, b.idx, topk_weights=b.w[1:]), ["(3, 2)", "(4, 2)"]),
    ("dedup", lambda b: b.ep.dispatch(b.x, b.idx, topk_weights=b.idx), ["int64"]),
    ("dedup", lambda b: b.ep.combine(b.out, b.d, b.w), ["dispatch"]),
    ("dedup", lambda b: b.ep.reduce_local(b.out[1:], b.d), ["8"]),
]  # fmt: skip


class Bench:
    """What bad calls are tried on."""

    def __init__(self, comm: xccl.Communicator, protocol: str, rows: str) -> None:
        make = Shape(2, _H, _K, _T, BF16, "int8", protocol, rows).expert_parallel
        self.ep, other = make(comm), make(comm)
        self.x, self.idx, self.w = np.zeros((_T, _H), BF16), np.zeros((_T, _K), int), np.zeros((_T, _K), np.float32)
        self.idx[:, 1] = 1
        self.q = np.zeros((9, _H), np.int8)
        options = {"topk_weights": self.w} if rows == "dedup" else {}
        self.d, self.foreign = (ep.dispatch(self.x, self.idx, **options) for ep in (self.ep, other))
        self.out = np.zeros((len(self.d.source), _H), BF16)


def test_bad_calls(fabric: str, protocol: str, rows: str) -> None:
    """Each is refused at once, changes nothing, and shows what was wrong."""

    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        bench = Bench(comm, protocol, rows)
        errors = [error_of(call, bench) for how, call, _ in BAD if how == rows]
        bench.ep.combine(bench.out, bench.d, bench.w if rows == "expanded" else None)
        return errors

    for errors in launch(main, 2, fabric, op_timeout_s=5.0):
        for error, shown in zip(errors, [texts for how, _, texts in BAD if how == rows], strict=True):
            assert isinstance(error, UsageError), f"{shown}: {error!r}"
            for text in shown:
                assert text in str(error)
