"""NumPy arrays as kernels see them: by the address of the array object, which `id` says in CPython.

Asking an array in Python for address, shape and flags takes a microsecond, longer than sending 8 bytes to another rank;
a kernel looks at the object itself. Its layout is part of NumPy's binary interface (PyArrayObject_fields in
ndarraytypes.h), and is checked here when the module is imported. The caller keeps a reference to the array meanwhile.
"""

from __future__ import annotations

import ctypes

import numpy as np

from ._jit import device
from .atomics import load_i32, load_i64

#: Behind the object's header: address of the data, number of dimensions (int), address of the dimensions, ..., address
#: of the dtype object, flags (int).
_HEADER = object.__basicsize__
_TYPE = _HEADER - 8
_DATA = _HEADER
_NDIM = _HEADER + 8
_DIMS = _HEADER + 16
_DESCR = _HEADER + 40
_FLAGS = _HEADER + 48
_CONTIGUOUS, _WRITEABLE = 0x1, 0x400


def _check_layout() -> None:
    """Raise ImportError if array objects are not laid out as this module thinks."""
    probe = np.zeros((3, 5), np.int16)[1:]
    probe.flags.writeable = False
    at = id(probe)

    def word(offset: int, kind: type[ctypes.c_int64] | type[ctypes.c_int32] = ctypes.c_int64) -> int:
        return kind.from_address(at + offset).value

    dims = ctypes.c_int64.from_address(word(_DIMS)).value
    flags = word(_FLAGS, ctypes.c_int32)
    seen = (word(_TYPE), word(_DATA), word(_NDIM, ctypes.c_int32), dims, word(_DESCR), flags)
    if seen != (id(np.ndarray), probe.ctypes.data, 2, 2, id(probe.dtype), probe.flags.num) or flags & _WRITEABLE:
        raise ImportError(f"xccl does not know the array objects of NumPy {np.__version__} on this Python")


_check_layout()


@device
def data_of(array: int) -> int:
    """Address of the data of an array, 0 for no array (0)."""
    if array == 0:
        return 0
    return load_i64(array + _DATA)


@device
def bytes_of(array: int, item_bytes: int) -> int:
    """Bytes of the data of an array."""
    n_bytes = item_bytes
    dims = load_i64(array + _DIMS)
    for i in range(load_i32(array + _NDIM)):
        n_bytes *= load_i64(dims + 8 * i)
    return n_bytes


@device
def first_dim(array: int) -> int:
    """Length of the first dimension, -1 if there is none."""
    if load_i32(array + _NDIM) == 0:
        return -1
    return load_i64(load_i64(array + _DIMS))


@device
def same_rows(array: int, other: int) -> bool:
    """Have two arrays the same shape but for their first dimension?"""
    n = load_i32(array + _NDIM)
    if n == 0 or load_i32(other + _NDIM) != n:
        return False
    for i in range(1, n):
        if load_i64(load_i64(array + _DIMS) + 8 * i) != load_i64(load_i64(other + _DIMS) + 8 * i):
            return False
    return True


@device
def is_plain(array: int, array_type: int, descr: int, written: bool) -> bool:
    """Is it of that very type and dtype object, C-contiguous, and writeable if it is to be written?

    The type is an argument, since compiled code is kept for other processes, where it is somewhere else.
    """
    flags = load_i32(array + _FLAGS)
    return (
        load_i64(array + _TYPE) == array_type
        and load_i64(array + _DESCR) == descr
        and flags & _CONTIGUOUS != 0
        and (not written or flags & _WRITEABLE != 0)
    )
