"""Compiled loops. Addresses and integers in, a status out: no Python objects, no exceptions, no allocation."""

from __future__ import annotations

from . import calls, collectives, driver, groups, moe, moe_pull, moe_push, moe_push_combine, onesided, ring, wait, words
from ._jit import cache_dir, is_left_out, leave_out, warm

__all__ = [
    "cache_dir", "calls", "collectives", "driver", "groups", "is_left_out", "leave_out", "moe", "moe_pull", "moe_push",
    "moe_push_combine", "onesided", "ring", "wait", "warm", "words",
]  # fmt: skip
