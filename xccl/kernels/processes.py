"""Private memory of other processes, by the operating system's kernel (process_vm_readv, process_vm_writev)."""

from __future__ import annotations

from typing import Any

from numba.core import types

from ._jit import device, kernel
from .atomics import load_i32, store_i64

_signature = types.int64(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64)
_process_vm_readv: Any = types.ExternalFunction("process_vm_readv", _signature)
_process_vm_writev: Any = types.ExternalFunction("process_vm_writev", _signature)
_errno_address: Any = types.ExternalFunction("__errno_location", types.int64())
_EFAULT = 14


@device
def _set_vectors(vectors: int, own: int, other: int, n_bytes: int) -> None:
    store_i64(vectors, own)
    store_i64(vectors + 8, n_bytes)
    store_i64(vectors + 16, other)
    store_i64(vectors + 24, n_bytes)


@device
def _move_memory(pid: int, vectors: int, own: int, other: int, n_bytes: int, writes: bool) -> bool:
    """Copy between `own` and `other` in another process, there or here; False if that cannot be done (any more)."""
    done = 0
    while done < n_bytes:
        _set_vectors(vectors, own + done, other + done, n_bytes - done)
        if writes:
            moved = _process_vm_writev(pid, vectors, 1, vectors + 16, 1, 0)
        else:
            moved = _process_vm_readv(pid, vectors, 1, vectors + 16, 1, 0)
        if moved <= 0:
            return False
        done += moved
    return True


@device
def read_memory(pid: int, vectors: int, own: int, other: int, n_bytes: int) -> bool:
    """Copy to `own` from `other` in another process; False if that cannot be read (any more).

    Args:
        pid: the other process.
        vectors: address of 32 bytes for two `struct iovec`.
        own: address here.
        other: address there.
        n_bytes: how much.
    """
    return bool(_move_memory(pid, vectors, own, other, n_bytes, False))


@device
def write_memory(pid: int, vectors: int, own: int, other: int, n_bytes: int) -> bool:
    """Copy from `own` to `other` in another process; otherwise as `read_memory`."""
    return bool(_move_memory(pid, vectors, own, other, n_bytes, True))


@device
def copy_together(pid: int, own: int, other: int, count: int, outward: bool) -> int:
    """Several blocks by one call; bytes that were copied: fewer than all if a part cannot be reached (any more).

    Args:
        pid: the other process.
        own: address of [count] `struct iovec` for blocks here.
        other: the same, for blocks of these sizes there.
        count: how many.
        outward: from here to there.
    """
    if outward:
        return _process_vm_writev(pid, own, count, other, count, 0)
    return _process_vm_readv(pid, own, count, other, count, 0)


@kernel("int64(int64, int64, int64, int64, int64)")
def read(pid: int, vectors: int, own: int, other: int, n_bytes: int) -> int:
    """`read_memory` for Python: 1 if it could be read."""
    return int(read_memory(pid, vectors, own, other, n_bytes))


@kernel("int64(int64, int64, int64)")
def may_read(pid: int, vectors: int, address: int) -> int:
    """May this process read the memory of another? 1 if so. It asks for a byte at an address that is nobody's.

    Args:
        pid: the other process.
        vectors: address of 32 bytes for two `struct iovec`.
        address: where nothing is mapped.
    """
    _set_vectors(vectors, vectors, address, 1)
    if _process_vm_readv(pid, vectors, 1, vectors + 16, 1, 0) >= 0:
        return 1
    # Permission is checked first: a bad address is one that it would have been allowed to read.
    return int(load_i32(_errno_address()) == _EFAULT)
