"""How kernels are declared, compiled once, and cached.

`@kernel("int64(int64, int64)")` declares an entry point that Python calls; `@device` declares a function that only
other kernels call (the terms are CUDA's). Nothing is compiled at import: `warm()` compiles every declared kernel, or
loads it from the disk cache, and is called once by the parent before ranks start, so that ranks forked from it start
warm.

The cache directory's name carries a digest of *all* kernel sources: numba keys its cache on the kernel's own file
only, and would miss a change of a helper in another one. Two processes that warm at the same time take turns under
a file lock, since eight processes that compile the same take four times as long as one. Into an empty cache, children
of the one that warms compile together (`_together`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numba

from ._together import compile_together

#: Options of every kernel. No fast-math: results must be the same bits on every path and machine (no FMA contraction).
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}


class Compiled(Protocol):
    """Something that is declared at import and compiled by `warm`."""

    @property
    def function(self) -> Callable[..., Any]:
        """What it is compiled from."""

    @property
    def is_compiled(self) -> bool:
        """Is it?"""

    def compile(self) -> None:
        """Compile, or load from the cache."""


_DECLARED: list[Compiled] = []
_LEFT_OUT: set[str] = set()
_DEVICE_NAMES: set[str] = set()
#: Threads of the local fabric may make the first call of a kernel at the same time.
WARMING = threading.RLock()


def _source_digest() -> str:
    """A digest of everything that the compiled code depends on: kernel sources, layouts, numba and Python versions."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256(f"{numba.__version__} {platform.python_version()}".encode())
    for folder in (package, package.parent / "layout"):
        for source in sorted(folder.glob("*.py")):
            digest.update(source.name.encode())
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def cache_dir() -> Path:
    """The directory of compiled kernels: `$XCCL_CACHE_DIR`, else the user's cache, else a private temporary one.

    numba's index files are pickles, so the directory must not be writable for others.
    """
    for base in _cache_bases():
        path = base / f"kernels-{_DIGEST}"
        with contextlib.suppress(OSError):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(path, os.W_OK) and all(_is_private(p) for p in (base, path)):
                return path
    return Path(tempfile.mkdtemp(prefix="xccl-kernels-"))


def _cache_bases() -> Iterator[Path]:
    if root := os.environ.get("XCCL_CACHE_DIR"):
        yield Path(root)
        return
    with contextlib.suppress(RuntimeError):  # no home directory
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xccl"
    yield Path(tempfile.gettempdir()) / f"xccl-{os.getuid()}"


def _is_private(path: Path) -> bool:
    stat = path.lstat()
    return stat.st_uid in (0, os.getuid()) and not stat.st_mode & 0o022


def declare(entry_point: Compiled) -> None:
    """Have `warm` compile it."""
    _DECLARED.append(entry_point)


_DIGEST = _source_digest()
_CACHE_DIR = cache_dir()


@contextlib.contextmanager
def numba_cache_here() -> Iterator[None]:
    """Let what is declared in the block be cached in the directory of this module."""
    # numba reads CACHE_DIR while it decorates; the user's own kernels must keep theirs.
    saved = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(_CACHE_DIR)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = saved


class Kernel:
    """A compiled entry point with one signature.

    `kernel.call` is the bare entry point: it skips numba's type dispatch (about 0.2 us a call) and checks nothing, so
    callers validate first. It exists after `compile()`; calling the object itself compiles on demand.
    """

    __slots__ = ("call", "dispatcher", "name", "signature")

    def __init__(self, function: Callable[..., Any], signature: str) -> None:
        self.name = function.__name__
        self.signature = signature
        with numba_cache_here():
            self.dispatcher = numba.njit(cache=True, **OPTIONS)(function)
        self.call: Callable[..., Any] = self._first_call
        declare(self)

    def _first_call(self, *args: Any) -> Any:
        self.compile()
        return self.call(*args)

    @property
    def function(self) -> Callable[..., Any]:
        """What it is compiled from."""
        function: Callable[..., Any] = self.dispatcher.py_func
        return function

    @property
    def is_compiled(self) -> bool:
        """Is `call` the bare entry point?"""
        return bool(self.dispatcher.overloads)

    def compile(self) -> None:
        """Compile, or load from the cache, and bind `call`."""
        with WARMING:
            if self.is_compiled:
                return
            self.dispatcher.compile(self.signature)
            (overload,) = self.dispatcher.overloads.values()
            self.call = overload.entry_point

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    @property
    def address(self) -> int:
        """Of a C function that does the same, for other kernels (`fastcall.call_kernel`)."""
        self.compile()
        (overload,) = self.dispatcher.overloads.values()
        address: int = overload.library.get_pointer_to_function(overload.fndesc.llvm_cfunc_wrapper_name)
        return address


def kernel(signature: str) -> Callable[[Callable[..., Any]], Kernel]:
    """Declare a kernel with a numba signature such as `"int64(int64, int64)"`."""

    def decorate(function: Callable[..., Any]) -> Kernel:
        return Kernel(function, signature)

    return decorate


def device(function: Callable[..., Any]) -> Any:
    """Declare a function that only kernels call; LLVM inlines it where that pays.

    Its qualified name must be its own. The names of compiled functions have a number in them that counts what a process
    has compiled, so of two functions with one name, from kernels that two processes have put into the cache, both may
    have the same number: then whoever loads both kernels calls one function for the other.

    Raises:
        ImportError: there is another function with this name.
    """
    name = f"{function.__module__}.{function.__qualname__}"
    if name in _DEVICE_NAMES:
        raise ImportError(f"two device functions are called {name}; see `named`")
    _DEVICE_NAMES.add(name)
    return numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)(function)


def leave_out(modules: Iterable[str]) -> None:
    """Have `warm` pass over the kernels of these modules from now on: whoever calls one of them compiles it then.

    For a process that knows what its ranks will do, such as a command. Direct calls among them are not taken at all.
    """
    _LEFT_OUT.clear()
    _LEFT_OUT.update(modules)


def is_left_out(item: Compiled) -> bool:
    """Does `warm` pass over it?"""
    return item.function.__module__.rpartition(".")[2] in _LEFT_OUT


def named(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a function that is made for several types a name of its own; below `@device`."""

    def rename(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__name__ = function.__qualname__ = name
        return function

    return rename


def warm() -> None:
    """Compile or load every declared kernel that is not left out, once per process; across processes one at a time.

    Ctrl-C takes effect between two kernels: inside of LLVM's callbacks a KeyboardInterrupt could be swallowed.
    """
    with WARMING:
        pending = [k for k in _DECLARED if not k.is_compiled and not is_left_out(k)]
        if not pending:
            return
        with open(_CACHE_DIR / "lock", "w") as lock, _interrupts_held() as raise_if_interrupted:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    raise_if_interrupted()
                    time.sleep(0.01)
            if not any(_CACHE_DIR.glob("*.nbi")):
                compile_together([k.function for k in pending], lambda i: pending[i].compile(), raise_if_interrupted)
            for item in pending:
                item.compile()
                raise_if_interrupted()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[Callable[[], None]]:
    """Note SIGINT instead of raising; the function that is given raises what was noted."""
    noted: list[int] = []

    def raise_if_interrupted() -> None:
        if noted:
            raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield raise_if_interrupted  # signals do not come here, or are somebody else's business
        return
    signal.signal(signal.SIGINT, lambda signum, _frame: noted.append(signum))
    try:
        yield raise_if_interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    raise_if_interrupted()
