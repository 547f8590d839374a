"""Element types inside kernels: bf16 and fp16 to float32 and back.

Each conversion is written once, as LLVM instructions that take a scalar or a vector alike: `widen` and `narrow` are for
other intrinsics that hold vectors in registers, and the functions below them are the scalar forms that kernels call.

Narrowing rounds to nearest, ties to even; what is too large becomes infinity, denormals are kept, and every NaN becomes
the positive quiet one without payload, so that the bits of a result never depend on which NaN came first. Bf16 goes by
integer instructions on purpose: x86's own bf16 conversion flushes denormals to zero.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..layout.dtypes import BF16, FP16, FP32

#: The one NaN of each type, as bits.
NAN_BITS: Final = {BF16: 0x7FC0, FP16: 0x7E00, FP32: 0x7FC00000}

_I16, _I32, _F16, _F32 = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


def storage_type(code: int) -> Any:
    """The LLVM type in which one element lies in memory: i16 for bf16 and fp16, float for fp32."""
    return _F32 if code == FP32 else _I16


def _shaped(element: Any, like: Any) -> Any:
    """`element`, or a vector of it if the value `like` is a vector."""
    return ir.VectorType(element, like.type.count) if isinstance(like.type, ir.VectorType) else element


def _constant(kind: Any, value: Any) -> Any:
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)
    return ir.Constant(kind, value)


def widen(builder: Any, code: int, stored: Any) -> Any:
    """Emit the float32 of an element (or a vector of elements) as it lies in memory; always exact."""
    if code == FP32:
        return stored
    if code == FP16:
        return builder.fpext(builder.bitcast(stored, _shaped(_F16, stored)), _shaped(_F32, stored))
    wide = _shaped(_I32, stored)
    return builder.bitcast(builder.shl(builder.zext(stored, wide), _constant(wide, 16)), _shaped(_F32, stored))


def narrow(builder: Any, code: int, value: Any) -> Any:
    """Emit the element, as it lies in memory, that a float32 (or a vector of them) rounds to."""
    is_nan = builder.fcmp_unordered("uno", value, value)
    if code == FP32:
        wide = _shaped(_I32, value)
        nan = builder.bitcast(_constant(wide, NAN_BITS[FP32]), value.type)
        return builder.select(is_nan, nan, value)
    short = _shaped(_I16, value)
    if code == FP16:
        rounded = builder.bitcast(builder.fptrunc(value, _shaped(_F16, value)), short)
    else:
        # Adding just below half of the last place kept, plus that place's own bit, is rounding with ties to even.
        wide = _shaped(_I32, value)
        bits = builder.bitcast(value, wide)
        last = builder.and_(builder.lshr(bits, _constant(wide, 16)), _constant(wide, 1))
        bits = builder.add(bits, builder.add(last, _constant(wide, 0x7FFF)))
        rounded = builder.trunc(builder.lshr(bits, _constant(wide, 16)), short)
    return builder.select(is_nan, _constant(short, NAN_BITS[code]), rounded)


def _widening(code: int, stored: Any) -> Any:
    @intrinsic
    def to_f32(typingctx: Any, element: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return widen(builder, code, args[0])

        return types.float32(stored), codegen

    return to_f32


def _narrowing(code: int, stored: Any) -> Any:
    @intrinsic
    def from_f32(typingctx: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return narrow(builder, code, args[0])

        return stored(types.float32), codegen

    return from_f32


@intrinsic
def f32_bits(typingctx: Any, value: Any) -> Any:
    """The bits of a float32 as uint32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _I32)

    return types.uint32(types.float32), codegen


@intrinsic
def f32_from_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 with the bits of a uint32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _F32)

    return types.float32(types.uint32), codegen


#: uint16 (the bits in memory) -> float32.
bf16_to_f32 = _widening(BF16, types.uint16)
fp16_to_f32 = _widening(FP16, types.uint16)

#: float32 -> uint16, rounded; NaN canonical.
bf16_from_f32 = _narrowing(BF16, types.uint16)
fp16_from_f32 = _narrowing(FP16, types.uint16)

#: float32 -> float32: the same value, but NaN is the canonical one.
canonical_f32 = _narrowing(FP32, types.float32)
