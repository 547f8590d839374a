"""Records of operations under way, each with a Python object that knows its request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..layout import ring as layout
from ..layout.ring import OPERATION

if TYPE_CHECKING:
    from .request import Request

_CHUNK = 64
_LINK = layout.OP_LINK // 8
_NUMBER = layout.OP_NUMBER // 8
_OBJECT = layout.OP_OBJECT // 8
_FREE = layout.DR_FREE // 8


class OperationRecord:
    """The record of one operation, used again and again. Compiled code reads and writes these slots.

    Attributes:
        words: its 64-bit words.
        address: where it is.
        request: the request whose operation it is, kept alive while it is under way; None if it is nobody's.
    """

    __slots__ = ("address", "request", "words")

    def __init__(self, words: memoryview, address: int) -> None:
        self.words = words
        self.address = address
        self.request: Request | None = None


class OperationPool:
    """Records of operations; memory for them is taken a chunk at a time, and kept.

    Args:
        driver: the driver's record, where the list of those that nobody uses begins.
    """

    def __init__(self, driver: memoryview) -> None:
        self._driver = driver
        self._chunks: list[npt.NDArray[np.int64]] = []
        self._records: dict[int, OperationRecord] = {}

    def take(self) -> OperationRecord:
        """A record that nobody uses."""
        if not self._driver[_FREE]:
            self._add_chunk()
        record = self._records[self._driver[_FREE]]
        self._driver[_FREE] = record.words[_LINK]
        return record

    def give_back(self, record: OperationRecord) -> None:
        """Nobody uses it any more."""
        record.request = None
        record.words[_LINK] = self._driver[_FREE]
        self._driver[_FREE] = record.address

    def at(self, address: int) -> OperationRecord:
        """The one at this address."""
        return self._records[address]

    def requests(self) -> list[Request]:
        """Requests that were not collected, in the order of their posting."""
        used = [record for record in self._records.values() if record.request is not None]
        used.sort(key=lambda record: record.words[_NUMBER])
        return [record.request for record in used if record.request is not None]

    def _add_chunk(self) -> None:
        chunk = np.zeros((_CHUNK, OPERATION.size_bytes // 8), np.int64)
        self._chunks.append(chunk)
        for row in chunk:
            record = OperationRecord(row.data, row.ctypes.data)
            record.words[_OBJECT] = id(record)
            self._records[record.address] = record
            self.give_back(record)
