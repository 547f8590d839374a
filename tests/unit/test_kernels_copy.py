"""Copies and clears of every size and alignment, and nothing written beside them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.unit.guarded import Guarded, assembly
from xccl.kernels import copy as kernels

WAYS = [kernels.copy, kernels.copy_streaming]
#: The first call compiles, and on a busy machine any call may wait.
RELAXED = settings(deadline=None)
SIZES = st.one_of(st.integers(0, 130), st.integers(0, 5000))


def check_copy(way: Any, n_bytes: int, dst_offset: int, src_offset: int) -> None:
    data = np.random.default_rng(n_bytes).integers(0, 256, n_bytes, np.uint8)
    src, dst = Guarded.of(data, src_offset), Guarded(n_bytes, dst_offset)
    way(dst.address, src.address, n_bytes)
    np.testing.assert_array_equal(dst.read(np.uint8), data)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_copy_every_small_size(way: Any) -> None:
    for n_bytes in range(600):
        check_copy(way, n_bytes, n_bytes % 67, n_bytes % 5)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@RELAXED
@given(n_bytes=SIZES, dst_offset=st.integers(0, 130), src_offset=st.integers(0, 130))
def test_copy_any_alignment(way: Any, n_bytes: int, dst_offset: int, src_offset: int) -> None:
    check_copy(way, n_bytes, dst_offset, src_offset)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize(("dst_offset", "src_offset"), [(0, 16), (16, 0), (0, 0), (1, 64), (63, 2)])
def test_copy_large(way: Any, dst_offset: int, src_offset: int) -> None:
    check_copy(way, (1 << 20) + 77, dst_offset, src_offset)


@pytest.mark.parametrize("dst_offset", [0, 1, 16, 255, 256, 4095])
@pytest.mark.parametrize("delta", [-1, 0, 1, 70_001])
def test_copy_where_memcpy_begins(delta: int, dst_offset: int) -> None:
    for src_offset in (0, 64):
        check_copy(kernels.copy, kernels.MEMCPY_BYTES + delta, dst_offset, src_offset)


@pytest.mark.parametrize("delta", [-1, 0, 1])
def test_copy_around_the_streaming_threshold(delta: int) -> None:
    n_bytes = kernels.STREAMING_THRESHOLD_BYTES + delta
    src, dst = np.arange(n_bytes, dtype=np.uint8), np.zeros(n_bytes, np.uint8)
    kernels.copy(dst.ctypes.data, src.ctypes.data, n_bytes)
    assert (src == dst).all()


def test_zero_every_small_size() -> None:
    for n_bytes in range(600):
        dst = Guarded(n_bytes, n_bytes % 67)
        kernels.zero(dst.address, n_bytes)
        assert not dst.read(np.uint8).any()


@RELAXED
@given(n_bytes=SIZES, offset=st.integers(0, 130))
def test_zero_any_alignment(n_bytes: int, offset: int) -> None:
    dst = Guarded(n_bytes, offset)
    kernels.zero(dst.address, n_bytes)
    assert not dst.read(np.uint8).any()


@pytest.mark.parametrize(
    ("function", "n_parameters"),
    [(kernels.copy_bytes, 3), (kernels.copy_bytes_streaming, 3), (kernels.fill_zero, 2)],
    ids=["copy_bytes", "copy_bytes_streaming", "fill_zero"],
)
def test_loops_do_not_become_libc_calls(function: Any, n_parameters: int) -> None:
    # LLVM recognises loops that copy; glibc's memcpy is ten times slower at some offsets (see the module).
    assert not re.search(r"mem(cpy|move|set)\b", assembly(function, n_parameters))
