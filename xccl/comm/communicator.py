"""The communicator: what a rank holds, and every operation starts from."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..fabric import Fabric
from ..kernels import onesided, words
from ..layout.collectives import CB_BARRIER_ARRIVALS, CB_BARRIER_RELEASE
from ..layout.segment import CTL_BARRIER_ARRIVALS, CTL_BARRIER_RELEASE, EXPERT_METADATA_BYTES
from ..trace.record import Recorder
from . import traced
from .buffers import address_of, readable, require_int, writable
from .collectives import Collectives
from .core import Core, Waiting, require_timeout
from .exchange import Exchange
from .groups import Grouping, GroupParts, Invitations
from .p2p import PointToPoint, Request
from .symmetric import Signals, SymmetricAllocator, SymmetricArray

_COMPARISONS = onesided.COMPARISONS
_SIGNAL_OPS = {"set": 0, "add": 1}
_INT64 = (-(1 << 63), (1 << 63) - 1)


class Communicator(Collectives, Grouping):
    """One rank's end of a session. Made by `xccl.launch` or `xccl.init`; used by one thread at a time.

    Attributes:
        rank: this rank, from 0.
        size: number of ranks.
        fabric_name: "shm" or "local".
        world: the communicator of the session; itself, if this is no group.
        world_ranks: which rank of the session each rank is, in order.
    """

    def __init__(
        self, fabric: Fabric, *, op_timeout_s: float = 30.0, report: Callable[[Any], None] | None = None
    ) -> None:
        geometry = fabric.geometry
        self.world: Communicator = self
        #: Those of all communicators of this rank.
        self.exchanges: weakref.WeakSet[Exchange] = weakref.WeakSet()
        self.app_allocator = SymmetricAllocator("app data area", geometry.app_offset, geometry.app_bytes)
        self.metadata_allocator = SymmetricAllocator(
            "metadata area", geometry.expert_metadata_offset, EXPERT_METADATA_BYTES
        )
        self.heap_allocator = SymmetricAllocator("managed data area", geometry.heap_offset, geometry.heap_bytes)
        self._report = report
        self._parts = None
        core = Core(fabric, op_timeout_s)
        # Allocated before all else, so that these are at the same offset in all segments.
        exchange = Exchange.of_session(core, self.heap_allocator, self.metadata_allocator)
        self.invitations = Invitations(core, self.metadata_allocator)
        core.exchange = exchange.tell_all
        self.world_ranks = tuple(range(fabric.ranks))
        arrivals = int(fabric.controls[0]) + CTL_BARRIER_ARRIVALS
        self._begin(core, exchange, PointToPoint(core), arrivals, fabric.controls + CTL_BARRIER_RELEASE)

    @classmethod
    def of_group(cls, comm: Communicator, members: list[int]) -> Communicator:
        """A group's communicator; see `group`, which checks the arguments.

        Args:
            comm: any communicator of the session.
            members: ranks of the session.
        """
        group = cls.__new__(cls)
        group.world = comm.world
        group.app_allocator, group.metadata_allocator = comm.app_allocator, comm.metadata_allocator
        group.heap_allocator, group.invitations = comm.heap_allocator, comm.invitations
        group._report = comm._report
        group._parts = parts = GroupParts(comm, members)
        group.world_ranks = parts.fabric.members
        arrivals = int(parts.blocks[0]) + CB_BARRIER_ARRIVALS
        group._begin(parts.core, parts.exchange, parts.p2p, arrivals, parts.blocks + CB_BARRIER_RELEASE)
        return group

    def _begin(
        self, core: Core, exchange: Exchange, p2p: PointToPoint, arrivals: int, releases: npt.NDArray[np.int64]
    ) -> None:
        """What a session's and a group's communicator have in common."""
        self.core = core
        self.rank = core.rank
        self.size = core.size
        self.fabric_name = core.fabric.name
        self._p2p = p2p
        self._exchange = exchange
        self.world.exchanges.add(exchange)
        self._controls: list[int] = core.fabric.controls.tolist()
        self._barriers = 0
        #: Addresses of the words of barriers: the count at rank 0, and, behind their number, the releases of all ranks.
        self._arrivals = arrivals
        self._releases = np.array([core.size, *releases], np.int64)
        self._barrier_words = (arrivals, self._releases.ctypes.data, int(releases[core.rank]))
        #: Numbers of the last barrier at which this rank arrived, and of the last that it released; a signal's value.
        self._scratch = np.zeros(3, np.int64)
        self._arrived: int = self._scratch.ctypes.data
        self._seen: int = self._arrived + 16

    def __repr__(self) -> str:
        group = "" if self._parts is None else f", rank {self.world_ranks[self.rank]} of the session"
        return f"Communicator(rank={self.rank}, size={self.size}, fabric={self.fabric_name!r}{group})"

    @property
    def op_timeout_s(self) -> float:
        """Default deadline of every wait, in seconds."""
        return self.core.op_timeout_s

    @op_timeout_s.setter
    def op_timeout_s(self, value: float) -> None:
        self.core.op_timeout_s = require_timeout(value)

    # -- symmetric memory -------------------------------------------------------------------------------------------

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> SymmetricArray:
        """A symmetric array, not initialised; collective.

        Args:
            shape: shape of each rank's copy, at most 10 dimensions.
            dtype: any fixed-size dtype without Python objects.

        Raises:
            UsageError: shape or dtype is impossible, or differs between ranks (then at all of them).
            CapacityError: the app data area or the memory is exhausted.
        """
        self.core.require_open()
        try:
            dims, element = _require_shape(shape, dtype)
        except UsageError as error:
            self.core.refuse("empty", error)
        return SymmetricArray(self.core, self.app_allocator, dims, element)

    def signals(self, count: int) -> Signals:
        """`count` signal words in each rank's segment, all 0; collective.

        Raises:
            UsageError: count is out of range, or differs between ranks (then at all of them).
            CapacityError: the app data area or the memory is exhausted.
        """
        self.core.require_open()
        try:
            count = require_int(count, "count", 1, 1 << 20)
        except UsageError as error:
            self.core.refuse("signals", error)
        return Signals(self.core, self.app_allocator, count)

    # -- one-sided --------------------------------------------------------------------------------------------------

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
        source = readable(source, "source")
        address = self._remote(target, source, peer, offset, "source")
        source, source_address = _apart(source, address)
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
        target.require_alive()
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
        signals.require_alive()
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
        source = readable(source, "source")
        destination = self._remote(target, source, peer, offset, "source")
        word, control = self._signal_word(signals, index, peer)
        value = require_int(value, "value", *_INT64)
        add = _require_op(op)
        source, source_address = _apart(source, destination)
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
        word, control = self._signal_word(signals, index, self.rank)
        code = _COMPARISONS.get(str(comparison))
        if code is None:
            raise UsageError(
                f"comparison must be one of {', '.join(_COMPARISONS)}, got {comparison!r}", value=comparison
            )
        value = require_int(value, "value", *_INT64)
        timeout_s = self.core.op_timeout_s if timeout_s is None else require_timeout(timeout_s)
        call, seen = onesided.wait_until.call, self._seen

        what = f"wait_until signal {index} {comparison} {value}"
        operation = None if self.core.trace is None else self.core.trace.start("wait_until", stage="wait")
        self.core.run(
            lambda until_ns: int(call(control, word, code, value, seen, until_ns)),
            lambda: Waiting(what, expected=value, seen=int(self._scratch[2])),
            timeout_s,
        )
        if operation is not None:
            operation.finish(partial(traced.waits, "wait", "signal"))
        return int(self._scratch[2])

    def fence(self) -> None:
        """Order: what this rank put before is seen by a peer before what it puts after."""
        self.core.require_open()
        onesided.quiet.call()

    def quiet(self) -> None:
        """Complete: what this rank put before is in the peers' memory on return."""
        self.core.require_open()
        onesided.quiet.call()

    def barrier(self, timeout_s: float | None = None) -> None:
        """Return when all ranks have called it; what any rank put before is then seen by all.

        After a WaitTimeout this rank is still counted as arrived, and the next call goes on with the same barrier.

        Raises:
            WaitTimeout, PeerDied, SessionAborted: see `xccl.errors`.
        """
        core = self.core
        core.require_open()
        timeout_s = core.op_timeout_s if timeout_s is None else require_timeout(timeout_s)
        self._barriers = epoch = self._barriers + 1
        call = onesided.barrier.call
        args = (core.control, core.controls_address, *self._barrier_words, epoch, self._arrived)

        def describe() -> Waiting:
            # Once all have arrived, one that was released earlier than this rank may have left: it is not missed.
            arrivals = int(words.load(self._arrivals)) - (epoch - 1) * self.size
            return Waiting("barrier", epoch, expected=self.size, seen=arrivals, everyone=arrivals < self.size)

        operation = None if core.trace is None else core.trace.start("barrier", epoch)
        arrives = self._scratch[0] != epoch
        try:
            core.run(lambda until_ns: int(call(*args, until_ns)), describe, timeout_s)
        except BaseException:
            self._barriers = epoch - 1
            raise
        if operation is not None:
            released = bool(arrives and self._scratch[1] == epoch)
            operation.overlap("arrive", "release", "await-release")
            operation.finish(partial(traced.barrier, ranks=self.size, arrived=bool(arrives), released=released))

    # -- send and receive -------------------------------------------------------------------------------------------

    def send(
        self, buffer: npt.NDArray[Any], dst: int, event_id: int, lanes: int = 2, timeout_s: float | None = None
    ) -> None:
        """Send an array to rank `dst`; returns when the receiver has all of it (XDS section 3.1).

        Args:
            buffer: what to send; strided arrays are copied first.
            dst: the receiver.
            event_id: the caller's number for the transfer, 0 or more; both sides must give the same.
            lanes: emulated AIV cores over which the message is dealt, 1 to 48; both sides must give the same.
            timeout_s: deadline in seconds; the communicator's default if None.

        Raises:
            UsageError: an argument is wrong, or the receiver expects another size or number of lanes.
            EventMismatch: the receiver expects another event.
            WaitTimeout: at the deadline; the channel to `dst` is unusable then.
            PeerDied, SessionAborted: the session is over.
        """
        self._p2p.blocking(buffer, dst, event_id, lanes, _checked(timeout_s), sending=True)

    def recv(
        self, buffer: npt.NDArray[Any], src: int, event_id: int, lanes: int = 2, timeout_s: float | None = None
    ) -> None:
        """Receive from rank `src` into a writable, C-contiguous array of exactly the size sent.

        Arguments and errors are those of `send`. A refused message is dropped, and the channel stays usable.
        """
        self._p2p.blocking(buffer, src, event_id, lanes, _checked(timeout_s), sending=False)

    def isend(self, buffer: npt.NDArray[Any], dst: int, event_id: int, lanes: int = 2) -> Request:
        """Start a send; arguments as for `send`. Don't change the buffer before the request is done."""
        return self._p2p.start(buffer, dst, event_id, lanes, sending=True)

    def irecv(self, buffer: npt.NDArray[Any], src: int, event_id: int, lanes: int = 2) -> Request:
        """Start a receive; arguments as for `recv`. Receives from a rank complete in the order of their posting."""
        return self._p2p.start(buffer, src, event_id, lanes, sending=False)

    # -- session ----------------------------------------------------------------------------------------------------

    @contextmanager
    def trace(self) -> Iterator[Recorder]:
        """Record what the operations of this rank do inside of a `with` block.

        What begins in the block is recorded: its stages, and when it is finished, what it has moved, signalled, awaited
        and computed, in the terms of `xccl.protocol`. Recorders may be returned from the rank's function, and exported
        by `xccl.trace.chrome`.

        Raises:
            UsageError: operations are recorded already.
        """
        self.core.require_open()
        if self.core.trace is not None:
            raise UsageError("operations are recorded already: leave the other trace() first", value="nested")
        recorder = self.core.trace = Recorder(self.rank)
        self._exchange.ready.clear()
        try:
            yield recorder
        finally:
            self.core.trace = None

    def report(self, message: Any) -> None:
        """Send a picklable object to the `on_report` callback of `xccl.launch`; nothing happens if there is none."""
        if self._report is not None:
            self._report(message)

    def close(self, *, failed: bool = False) -> None:
        """Leave the session: this rank's work is done. Called by `launch`, and by leaving a `with` block.

        Of a group: free it.

        Args:
            failed: the work is not done; the other ranks were told why.

        Raises:
            UsageError: requests are under way: what they carry would be lost. Wait for them first.
        """
        if self.core.closed or self.core.is_forked:
            return
        if self._parts is not None:
            if not failed:
                self.free()
            return
        if not failed:
            self._p2p.require_idle()
        self.core.closed = True
        for exchange in self.exchanges:
            exchange.ready.clear()
        if not failed:
            self.core.fabric.leave()
        self.core.fabric.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.core.fail(error)
        self.close(failed=error is not None)


def _require_shape(shape: Any, dtype: npt.DTypeLike) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        dims = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        element: np.dtype[Any] = np.dtype(dtype)
    except TypeError as error:
        raise UsageError(f"empty() needs a shape and a dtype, got {shape!r}, {dtype!r}", value=repr(shape)) from error
    if len(dims) > 10:
        raise UsageError(f"a symmetric array has at most 10 dimensions, got {len(dims)}", value=len(dims), bound=10)
    dims = tuple(require_int(n, f"shape[{i}]", 0, 1 << 48) for i, n in enumerate(dims))
    if element.hasobject or element.itemsize == 0 or element.subdtype is not None:
        raise UsageError(f"dtype {element} cannot live in shared memory", value=str(element))
    if math.prod(dims) * element.itemsize > 1 << 52:
        raise UsageError(f"shape {dims} of {element} is too large", value=dims, bound=1 << 52)
    return dims, element


def _overlaps(address: int, other_address: int, n_bytes: int) -> bool:
    """Do two regions of the same size share bytes?"""
    return address < other_address + n_bytes and other_address < address + n_bytes


def _apart(source: npt.NDArray[Any], address: int) -> tuple[npt.NDArray[Any], int]:
    """The array and its address; those of a copy if it overlaps the region at `address` that it is to be copied to."""
    source_address = address_of(source)
    if _overlaps(source_address, address, source.nbytes):
        source = source.copy()
        source_address = address_of(source)
    return source, source_address


def _checked(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else require_timeout(timeout_s)


def _require_op(op: str) -> int:
    add = _SIGNAL_OPS.get(str(op))
    if add is None:
        raise UsageError(f"op must be set or add, got {op!r}", value=op)
    return add
