"""Checks and addresses of the user's NumPy arrays, and a pool for results."""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError

_from_buffer = ctypes.c_char.from_buffer
_addressof = ctypes.addressof


def address_of(array: npt.NDArray[Any]) -> int:
    """Address of an array's first element; thrice as fast as `array.ctypes.data` where there is a buffer protocol."""
    try:
        return _addressof(_from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # read-only, empty, or a dtype without buffer format (bfloat16)
        return int(array.ctypes.data)


def require_array(value: Any, name: str) -> npt.NDArray[Any]:
    """The value, if it is a NumPy array.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(value, np.ndarray):
        raise UsageError(f"{name} must be a NumPy array, got {type(value).__name__}", value=type(value).__name__)
    if value.dtype.hasobject:
        raise UsageError(f"{name} holds Python objects ({value.dtype}), which mean nothing to another rank", value=name)
    return value


def readable(value: Any, name: str) -> npt.NDArray[Any]:
    """A C-contiguous array to read from: the value, or a copy if it is strided."""
    array = require_array(value, name)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def writable(value: Any, name: str) -> npt.NDArray[Any]:
    """A C-contiguous array to write into.

    Raises:
        UsageError: the array is read-only or strided.
    """
    array = require_array(value, name)
    flags = array.flags
    if not flags.c_contiguous:
        raise UsageError(
            f"{name} must be C-contiguous to be written into, got strides {array.strides} for shape {array.shape}",
            value=array.strides,
        )
    if not flags.writeable:
        raise UsageError(f"{name} is read-only, and cannot be written into", value="read-only")
    return array


def require_int(value: Any, name: str, low: int, high: int) -> int:
    """The value as an int, if it is an integer from `low` to `high`.

    Raises:
        UsageError: it is not.
    """
    if type(value) is not int:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise UsageError(f"{name} must be an integer, got {value!r}", value=repr(value))
        value = int(value)
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}, allowed are {low} to {high}", value=value, bound=(low, high))
    return int(value)


class _Lease:
    """Owner of one buffer of a pool: NumPy arrays made from it keep it alive, and its end gives the buffer back."""

    __slots__ = ("__array_interface__", "_block", "_pool")

    def __init__(self, pool: BufferPool, block: npt.NDArray[np.uint8]) -> None:
        self._pool = pool
        self._block = block
        self.__array_interface__ = block.__array_interface__

    def __del__(self) -> None:
        self._pool._give_back(self._block)


class BufferPool:
    """Memory for results, used again once the caller has dropped the last view of a result.

    A fresh allocation of megabytes costs a page fault every 4 KiB, more than the copy into it. Sizes are rounded up to
    powers of two, and at most `keep` free buffers of a size are kept.
    """

    def __init__(self, keep: int = 4) -> None:
        self._keep = keep
        self._free: defaultdict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An uninitialised C-contiguous array, 64-byte aligned."""
        n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if n_bytes == 0:
            return np.empty(shape, dtype)
        size_bytes = 1 << max(12, (n_bytes - 1).bit_length())
        with self._lock:
            free = self._free[size_bytes]
            block = free.pop() if free else None
        if block is None:
            raw = np.empty(size_bytes + 64, np.uint8)
            start = -raw.ctypes.data % 64
            block = raw[start : start + size_bytes]
        whole = np.asarray(_Lease(self, block))
        return whole[:n_bytes].view(dtype).reshape(shape)

    def _give_back(self, block: npt.NDArray[np.uint8]) -> None:
        # Runs in a destructor: it must not wait for a lock that this very thread may hold.
        if self._lock.acquire(blocking=False):
            try:
                free = self._free[block.size]
                if len(free) < self._keep:
                    free.append(block)
            finally:
                self._lock.release()
