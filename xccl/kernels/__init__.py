"""Compiled loops. Addresses and integers in, a status out: no Python objects, no exceptions, no allocation."""

from __future__ import annotations

from . import (
    calls,
    collectives,
    driver,
    groups,
    moe,
    moe_pull,
    moe_pull_combine,
    moe_push,
    moe_push_combine,
    moe_routing,
    moe_sums,
    onesided,
    operations,
    ring,
    wait,
    words,
)
from ._jit import cache_dir, is_left_out, leave_out, warm

__all__ = [
    "cache_dir", "calls", "collectives", "driver", "groups", "is_left_out", "leave_out", "moe",
    "moe_pull", "moe_pull_combine", "moe_push", "moe_push_combine", "moe_routing", "moe_sums", "onesided",
    "operations", "ring", "wait", "warm", "words",
]  # fmt: skip
