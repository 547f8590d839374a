"""The interface to global memory: what every fabric offers to the operations above it.

A fabric is one rank's view of the segments of all ranks. On the fabrics here each segment is mapped, so peers' memory
is plain addresses; a fabric without load/store access to peers would raise FabricError from `base` and `view`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import FabricError
from ..kernels import wait, words
from ..layout.record import align_up
from ..layout.ring import REACH_NONE
from ..layout.segment import (
    ABORT_DIED,
    CONTROL_OFFSET,
    CTL_ABORT,
    CTL_LAST_WORDS,
    CTL_PAUSES,
    CTL_STATE,
    CTL_YIELDS,
    LAST_WORDS_BYTES,
    PAGE_BYTES,
    STATE_LEFT,
    Geometry,
)


class Fabric(ABC):
    """Global memory, seen by one rank.

    Attributes:
        rank: this rank.
        geometry: sizes and offsets of every segment.
        segments: int64 [ranks], the address at which each rank's segment is mapped here.
        controls: int64 [ranks], the addresses of their control areas.
        processes: int64 [ranks], the processes that must be asked for the private memory of each; 0: it is loaded.
        reached: how all other ranks reach the private memory of this one: one of the REACH_ codes.
    """

    #: Name on the command line and in reports.
    name: ClassVar[str]

    def __init__(self, rank: int, geometry: Geometry) -> None:
        self.rank = rank
        self.geometry = geometry
        self.segments: npt.NDArray[np.int64] = np.zeros(geometry.ranks, np.int64)
        self.controls: npt.NDArray[np.int64] = np.zeros(geometry.ranks, np.int64)
        self.processes: npt.NDArray[np.int64] = np.zeros(geometry.ranks, np.int64)
        self.reached = REACH_NONE

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.geometry.ranks

    @property
    def segment_bytes(self) -> int:
        """Size of a segment."""
        return self.geometry.total_bytes

    @property
    def control(self) -> int:
        """Address of the own control area."""
        return int(self.controls[self.rank])

    @abstractmethod
    def view(self, rank: int, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes of a rank's segment as a NumPy view, which keeps the mapping alive."""

    @abstractmethod
    def commit(self, rank: int, offset: int, n_bytes: int) -> None:
        """Make sure that a part of a rank's segment is backed by memory, before anyone touches it.

        Raises:
            CapacityError: the memory is not there; says how much is needed and free.
        """

    @abstractmethod
    def release(self, offset: int, n_bytes: int) -> None:
        """Give the memory behind a part of the own segment back, as far as it fills whole pages; it reads as 0 then."""

    @abstractmethod
    def dead_peers(self) -> list[tuple[int, str]]:
        """Ranks that ended without leaving the session, with how: killed, exited, zombies included."""

    @abstractmethod
    def close(self) -> None:
        """Give up this rank's view. Views of memory that are still held stay valid."""

    def _mapped(self, bases: list[int], pauses: int, yields: int) -> None:
        """Fill the address tables, and set this rank's wait policy."""
        self.segments[:] = bases
        self.controls[:] = self.segments + CONTROL_OFFSET
        words.store(self.control + CTL_PAUSES, pauses)
        words.store(self.control + CTL_YIELDS, yields)

    # -- life and death of ranks ------------------------------------------------------------------------------------

    def state(self, rank: int) -> int:
        """STATE_RUNNING, STATE_LEFT or STATE_FAILED."""
        return int(words.load(int(self.controls[rank]) + CTL_STATE))

    def count_left(self) -> int:
        """Number of other ranks that have left the session."""
        return int(words.count_equal.call(self.controls.ctypes.data, self.ranks, CTL_STATE, STATE_LEFT, self.rank))

    def leave(self) -> None:
        """Say that this rank has done its work: its end is no failure. Wakes whoever waits for it in vain."""
        words.store(self.control + CTL_STATE, STATE_LEFT)
        wait.ring_all.call(self.controls.ctypes.data, self.ranks)

    def abort(self, kind: int, culprit: int, last_words: str = "") -> None:
        """End the session: set the abort word of every rank that has none yet, and wake it.

        Args:
            kind: one of the ABORT_ constants.
            culprit: the rank that failed.
            last_words: what to tell the others, kept in this rank's segment.
        """
        if last_words:
            text = last_words.encode(errors="replace")[: LAST_WORDS_BYTES - 1]
            area = self.view(self.rank, CONTROL_OFFSET + CTL_LAST_WORDS, LAST_WORDS_BYTES)
            area[: len(text)] = np.frombuffer(text, np.uint8)
            area[len(text) :] = 0
        for control in self.controls:
            wait.abort(int(control), kind << 32 | culprit)

    def abort_word(self) -> tuple[int, int] | None:
        """Kind and culprit, when the session was aborted."""
        word = int(words.load(self.control + CTL_ABORT))
        return (word >> 32, word & 0xFFFFFFFF) if word else None

    def last_words(self, rank: int) -> str:
        """What a rank said when it failed."""
        area = self.view(rank, CONTROL_OFFSET + CTL_LAST_WORDS, LAST_WORDS_BYTES)
        return bytes(area).split(b"\0", 1)[0].decode(errors="replace")

    def check_peers(self) -> None:
        """Abort the session if a peer has died; the abort word then tells everyone, this rank included."""
        for rank, reason in self.dead_peers():
            self.abort(ABORT_DIED, rank, f"rank {rank} {reason}")
            return

    @abstractmethod
    def private_reach(self, peer: int) -> tuple[int, int]:
        """How the private memory of a rank is reached from here: one of the REACH_ codes, and its process."""

    @abstractmethod
    def keep(self, array: npt.NDArray[Any]) -> None:
        """An operation was given up while other ranks may still read this array: where they load it, let it stay."""

    def read_control(self, offset: int) -> int:
        """A word of the own control area."""
        return int(words.load(self.control + offset))

    def require_peer(self, rank: int) -> None:
        """Raise FabricError when `rank`'s memory cannot be addressed from here."""
        if not self.segments[rank]:
            raise FabricError(f"the memory of rank {rank} is not mapped in rank {self.rank}", rank=self.rank, peer=rank)


def whole_pages(offset: int, n_bytes: int) -> tuple[int, int]:
    """Start and length of the whole pages within a range."""
    start = align_up(offset, PAGE_BYTES)
    return start, max(0, (offset + n_bytes) // PAGE_BYTES * PAGE_BYTES - start)


def wait_policy(ranks: int, cores: int) -> tuple[int, int]:
    """Pauses and yields before a waiting rank sleeps, by ranks per core.

    With a core for each rank a short spin catches most messages. With more ranks than cores a spin only keeps the peer
    off the core; a few yields hand it over, and with very many ranks even those are mostly wasted.
    """
    if ranks <= cores:
        return 2000, 200
    if ranks <= 8 * cores:
        return 0, 20
    return 0, 2
