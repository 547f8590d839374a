"""The communicator: what a rank holds, and every operation starts from."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError, UsageError
from ..fabric import Fabric
from ..kernels.wait import OK
from ..layout.collectives import CB_BARRIER_ARRIVALS, CB_BARRIER_RELEASE
from ..layout.segment import CTL_BARRIER_ARRIVALS, CTL_BARRIER_RELEASE, EXPERT_METADATA_BYTES
from ..trace.record import Recorder
from .barrier import BarrierState
from .buffers import require_int
from .collectives import Collectives
from .core import Core, no_exchange, no_refusal, no_requests, require_timeout
from .exchange import Exchange
from .groups import Grouping, GroupParts, Invitations
from .p2p import PointToPoint
from .sendrecv import SendReceive
from .symmetric import Signals, SymmetricAllocator, SymmetricArray


class Communicator(SendReceive, Collectives, Grouping):
    """One rank's end of a session. Made by `xccl.launch` or `xccl.init`; used by one thread at a time.

    Attributes:
        rank: this rank, from 0.
        size: number of ranks.
        fabric_name: "shm" or "local".
        world_ranks: which rank of the session each rank is, in order.
    """

    def __init__(
        self, fabric: Fabric, *, op_timeout_s: float = 30.0, report: Callable[[Any], None] | None = None
    ) -> None:
        geometry = fabric.geometry
        self._world: Communicator | None = None
        #: Those of all communicators of this rank.
        self.exchanges: weakref.WeakSet[Exchange] = weakref.WeakSet()
        self.app_allocator = SymmetricAllocator("app data area", geometry.app_offset, geometry.app_bytes, "app_bytes")
        self.metadata_allocator = SymmetricAllocator(
            "metadata area", geometry.expert_metadata_offset, EXPERT_METADATA_BYTES
        )
        self.heap_allocator = SymmetricAllocator(
            "managed data area", geometry.heap_offset, geometry.heap_bytes, "heap_bytes"
        )
        self._report = report
        self._parts = None
        core = Core(fabric, op_timeout_s)
        # Allocated before all else, so that these are at the same offset in all segments.
        try:
            exchange = Exchange.of_session(core, self.heap_allocator, self.metadata_allocator)
        except CapacityError as error:
            core.fail(error)
            fabric.close()
            raise
        self.invitations = Invitations(core, self.metadata_allocator)
        core.exchange, core.refuse_exchange = exchange.tell_all, exchange.refuse
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
        group._world = comm.world
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
        super().__init__(core, p2p)
        self.core = core
        self.rank = core.rank
        self.size = core.size
        self.fabric_name = core.fabric.name
        self._exchange = exchange
        self.world.exchanges.add(exchange)
        self._direct = exchange.known.direct
        self._barrier = BarrierState(core, arrivals, releases)
        self._direct_barrier = self._barrier.direct

    @property
    def world(self) -> Communicator:
        """The communicator of the session; itself, if this is no group."""
        # No reference to itself: a session's memory goes with the last name for it, not with a garbage collection.
        return self if self._world is None else self._world

    def __repr__(self) -> str:
        group = "" if self._parts is None else f", rank {self.world_ranks[self.rank]} of the session"
        return f"Communicator(rank={self.rank}, size={self.size}, fabric={self.fabric_name!r}{group})"

    @property
    def op_timeout_s(self) -> float:
        """Default deadline of every wait, in seconds."""
        return self.core.op_timeout_s

    @op_timeout_s.setter
    def op_timeout_s(self, value: float) -> None:
        self.core.op_timeout_s = require_timeout(value, "op_timeout_s")

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
            self.core.refuse(error)
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
            self.core.refuse(error)
        return Signals(self.core, self.app_allocator, count)

    # -- barrier -----------------------------------------------------------------------------------------------------

    def barrier(self, timeout_s: float | None = None) -> None:
        """Return when all ranks have called it; what any rank put before is then seen by all.

        After a WaitTimeout this rank is still counted as arrived, and the next call goes on with the same barrier.

        Raises:
            WaitTimeout, PeerDied, SessionAborted: see `xccl.errors`.
        """
        if self._direct_barrier(timeout_s) != OK:
            self._barrier.wait(timeout_s)

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
        self._p2p.shut_down()
        self.core.closed = True
        # Not only what they refer to: a cycle would keep the memory until the collector comes.
        self.core.exchange, self.core.refuse_exchange = no_exchange, no_refusal
        self.core.set_driver(None, no_requests)
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
