"""Quantisation of rows, bit for bit as the oracle has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.unit.guarded import Guarded, bits
from tests.unit.oracles import FLOAT_CODES, KINDS, lengths, row, seeds
from xccl.comm import reference
from xccl.kernels import quantise as kernels
from xccl.layout.dtypes import DTYPE_OF, FP32, NAME_OF

#: The first call compiles, and on a busy machine any call may wait.
RELAXED = settings(deadline=None)
CODES = pytest.mark.parametrize("code", FLOAT_CODES, ids=lambda code: NAME_OF[code])


def quantised(code: int, x: Any, src_offset: int = 0, dst_offset: int = 0) -> tuple[Any, np.float32]:
    src, dst = Guarded.of(x, src_offset), Guarded(x.size, dst_offset)
    scale = np.float32(kernels.quantise(code, src.address, x.size, dst.address))
    return dst.read(np.int8), scale


def dequantised(code: int, q: Any, scale: np.float32, src_offset: int = 0, dst_offset: int = 0) -> Any:
    dtype = DTYPE_OF[code]
    src, dst = Guarded.of(q, src_offset), Guarded(q.size * dtype.itemsize, dst_offset)
    kernels.dequantise(src.address, scale, q.size, code, dst.address)
    return dst.read(dtype)


@CODES
@pytest.mark.parametrize("kind", KINDS)
@RELAXED
@given(n=lengths(), seed=seeds(), src_offset=st.integers(0, 40), dst_offset=st.integers(0, 70))
def test_quantise(code: int, kind: str, n: int, seed: int, src_offset: int, dst_offset: int) -> None:
    x = row(code, n, kind, seed)
    q, scale = quantised(code, x, src_offset * x.itemsize, dst_offset)
    with np.errstate(all="ignore"):
        expected_q, expected_scale = reference.quantise(x)
    np.testing.assert_array_equal(q, expected_q)
    assert scale == expected_scale or (np.isnan(scale) and np.isnan(expected_scale))


@CODES
@RELAXED
@given(n=lengths(), seed=seeds(), scale_bits=seeds(), src_offset=st.integers(0, 70), dst_offset=st.integers(0, 40))
def test_dequantise(code: int, n: int, seed: int, scale_bits: int, src_offset: int, dst_offset: int) -> None:
    q = np.random.default_rng(seed).integers(-128, 128, n).astype(np.int8)
    scale = np.uint32(scale_bits).view(np.float32)
    x = dequantised(code, q, scale, src_offset, dst_offset * DTYPE_OF[code].itemsize)
    with np.errstate(all="ignore"):
        expected = reference.dequantise(q, np.asarray(scale), DTYPE_OF[code])
    np.testing.assert_array_equal(bits(x), bits(expected))


@CODES
def test_every_byte_comes_back(code: int) -> None:
    x = np.arange(-127, 128).astype(DTYPE_OF[code])
    q, scale = quantised(code, x)
    assert scale == 1
    np.testing.assert_array_equal(q, np.arange(-127, 128))
    np.testing.assert_array_equal(bits(dequantised(code, q, scale)), bits(x))


@CODES
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 63, 64, 100])
def test_one_special_spoils_the_row(code: int, special: float, place: int) -> None:
    x = np.ones(101, DTYPE_OF[code])
    x[place] = special
    q, scale = quantised(code, x)
    assert bits(np.array(scale)) == 0x7FC00000
    assert not q.any()
    with np.errstate(all="ignore"):
        expected = reference.dequantise(q, np.asarray(scale), DTYPE_OF[code])
    np.testing.assert_array_equal(bits(dequantised(code, q, scale)), bits(expected))


def test_scale_of_tiny_and_huge_rows() -> None:
    smallest, largest = np.float32(1e-45), np.finfo(np.float32).max
    q, scale = quantised(FP32, np.array([smallest, -smallest], np.float32))
    assert scale == np.float32(2.0**-126)
    assert q.tolist() == [0, 0]
    q, scale = quantised(FP32, np.array([largest, -largest], np.float32))
    assert scale == largest / np.float32(127)
    assert q.tolist() == [127, -127]
