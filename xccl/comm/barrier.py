"""The barrier of one communicator: a count at rank 0, and a release word in each segment (`kernels.onesided`)."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from ..kernels import collective_calls, onesided, words
from ..kernels.calls import NOT_TAKEN
from ..layout import calls as layout
from ..layout.calls import BARRIER
from . import traced
from .callstate import bind_to
from .core import Core, Waiting, require_timeout


class BarrierState:
    """What one rank knows of it.

    Args:
        core: waits of this rank.
        arrivals: address of the word at rank 0 that counts arrivals.
        releases: int64 [ranks], addresses of the release words of all ranks.

    Attributes:
        direct: takes a deadline (None); does all that `wait` does and returns 0, or leaves the rest to it.
    """

    def __init__(self, core: Core, arrivals: int, releases: npt.NDArray[np.int64]) -> None:
        self._core = core
        self._arrivals = arrivals
        self._releases = np.ascontiguousarray(releases)
        self._own = int(releases[core.rank])
        self._record = np.zeros(BARRIER.size_bytes // 8, np.int64)
        self._address: int = self._record.ctypes.data
        for offset, value in {
            layout.BA_CALLS: core.calls.address,
            layout.BA_ARRIVALS: arrivals,
            layout.BA_RELEASES: self._releases.ctypes.data,
        }.items():
            self._record[offset // 8] = value
        self.direct = bind_to(self._address, collective_calls.barrier, NOT_TAKEN)

    def wait(self, timeout_s: float | None) -> None:
        """See `Communicator.barrier`."""
        core = self._core
        began_ns = core.calls.began_ns()
        core.require_open()
        timeout_s = core.op_timeout_s if timeout_s is None else require_timeout(timeout_s)
        epoch = self._number(layout.BA_EPOCH) + 1
        call = onesided.barrier.call
        args = (self._address, core.size, core.controls_address, core.control, self._own, epoch)

        def describe() -> Waiting:
            # Once all have arrived, one that was released earlier than this rank may have left: it is not missed.
            arrivals = int(words.load(self._arrivals)) - (epoch - 1) * core.size
            return Waiting("barrier", epoch, expected=core.size, seen=arrivals, everyone=arrivals < core.size)

        operation = None if core.trace is None else core.trace.start("barrier", epoch)
        arrives = self._number(layout.BA_ARRIVED) != epoch
        core.run(lambda until_ns: int(call(*args, until_ns)), describe, timeout_s, began_ns)
        if operation is not None:
            released = arrives and self._number(layout.BA_RELEASED) == epoch
            operation.overlap("arrive", "release", "await-release")
            operation.finish(partial(traced.barrier, ranks=core.size, arrived=arrives, released=released))

    def _number(self, word: int) -> int:
        return int(self._record[word // 8])
