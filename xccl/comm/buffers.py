"""Checks and addresses of the user's NumPy arrays, and a pool for results."""

from __future__ import annotations

import ctypes
import math
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError

#: The object of a NumPy array begins with a reference count and a type, and then has the address of its data; that is
#: part of NumPy's binary interface (PyArrayObject_fields). `array.ctypes.data` takes ten times as long to say the same.
_DATA_OFFSET_BYTES = object.__basicsize__
_word_at = ctypes.c_ssize_t.from_address


def address_of(array: npt.NDArray[Any]) -> int:
    """Address of an array's first element."""
    return _word_at(id(array) + _DATA_OFFSET_BYTES).value


def _slow_address_of(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)


_probe = np.zeros((2, 3), np.uint16)[1:]
if address_of(_probe) != _slow_address_of(_probe):  # another interpreter than CPython
    address_of = _slow_address_of


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


class BufferPool:
    """Memory for results, used again once the caller has dropped the last view of a result.

    A fresh allocation of megabytes costs a page fault every 4 KiB, more than the copy into it. Sizes are rounded up to
    eighths of a power of two, and at most `keep` buffers of a size are kept. A buffer is free when nobody but the pool
    refers to it: every view of a result, and every view of a view, holds the buffer itself as its base.
    """

    def __init__(self, keep: int = 4) -> None:
        self._keep = keep
        self._buffers: dict[int, list[tuple[npt.NDArray[np.uint8], int]]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An uninitialised C-contiguous array, 64-byte aligned."""
        n_bytes = math.prod(shape) * dtype.itemsize
        if n_bytes == 0:
            return np.empty(shape, dtype)
        # Up to 12% more than asked for, so that results of about the same size share buffers.
        step_bytes = 1 << max(12, (n_bytes - 1).bit_length() - 3)
        size_bytes = -(-n_bytes // step_bytes) * step_bytes
        buffers = self._buffers.setdefault(size_bytes, [])
        for raw, start in buffers:
            if sys.getrefcount(raw) == _REFERENCES_OF_THE_POOL:
                return np.ndarray(shape, dtype, raw, start)
        raw = np.empty(size_bytes + 64, np.uint8)
        start = -address_of(raw) % 64
        if len(buffers) < self._keep:
            buffers.append((raw, start))
        return np.ndarray(shape, dtype, raw, start)


def _references(buffers: list[tuple[npt.NDArray[np.uint8], int]]) -> int:
    """What `take` counts for a free buffer: how many references a name and an argument are is Python's affair."""
    for raw, _ in buffers:
        return sys.getrefcount(raw)
    return 0


_REFERENCES_OF_THE_POOL = _references([(np.empty(1, np.uint8), 0)])


def require_one_of(allowed: tuple[str, ...], value: Any, name: str) -> str:
    """One of several words.

    Raises:
        UsageError: it is none of them.
    """
    if str(value) not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {value!r}", value=value, bound=allowed)
    return str(value)
