"""Rows of numbers that are hard on float kernels, for tests against the oracles in `xccl.comm.reference`."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from xccl.layout.dtypes import BF16, DTYPE_OF, FP16, FP32

FLOAT_CODES: Final = [BF16, FP16, FP32]

KINDS: Final = ["normal", "wide", "denormal", "zeros", "halves", "any bits", "normal with specials"]


def row(code: int, n: int, kind: str, seed: int) -> npt.NDArray[Any]:
    """`n` elements of one kind."""
    dtype = DTYPE_OF[code]
    random = np.random.default_rng(seed)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    any_bits = random.integers(0, 1 << (8 * dtype.itemsize), n, np.uint64).astype(unsigned)
    sign_bit = 1 << (8 * dtype.itemsize - 1)
    with np.errstate(all="ignore"):
        if kind == "wide":  # over the range of exponents, finite
            exponents = random.uniform(-14, 14, n) if code == FP16 else random.uniform(-125, 125, n)
            return (random.standard_normal(n) * 2.0**exponents).astype(dtype)
        if kind == "denormal":
            mantissa = np.array(np.finfo(np.float16).tiny if code == FP16 else np.float32(2.0**-126)).astype(dtype)
            return (any_bits & (sign_bit | (int(mantissa.view(unsigned)) - 1))).astype(unsigned).view(dtype)
        if kind == "zeros":
            return (any_bits & sign_bit).astype(unsigned).view(dtype)
        if kind == "halves":  # with absmax 127 the scale is 1, and halves are ties
            values = random.integers(-254, 255, n) / 2
            values[: min(n, 1)] = -127
            return values.astype(dtype)
        if kind == "any bits":
            return any_bits.view(dtype)
        values = random.standard_normal(n).astype(dtype)
        if kind == "normal with specials":
            specials = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0]).astype(dtype)
            where = random.integers(0, max(n, 1), min(n, 3))
            values[where] = random.choice(specials.view(unsigned), where.size).view(dtype)
        return values


def lengths() -> st.SearchStrategy[int]:
    return st.one_of(st.integers(0, 140), st.integers(0, 5000))


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**32 - 1)
