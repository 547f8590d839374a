"""Long waits are shown to whoever looks at the segment from outside (`xccl top`): see `layout.status`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ..kernels import status as kernels
from ..layout import status as layout
from ..layout.segment import CONTROL_OFFSET, STATUS_OFFSET

if TYPE_CHECKING:
    from .core import Waiting

#: A wait is shown when it has taken so long, and brought up to date so often at most.
SHOWN_AFTER_NS: Final = 10_000_000
REFRESH_NS: Final = 50_000_000
#: All of a record but its sequence number.
_WORDS: Final = (layout.ST_OPERATION + layout.OPERATION_BYTES) // 8 - 1
_GONE: Final = np.zeros(1, np.int64)


class StatusBoard:
    """The status records of one rank.

    Args:
        control: address of its control area.
        members: which rank of the session each rank is.
        is_shared: can other processes see them? If not, nothing is shown.

    Attributes:
        free: addresses of those that no thread uses.
    """

    def __init__(self, control: int, members: Sequence[int], *, is_shared: bool) -> None:
        first = control - CONTROL_OFFSET + STATUS_OFFSET
        size_bytes = layout.STATUS.size_bytes
        records = range(first, first + layout.STATUS_SLOTS * size_bytes, size_bytes)
        self.free = list(reversed(records)) if is_shared else []
        self.members = np.array(members, np.int64)

    def of_group(self, members: Sequence[int]) -> StatusBoard:
        """The same records for waits of a group with these members, by their ranks in the session."""
        board = copy(self)
        board.members = np.array(members, np.int64)
        return board

    def wait(self, rank: int, deadline_ns: int, timeout_s: float) -> ShownWait:
        """A wait of a thread of `rank` that is to end at `deadline_ns`, by CLOCK_MONOTONIC, after `timeout_s`."""
        return ShownWait(self, rank, deadline_ns - int(timeout_s * 1e9), deadline_ns)


class ShownWait:
    """One wait, which is shown once it has become long, until `end` is called."""

    __slots__ = ("_board", "_next_ns", "_rank", "_record", "_since_ns", "_until_ns")

    def __init__(self, board: StatusBoard, rank: int, since_ns: int, until_ns: int) -> None:
        self._board = board
        self._rank = rank
        self._since_ns, self._until_ns = since_ns, until_ns
        self._next_ns = since_ns + SHOWN_AFTER_NS
        self._record = 0

    def show(self, waiting: Waiting, now_ns: int) -> None:
        """Show what is waited for, if it is time; if more threads wait than there are records, some are not shown."""
        if now_ns < self._next_ns:
            return
        self._next_ns = now_ns + REFRESH_NS
        if not self._record:
            try:
                self._record = self._board.free.pop()
            except IndexError:
                return
        words = np.zeros(_WORDS, np.int64)
        flags, named = awaited(waiting, self._rank, self._board.members)
        if waiting.event is not None:
            flags |= layout.HAS_EVENT
        if waiting.expected is not None:
            flags |= layout.HAS_VALUES
        for offset, value in {
            layout.ST_SINCE_NS: self._since_ns,
            layout.ST_UNTIL_NS: self._until_ns,
            layout.ST_THREAD: threading.get_native_id(),
            layout.ST_FLAGS: flags,
            layout.ST_EVENT: waiting.event or 0,
            layout.ST_EXPECTED: waiting.expected or 0,
            layout.ST_SEEN: waiting.seen or 0,
        }.items():
            words[offset // 8 - 1] = value
        bytes_ = words.view(np.uint8)
        at = layout.ST_PEERS - 8
        bytes_[at : at + layout.MAX_PEERS // 8] = np.packbits(named, bitorder="little")
        text = np.frombuffer(waiting.operation.encode(errors="replace")[: layout.OPERATION_BYTES], np.uint8)
        at = layout.ST_OPERATION - 8
        bytes_[at : at + len(text)] = text
        kernels.publish.call(self._record, words.ctypes.data, _WORDS)

    def end(self) -> None:
        """The wait has ended, well or not."""
        if self._record:
            kernels.publish.call(self._record, _GONE.ctypes.data, len(_GONE))
            self._board.free.append(self._record)
            self._record = 0


def awaited(waiting: Waiting, rank: int, members: npt.NDArray[np.int64]) -> tuple[int, npt.NDArray[np.uint8]]:
    """For whom `rank` of these members waits: a WHO_ code, and 1 for each rank of the session that is waited for."""
    named = np.zeros(layout.MAX_PEERS, np.uint8)
    missing = [] if waiting.missing is None else waiting.missing()
    if not missing and waiting.peer is not None:
        missing = [waiting.peer]
    if missing:
        named[members[missing]] = 1
        return layout.WHO_ALL, named
    named[members] = 1
    named[members[rank]] = 0
    return (layout.WHO_SOME if waiting.everyone else layout.WHO_ANY), named
