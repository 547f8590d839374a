"""Weighted sums of rows, bit for bit in the order of the rows."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.unit.guarded import Guarded, assembly, bits
from tests.unit.oracles import FLOAT_CODES, KINDS, lengths, row, seeds
from xccl.comm import reference
from xccl.kernels import reduce as kernels
from xccl.layout.dtypes import DTYPE_OF, FP32, NAME_OF

#: The first call compiles, and on a busy machine any call may wait.
RELAXED = settings(deadline=None)
CODES = pytest.mark.parametrize("code", FLOAT_CODES, ids=lambda code: NAME_OF[code])


def summed(code: int, rows: list[Any], weights: Any, n: int, offset: int = 0) -> Any:
    itemsize = DTYPE_OF[code].itemsize
    sources = [Guarded.of(x, (offset + i) * itemsize) for i, x in enumerate(rows)]
    addresses = np.array([source.address for source in sources], np.int64)
    dst = Guarded(n * itemsize, offset * itemsize)
    kernels.weighted_sum(code, addresses.ctypes.data, weights.ctypes.data, len(rows), n, dst.address)
    return dst.read(DTYPE_OF[code])


def expected_sum(code: int, rows: list[Any], weights: Any, n: int) -> Any:
    stacked = np.array(rows, DTYPE_OF[code]).reshape(1, len(rows), n)
    with np.errstate(all="ignore"):
        return reference.weighted_sum(stacked, weights[None], np.zeros((1, len(rows)), np.int64))[0]


@CODES
@pytest.mark.parametrize("kind", KINDS)
@RELAXED
@given(n=lengths(), k=st.integers(0, 20), seed=seeds(), offset=st.integers(0, 33))
def test_weighted_sum(code: int, kind: str, n: int, k: int, seed: int, offset: int) -> None:
    rows = [row(code, n, kind, seed + i) for i in range(k)]
    weights = row(FP32, k, "any bits" if seed % 4 == 0 else "normal", seed)
    np.testing.assert_array_equal(
        bits(summed(code, rows, weights, n, offset)), bits(expected_sum(code, rows, weights, n))
    )


@CODES
@pytest.mark.parametrize("k", [1, 8, 9, 300])
def test_whole_tokens(code: int, k: int) -> None:
    n = 7168
    rows = [row(code, n, "normal", i) for i in range(k)]
    weights = np.random.default_rng(k).random(k, np.float32)
    np.testing.assert_array_equal(bits(summed(code, rows, weights, n)), bits(expected_sum(code, rows, weights, n)))


@CODES
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 63, 64, 65, 129])
def test_no_rows_make_zeros(code: int, n: int) -> None:
    assert not bits(summed(code, [], np.zeros(0, np.float32), n)).any()


@CODES
def test_sum_starts_from_plus_zero(code: int) -> None:
    rows = [np.full(81, -0.0, DTYPE_OF[code])]
    assert not bits(summed(code, rows, np.ones(1, np.float32), 81)).any()


@CODES
def test_result_may_replace_a_row(code: int) -> None:
    n = 143
    rows = [row(code, n, "normal", i) for i in range(3)]
    weights = np.array([0.5, 2, -1], np.float32)
    sources = [Guarded.of(x) for x in rows]
    addresses = np.array([source.address for source in sources], np.int64)
    kernels.weighted_sum(code, addresses.ctypes.data, weights.ctypes.data, 3, n, sources[1].address)
    np.testing.assert_array_equal(bits(sources[1].read(DTYPE_OF[code])), bits(expected_sum(code, rows, weights, n)))


def test_products_are_rounded_before_they_are_added() -> None:
    # (1 + 2**-12)**2 = 1 + 2**-11 + 2**-24: the last term is lost when the product is rounded, and kept by an FMA.
    x = np.float32(1 + 2.0**-12)
    rows = [np.full(97, -1, np.float32), np.full(97, x, np.float32)]
    total = summed(FP32, rows, np.array([1, x], np.float32), 97)
    assert (total == np.float32(2.0**-11)).all()
    assert not re.search(r"\bv?fn?m(add|sub|la|ls)", assembly(kernels.weighted_sum_rows, 6))
