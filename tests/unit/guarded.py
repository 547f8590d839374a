"""Memory for tests of kernels: at a chosen alignment, between canaries that nobody may touch."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.core import types

_CANARY = 0xA5
_GUARD_BYTES = 256
_ALIGNMENT = 4096


class Guarded:
    """`n_bytes` bytes that start `offset` bytes after a page boundary; at first all are canaries."""

    def __init__(self, n_bytes: int, offset: int = 0) -> None:
        self._memory = np.full(n_bytes + offset + 2 * _GUARD_BYTES + _ALIGNMENT, _CANARY, np.uint8)
        self._start = -(self._memory.ctypes.data + _GUARD_BYTES) % _ALIGNMENT + _GUARD_BYTES + offset
        self._end = self._start + n_bytes
        self.address = self._memory.ctypes.data + self._start

    @classmethod
    def of(cls, array: npt.NDArray[Any], offset: int = 0) -> Guarded:
        """A copy of `array`."""
        memory = cls(array.nbytes, offset)
        memory.bytes[:] = np.frombuffer(array.tobytes(), np.uint8)
        return memory

    @property
    def bytes(self) -> npt.NDArray[np.uint8]:
        return self._memory[self._start : self._end]

    def read(self, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The contents, copied, after a check of the canaries."""
        assert (self._memory[: self._start] == _CANARY).all(), "bytes before the destination were written"
        assert (self._memory[self._end :] == _CANARY).all(), "bytes after the destination were written"
        return np.frombuffer(self.bytes.tobytes(), dtype)


def bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array's elements as unsigned integers, for comparisons bit for bit."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def assembly(function: Any, n_parameters: int) -> str:
    """The machine code of a @device function of int64 parameters.

    Of kernels that come from the cache numba shows none, so this compiles a caller anew.
    """

    @numba.njit
    def caller(parameters: Any) -> Any:
        return function(*parameters)

    caller.compile((types.UniTuple(types.int64, n_parameters),))
    (text,) = caller.inspect_asm().values()
    assert isinstance(text, str)
    return text
