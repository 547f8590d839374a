"""Rows that are not copied: outputs where peers read them, rows of a rank for its own experts, and those past the caches."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import xccl
from tests.multirank.support import FP32, Shape, assert_same, launch
from tests.multirank.test_moe_direct import echoed, is_in_segment
from xccl.layout.moe_direct import OUTPUTS

SHAPE = Shape(num_experts=7, hidden=50, top_k=3, dtype=FP32)
RAGGED = [9, 0, 16]

rows = pytest.fixture(params=["expanded", "dedup"], name="rows")(lambda request: request.param)


def test_outputs_may_be_overwritten_when_combine_returns(fabric: str, protocol: str, rows: str) -> None:
    """Whether they lie in place or not, which differs between ranks; one of them reads late."""
    shape = replace(SHAPE, protocol=protocol, rows=rows)
    rounds = [shape.round(i, [16, 16, 16]) for i in range(6)]

    def main(comm: xccl.Communicator) -> None:
        ep, rank = shape.expert_parallel(comm), comm.rank
        for number, r in enumerate(rounds):
            slow = number % 3 == rank
            ep.on_step = lambda operation, step, slow=slow: time.sleep(0.01 * (slow and step in ("pull", "reduce")))
            d = r.dispatch(rank, ep)
            outs = r.outs[rank] if r.partials is None else r.partials[rank]
            outputs = ep.empty_outputs(d) if (number + rank) % 2 else np.empty_like(outs)
            outputs[...] = outs
            y = ep.combine(outputs, d, None if r.partials is not None else r.weights[rank])
            outputs[...] = np.nan
            assert_same(y, r.ys[rank])

    launch(main, 3, fabric)


def test_inputs_may_be_overwritten_when_dispatch_returns(fabric: str, protocol: str, rows: str) -> None:
    """Own rows come straight from them; a slow rank still wants those of its peers."""
    shape = replace(SHAPE, protocol=protocol, rows=rows)
    r = shape.round(0, [16, 16, 16])

    def main(comm: xccl.Communicator) -> None:
        ep, rank = shape.expert_parallel(comm), comm.rank
        late = ("pull", "assemble", "await-rows")
        ep.on_step = lambda operation, step: time.sleep(0.01 * (rank == 1 and step in late))
        x = np.empty_like(r.xs[rank])
        mine = replace(r, xs=[x] * comm.size)
        d = None
        for _ in range(4):
            x[...] = r.xs[rank]
            d = mine.dispatch(rank, ep)
            x[...] = np.nan
            r.check_dispatched(rank, d)
        x[...] = r.xs[rank]
        again = ep.dispatch(x, handle=d)
        x[...] = np.nan
        r.check_dispatched(rank, again)
        r.combine(rank, ep, again)

    launch(main, 3, fabric)


def test_the_result_over_the_outputs(fabric: str, protocol: str) -> None:
    """Own rows, or those that peers read, must not be overwritten by sums before they are read."""
    shape = replace(SHAPE, protocol=protocol)
    r = echoed(shape.round(2, [16, 16], no_expert=0))

    def main(comm: xccl.Communicator) -> None:
        ep, rank = shape.expert_parallel(comm), comm.rank
        n = len(r.outs[rank])
        for start in (0, 3, n - 16):
            for lent in (False, True):
                d = r.dispatch(rank, ep)
                outputs = ep.empty_outputs(d) if lent else np.empty_like(d.tokens)
                outputs[...] = d.tokens
                y = ep.combine(outputs, d, r.weights[rank], out=outputs[start : start + 16])
                assert_same(y, r.ys[rank])

    launch(main, 2, fabric)


def test_what_pull_lends_lies_in_place(fabric: str) -> None:
    """The first two at once; else outputs are copied. The trace says which, and so it is for symmetric arrays."""
    r = SHAPE.round(0, RAGGED)

    def main(comm: xccl.Communicator) -> tuple[list[bool], list[int]]:
        ep, rank = SHAPE.expert_parallel(comm), comm.rank
        d = r.dispatch(rank, ep)
        symmetric = comm.empty((3 * 16 * 3, SHAPE.hidden), FP32).local[: len(d.tokens)]
        places = [*(ep.empty_outputs(d) for _ in range(OUTPUTS + 1)), symmetric, np.empty_like(d.tokens)]
        with comm.trace() as recorder:
            for at in places:
                at[...] = r.outs[rank]
                assert_same(ep.combine(at, d, r.weights[rank]), r.ys[rank])
        written = [
            sum(e.n_bytes for e in operation.entries if (e.stage, e.what) == ("write", "rows"))
            for operation in recorder.named("combine")
        ]
        held = places[:1]
        del places, at
        ep.free()
        held[0][...] = 1
        return [is_in_segment(comm, each) for each in held], written

    for rank, (lies, written) in enumerate(launch(main, 3, fabric)):
        assert lies == [True]
        copied = r.outs[rank].nbytes
        assert written == [0] * OUTPUTS + [copied, 0, copied]


def test_pull_lends_nothing_where_address_space_is_scarce(fabric: str) -> None:
    shape = replace(SHAPE, hidden=1024)
    r = shape.round(1, RAGGED)

    def main(comm: xccl.Communicator) -> bool:
        ep = shape.expert_parallel(comm)
        d = r.dispatch(comm.rank, ep)
        r.combine(comm.rank, ep, d, lent=True)
        return is_in_segment(comm, ep.empty_outputs(d))

    assert launch(main, 3, fabric, heap_bytes=1 << 20) == [False] * 3
    assert launch(main, 3, fabric, heap_bytes=1 << 24) == [True] * 3


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_rows_that_outgrow_the_caches(fabric: str, protocol: str, rows: str, quant: Any) -> None:
    """From 32 MiB at all ranks together on they are written past the caches."""
    shape = Shape(
        num_experts=6, hidden=16411, top_k=2, max_tokens=200, dtype=FP32, quant=quant, protocol=protocol, rows=rows
    )
    r = shape.round(3, [200, 190])
    launch(lambda comm: r.run(comm.rank, shape.expert_parallel(comm)), 2, fabric)
    assert 2 * len(r.dispatched[1].tokens) * 4 * shape.hidden >= 32 << 20
