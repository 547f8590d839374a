"""Compiling many kernels on all cores: children compile into the disk cache, and the parent loads from there.

A child is a fork that does nothing else, so it is made only while the process has a single thread. It compiles what it
takes from a pipe, the largest first, so that none begins with a large one when all others are done. What a child leaves
undone, because it fails or takes too long, the parent compiles itself: it sees the errors, too.
"""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

_INDEX: Final = struct.Struct("=H")
#: Fewer than this are not worth a fork.
_FEWEST: Final = 4
_MOST_CHILDREN: Final = 8
_PAUSE_S: Final = 0.01
_PATIENCE_S: Final = 300.0


def compile_together(
    functions: Sequence[Callable[..., Any]],
    compile_one: Callable[[int], None],
    raise_if_interrupted: Callable[[], None],
) -> None:
    """Run `compile_one(i)` for each function in some child, as far as that is possible.

    Args:
        functions: the Python functions, for their size.
        compile_one: compiles number i, into the cache.
        raise_if_interrupted: called now and then; if it raises, the children end.
    """
    cores = min(len(os.sched_getaffinity(0)), _MOST_CHILDREN)
    if len(functions) < _FEWEST or cores < 2 or threading.active_count() > 1:
        return
    order = sorted(range(len(functions)), key=lambda i: -_size(functions[i], set()))
    queue, filler = os.pipe()
    children: list[int] = []
    try:
        os.write(filler, b"".join(map(_INDEX.pack, order)))
        os.close(filler)
        for _ in range(cores):
            child = os.fork()
            if child == 0:
                _work(queue, compile_one)
            children.append(child)
        deadline = time.monotonic() + _PATIENCE_S
        while children and time.monotonic() < deadline:
            raise_if_interrupted()
            children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
            time.sleep(_PAUSE_S)
    finally:
        os.close(queue)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _work(queue: int, compile_one: Callable[[int], None]) -> None:
    """The life of a child."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
        while message := os.read(queue, _INDEX.size):
            compile_one(_INDEX.unpack(message)[0])
        status = 0
    finally:
        os._exit(status)


def _size(function: Any, seen: set[Any]) -> int:
    """Bytes of its code, and of that of all compiled functions that it calls."""
    code = function.__code__
    if code in seen:
        return 0
    seen.add(code)
    callees = (getattr(function.__globals__.get(name), "py_func", None) for name in code.co_names)
    return len(code.co_code) + sum(_size(callee, seen) for callee in callees if callee is not None)
