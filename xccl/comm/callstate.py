"""What the calls of a rank that go straight into a kernel look at (`xccl.kernels.calls`), kept up to date."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np

from ..fabric import Fabric
from ..kernels import calls, is_left_out, transfer_calls
from ..kernels.fastcall import FastCall
from ..kernels.objects import is_known
from ..kernels.onesided import COMPARISONS
from ..layout import calls as layout
from ..layout.calls import CALLS
from ..layout.segment import CTL_PAUSES

#: Why calls must go the long way, a bit each.
CLOSED: Final = 1
BROKEN: Final = 2
TRACED: Final = 4
UNMAPPED: Final = 8

#: Strings are known by their addresses; literals with the same letters are the same objects.
_AUTO, _MTE, *_OPS = map(sys.intern, ("auto", "mte", "set", "add"))
_COMPARISONS = list(map(sys.intern, COMPARISONS))

#: Looks at a word with the interpreter's lock held: some 10 us.
_MAX_SPINS: Final = 200

#: Of these `None` says that they were not taken.
_WITH_RESULT: Final = (calls.wait_until, transfer_calls.post_send, transfer_calls.post_receive)
_arrays_are_known = cache(is_known)
_INT64: Final = np.dtype(np.int64)


class CallState:
    """The record of one rank.

    Attributes:
        words: the record, as a memory view of 64-bit integers.
        address: where it is.
    """

    def __init__(self, fabric: Fabric) -> None:
        self._record = np.zeros(CALLS.size_bytes // 8, np.int64)
        self.words = self._record.data
        self.address: int = self._record.ctypes.data
        self._channels = np.zeros((2, fabric.ranks), np.int64)
        for offset, value in {
            layout.CA_CONTROL: fabric.control,
            layout.CA_RANK: fabric.rank,
            layout.CA_RANKS: fabric.ranks,
            layout.CA_CONTROLS: fabric.controls.ctypes.data,
            layout.CA_SEND_CHANNELS: self._channels[0].ctypes.data,
            layout.CA_RECEIVE_CHANNELS: self._channels[1].ctypes.data,
            # Ranks that are threads need the interpreter's lock to do what is waited for.
            layout.CA_SPINS: 0 if fabric.name == "local" else min(fabric.read_control(CTL_PAUSES), _MAX_SPINS),
            layout.CA_TYPE_INT: id(int),
            layout.CA_TYPE_ARRAY: id(np.ndarray),
            layout.CA_NONE: id(None),
            layout.CA_INT64: id(_INT64),
            layout.CA_AUTO: id(_AUTO),
            layout.CA_MTE: id(_MTE),
        }.items():
            self.words[offset // 8] = value
        for table, names in ((layout.CA_OPS, _OPS), (layout.CA_COMPARISONS, _COMPARISONS)):
            for i, name in enumerate(names):
                self.words[table // 8 + i] = id(name)
        self.detour(UNMAPPED, not fabric.segments.all())

    def bind(self, function: FastCall) -> Callable[..., Any]:
        """The call for this rank; see `bind_to`."""
        return bind_to(self.address, function, None if function in _WITH_RESULT else calls.NOT_TAKEN)

    def detour(self, reason: int, on: bool) -> None:
        """Note that a reason for the long way holds, or no longer."""
        index = layout.CA_DETOUR // 8
        self.words[index] = self.words[index] | reason if on else self.words[index] & ~reason

    def set_channel(self, peer: int, sending: bool, address: int) -> None:
        """Tell where a channel is; 0 if there is none that may be used."""
        self._channels[0 if sending else 1, peer] = address

    def began_ns(self) -> int:
        """When the last direct call began to wait; 0 if it did not."""
        return int(self.words[layout.CA_BEGAN_NS // 8])


def bind_to(record: int, function: FastCall, not_taken: object) -> Callable[..., Any]:
    """A direct call that works on the record at that address.

    If this interpreter keeps its objects in another way, or the call is left out of what is compiled, it is one that is
    never taken, and always returns `not_taken`.
    """
    if is_left_out(function) or not _arrays_are_known():
        return lambda *_: not_taken
    return function.bind(record)
