"""Send and receive between two ranks (XDS section 3.1). Rules and theory of operation: `xccl.kernels.ring`.

Progress. A request moves on whenever its rank is in `test`, `wait`, or any call that waits; all requests of the rank
are driven then, in the order of their posting, so two ranks that send to each other before they receive do not block
each other. A rank that computes makes no progress meanwhile.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EventMismatch, FabricError, UsageError, XcclError
from ..kernels import ring, wait
from ..kernels.wait import MISMATCH, OK, PENDING
from ..layout import ring as layout
from ..layout.ring import CHANNEL, MAX_LANES, OPERATION
from ..trace.record import Operation
from . import traced
from .buffers import address_of, readable, require_int, writable
from .core import SLICE_NS, Core, Waiting, require_timeout

_MAX_EVENT_ID = (1 << 63) - 1
#: Rounds over all requests, with a yield after each, before a waiting rank sleeps.
_ROUNDS_BEFORE_SLEEP = 20


class Channel:
    """One direction of a pair, with its ring, which is committed when the pair first talks in that direction."""

    def __init__(self, core: Core, peer: int, *, sending: bool) -> None:
        geometry = core.fabric.geometry
        sender, receiver = (core.rank, peer) if sending else (peer, core.rank)
        fields = geometry.data_fields_offset(sender)
        acks = geometry.ack_fields_offset(receiver)
        ring_offset = geometry.ring_offset(sender)
        # Either side may come first, and touches both; committing twice costs nothing.
        core.fabric.commit(receiver, fields, MAX_LANES * layout.FIELD_BYTES)
        core.fabric.commit(sender, acks, geometry.fields_per_peer_bytes - MAX_LANES * layout.FIELD_BYTES)
        core.fabric.commit(receiver, ring_offset, geometry.ring_bytes)
        segments = core.fabric.segments
        self.peer = peer
        self.sending = sending
        self.name = f"{'send to' if sending else 'recv from'} rank {peer}"
        #: The started requests that have not ended, in order.
        self.under_way: list[Request] = []
        #: Why the channel can't be used any more.
        self.broken: str | None = None
        self.kernel, self.post_kernel = (ring.send, ring.post_send) if sending else (ring.receive, ring.post_receive)
        self._slot_lanes = np.zeros(geometry.ring_slots, np.int64)
        self._starts = np.zeros(geometry.ring_slots, np.int64)
        self.state = np.zeros(CHANNEL.size_bytes // 8, np.int64)
        self.address: int = self.state.ctypes.data
        for offset, value in {
            layout.CH_OWN_CONTROL: core.control,
            layout.CH_PEER_CONTROL: int(core.fabric.controls[peer]),
            layout.CH_RING: int(segments[receiver]) + ring_offset,
            layout.CH_DATA_FIELDS: int(segments[receiver]) + fields,
            layout.CH_ACK_FIELDS: int(segments[sender]) + acks,
            layout.CH_SLOTS: geometry.ring_slots,
            layout.CH_SLOT_BYTES: geometry.slot_bytes,
            layout.CH_SLOT_STRIDE: geometry.slot_stride_bytes,
            layout.CH_SLOT_LANES: self._slot_lanes.ctypes.data,
            layout.CH_STARTS: self._starts.ctypes.data,
            layout.CH_REFUSAL_TABLE: int(segments[sender]) + geometry.refusals_offset(receiver),
        }.items():
            self.state[offset // 8] = value

    def word(self, offset: int) -> int:
        """A word of the state."""
        return int(self.state[offset // 8])


class Request:
    """One send or receive under way. Made by `isend` and `irecv`; keeps its buffer alive.

    The buffer must not be changed (isend) or read (irecv) before the request is done.
    """

    def __init__(
        self, engine: PointToPoint, channel: Channel, buffer: npt.NDArray[Any], event_id: int, lanes: int
    ) -> None:
        self.engine = engine
        self.channel = channel
        self.buffer = buffer
        self.event_id = event_id
        self.lanes = lanes
        self.error: XcclError | None = None
        self.done = False
        recorder = engine.core.trace
        name = "send" if channel.sending else "recv"
        self.trace: Operation | None = None if recorder is None else recorder.start(name, event_id)
        self.op = np.zeros(OPERATION.size_bytes // 8, np.int64)
        self.address: int = self.op.ctypes.data

    def word(self, offset: int) -> int:
        """A word of the operation."""
        return int(self.op[offset // 8])

    def is_under_way(self) -> bool:
        """Not done yet. Looks only, and drives nothing."""
        return not self.done

    def test(self) -> bool:
        """Drive all requests of this rank a little; is this one done?

        Raises:
            EventMismatch, UsageError: the other side means another transfer, or another size.
            PeerDied, SessionAborted: the session is over.
        """
        if self.is_under_way():
            self.engine.poll(self)
        if self.error is not None:
            raise self.error.with_traceback(None)
        return self.done

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the transfer is complete: for a send, when the receiver has acknowledged all of it.

        Args:
            timeout_s: deadline in seconds; the communicator's default if None. After a WaitTimeout the request is still
                under way, and may be waited for again.

        Raises:
            EventMismatch, UsageError, WaitTimeout, PeerDied, SessionAborted: as for `send` and `recv`.
        """
        self.engine.wait(self, self.engine.core.op_timeout_s if timeout_s is None else require_timeout(timeout_s))
        if self.error is not None:
            raise self.error.with_traceback(None)

    def describe(self) -> Waiting:
        """What this request waits for."""
        name = "send" if self.channel.sending else "recv"
        chunks, done = self.word(layout.OP_CHUNKS), self.word(layout.OP_DONE)
        if self.channel.sending and chunks and done == chunks:
            name += " (all chunks written, not acknowledged)"
        return Waiting(name, self.event_id, self.channel.peer, max(chunks, 1), done)


class PointToPoint:
    """Channels of one rank in one communicator, and its requests.

    Args:
        core: waits of this rank.
        world: of the session, when this is a group's: the requests of all communicators of a rank are driven together.
    """

    def __init__(self, core: Core, world: PointToPoint | None = None) -> None:
        self.core = core
        self._channels: dict[tuple[int, bool], Channel] = {}
        self._world = world
        self._active: list[Request] = [] if world is None else world._active

    def start(self, buffer: Any, peer: int, event_id: int, lanes: int, *, sending: bool, until_ns: int = 0) -> Request:
        """Check the arguments, post a request, and drive it as far as it goes by `until_ns`, without waiting if 0."""
        core = self.core
        core.require_open()
        array = readable(buffer, "the buffer to send") if sending else writable(buffer, "the buffer to receive into")
        peer = require_int(peer, "dst" if sending else "src", 0, core.size - 1)
        event_id = require_int(event_id, "event_id", 0, _MAX_EVENT_ID)
        lanes = require_int(lanes, "lanes", 1, MAX_LANES)
        channel = self._channels.get((peer, sending))
        if channel is None:
            channel = self._channels[peer, sending] = Channel(core, peer, sending=sending)
        if channel.broken is not None:
            raise FabricError(
                f"rank {core.rank}: the channel to {channel.name} is unusable: {channel.broken}", peer=peer
            )
        return self._post(channel, array, event_id, lanes, until_ns)

    def _post(self, channel: Channel, array: npt.NDArray[Any], event_id: int, lanes: int, until_ns: int) -> Request:
        request = Request(self, channel, array, event_id, lanes)
        channel.under_way.append(request)
        self._active.append(request)
        self.core.progress = self.drive
        status = channel.post_kernel.call(
            channel.address, request.address, address_of(array), array.nbytes, event_id, lanes, until_ns
        )  # fmt: skip
        self._after_step(request, int(status))
        return request

    def blocking(
        self, buffer: Any, peer: int, event_id: int, lanes: int, timeout_s: float | None, *, sending: bool
    ) -> None:
        """Send or receive, and wait. After a WaitTimeout the channel is unusable, since it was left in the middle."""
        timeout_s = self.core.op_timeout_s if timeout_s is None else timeout_s
        if sending and peer == self.core.rank:
            raise UsageError(f"rank {peer} cannot send to itself and wait for its own receive; use isend", value=peer)
        # With other requests under way, nothing may wait for one alone.
        until_ns = 0 if self._active else time.monotonic_ns() + min(SLICE_NS, int(timeout_s * 1e9))
        request = self.start(buffer, peer, event_id, lanes, sending=sending, until_ns=until_ns)
        try:
            self.wait(request, timeout_s)
        except BaseException as error:
            if not request.done:
                self._abandon(request, f"event {request.event_id} was given up in the middle ({type(error).__name__})")
            raise
        if request.error is not None:
            raise request.error

    def require_idle(self) -> None:
        """Raise UsageError if requests are under way that somebody could still complete; of a group, its own."""
        self.drive()
        active = [request for request in self._active if self._world is None or request.engine is self]
        if active and self.core.fabric.abort_word() is None:
            what = "; ".join(str(request.describe()) for request in active[:4])
            raise UsageError(
                f"rank {self.core.rank} cannot leave: {len(active)} requests are under way ({what}); wait first",
                value=len(active), bound=0,
            )  # fmt: skip

    def drive(self) -> None:
        """Give every request of this rank a chance, in the order in which they were posted."""
        for request in list(self._active):
            if request.is_under_way():
                request.engine.step(request, 0)

    def poll(self, request: Request) -> None:
        """Drive all requests a little, and raise if the session is over or the request's peer has left it."""
        self.core.require_open()
        if self._look(request) == PENDING:
            self.core.check_session(request.describe)
            if self.core.has_left(request.describe()) and self._look(request) == PENDING:
                self._end(request, self.core.left(request.describe()))

    def wait(self, request: Request, timeout_s: float) -> None:
        """Drive all requests until this one is done."""
        core = self.core
        if request.is_under_way():
            core.require_open()
        deadline_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        looked_ns = 0
        while request.is_under_way():
            now_ns = time.monotonic_ns()
            until_ns = min(deadline_ns, now_ns + SLICE_NS)
            alone = len(self._active) == 1
            status = self.step(request, until_ns) if alone else self._drive_and_sleep(request, until_ns)
            if status in (wait.SLICE, wait.ABORTED) or now_ns - looked_ns > SLICE_NS:
                looked_ns = now_ns
                if request.is_under_way():
                    self.poll(request)
            if request.is_under_way() and time.monotonic_ns() >= deadline_ns:
                raise core.timed_out(request.describe(), timeout_s)

    def _look(self, request: Request) -> int:
        """Drive all requests once; PENDING if this one is still under way."""
        self.drive()
        return PENDING if request.is_under_way() else OK

    def _drive_and_sleep(self, request: Request, until_ns: int) -> int:
        """Several requests: drive them in turn, then sleep until the doorbell rings for any of them."""
        for _ in range(_ROUNDS_BEFORE_SLEEP):
            if self._look(request) == OK:
                return OK
            os.sched_yield()
        control = self.core.control
        wait.arm(control)
        try:
            return OK if self._look(request) == OK else int(wait.sleep(control, until_ns))
        finally:
            wait.disarm(control)

    def step(self, request: Request, until_ns: int) -> int:
        """Drive one request of this communicator."""
        channel = request.channel
        status = int(channel.kernel.call(channel.address, request.address, until_ns))
        self._after_step(request, status)
        return status

    def _after_step(self, request: Request, status: int) -> None:
        if status == OK:
            self._end(request, None)
        elif status == MISMATCH:
            self._end(request, self._mismatch(request))

    def _end(self, request: Request, error: XcclError | None) -> None:
        request.done = True
        request.error = error
        if request.trace is not None and error is None:
            traced.transferred(request.trace, request.op, self.core.rank, request.channel.peer, request.channel.sending)
        request.channel.under_way.remove(request)
        self._active.remove(request)
        if not self._active:
            self.core.progress = None

    def _mismatch(self, request: Request) -> XcclError:
        channel = request.channel
        rank, peer = self.core.rank, channel.peer
        event_id = channel.word(layout.CH_PEER_EVENT_ID)
        n_bytes = channel.word(layout.CH_PEER_BYTES)
        lanes = channel.word(layout.CH_PEER_LANES)
        does, did = ("sends", "receives") if channel.sending else ("receives", "sent")
        if event_id != request.event_id:
            return EventMismatch(
                f"rank {rank} {does} event {request.event_id}, but rank {peer} {did} event {event_id}",
                operation="send" if channel.sending else "recv", event_id=request.event_id, peer_event_id=event_id,
                rank=rank, peer=peer,
            )  # fmt: skip
        return UsageError(
            f"event {event_id}: rank {rank} {does} {request.buffer.nbytes} bytes on {request.lanes} lanes, but "
            f"rank {peer} {did} {n_bytes} bytes on {lanes} lanes; both must be the same",
            event_id=event_id, rank=rank, peer=peer, value=request.buffer.nbytes, bound=n_bytes,
        )  # fmt: skip

    def _abandon(self, request: Request, reason: str) -> None:
        channel = request.channel
        channel.broken = reason
        for other in list(channel.under_way):
            self._end(other, FabricError(f"the channel to {channel.name} is unusable: {reason}", peer=channel.peer))
