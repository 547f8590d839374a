"""Numbers and arrays of Python, read by compiled code.

What is read of an array are the first fields of `PyArrayObject` and of `PyArray_Descr`. They have stood at these
places since NumPy 1.7 (of the dtype, since NumPy 2.0), and every compiled extension module relies on them, since
NumPy's macros for them are inlined. Still `is_known` checks them on real objects once, and where they differ nothing
here is used.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core import types

from ..layout.calls import CA_TYPE_ARRAY, CA_TYPE_INT
from ._jit import device
from .atomics import load_i32, load_i64, store_i64

_HEAD_BYTES = object.__basicsize__
_OBJECT_TYPE = _HEAD_BYTES - 8
_ARRAY_DATA = _HEAD_BYTES
_ARRAY_NDIM = _HEAD_BYTES + 8
_ARRAY_SHAPE = _HEAD_BYTES + 16
_ARRAY_DTYPE = _HEAD_BYTES + 40
_ARRAY_FLAGS = _HEAD_BYTES + 48
_DTYPE_FLAGS = _HEAD_BYTES + 16
_DTYPE_ITEM_BYTES = _HEAD_BYTES + 24

_C_CONTIGUOUS = 0x0001
_WRITEABLE = 0x0400
_HAS_OBJECT = 0x01

_as_int64: Any = types.ExternalFunction("PyLong_AsLongLong", types.int64(types.int64))
_new_int: Any = types.ExternalFunction("PyLong_FromLongLong", types.int64(types.int64))
_new_reference: Any = types.ExternalFunction("Py_IncRef", types.void(types.int64))
_drop_reference: Any = types.ExternalFunction("Py_DecRef", types.void(types.int64))
_allocate: Any = types.ExternalFunction("PyType_GenericAlloc", types.int64(types.int64, types.int64))
_error_occurred: Any = types.ExternalFunction("PyErr_Occurred", types.int64())
_clear_error: Any = types.ExternalFunction("PyErr_Clear", types.void())

#: A new reference to an int of that value.
new_int = _new_int
#: One reference less to an object. May run any code of Python's.
drop_reference = _drop_reference


@device
def own_state(function_self: int) -> int:
    """The address that a function was bound to."""
    return _as_int64(function_self)


@device
def argument(args: int, index: int) -> int:
    """The address of an argument."""
    return load_i64(args + 8 * index)


@device
def same_object(found: int) -> int:
    """A new reference to an object that exists."""
    _new_reference(found)
    return found


@device
def object_like(template: int, size_bytes: int) -> int:
    """A new object with the same in all its `__slots__`, which are all that it has; 0 with MemoryError set."""
    made = _allocate(load_i64(template + _OBJECT_TYPE), 0)
    if made != 0:
        for offset in range(_HEAD_BYTES, size_bytes, 8):
            store_i64(made + offset, same_object(load_i64(template + offset)))
    return made


@device
def set_slot(place: int, found: int) -> None:
    """Let the slot at this address refer to an object, and no longer to what it did. May run any code of Python's."""
    before = load_i64(place)
    store_i64(place, same_object(found))
    _drop_reference(before)


@device
def int_value(found: int) -> int:
    """The value of an object that is an `int` of 64 bits."""
    return _as_int64(found)


@device
def as_int(calls: int, found: int) -> tuple[bool, int]:
    """Whether an object is an `int` of 64 bits, and its value."""
    if load_i64(found + _OBJECT_TYPE) != load_i64(calls + CA_TYPE_INT):
        return False, 0
    value = _as_int64(found)
    if value == -1 and _error_occurred() != 0:
        _clear_error()
        return False, 0
    return True, value


@device
def as_index(calls: int, found: int, low: int, high: int) -> int:
    """The value of an `int` from `low` (0 at least) to `high`; -1 if it is anything else."""
    fits, value = as_int(calls, found)
    return value if fits and low <= value <= high else -1


@device
def array_bytes(calls: int, found: int, writable: bool) -> int:
    """Bytes of a C-contiguous array without Python objects; -1 if it is anything else."""
    if load_i64(found + _OBJECT_TYPE) != load_i64(calls + CA_TYPE_ARRAY):
        return -1
    needed = _C_CONTIGUOUS | _WRITEABLE if writable else _C_CONTIGUOUS
    if load_i32(found + _ARRAY_FLAGS) & needed != needed:
        return -1
    dtype = load_i64(found + _ARRAY_DTYPE)
    if load_i64(dtype + _DTYPE_FLAGS) & _HAS_OBJECT != 0:
        return -1
    n_bytes = load_i64(dtype + _DTYPE_ITEM_BYTES)
    shape = load_i64(found + _ARRAY_SHAPE)
    for i in range(load_i32(found + _ARRAY_NDIM)):
        n_bytes *= load_i64(shape + 8 * i)
    return n_bytes


@device
def array_address(found: int) -> int:
    """Address of an array's first element."""
    return load_i64(found + _ARRAY_DATA)


@device
def array_rows(found: int) -> int:
    """Length of an array's first dimension; -1 if it has none."""
    return load_i64(load_i64(found + _ARRAY_SHAPE)) if load_i32(found + _ARRAY_NDIM) > 0 else -1


@device
def array_dims(found: int) -> int:
    """Number of an array's dimensions."""
    return load_i32(found + _ARRAY_NDIM)


@device
def array_row_bytes(found: int) -> int:
    """Bytes of each element of an array's first dimension."""
    n_bytes = load_i64(load_i64(found + _ARRAY_DTYPE) + _DTYPE_ITEM_BYTES)
    for i in range(1, load_i32(found + _ARRAY_NDIM)):
        n_bytes *= load_i64(load_i64(found + _ARRAY_SHAPE) + 8 * i)
    return n_bytes


@device
def have_same_rows(first: int, second: int) -> bool:
    """Have two arrays of one dtype as many dimensions, and the same but for the first one?"""
    n_dims = load_i32(first + _ARRAY_NDIM)
    if load_i32(second + _ARRAY_NDIM) != n_dims:
        return False
    for i in range(1, n_dims):
        if load_i64(load_i64(first + _ARRAY_SHAPE) + 8 * i) != load_i64(load_i64(second + _ARRAY_SHAPE) + 8 * i):
            return False
    return True


@device
def array_dtype(found: int) -> int:
    """Address of an array's dtype object."""
    return load_i64(found + _ARRAY_DTYPE)


def slot_offset(found: object, name: str) -> int:
    """Where in an object the reference of a slot is, in bytes, if no other slot of it refers to the same."""
    words = (ctypes.c_int64 * (type(found).__basicsize__ // 8)).from_address(id(found))
    return 8 * list(words).index(id(getattr(found, name)), _HEAD_BYTES // 8)


def is_known() -> bool:
    """Do arrays, dtypes and types of this interpreter lie in memory as this module reads them?"""
    samples = [np.zeros((3, 5), np.float64), np.zeros(7, "V12"), np.zeros((2, 2), np.int16).T, np.zeros(1, object)]
    samples[0].flags.writeable = False
    return _HEAD_BYTES == 16 and all(map(_is_read_right, samples))


def _is_read_right(array: npt.NDArray[Any]) -> bool:
    def word(address: int) -> int:
        return ctypes.c_int64.from_address(address).value

    def half(address: int) -> int:
        return ctypes.c_int32.from_address(address).value

    at, dtype = id(array), id(array.dtype)
    flags = half(at + _ARRAY_FLAGS)
    return (
        word(at + _OBJECT_TYPE) == id(np.ndarray)
        and word(at + _ARRAY_DATA) == array.ctypes.data
        and half(at + _ARRAY_NDIM) == array.ndim
        and tuple(word(word(at + _ARRAY_SHAPE) + 8 * i) for i in range(array.ndim)) == array.shape
        and word(at + _ARRAY_DTYPE) == dtype
        and bool(flags & _C_CONTIGUOUS) == array.flags.c_contiguous
        and bool(flags & _WRITEABLE) == array.flags.writeable
        and word(dtype + _DTYPE_ITEM_BYTES) == array.itemsize
        and bool(word(dtype + _DTYPE_FLAGS) & _HAS_OBJECT) == array.dtype.hasobject
    )
