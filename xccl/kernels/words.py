"""Atomic access to single words, for Python code."""

from __future__ import annotations

from ._jit import kernel
from .atomics import fetch_add, load_acquire, load_i64, store_release


@kernel("int64(int64)")
def load(address: int) -> int:
    """The int64 at `address`, load-acquire."""
    return load_acquire(address)


@kernel("void(int64, int64)")
def store(address: int, value: int) -> None:
    """Store an int64 at `address`, store-release."""
    store_release(address, value)


@kernel("int64(int64, int64)")
def add(address: int, value: int) -> int:
    """Add to the int64 at `address`; the value before."""
    return fetch_add(address, value)


@kernel("int64(int64, int64, int64, int64)")
def count_equal(addresses: int, count: int, offset: int, value: int) -> int:
    """How many of the int64 at `offset` from each of `count` addresses are `value`."""
    equal = 0
    for i in range(count):
        if load_acquire(load_i64(addresses + 8 * i) + offset) == value:
            equal += 1
    return equal
