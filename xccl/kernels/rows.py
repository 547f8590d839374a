"""Loops over rows as the protocols have them, for `xccl calibrate host`: one primitive at a time."""

from __future__ import annotations

from ._jit import kernel
from .atomics import store_f32, store_i64
from .copy import copy_bytes
from .quantise import quantise_row
from .reduce import weighted_sum_rows


@kernel("void(int64, int64, int64, int64, int64)")
def copy_rows(destination: int, source: int, row_bytes: int, rows: int, repeat: int) -> None:
    """Copy each row of `source` to the next `repeat` rows of `destination`, `rows` in all."""
    for i in range(rows):
        copy_bytes(destination + i * row_bytes, source + (i // repeat) * row_bytes, row_bytes)


@kernel("void(int64, int64, int64, int64, int64, int64)")
def quantise_rows(code: int, destination: int, source: int, row_bytes: int, elements: int, rows: int) -> None:
    """Quantise each row of `source`."""
    for i in range(rows):
        quantise_row(code, source + i * row_bytes, elements, destination + i * elements)


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def sum_rows(code: int, destination: int, source: int, elements: int, row_bytes: int, sums: int, scratch: int) -> None:
    """Sum eight rows of `source` at a time. `scratch` has room for eight addresses and eight weights."""
    for k in range(8):
        store_f32(scratch + 64 + 4 * k, 0.125)
    for i in range(sums):
        for k in range(8):
            store_i64(scratch + 8 * k, source + (8 * i + k) * row_bytes)
        weighted_sum_rows(code, scratch, scratch + 64, 8, elements, destination + i * row_bytes)
