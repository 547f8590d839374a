"""Conversions of every bf16 and fp16, and of every float32 that is near a decision of rounding."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numba
import numpy as np
import pytest

from tests.unit.guarded import bits
from xccl.comm.reference import round_to
from xccl.kernels import elements

ALL_BITS = np.arange(1 << 16, dtype=np.uint16)
TYPES = {
    "bf16": (np.dtype(ml_dtypes.bfloat16), elements.bf16_to_f32, elements.bf16_from_f32),
    "fp16": (np.dtype(np.float16), elements.fp16_to_f32, elements.fp16_from_f32),
}


def mapped(function: Any, values: Any, dtype: Any) -> Any:
    @numba.njit
    def apply(source: Any, target: Any) -> None:
        for i in range(source.size):
            target[i] = function(source[i])

    target = np.empty(values.size, dtype)
    apply(values, target)
    return target


def decisions(dtype: np.dtype[Any]) -> Any:
    """Each value of a 16-bit type, each middle between two neighbours, and the float32 just beside each of these."""
    with np.errstate(all="ignore"):
        values = ALL_BITS.view(dtype).astype(np.float32)
        middles = values + (np.roll(values, -1) - values) / np.float32(2)
        points = np.concatenate([values, middles])
        return np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))])


@pytest.mark.parametrize("name", TYPES)
def test_widening_is_exact(name: str) -> None:
    dtype, widen, _ = TYPES[name]
    with np.errstate(all="ignore"):
        expected = ALL_BITS.view(dtype).astype(np.float32)
    actual = mapped(widen, ALL_BITS, np.float32)
    numbers = ~np.isnan(expected)
    assert (np.isnan(actual) == ~numbers).all()
    assert (bits(actual)[numbers] == bits(expected)[numbers]).all()


@pytest.mark.parametrize("name", TYPES)
def test_narrowing_rounds_to_even(name: str) -> None:
    dtype, _, narrow = TYPES[name]
    values = decisions(dtype)
    np.testing.assert_array_equal(mapped(narrow, values, np.uint16), bits(round_to(values, dtype)))


@pytest.mark.parametrize(
    ("narrow", "dtype", "nan"),
    [
        (elements.bf16_from_f32, np.uint16, 0x7FC0),
        (elements.fp16_from_f32, np.uint16, 0x7E00),
        (elements.canonical_f32, np.float32, 0x7FC00000),
    ],
    ids=["bf16", "fp16", "fp32"],
)
def test_narrowing_makes_one_nan(narrow: Any, dtype: Any, nan: int) -> None:
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFC00000, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(
        np.float32
    )
    assert set(bits(mapped(narrow, nans, dtype)).tolist()) == {nan}


def test_canonical_f32_keeps_numbers() -> None:
    numbers = np.array([0.0, -0.0, 1e-45, -1e-40, 1.5, -3e38, np.inf, -np.inf], np.float32)
    assert (bits(mapped(elements.canonical_f32, numbers, np.float32)) == bits(numbers)).all()
