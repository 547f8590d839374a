"""Push times the rows that it writes to a peer, and takes the way that is clearly faster; results are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import xccl
from tests.multirank.support import FP32, Shape, launch
from xccl.kernels.moe_writes import SAMPLED_ROWS, TIMED_BYTES
from xccl.layout.moe_push import PW_CACHED_NS, PW_ROWS, PW_STREAMED_NS

HIDDEN = TIMED_BYTES // 4
ROUNDS = 6
CACHED, STREAMED, ROWS = PW_CACHED_NS // 8, PW_STREAMED_NS // 8, PW_ROWS // 8


def shape_of(hidden: int) -> Shape:
    return Shape(num_experts=4, hidden=hidden, top_k=2, dtype=FP32, protocol="push")


def rounds(comm: xccl.Communicator, ep: Any, hidden: int, estimates: tuple[int, int] | None) -> Any:
    """Some round trips, each with these estimates; what was timed then."""
    shape, writes = shape_of(hidden), ep._protocol._writes
    for number in range(ROUNDS):
        if estimates is not None:
            writes[:, [CACHED, STREAMED]] = estimates
        r = shape.round(number, [16] * comm.size)
        r.combine(comm.rank, ep, r.dispatch(comm.rank, ep))
    return writes


@pytest.mark.parametrize("estimates", [(1, 1 << 40), (1 << 40, 1), None], ids=["cached", "streamed", "timed"])
def test_rows_are_right_whichever_way_they_are_written(fabric: str, estimates: tuple[int, int] | None) -> None:
    def main(comm: xccl.Communicator) -> None:
        ep = shape_of(HIDDEN).expert_parallel(comm)
        writes = rounds(comm, ep, HIDDEN, estimates)
        assert (writes[:, ROWS] >= 0).all()
        assert (writes[:, ROWS] < SAMPLED_ROWS).all()
        if estimates is None:
            peer = 1 - comm.rank
            assert (writes[peer, [CACHED, STREAMED]] > 0).all()
            assert not writes[comm.rank].any()  # own rows go in no packets

    launch(main, 2, fabric)


def test_short_rows_are_not_timed(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        ep = shape_of(HIDDEN - 1).expert_parallel(comm)
        assert not np.any(rounds(comm, ep, HIDDEN - 1, None))

    launch(main, 2, fabric)
