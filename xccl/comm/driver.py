"""What all communicators of a rank share in send and receive: its requests, and who drives them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..kernels import driver as kernels, operations
from ..layout import ring as layout
from ..layout.ring import CHANNEL, DRIVER, KIND_COPY
from .channel import Channel, OperationPool
from .core import Core
from .dma import DmaEngine

if TYPE_CHECKING:
    from .p2p import Request

_COUNT = layout.DR_COUNT // 8
_ENDED = layout.DR_ENDED // 8
_REQUESTS = layout.DR_REQUESTS // 8
_LOCK = layout.CH_LOCK // 8


class Driver:
    """The requests of a rank, in whatever communicator, and the record that leads the kernels to all its channels.

    Args:
        core: of the session.

    Attributes:
        address: where the record is.
        pool: records of operations.
        requests: those that were not collected, by the address of their record.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._record = np.zeros(DRIVER.size_bytes // 8, np.int64)
        self._words = self._record.data
        self.address: int = self._record.ctypes.data
        self.pool = OperationPool()
        self.requests: dict[int, Request] = {}
        self._states: list[npt.NDArray[np.int64]] = []
        self._unused_states: list[npt.NDArray[np.int64]] = []
        self._table = np.zeros(16, np.int64)
        self._old_tables: list[npt.NDArray[np.int64]] = []
        self._words[layout.DR_CONTROL // 8] = core.control
        self._words[layout.DR_CHANNELS // 8] = self._table.ctypes.data
        self._copies: Channel | None = None
        self._engine: DmaEngine | None = None

    # -- channels ---------------------------------------------------------------------------------------------------

    @property
    def copies(self) -> Channel:
        """The channel of the rank's own copies."""
        if self._copies is None:
            self._copies = Channel(self._core, self, self._core.rank, kind=KIND_COPY)
        return self._copies

    def take_state(self) -> npt.NDArray[np.int64]:
        """The record of a new channel: zeros, and known to the kernels, which find no operation in it."""
        if self._unused_states:
            return self._unused_states.pop()
        state = np.zeros(CHANNEL.size_bytes // 8, np.int64)
        count = self._words[_COUNT]
        if count == len(self._table):
            # A DMA engine may be reading the old table: it stays.
            self._old_tables.append(self._table)
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
            self._words[layout.DR_CHANNELS // 8] = self._table.ctypes.data
        self._states.append(state)
        self._table[count] = state.ctypes.data
        self._words[_COUNT] = count + 1
        return state

    def give_back_state(self, state: npt.NDArray[np.int64]) -> None:
        """A channel without operations is not used any more. Its record stays where a DMA engine may look at it."""
        while state[_LOCK]:
            time.sleep(0)
        state[:_LOCK] = 0  # the lock stays the engine's, should it come just now
        state[_LOCK + 1 :] = 0
        self._unused_states.append(state)

    # -- requests ---------------------------------------------------------------------------------------------------

    def add(self, address: int, request: Request) -> None:
        """A request is under way."""
        if not self.requests:
            self._core.progress = self.progress
            self._words[_REQUESTS] = 1
        self.requests[address] = request

    def remove(self, address: int) -> None:
        """A request was collected."""
        del self.requests[address]
        if not self.requests:
            self._words[_REQUESTS] = 0
            self._core.progress = None

    def progress(self) -> int:
        """Give every request a chance, and wait for nothing; ABORTED if the session is over."""
        status = int(kernels.progress.call(self.address))
        self.collect()
        return status

    @cached_property
    def _next_ended(self) -> Callable[[], int]:
        """Takes an operation off the list of those that have ended; its address, or 0 if there is none."""
        return operations.next_ended.bind(self.address)

    def collect(self) -> None:
        """Let the owners of all operations that have ended take note of it."""
        while self._words[_ENDED]:
            request = self.requests.get(self._next_ended())
            # A signal's exception may come between the post of an operation and `add`: nobody waits for that one.
            if request is not None:
                request.owner.end(request)

    # -- the DMA engine ---------------------------------------------------------------------------------------------

    def start_engine(self) -> None:
        """Make the DMA engine, unless there is one."""
        if self._engine is None:
            self._words[layout.DR_HAS_ENGINE // 8] = 1
            self._engine = DmaEngine(self.address, self._core.rank)

    def stop_engine(self) -> None:
        """End the DMA engine, if there is one."""
        if self._engine is not None:
            self._engine.stop()
