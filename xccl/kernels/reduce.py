"""Weighted sums of rows, with bits that never depend on timing, machine or shape of the loop.

    dst[j] = round(((0 + w[0] * row[0][j]) + w[1] * row[1][j]) + ...)     each operation rounded to float32 on its own

A block of columns is summed over all rows while its sums stay in vector registers, so that any number of rows takes one
pass, one order of additions and one piece of code. The vectors are spelt out in LLVM: its own vectoriser would have to
check every row against the destination for overlap, once for each number of rows that the loop is unrolled for.

Measured on a 2-core Sapphire-Rapids-class VM with AVX-512, us for a token of 7168 columns, rows in cache; in brackets,
with AVX2 only:

                bf16          fp16          fp32
    8 rows      2.6 (3.5)     2.3 (2.5)     2.0-3.3 (2.4)
    16 rows     4.8 (6.3)     4.3 (4.6)     3.7-7.7 (5.1)

(Fp32 depends on where rows lie: eight of 28 KiB outgrow the 48 KiB of L1, and a multiple of 4 KiB apart they collide.)
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..layout.dtypes import BF16, FP16, FP32
from ._jit import device, kernel, named
from .elements import narrow, storage_type, widen

_I64, _F32 = ir.IntType(64), ir.FloatType()
#: Columns that one pass over the rows sums: four AVX-512 registers, or eight of AVX2 (32 and 128 are slower on both).
_BLOCK = 64
#: Columns of the smaller pass for what is left.
_SMALL_BLOCK = 16


def _block_summer(code: int, n_columns: int) -> Any:
    """An intrinsic that sums `n_columns` columns of all rows in registers and stores them rounded."""
    stored = ir.VectorType(storage_type(code), n_columns)
    element_bytes = 4 if code == FP32 else 2

    @intrinsic
    def sum_block(typingctx: Any, rows: Any, weights: Any, k: Any, column: Any, dst: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows_address, weights_address, n_rows, first_column, dst_address = args
            offset = builder.mul(first_column, ir.Constant(_I64, element_bytes))
            row_pointers = builder.inttoptr(rows_address, _I64.as_pointer())
            weight_pointers = builder.inttoptr(weights_address, _F32.as_pointer())
            total = cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(_F32, n_columns), None))
            with cgutils.for_range(builder, n_rows) as loop:
                row = builder.load(builder.gep(row_pointers, [loop.index]))
                elements = builder.load(
                    builder.inttoptr(builder.add(row, offset), stored.as_pointer()), align=element_bytes
                )
                weight = _splat(builder, builder.load(builder.gep(weight_pointers, [loop.index])), n_columns)
                # Two instructions, never one FMA: each product is rounded before it is added.
                product = builder.fmul(weight, widen(builder, code, elements))
                builder.store(builder.fadd(builder.load(total), product), total)
            rounded = narrow(builder, code, builder.load(total))
            dst_pointer = builder.inttoptr(builder.add(dst_address, offset), stored.as_pointer())
            builder.store(rounded, dst_pointer, align=element_bytes)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return sum_block


def _splat(builder: Any, scalar: Any, count: int) -> Any:
    kind = ir.VectorType(scalar.type, count)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), count), None))


def _row_summer(name: str, code: int) -> Any:
    block, small_block, single = (_block_summer(code, n) for n in (_BLOCK, _SMALL_BLOCK, 1))

    @device
    @named(name)
    def sum_rows(rows_address: int, weights_address: int, k: int, n: int, dst_address: int) -> None:
        column = 0
        while column + _BLOCK <= n:
            block(rows_address, weights_address, k, column, dst_address)
            column += _BLOCK
        while column + _SMALL_BLOCK <= n:
            small_block(rows_address, weights_address, k, column, dst_address)
            column += _SMALL_BLOCK
        while column < n:
            single(rows_address, weights_address, k, column, dst_address)
            column += 1

    return sum_rows


_sum_bf16 = _row_summer("_sum_bf16", BF16)
_sum_fp16 = _row_summer("_sum_fp16", FP16)
_sum_fp32 = _row_summer("_sum_fp32", FP32)


@device
def weighted_sum_rows(code: int, rows_address: int, weights_address: int, k: int, n: int, dst_address: int) -> None:
    """Sum `k` rows of `n` elements, each times its float32 weight, in float32 and in row order, then round.

    Args:
        code: Element type of the rows and of the result: BF16, FP16 or FP32.
        rows_address: `k` int64 addresses of rows, each aligned to its element size.
        weights_address: `k` float32 weights.
        k: Number of rows; with none the result is zeros.
        n: Number of columns.
        dst_address: The result; it may be one of the rows, but overlap none in part.
    """
    if code == BF16:
        _sum_bf16(rows_address, weights_address, k, n, dst_address)
    elif code == FP16:
        _sum_fp16(rows_address, weights_address, k, n, dst_address)
    else:
        _sum_fp32(rows_address, weights_address, k, n, dst_address)


@kernel("void(int64, int64, int64, int64, int64, int64)")
def weighted_sum(code: int, rows_address: int, weights_address: int, k: int, n: int, dst_address: int) -> None:
    """`weighted_sum_rows` for Python."""
    weighted_sum_rows(code, rows_address, weights_address, k, n, dst_address)
