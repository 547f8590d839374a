"""Data of benchmarks: it follows from (seed, rank, round) alone, so that every rank knows what its peers have sent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from xccl.cli.options import BenchOptions
from xccl.layout.dtypes import CODE_BY_NAME, DTYPE_OF

Array = npt.NDArray[Any]

#: Rounds of data: what is timed, and what is checked. The check must not pass on what the timed loop left behind.
TIMED: Final = 0
CHECKED: Final = 1

_POOL_ROWS: Final = 1 << 18


_Data = TypeVar("_Data")
_shared: dict[tuple[object, BenchOptions], Any] = {}
_sharing = threading.Lock()


def shared(make: Callable[[BenchOptions], _Data], options: BenchOptions) -> _Data:
    """The data of a run: one object in a process, whose ranks may be hundreds of threads."""
    with _sharing:
        if (make, options) not in _shared:
            _shared.clear()
            _shared[make, options] = make(options)
        found: _Data = _shared[make, options]
        return found


def dtype_of(options: BenchOptions) -> np.dtype[Any]:
    """The NumPy dtype of `--dtype`."""
    return DTYPE_OF[CODE_BY_NAME[options.dtype]]


def random_bits(count: int, dtype: np.dtype[Any], *key: int) -> Array:
    """[count] elements of random bits, NaN and all: moving data must keep each of them."""
    return np.random.default_rng(key).integers(0, 256, count * dtype.itemsize, np.uint8).view(dtype)


def count_wrong(got: Array | None, want: Array | None) -> int:
    """Elements of `got` whose bits differ from `want`; all of them if dtype or shape do."""
    if got is None or want is None:
        return 0 if got is want else 1
    if got.dtype != want.dtype or got.shape != want.shape:
        return max(got.size, want.size, 1)
    if got.dtype.names is not None:
        return int(np.count_nonzero(got != want))
    bits = f"u{got.dtype.itemsize}"
    return int(np.count_nonzero(np.ascontiguousarray(got).view(bits) != np.ascontiguousarray(want).view(bits)))


def clear(*outputs: Array | None) -> None:
    """Overwrite earlier outputs, so that a check cannot pass on stale results."""
    for output in outputs:
        if output is not None and output.flags.writeable:
            output[...] = np.zeros((), output.dtype)


class TokenPool:
    """Tokens of any rank, for the price of a copy.

    Each token is a window into one pool of normal numbers, at a place of its own. So a rank can make the tokens of all
    ranks, which it needs to check what it received, without drawing ranks * tokens * hidden random numbers.
    """

    def __init__(self, hidden: int, dtype: np.dtype[Any], seed: int) -> None:
        numbers = np.random.default_rng((seed, 0)).standard_normal(_POOL_ROWS + hidden, np.float32)
        self._windows = np.lib.stride_tricks.sliding_window_view(numbers.astype(dtype), hidden)
        self._seed = seed

    def tokens(self, rank: int, data_round: int, count: int) -> Array:
        """[count, hidden] tokens of one rank in one round."""
        return self.at(self.places(rank, data_round, count))

    def places(self, rank: int, data_round: int, count: int) -> Array:
        """int64 [count]: where those tokens are in the pool."""
        return np.random.default_rng((self._seed, 1, rank, data_round)).integers(0, _POOL_ROWS, count)

    def at(self, places: Array) -> Array:
        """[count, hidden] the tokens at these places."""
        return np.ascontiguousarray(self._windows[places])
