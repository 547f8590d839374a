"""Copying and clearing memory by address. Regions never overlap.

Three ways to copy: `copy_bytes` goes through the caches, `copy_bytes_streaming` past them, and `copy_bytes_auto`
chooses by size. libc's memcpy (and so NumPy's copy) is used with care: when (dst - src) mod 4096 is 16, which is where
page-aligned shared memory meets a large NumPy array, it was seen to fall to 3 GB/s between 4 and 256 KiB on one machine
(without AVX-512), and to half its speed at 16 KiB on the one below. The loops here load 256 bytes before they store
any, and store to aligned lines; so a load seldom waits for an earlier store with the same low address bits. Where the
distance is harmless, `copy_bytes_auto` calls memcpy for 32 KiB or more: it does not fetch lines that it overwrites.

Measured in GB/s on a 2-core Sapphire-Rapids-class VM with AVX-512, 2 MiB of L2 a core (take them as proportions):

    one core, size                  4 KiB   64 KiB   1 MiB   16 MiB   64 MiB
    copy_bytes                        242       54      31       14       10
    copy_bytes, dst - src = 16        158       52      31       15       10
    copy_bytes_streaming               12       23      24       14       14
    memcpy                            241       50      32       14        -
    copy_bytes beside it              248       47      28       14        -

    producer to consumer, size               64 KiB   1 MiB   16 MiB   32 MiB   64 MiB
    copy_bytes, two to four blocks in turn       20   17-21    12-13      8.7        -
    copy_bytes_streaming, the same               11      10     9-10      8.9        -
    copy_bytes, one block                       5.1      11      7.2      5.1      4.1
    copy_bytes_streaming, one block             5.4     6.3      5.9      4.9      4.5

Copies of up to 64 bytes take 0.4 ns each when independent, and 1.2 (8 bytes) to 1.9 ns when each reads what the one
before has written; 512 bytes take 2 to 4 ns, 1 KiB 4 to 5.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ._jit import device, kernel
from .atomics import fence_nontemporal

#: From here on `copy_bytes_auto` writes past the caches. Below, the consumer on another core gains more from finding
#: the block in the caches than the producer does from not fetching lines that it overwrites; the two are level at
#: 32 MiB (see above). Where the last cache is small and nobody reads the block soon, streaming pays from 1 MiB on.
STREAMING_THRESHOLD_BYTES = 32 << 20

#: From here on memcpy is faster, if no store is less than so far ahead of the loads, modulo a page.
MEMCPY_BYTES, _MEMCPY_DISTANCE, _PAGE_MASK = 32 << 10, 256, 4095
_memcpy: Any = types.ExternalFunction("memcpy", types.int64(types.int64, types.int64, types.int64))

_BYTE = ir.IntType(8)
_LINE = 64


def _pointers(builder: Any, address: Any, n_bytes: int, n_vectors: int) -> list[Any]:
    """Pointers to consecutive vectors of `n_bytes` bytes."""
    offsets = [ir.Constant(ir.IntType(64), i * n_bytes) for i in range(n_vectors)]
    vector = ir.VectorType(_BYTE, n_bytes).as_pointer()
    return [builder.inttoptr(builder.add(address, offset), vector) for offset in offsets]


def _copier(n_bytes: int, n_vectors: int = 1, nontemporal: bool = False) -> Any:
    """An intrinsic that copies exactly `n_vectors` vectors: all loads come first, then all stores.

    Any alignment will do, but non-temporal stores need a destination aligned to the vector.
    """

    @intrinsic
    def copy_exactly(typingctx: Any, dst: Any, src: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values = [builder.load(p, align=1) for p in _pointers(builder, args[1], n_bytes, n_vectors)]
            for value, pointer in zip(values, _pointers(builder, args[0], n_bytes, n_vectors), strict=True):
                store = builder.store(value, pointer, align=n_bytes if nontemporal else 1)
                if nontemporal:
                    one = ir.Constant(ir.IntType(32), 1)
                    store.set_metadata("nontemporal", builder.module.add_metadata([one]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return copy_exactly


def _zeroer(n_bytes: int, n_vectors: int = 1) -> Any:
    """An intrinsic that clears exactly `n_vectors` vectors at any alignment."""

    @intrinsic
    def zero_exactly(typingctx: Any, dst: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for pointer in _pointers(builder, args[0], n_bytes, n_vectors):
                builder.store(ir.Constant(pointer.type.pointee, None), pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return zero_exactly


_copy_1, _copy_2, _copy_4, _copy_8, _copy_16, _copy_32, _copy_64 = (_copier(1 << i) for i in range(7))
_copy_256 = _copier(64, 4)
_stream_64 = _copier(64, nontemporal=True)
_stream_256 = _copier(64, 4, nontemporal=True)
_zero_1, _zero_2, _zero_4, _zero_8, _zero_16, _zero_32, _zero_64 = (_zeroer(1 << i) for i in range(7))
_zero_256 = _zeroer(64, 4)


@device
def _copy_up_to_64(dst: int, src: int, n_bytes: int) -> None:
    # Two vectors that overlap in the middle cover every length between one and two of their size.
    if n_bytes >= 8:
        if n_bytes <= 16:
            _copy_8(dst, src)
            _copy_8(dst + n_bytes - 8, src + n_bytes - 8)
        elif n_bytes <= 32:
            _copy_16(dst, src)
            _copy_16(dst + n_bytes - 16, src + n_bytes - 16)
        else:
            _copy_32(dst, src)
            _copy_32(dst + n_bytes - 32, src + n_bytes - 32)
    elif n_bytes >= 4:
        _copy_4(dst, src)
        _copy_4(dst + n_bytes - 4, src + n_bytes - 4)
    elif n_bytes >= 2:
        _copy_2(dst, src)
        _copy_2(dst + n_bytes - 2, src + n_bytes - 2)
    elif n_bytes == 1:
        _copy_1(dst, src)


@device
def copy_bytes(dst_address: int, src_address: int, n_bytes: int) -> None:
    """Copy `n_bytes` through the caches: for small blocks, and for what is read again soon."""
    if n_bytes <= _LINE:
        _copy_up_to_64(dst_address, src_address, n_bytes)
        return
    # The first and the last line are stored unaligned and overlap the aligned ones between them.
    _copy_64(dst_address, src_address)
    done = _LINE - (dst_address & (_LINE - 1))
    while done + 256 <= n_bytes:
        _copy_256(dst_address + done, src_address + done)
        done += 256
    while done + _LINE <= n_bytes:
        _copy_64(dst_address + done, src_address + done)
        done += _LINE
    _copy_64(dst_address + n_bytes - _LINE, src_address + n_bytes - _LINE)


@device
def copy_bytes_streaming(dst_address: int, src_address: int, n_bytes: int) -> None:
    """Copy `n_bytes` past the caches: for large blocks that nobody reads soon.

    Ends with a store fence, so that a flag released afterwards is seen after the data. No line is written both through
    the caches and past them, but for the partial ones at the ends.
    """
    done = min(-dst_address & (_LINE - 1), n_bytes)
    _copy_up_to_64(dst_address, src_address, done)
    while done + 256 <= n_bytes:
        _stream_256(dst_address + done, src_address + done)
        done += 256
    while done + _LINE <= n_bytes:
        _stream_64(dst_address + done, src_address + done)
        done += _LINE
    _copy_up_to_64(dst_address + done, src_address + done, n_bytes - done)
    fence_nontemporal()


@device
def copy_bytes_auto(dst_address: int, src_address: int, n_bytes: int) -> None:
    """The fastest way; past the caches from `STREAMING_THRESHOLD_BYTES` on."""
    if n_bytes >= STREAMING_THRESHOLD_BYTES:
        copy_bytes_streaming(dst_address, src_address, n_bytes)
        return
    ahead = (dst_address - src_address) & _PAGE_MASK
    if n_bytes >= MEMCPY_BYTES and (ahead == 0 or ahead >= _MEMCPY_DISTANCE):
        _memcpy(dst_address, src_address, n_bytes)
    else:
        copy_bytes(dst_address, src_address, n_bytes)


@device
def _zero_up_to_64(dst: int, n_bytes: int) -> None:
    if n_bytes >= 8:
        if n_bytes <= 16:
            _zero_8(dst)
            _zero_8(dst + n_bytes - 8)
        elif n_bytes <= 32:
            _zero_16(dst)
            _zero_16(dst + n_bytes - 16)
        else:
            _zero_32(dst)
            _zero_32(dst + n_bytes - 32)
    elif n_bytes >= 4:
        _zero_4(dst)
        _zero_4(dst + n_bytes - 4)
    elif n_bytes >= 2:
        _zero_2(dst)
        _zero_2(dst + n_bytes - 2)
    elif n_bytes == 1:
        _zero_1(dst)


@device
def fill_zero(dst_address: int, n_bytes: int) -> None:
    """Set `n_bytes` to zero."""
    if n_bytes <= _LINE:
        _zero_up_to_64(dst_address, n_bytes)
        return
    _zero_64(dst_address)
    done = _LINE - (dst_address & (_LINE - 1))
    while done + 256 <= n_bytes:
        _zero_256(dst_address + done)
        done += 256
    while done + _LINE <= n_bytes:
        _zero_64(dst_address + done)
        done += _LINE
    _zero_64(dst_address + n_bytes - _LINE)


@kernel("void(int64, int64, int64)")
def copy(dst_address: int, src_address: int, n_bytes: int) -> None:
    """`copy_bytes_auto` for Python."""
    copy_bytes_auto(dst_address, src_address, n_bytes)


@kernel("void(int64, int64, int64)")
def copy_streaming(dst_address: int, src_address: int, n_bytes: int) -> None:
    """`copy_bytes_streaming` for Python."""
    copy_bytes_streaming(dst_address, src_address, n_bytes)


@kernel("void(int64, int64)")
def zero(dst_address: int, n_bytes: int) -> None:
    """`fill_zero` for Python."""
    fill_zero(dst_address, n_bytes)
