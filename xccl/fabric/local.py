"""Fabric `local`: ranks are threads of one process, and segments are anonymous memory.

The address space of a segment is reserved without backing (MAP_NORESERVE): pages appear when they are first touched, so
a world of hundreds of ranks costs what it uses.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError
from ..layout.ring import REACH_DIRECT
from ..layout.segment import Geometry
from .base import Fabric, wait_policy, whole_pages

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class LocalWorld:
    """The segments of all ranks of one process. Made once, before the threads of the ranks start."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.dead: dict[int, str] = {}
        #: Arrays that ranks may still read although their owner has given up.
        self.kept: list[npt.NDArray[Any]] = []
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            self.maps = [mmap.mmap(-1, geometry.total_bytes, flags=flags) for _ in range(geometry.ranks)]
        except OSError as error:
            needed_bytes = geometry.ranks * geometry.total_bytes
            raise CapacityError(
                f"cannot reserve {needed_bytes} bytes of address space for {geometry.ranks} segments of "
                f"{geometry.total_bytes} bytes ({error}); lower app_bytes or heap_bytes",
                needed_bytes=needed_bytes,
            ) from error
        self.bases = [np.frombuffer(m, np.uint8, 1).ctypes.data for m in self.maps]

    def mark_dead(self, rank: int, reason: str) -> None:
        """Note that the thread of a rank has ended before its time."""
        self.dead[rank] = reason


class LocalFabric(Fabric):
    """One thread's view of a `LocalWorld`."""

    name = "local"

    def __init__(self, world: LocalWorld, rank: int) -> None:
        super().__init__(rank, world.geometry)
        self._world = world
        self.reached = REACH_DIRECT
        self._mapped(world.bases, *wait_policy(world.geometry.ranks, len(os.sched_getaffinity(0))))

    def view(self, rank: int, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes of a rank's segment."""
        return np.frombuffer(self._world.maps[rank], np.uint8, n_bytes, offset)

    def commit(self, rank: int, offset: int, n_bytes: int) -> None:
        """Nothing to do: anonymous pages appear when touched."""

    def release(self, offset: int, n_bytes: int) -> None:
        """Drop the pages: private ones come back as zeros."""
        start, length = whole_pages(offset, n_bytes)
        if length:
            self._world.maps[self.rank].madvise(mmap.MADV_DONTNEED, start, length)

    def private_reach(self, peer: int) -> tuple[int, int]:
        """By load and store: all ranks are in this process."""
        return REACH_DIRECT, 0

    def keep(self, array: npt.NDArray[Any]) -> None:
        """It lives as long as the world: another thread may be in the middle of reading it."""
        self._world.kept.append(array)

    def dead_peers(self) -> list[tuple[int, str]]:
        """Ranks whose threads were marked dead."""
        return [(rank, reason) for rank, reason in list(self._world.dead.items()) if rank != self.rank]

    def close(self) -> None:
        """Nothing to do: the world is freed with its last view."""
