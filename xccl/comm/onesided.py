"""One-sided operations: put, get, signals, and the order of what a rank writes.

Each method first tries the call that goes straight into a kernel (`xccl.kernels.calls`); what that does not take goes
the long way, which checks everything and is traced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..kernels import calls, onesided
from . import traced
from .buffers import address_of, readable, require_int, writable
from .core import Core, Waiting, require_timeout
from .symmetric import Signals, SymmetricArray

_COMPARISONS = onesided.COMPARISONS
_SIGNAL_OPS = {"set": 0, "add": 1}
_INT64 = (-(1 << 63), (1 << 63) - 1)


class OneSided:
    """The one-sided operations of a communicator."""

    core: Core
    rank: int
    size: int

    def __init__(self, core: Core) -> None:
        self._controls: list[int] = core.fabric.controls.tolist()
        #: The value of a signal that was waited for.
        self._seen = np.zeros(1, np.int64)
        self._direct_put = core.calls.bind(calls.put)
        self._direct_get = core.calls.bind(calls.get)
        self._direct_put_signal = core.calls.bind(calls.put_signal)
        self._direct_signal = core.calls.bind(calls.signal)
        self._direct_wait = core.calls.bind(calls.wait_until)

    def put(self, target: SymmetricArray, source: npt.NDArray[Any], peer: int, offset: int = 0) -> None:
        """Copy `source` into rank `peer`'s copy of `target`. Complete locally on return, remotely after `quiet`.

        Args:
            target: the symmetric array.
            source: an array of the same dtype; strided ones are copied first.
            peer: the rank to write to.
            offset: first element to write, counted in `target` as if it were flat.

        Raises:
            UsageError: dtype, peer or range is wrong. Nothing was written.
        """
        if type(target) is SymmetricArray and not self._direct_put(target.handle, source, peer, offset):
            return
        source = readable(source, "source")
        address = self._remote(target, source, peer, offset, "source")
        source, source_address = apart(source, address)
        operation = None if self.core.trace is None else self.core.trace.start("put", stage="put")
        onesided.copy.call(address, source_address, source.nbytes)
        if operation is not None:
            operation.finish(partial(traced.moved, "put", int(peer), source.nbytes))

    def get(self, destination: npt.NDArray[Any], source: SymmetricArray, peer: int, offset: int = 0) -> None:
        """Copy from rank `peer`'s copy of `source` into `destination`; complete on return.

        Args:
            destination: a writable, C-contiguous array of the same dtype; its size says how much is read.
            source: the symmetric array.
            peer: the rank to read from.
            offset: first element to read, counted in `source` as if it were flat.

        Raises:
            UsageError: dtype, peer or range is wrong. Nothing was written.
        """
        if type(source) is SymmetricArray and not self._direct_get(destination, source.handle, peer, offset):
            return
        destination = writable(destination, "destination")
        address = self._remote(source, destination, peer, offset, "destination")
        operation = None if self.core.trace is None else self.core.trace.start("get", stage="get")
        destination_address = address_of(destination)
        if _overlaps(destination_address, address, destination.nbytes):
            middle = np.empty_like(destination)
            onesided.copy.call(address_of(middle), address, middle.nbytes)
            destination[...] = middle
        else:
            onesided.copy.call(destination_address, address, destination.nbytes)
        if operation is not None:
            operation.finish(partial(traced.moved, "get", int(peer), destination.nbytes))

    def _remote(self, target: SymmetricArray, array: npt.NDArray[Any], peer: int, offset: int, name: str) -> int:
        """Address of element `offset` at `peer`, after all checks."""
        if not isinstance(target, SymmetricArray):
            raise UsageError(
                f"the remote side must be a symmetric array, got {type(target).__name__}", value="no array"
            )
        target.require_of(self.core)
        peer = require_int(peer, "peer", 0, self.size - 1)
        if array.dtype != target.dtype:
            raise UsageError(
                f"{name} is {array.dtype}, the symmetric array is {target.dtype}",
                value=str(array.dtype),
                bound=str(target.dtype),
            )
        offset = require_int(offset, "offset", 0, target.size)
        if offset + array.size > target.size:
            raise UsageError(
                f"{array.size} elements at offset {offset} end at {offset + array.size}, the array has {target.size}",
                value=offset + array.size, bound=target.size,
            )  # fmt: skip
        self.core.fabric.require_peer(peer)
        return target.addresses[peer] + offset * target.itemsize

    def _signal_word(self, signals: Signals, index: int, peer: int) -> tuple[int, int]:
        """Address of a signal word at `peer`, and of that rank's control area."""
        self.core.require_open()
        if not isinstance(signals, Signals):
            raise UsageError(
                f"signals must come from comm.signals(), got {type(signals).__name__}", value=type(signals).__name__
            )
        signals.require_of(self.core)
        index = require_int(index, "index", 0, signals.count - 1)
        peer = require_int(peer, "peer", 0, self.size - 1)
        return signals.addresses[peer] + index * Signals.STRIDE_BYTES, self._controls[peer]

    def put_signal(
        self,
        target: SymmetricArray,
        source: npt.NDArray[Any],
        peer: int,
        signals: Signals,
        index: int,
        value: int,
        op: str = "set",
        offset: int = 0,
    ) -> None:
        """Put, then set or add to a signal word at the same peer. The signal never overtakes the data.

        Args:
            target: the symmetric array.
            source: an array of the same dtype.
            peer: the rank to write to.
            signals: words from `signals()`.
            index: which word.
            value: what to set it to, or add to it (64 bits, signed).
            op: "set" or "add".
            offset: first element to write.

        Raises:
            UsageError: an argument is wrong. Nothing was written.
        """
        if (
            type(target) is SymmetricArray
            and type(signals) is Signals
            and not self._direct_put_signal(target.handle, source, peer, signals.handle, index, value, op, offset)
        ):
            return
        source = readable(source, "source")
        destination = self._remote(target, source, peer, offset, "source")
        word, control = self._signal_word(signals, index, peer)
        value = require_int(value, "value", *_INT64)
        add = _require_op(op)
        source, source_address = apart(source, destination)
        operation = None if self.core.trace is None else self.core.trace.start("put_signal", stage="put-signal")
        onesided.put_signal.call(destination, source_address, source.nbytes, word, value, add, control)
        if operation is not None:
            operation.finish(partial(traced.moved, "put-signal", int(peer), source.nbytes, signalled=True))

    def signal(self, signals: Signals, index: int, value: int, peer: int, op: str = "set") -> None:
        """Set or add to a signal word of rank `peer`, after all that this rank put before.

        Args:
            signals: words from `signals()`.
            index: which word.
            value: what to set it to, or add to it (64 bits, signed).
            peer: whose word.
            op: "set" or "add".

        Raises:
            UsageError: an argument is wrong.
        """
        if type(signals) is Signals and not self._direct_signal(signals.handle, index, value, peer, op):
            return
        word, control = self._signal_word(signals, index, peer)
        value, add = require_int(value, "value", *_INT64), _require_op(op)
        operation = None if self.core.trace is None else self.core.trace.start("signal", stage="signal")
        onesided.signal.call(word, value, add, control)
        if operation is not None:
            operation.finish(partial(traced.signals, "signal", "signal", [int(peer)]))

    def wait_until(
        self, signals: Signals, index: int, comparison: str, value: int, timeout_s: float | None = None
    ) -> int:
        """Wait until this rank's own signal word compares so with `value`.

        Args:
            signals: words from `signals()`.
            index: which word.
            comparison: eq, ne, gt, ge, lt or le.
            value: what to compare with.
            timeout_s: deadline in seconds; the communicator's default if None.

        Returns:
            The value seen.

        Raises:
            UsageError: an argument is wrong.
            WaitTimeout: at the deadline, with the value expected and seen.
            PeerDied, SessionAborted: the session is over.
        """
        if type(signals) is Signals:
            seen: int | None = self._direct_wait(signals.handle, index, comparison, value, timeout_s)
            if seen is not None:
                return seen
        return self._wait_until(signals, index, comparison, value, timeout_s)

    def _wait_until(self, signals: Signals, index: int, comparison: str, value: int, timeout_s: float | None) -> int:
        """The long way, or the rest of it: the direct call may have waited already."""
        # A function of its own: the variables of the closures below are made when a function is entered.
        began_ns = self.core.calls.began_ns() if type(signals) is Signals else 0
        word, control = self._signal_word(signals, index, self.rank)
        code = _COMPARISONS.get(str(comparison))
        if code is None:
            raise UsageError(
                f"comparison must be one of {', '.join(_COMPARISONS)}, got {comparison!r}", value=comparison
            )
        value = require_int(value, "value", *_INT64)
        timeout_s = self.core.op_timeout_s if timeout_s is None else require_timeout(timeout_s)
        call, seen = onesided.wait_until.call, self._seen.ctypes.data

        what = f"wait_until signal {index} {comparison} {value}"
        operation = None if self.core.trace is None else self.core.trace.start("wait_until", stage="wait")
        self.core.run(
            lambda until_ns: int(call(control, word, code, value, seen, until_ns)),
            lambda: Waiting(what, expected=value, seen=int(self._seen[0])),
            timeout_s,
            began_ns,
        )
        if operation is not None:
            operation.finish(partial(traced.waits, "wait", "signal"))
        return int(self._seen[0])

    def fence(self) -> None:
        """Order: what this rank put before is seen by a peer before what it puts after."""
        self.core.require_open()
        onesided.quiet.call()

    def quiet(self) -> None:
        """Complete: what this rank put before is in the peers' memory on return."""
        self.core.require_open()
        onesided.quiet.call()


def _overlaps(address: int, other_address: int, n_bytes: int) -> bool:
    """Do two regions of the same size share bytes?"""
    return address < other_address + n_bytes and other_address < address + n_bytes


def apart(source: npt.NDArray[Any], address: int) -> tuple[npt.NDArray[Any], int]:
    """The array and its address; those of a copy if it overlaps the region at `address` that it is to be copied to."""
    source_address = address_of(source)
    if _overlaps(source_address, address, source.nbytes):
        source = source.copy()
        source_address = address_of(source)
    return source, source_address


def _require_op(op: str) -> int:
    add = _SIGNAL_OPS.get(str(op))
    if add is None:
        raise UsageError(f"op must be set or add, got {op!r}", value=op)
    return add
