"""Rows of all ranks, folded into one: sum, prod, max, min, in the order of the rows.

    dst[j] = round((row[0][j] op row[1][j]) op row[2][j] ...)

Bf16 and fp16 are widened to float32 and rounded once, at the end; the others are folded in their own type, integers
modulo 2**bits. A NaN among the operands of max and min is the result, and every NaN that comes out is the positive
quiet one (see `elements`). Of equal zeros max and min keep the first.

As in `reduce`, a block of columns is folded over all rows while its results stay in vector registers: one pass, one
order, one piece of code for any number of rows. The 48 loops are LLVM functions that this module spells out, since
numba's own front end would take most of a minute for them. They are compiled with each function that calls `fold_rows`,
and again with each that calls that one: call it from a kernel itself.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..layout.collectives import OPERATORS
from ..layout.dtypes import BF16, DTYPE_OF, FP16, FP32, FP64
from .elements import narrow, storage_type, widen

_I64 = ir.IntType(64)
_FLOATS: Final = (BF16, FP16, FP32, FP64)
_FUNCTION: Final = ir.FunctionType(ir.VoidType(), [_I64] * 4)
#: Bytes of results in registers: four of AVX-512, or eight of AVX2.
_BLOCK_BYTES: Final = 256
_SMALL_BLOCK_BYTES: Final = 64
SUM, PROD, MAX, MIN = range(len(OPERATORS))


def _stored(code: int) -> Any:
    if code == FP64:
        return ir.DoubleType()
    return storage_type(code) if code in _FLOATS else ir.IntType(8 * DTYPE_OF[code].itemsize)


def _widened(builder: Any, code: int, value: Any) -> Any:
    return widen(builder, code, value) if code in (BF16, FP16) else value


def _narrowed(builder: Any, code: int, value: Any) -> Any:
    if code in (BF16, FP16, FP32):
        return narrow(builder, code, value)
    if code != FP64:
        return value
    bits = value.type if not isinstance(value.type, ir.VectorType) else value.type.element
    nan = ir.Constant(bits, float("nan"))
    if isinstance(value.type, ir.VectorType):
        nan = ir.Constant(value.type, [nan] * value.type.count)
    return builder.select(builder.fcmp_unordered("uno", value, value), nan, value)


def _combined(builder: Any, code: int, operator: int, acc: Any, value: Any) -> Any:
    is_float = code in _FLOATS
    if operator == SUM:
        return builder.fadd(acc, value) if is_float else builder.add(acc, value)
    if operator == PROD:
        return builder.fmul(acc, value) if is_float else builder.mul(acc, value)
    sign = ">" if operator == MAX else "<"
    if is_float:
        takes = builder.or_(builder.fcmp_ordered(sign, value, acc), builder.fcmp_unordered("uno", value, value))
    elif DTYPE_OF[code].kind == "u":
        takes = builder.icmp_unsigned(sign, value, acc)
    else:
        takes = builder.icmp_signed(sign, value, acc)
    return builder.select(takes, value, acc)


def _emit_block(builder: Any, code: int, operator: int, count: int, args: Any, column: Any) -> None:
    """Fold `count` columns from `column` on."""
    rows, k, _, dst = args
    stored = _stored(code) if count == 1 else ir.VectorType(_stored(code), count)
    offset = builder.mul(column, ir.Constant(_I64, DTYPE_OF[code].itemsize))
    pointers = builder.inttoptr(rows, _I64.as_pointer())

    def load(index: Any) -> Any:
        address = builder.add(builder.load(builder.gep(pointers, [index])), offset)
        return _widened(builder, code, builder.load(builder.inttoptr(address, stored.as_pointer()), align=1))

    acc = cgutils.alloca_once_value(builder, load(ir.Constant(_I64, 0)))
    with cgutils.for_range(builder, k, start=ir.Constant(_I64, 1), intp=_I64) as loop:
        builder.store(_combined(builder, code, operator, builder.load(acc), load(loop.index)), acc)
    target = builder.inttoptr(builder.add(dst, offset), stored.as_pointer())
    builder.store(_narrowed(builder, code, builder.load(acc)), target, align=1)


def _fold_function(module: Any, code: int, operator: int) -> Any:
    """The function that folds `k` rows of `n` elements of one type with one operator."""
    function = ir.Function(module, _FUNCTION, f"xccl_fold_{code}_{operator}")
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    n = function.args[2]
    column = cgutils.alloca_once_value(builder, ir.Constant(_I64, 0))
    width = 4 if code in (BF16, FP16) else DTYPE_OF[code].itemsize
    for count in (_BLOCK_BYTES // width, _SMALL_BLOCK_BYTES // width, 1):
        size = ir.Constant(_I64, count)
        head, body, end = (function.append_basic_block(f"{name}_{count}") for name in ("while", "do", "end"))
        builder.branch(head)
        builder.position_at_end(head)
        more = builder.icmp_signed("<=", builder.add(builder.load(column), size), n)
        builder.cbranch(more, body, end)
        builder.position_at_end(body)
        at = builder.load(column)
        _emit_block(builder, code, operator, count, function.args, at)
        builder.store(builder.add(at, size), column)
        builder.branch(head)
        builder.position_at_end(end)
    builder.ret_void()
    return function


@intrinsic
def fold_rows(typingctx: Any, fold: Any, rows: Any, k: Any, n: Any, dst: Any) -> Any:
    """Fold `k` rows (addresses at `rows`) of `n` elements into `dst`.

    Args:
        typingctx: numba's.
        fold: code of the element type * 4 + operator.
        rows: address of [k] int64, the addresses of the rows, at any alignment.
        k: number of rows, at least 1.
        n: number of elements of a row.
        dst: address of the result; it may be one of the rows, but overlap none in part.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        done = builder.append_basic_block("folded")
        switch = builder.switch(args[0], done)
        for code in DTYPE_OF:
            for operator in range(len(OPERATORS)):
                function = builder.module.globals.get(f"xccl_fold_{code}_{operator}")
                if function is None:
                    function = _fold_function(builder.module, code, operator)
                case = builder.append_basic_block(f"fold_{code}_{operator}")
                switch.add_case(ir.Constant(_I64, code * len(OPERATORS) + operator), case)
                with builder.goto_block(case):
                    builder.call(function, args[1:])
                    builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen
