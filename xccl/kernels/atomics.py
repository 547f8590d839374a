"""Memory as kernels see it: plain and atomic access by integer address, fences, and pauses.

Kernels take addresses, not arrays: an address costs a tenth of an array argument at the call boundary, and peers'
segments are addresses anyway. Orderings follow the C11 names. A plain `while a[i] != v` loop is compiled to one load
and an endless jump, so whatever another rank may write is read through `load_acquire` here.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

I64 = ir.IntType(64)
_IS_X86 = platform.machine() in ("x86_64", "AMD64")


def _pointer(builder: Any, address: Any, llvm_type: Any = I64) -> Any:
    return builder.inttoptr(address, llvm_type.as_pointer())


@intrinsic
def load_acquire(typingctx: Any, address: Any) -> Any:
    """The int64 at `address`, load-acquire."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0]), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store_release(typingctx: Any, address: Any, value: Any) -> Any:
    """Store the int64 `value` at `address`, store-release."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def fetch_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at `address`, sequentially consistent; the value before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def compare_and_swap(typingctx: Any, address: Any, expected: Any, value: Any) -> Any:
    """Store `value` if the int64 at `address` equals `expected`; the value before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair = builder.cmpxchg(_pointer(builder, args[0]), args[1], args[2], "seq_cst", "acquire")
        return builder.extract_value(pair, 0)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def fence_seq_cst(typingctx: Any) -> Any:
    """A full fence; on x86 it also drains non-temporal stores."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def fence_nontemporal(typingctx: Any) -> Any:
    """Order earlier non-temporal stores before later stores (sfence on x86, a full fence elsewhere)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _IS_X86:
            function = builder.module.declare_intrinsic("llvm.x86.sse.sfence", (), ir.FunctionType(ir.VoidType(), []))
            builder.call(function, [])
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def cpu_pause(typingctx: Any) -> Any:
    """Tell the core that this is a spin loop (about 25 ns on x86; a compiler barrier elsewhere)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _IS_X86:
            function = builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), ir.FunctionType(ir.VoidType(), []))
            builder.call(function, [])
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch_for_writing(typingctx: Any, address: Any) -> Any:
    """Get a cache line for this core alone, without waiting for it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", (pointer,), ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        )
        builder.call(function, [builder.inttoptr(args[0], pointer), *(ir.Constant(i32, n) for n in (1, 3, 1))])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _plain_load(numba_type: Any, llvm_type: Any) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(_pointer(builder, args[0], llvm_type))

        return numba_type(types.int64), codegen

    return load


def _plain_store(numba_type: Any, llvm_type: Any) -> Any:
    @intrinsic
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[1], _pointer(builder, args[0], llvm_type))
            return context.get_dummy_value()

        return types.void(types.int64, numba_type), codegen

    return store


load_i64 = _plain_load(types.int64, I64)
store_i64 = _plain_store(types.int64, I64)
load_i32 = _plain_load(types.int32, ir.IntType(32))
store_i32 = _plain_store(types.int32, ir.IntType(32))
load_f32 = _plain_load(types.float32, ir.FloatType())
store_f32 = _plain_store(types.float32, ir.FloatType())


@intrinsic
def remainder(typingctx: Any, dividend: Any, divisor: Any) -> Any:
    """Of two numbers that are not negative: Python's own `%` costs twice as much, for signs."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.urem(args[0], args[1])

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _as_pointer(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


#: `carray(as_pointer(address), n, dtype)` is a view of memory inside a kernel.
as_pointer = _as_pointer
