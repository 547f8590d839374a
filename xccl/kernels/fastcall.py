"""Entry points that the interpreter calls without any wrapper: functions of CPython's METH_FASTCALL convention.

numba's own entry points take 40 to 110 ns a call, most of it for a tuple of arguments and for turning each into a
number, and they know nothing of NumPy arrays but a slow conversion; with the Python code that checks an array and finds
its address, a call costs a microsecond. A function here gets the addresses of its argument objects, reads numbers and
array headers by itself (`kernels.objects`), and costs 20 to 30 ns: as much as the fences of a short message.

    @fastcall
    def double(self, args, count): ...       # int64 addresses; returns the address of a new reference

    call = double.bind(state)                # `self` will be the Python int `state`: an address of a record
    call(21)

Such a function holds the interpreter's lock, and gives it up by `release_lock` before it waits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ._jit import OPTIONS, WARMING, declare, numba_cache_here

_METH_FASTCALL = 0x0080


class _Definition(ctypes.Structure):
    """`struct PyMethodDef`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


_new_function = ctypes.pythonapi.PyCFunction_NewEx
_new_function.restype = ctypes.py_object
_new_function.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p]


class FastCall:
    """A function for the interpreter, compiled like a kernel; its first argument is what it is bound to."""

    __slots__ = ("_callback", "_definition", "function", "name")

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__
        self.function = function
        self._callback: Any = None
        self._definition: Any = None
        declare(self)

    @property
    def is_compiled(self) -> bool:
        """Is there machine code?"""
        return self._callback is not None

    def compile(self) -> None:
        """Compile, or load from the cache."""
        with WARMING, numba_cache_here():
            if self.is_compiled:
                return
            options = {name: value for name, value in OPTIONS.items() if name != "nogil"}
            callback = numba.cfunc("int64(int64, int64, int64)", cache=True, **options)(self.function)
            self._definition = _Definition(self.name.encode(), callback.address, _METH_FASTCALL, None)
            self._callback = callback

    def bind(self, state: int) -> Callable[..., Any]:
        """A builtin function, for calls with positional arguments, that works on the record at address `state`."""
        self.compile()
        function: Callable[..., Any] = _new_function(ctypes.addressof(self._definition), state, None)
        return function


def fastcall(function: Callable[..., Any]) -> FastCall:
    """Declare a function `(self, args, count)` that gets and returns addresses of objects."""
    return FastCall(function)


_save_thread: Any = types.ExternalFunction("PyEval_SaveThread", types.int64())
_restore_thread: Any = types.ExternalFunction("PyEval_RestoreThread", types.void(types.int64))
#: Give up the interpreter's lock, and take it again with what the first has returned.
release_lock, take_lock = _save_thread, _restore_thread


@intrinsic
def call_kernel(typingctx: Any, address: Any, arguments: Any) -> Any:
    """Call a kernel of int64 arguments (a tuple), and an int64 result, by its `address`.

    A large kernel would be compiled again with every function that calls it by name.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        int64 = ir.IntType(64)
        values = [builder.extract_value(args[1], i) for i in range(arguments.count)]
        function_type = ir.FunctionType(int64, [int64] * len(values))
        return builder.call(builder.inttoptr(args[0], function_type.as_pointer()), values)

    return types.int64(types.int64, arguments), codegen
