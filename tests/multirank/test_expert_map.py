"""A layer whose experts have replicas gives the bits of the layer without: which replica a token takes is nobody's business."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import xccl
from tests.multirank.support import FP32, assert_same, launch
from xccl.protocol.routing import make_routing

RANKS, EXPERTS, HIDDEN, TOPK, TOKENS = 4, 8, 32, 3, 20


def layer(comm: xccl.Communicator, mapped: xccl.ExpertMap) -> tuple[Any, int]:
    """Dispatch, experts that scale by a factor of their logical one, combine; the sum, and the rows that came here."""
    rng = np.random.default_rng(comm.rank)
    x = rng.standard_normal((TOKENS, HIDDEN), np.float32)
    weights = rng.random((TOKENS, TOPK), np.float32)
    idx = make_routing("hot:1", tokens=TOKENS, experts=EXPERTS, topk=TOPK, seed=0, rank=comm.rank, ranks=RANKS)
    ep = xccl.ExpertParallel(
        comm, num_experts=mapped.physical, hidden=HIDDEN, top_k=TOPK, max_tokens=TOKENS, dtype=FP32, quant=None
    )
    d = ep.dispatch(x, mapped.to_physical(idx, position=comm.rank * TOKENS))
    logical = mapped.local(comm.rank)
    factors = np.repeat(1 + logical, d.counts).astype(np.float32)
    return ep.combine(d.tokens * factors[:, None], d, weights).copy(), len(d.tokens)


@pytest.mark.parametrize("fabric", ["local", "shm"])
def test_replicas_change_the_load_and_not_the_result(fabric: str) -> None:
    slices = [
        make_routing("hot:1", tokens=TOKENS, experts=EXPERTS, topk=TOPK, seed=0, rank=rank, ranks=RANKS)
        for rank in range(RANKS)
    ]
    load = np.stack([np.bincount(idx.ravel(), minlength=EXPERTS) for idx in slices])
    plain = launch(layer, RANKS, fabric, args=(xccl.ExpertMap.plain(EXPERTS, RANKS),))
    balanced = launch(layer, RANKS, fabric, args=(xccl.ExpertMap.balanced(load, RANKS, redundant=4),))
    for (with_one, _), (with_replicas, _) in zip(plain, balanced, strict=True):
        assert_same(with_replicas, with_one)
    assert max(rows for _, rows in balanced) < max(rows for _, rows in plain)
