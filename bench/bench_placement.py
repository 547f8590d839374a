"""Balancing a layer of 256 experts over 32 ranks, and mapping a batch's choices."""

from __future__ import annotations

from typing import Any

import numpy as np

from xccl import ExpertMap
from xccl.protocol.routing import expert_shares

LOAD = np.stack([expert_shares("skew", experts=256, topk=8)] * 4)


def bench_balanced(benchmark: Any) -> None:
    benchmark(ExpertMap.balanced, LOAD, 32, redundant=32)


def bench_to_physical(benchmark: Any) -> None:
    found = ExpertMap.balanced(LOAD, 32, redundant=32)
    benchmark(found.to_physical, np.arange(128 * 8).reshape(128, 8) % 256)
