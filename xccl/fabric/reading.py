"""Is the operating system's kernel slow here at reading another process's memory?

It takes as long as a copy, a microsecond for the call, and then each page: 75 ns on one machine, 240 on another. What
that means for collectives is in `xccl.protocol.collective_cuts`.
"""

from __future__ import annotations

import mmap
import os
from functools import cache
from time import perf_counter_ns
from typing import Final

import numpy as np

from ..kernels import copy, processes

#: Sixteen pages that stay in a core's cache.
_BLOCK_BYTES: Final = 64 << 10
_TRIES: Final = 20
#: Times as long as a copy: 5.0 as measured on the second machine, and about 2.8 by the costs above on the first.
_SLOW_RATIO: Final = 4.0


@cache
def reads_slowly() -> bool:
    """Does reading 64 KiB take the kernel more than four times as long as a copy?

    Measured once, in 0.2 ms, with the own memory: ranks that are forked afterwards inherit the answer. The shortest of
    several tries counts, since ranks may share a core.
    """
    with mmap.mmap(-1, 2 * _BLOCK_BYTES) as memory:
        blocks = np.frombuffer(memory, np.uint8)
        blocks[:] = 0
        target = blocks.ctypes.data
        vectors = np.zeros(4, np.int64)
        read_ns = copy_ns = 1 << 62
        for _ in range(_TRIES):
            start_ns = perf_counter_ns()
            processes.read(os.getpid(), vectors.ctypes.data, target, target + _BLOCK_BYTES, _BLOCK_BYTES)
            middle_ns = perf_counter_ns()
            copy.copy(target, target + _BLOCK_BYTES, _BLOCK_BYTES)
            copy_ns = min(copy_ns, perf_counter_ns() - middle_ns)
            read_ns = min(read_ns, middle_ns - start_ns)
        del blocks  # a buffer that is in use is not unmapped
    return read_ns > _SLOW_RATIO * copy_ns
