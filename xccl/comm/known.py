"""The collectives of one communicator as direct calls, and the arguments that these know."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..kernels import collective_calls as kernels
from ..kernels.collectives import UNFIT, collective
from ..layout import calls as layout
from ..layout.calls import COLLECTIVE_CALLS, KNOWN_CALL, KNOWN_CALLS
from ..layout.collectives import OPERATORS
from ..protocol.collective_cuts import ALGORITHMS, Kind
from .callstate import CallState, bind_to
from .plans import Plan

#: (x, out, op, root, algorithm, timeout_s) -> status; of alltoallv (x, send_counts, recv_counts, out, timeout_s).
Direct = Callable[..., int]

_HEAD_WORDS: Final = COLLECTIVE_CALLS.size_bytes // 8
_CALL_WORDS: Final = KNOWN_CALL.size_bytes // 8
#: Strings are known by the addresses of these: literals with the same letters are the same objects.
_STRINGS: Final = {text: sys.intern(text) for text in ("auto", *ALGORITHMS, *OPERATORS)}


@dataclass(frozen=True, slots=True)
class DirectCalls:
    """The direct calls, by the name of the collective."""

    allgather: Direct
    allreduce: Direct
    reduce_scatter: Direct
    alltoall: Direct
    alltoallv: Direct
    broadcast: Direct
    gather: Direct
    scatter: Direct


class KnownCalls:
    """Calls with arguments that were checked: made again, they go straight into the kernel.

    Args:
        calls: what all direct calls of the communicator look at.
        state: address of its collective state.

    Attributes:
        direct: the calls; they say UNFIT for all that they do not know.
    """

    def __init__(self, calls: CallState, state: int) -> None:
        kinds: tuple[Kind, ...] = DirectCalls.__slots__  # type: ignore[assignment]
        self._row = {kind: row for row, kind in enumerate(kinds)}
        self._words = np.zeros((len(kinds), _HEAD_WORDS + KNOWN_CALLS * _CALL_WORDS), np.int64)
        self._words[:, layout.CC_CALLS // 8] = calls.address
        self._words[:, layout.CC_STATE // 8] = state
        self._words[:, layout.CC_KERNEL // 8] = collective.address
        self._next = dict.fromkeys(kinds, 0)
        #: What the known calls lead to, by kind and place: it lives as long as they.
        self._held: dict[tuple[Kind, int], tuple[tuple[Any, ...], Plan]] = {}
        self.direct = DirectCalls(*(self._bind(kind) for kind in kinds))

    def _bind(self, kind: Kind) -> Direct:
        function = kernels.collect_rows if kind == "alltoallv" else kernels.collect
        return bind_to(self._words[self._row[kind]].ctypes.data, function, UNFIT)

    def add(
        self, plan: Plan, dtype: np.dtype[Any], n_bytes: int, op: str | None = None, root: int | None = None,
        algorithm: str | None = None,
    ) -> None:  # fmt: skip
        """Know a call from now on, if need be in place of the one that was added first.

        Args:
            plan: the call.
            dtype: that of the arrays.
            n_bytes: bytes of the input, or, where a rank gives nothing, of the output; in alltoallv of a row.
            op: as the caller gives it.
            root: the same.
            algorithm: the same; None in alltoallv.
        """
        kind, arguments = plan.kind, (id(dtype), dtype, n_bytes, op, root, algorithm)
        if any(self._held.get((kind, place)) == (arguments, plan) for place in range(KNOWN_CALLS)):
            return
        place = self._next[kind]
        self._next[kind] = (place + 1) % KNOWN_CALLS
        self._held[kind, place] = arguments, plan
        call = self._words[self._row[kind], _HEAD_WORDS + place * _CALL_WORDS :]
        for offset, value in {
            layout.KC_PLAN: plan.address,
            layout.KC_DTYPE: id(dtype),
            layout.KC_BYTES: n_bytes,
            layout.KC_OP: id(op if op is None else _STRINGS[op]),
            layout.KC_ROOT: -1 if root is None else root,
            layout.KC_ALGORITHM: id(algorithm if algorithm is None else _STRINGS[algorithm]),
        }.items():
            call[offset // 8] = value

    def clear(self) -> None:
        """Know none: something is to be done before the next call."""
        self._words[:, _HEAD_WORDS:] = 0
        self._held.clear()
