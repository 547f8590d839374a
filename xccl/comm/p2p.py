"""Send and receive between two ranks (XDS section 3.1), and copies as requests: channels, requests, errors.

Rules and theory of operation are those of `xccl.kernels.ring`, `zerocopy` and `driver`.

Progress. A request moves on whenever its rank is in `test`, `wait`, or any call that waits; all requests of the rank
are driven then, so two ranks that send to each other before they receive do not block each other. A rank that computes
makes no progress meanwhile, but for what was given to its DMA engine, and for zero-copy messages that its peers pull.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import EventMismatch, FabricError, UsageError, XcclError
from ..kernels import calls, driver as kernels, wait
from ..layout import calls as calls_layout, ring as layout
from ..layout.ring import KIND_COPY, KIND_RECEIVE, KIND_SEND, MAX_LANES
from ..trace.record import Operation
from . import traced
from .buffers import address_of, readable, require_int, require_one_of, writable
from .channel import Channel, OperationRecord
from .core import Core, Waiting, require_timeout
from .driver import Driver

_MAX_EVENT_ID = (1 << 63) - 1
_MODES: Final = ("auto", "ring", "zero_copy")
_ENGINES: Final = ("mte", "dma")
#: A request that is polled looks at the session so often.
_LOOK_NS = 1_000_000
#: The other side may be copying a piece of a message that is given up: that long this rank waits for it.
_SETTLE_NS = 1_000_000_000
#: A peer whose memory is gone is given so long to be seen dead; between two looks.
_DEATH_NS, _DEATH_PAUSE_S = 1_000_000_000, 0.001
#: Buffers that are still written to by a peer which does not come to an end: they must never be freed.
_LIMBO: list[Any] = []

_STATE = layout.OP_STATE // 8
_OF_COPIES = (layout.OP_CHUNKS, layout.OP_BYTES, layout.OP_SIGNAL)


class Owner(Protocol):
    """Who started a request, and is told of its end."""

    core: Core

    def poll(self, request: Request) -> None:
        """Drive all requests a little, and raise if the session is over or the request's peer has left it."""

    def wait(self, request: Request, timeout_s: float) -> None:
        """Drive all requests until this one is done."""

    def end(self, request: Request) -> None:
        """Take note of the end of an operation: nobody else touches its record."""

    def fail(self, request: Request, error: XcclError) -> None:
        """End a request that is under way, whatever the other side does."""


class Request:
    """One send, receive or put under way. Made by `isend`, `irecv` and `iput`; keeps its buffer alive.

    The buffer must not be changed (isend, iput) or read (irecv) before the request is done.
    """

    # Of the class, as long as they are what they mostly are: a request is made for each message of a stream.
    error: XcclError | None = None
    trace: Operation | None = None
    _looked_ns = 0

    def __init__(self, owner: Owner, channel: Channel, buffer: Any, record: OperationRecord) -> None:
        self.owner = owner
        self._record: OperationRecord | None = record
        self.channel = channel
        self.buffer = buffer
        self.peer = channel.peer

    @property
    def done(self) -> bool:
        """Has it ended, well or not? Looks only, and drives nothing."""
        return self._record is None or self._record.words[_STATE] != layout.STATE_UNDER_WAY

    def is_collected(self) -> bool:
        """Has the rank taken note of its end?"""
        return self._record is None

    def test(self) -> bool:
        """Drive all requests of this rank a little; is this one done? Never waits.

        Raises:
            EventMismatch, UsageError: the other side means another transfer, or another size.
            FabricError: the other side gave the transfer up.
            PeerDied, SessionAborted: the session is over.
        """
        if self._record is not None:
            self.owner.poll(self)
        if self.error is not None:
            raise self.error.with_traceback(None)
        return self._record is None

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the transfer is complete: for a send, when the receiver has acknowledged all of it.

        Args:
            timeout_s: deadline in seconds; the communicator's default if None. After a WaitTimeout the request is still
                under way, and may be waited for again.

        Raises:
            EventMismatch, UsageError, FabricError, WaitTimeout, PeerDied, SessionAborted: as for `send` and `recv`.
        """
        if timeout_s is not None:
            timeout_s = require_timeout(timeout_s)
        if self._record is not None:
            self.owner.wait(self, self.owner.core.op_timeout_s if timeout_s is None else timeout_s)
        if self.error is not None:
            raise self.error.with_traceback(None)

    def word(self, offset: int) -> int:
        """A word of the operation, which must not have been collected."""
        assert self._record is not None
        return int(self._record.words[offset // 8])

    def describe(self) -> Waiting:
        """What this request waits for."""
        chunks, done = self.word(layout.OP_CHUNKS), self.word(layout.OP_DONE)
        if self.channel.kind == KIND_COPY:
            return Waiting("put", None, self.peer, chunks, done)
        if self.word(layout.OP_FORM) != layout.FORM_RING and chunks:
            chunks, done = self.word(layout.OP_PIECES), self.word(layout.OP_MOVED)
        name = "send" if self.channel.sending else "recv"
        if self.channel.sending and chunks and self.word(layout.OP_DONE) == self.word(layout.OP_CHUNKS):
            name += " (all chunks written, not acknowledged)"
        return Waiting(name, self.word(layout.OP_EVENT_ID), self.peer, max(chunks, 1), done)


class PointToPoint:
    """Channels of one rank in one communicator, and its requests.

    Args:
        core: waits of this rank.
        world: of the session, when this is a group's: the requests of all communicators of a rank are driven together.
    """

    def __init__(self, core: Core, world: PointToPoint | None = None) -> None:
        self.core = core
        self.driver: Driver = Driver(core) if world is None else world.driver
        core.calls.words[calls_layout.CA_DRIVER // 8] = self.driver.address
        self._is_group = world is not None
        self._channels: dict[tuple[int, bool], Channel] = {}
        #: Those that others have opened, and not closed.
        self._opened: list[Channel] = []
        self._post_send = core.calls.bind(calls.post_send)
        self._post_receive = core.calls.bind(calls.post_receive)
        self._direct_wait = core.calls.bind(calls.wait)

    # -- starting ---------------------------------------------------------------------------------------------------

    def start(
        self, buffer: Any, peer: int, event_id: int, lanes: int, mode: str, engine: str, *, sending: bool
    ) -> Request:
        """Post a send or receive, and drive it once."""
        record = self.driver.pool.take()
        post = self._post_send if sending else self._post_receive
        status = post(buffer, peer, event_id, lanes, mode, engine, record.address)
        if status == calls.NOT_TAKEN:
            self.driver.pool.give_back(record)
            return self._start(buffer, peer, event_id, lanes, mode, engine, sending=sending)
        request = self._register(self._channels[peer, sending], buffer, record)
        if status == calls.POSTED_AND_ENDED:
            self.driver.collect()
        return request

    def _start(
        self, buffer: Any, peer: int, event_id: int, lanes: int, mode: str, engine: str, *, sending: bool
    ) -> Request:
        """The long way: check all arguments, whatever they are, and trace."""
        core = self.core
        core.require_open()
        array = readable(buffer, "the buffer to send") if sending else writable(buffer, "the buffer to receive into")
        peer = require_int(peer, "dst" if sending else "src", 0, core.size - 1)
        event_id = require_int(event_id, "event_id", 0, _MAX_EVENT_ID)
        lanes = require_int(lanes, "lanes", 1, MAX_LANES)
        mode = require_one_of(_MODES, mode, "mode")
        engine = require_one_of(_ENGINES, engine, "engine")
        channel = self._channel(peer, sending=sending)
        address = address_of(array)
        zero_copy = False
        if sending:
            zero_copy = self._is_zero_copy(channel, address, array.nbytes, mode)
        record = self.driver.pool.take()
        request = self._register(channel, array, record)
        if core.trace is not None:
            request.trace = core.trace.start("send" if sending else "recv", event_id)
        by_dma = engine == "dma"
        if by_dma:
            self.driver.start_engine()
        kernels.post.call(
            self.driver.address, channel.address, record.address, address, array.nbytes, event_id, lanes,
            layout.ENGINE_DMA if by_dma else layout.ENGINE_MTE, int(zero_copy),
        )  # fmt: skip
        self.driver.collect()
        return request

    def _is_zero_copy(self, channel: Channel, address: int, n_bytes: int, mode: str) -> bool:
        if mode == "ring" or (mode == "auto" and n_bytes < layout.ZERO_COPY_BYTES):
            return False
        if channel.reaches(address, n_bytes):
            return True
        if mode == "auto":
            return False
        raise UsageError(
            f"mode zero_copy: rank {channel.peer} cannot reach private memory of rank {self.core.rank} here; send from "
            f"the app data area (the `local` of a symmetric array), or use mode auto",
            value="private", peer=channel.peer,
        )  # fmt: skip

    def copies(
        self,
        name: str,
        descriptors: npt.NDArray[np.int64],
        peer: int,
        keep: Any,
        engine: str,
        signal: tuple[int, int, int],
    ) -> Request:
        """Post a list of copies, done in order, and a signal behind them.

        Args:
            name: of the operation and of its only stage, in traces.
            descriptors: [n, 3]: destination, source, bytes; contiguous.
            peer: whose memory it is about, for messages.
            keep: kept alive until it is done.
            engine: "mte" or "dma".
            signal: address of a word, what to add to it, control area of its rank; zeros for no signal.
        """
        by_dma = require_one_of(_ENGINES, engine, "engine") == "dma"
        if by_dma:
            self.driver.start_engine()
        channel = self.driver.copies
        record = self.driver.pool.take()
        request = self._register(channel, (descriptors, keep), record)
        request.peer = peer
        if self.core.trace is not None:
            request.trace = self.core.trace.start(name, stage=name)
        kernels.post_copies.call(
            self.driver.address, channel.address, record.address, descriptors.ctypes.data, len(descriptors),
            int(descriptors[:, 2].sum()), layout.ENGINE_DMA if by_dma else layout.ENGINE_MTE, *signal,
        )  # fmt: skip
        self.driver.collect()
        return request

    def _channel(self, peer: int, *, sending: bool) -> Channel:
        channel = self._channels.get((peer, sending))
        if channel is None:
            kind = KIND_SEND if sending else KIND_RECEIVE
            channel = self._channels[peer, sending] = Channel(self.core, self.driver, peer, kind=kind)
            self.core.calls.set_channel(peer, sending, channel.address)
        if channel.broken is not None:
            # If the other rank has died, that explains more.
            self.core.check_session(lambda: Waiting("send" if sending else "recv", None, peer))
            raise FabricError(
                f"rank {self.core.rank}: the channel to {channel.name} is unusable: {channel.broken}", peer=peer
            )
        return channel

    def _register(self, channel: Channel, buffer: Any, record: OperationRecord) -> Request:
        request = Request(self, channel, buffer, record)
        self.driver.add(record.address, request)
        return request

    def open_channel(self, kind: int, engine: int) -> Channel:
        """A channel for operations of one engine, to or from any peer; closed with the communicator at the latest."""
        channel = Channel(self.core, self.driver, self.core.rank, kind=kind, only=engine)
        self._opened.append(channel)
        return channel

    def close_channel(self, channel: Channel) -> None:
        """Nothing is under way in the channel, and it is not used any more."""
        self._opened.remove(channel)
        channel.retire()

    # -- blocking calls ---------------------------------------------------------------------------------------------

    def blocking(
        self, status: int, buffer: Any, peer: int, event_id: int, lanes: int, timeout_s: float | None, mode: str,
        engine: str, *, sending: bool,
    ) -> None:  # fmt: skip
        """A send or receive, from where the direct call has left it.

        After a failure the channel is unusable, since it was left in the middle.
        """
        began_ns = 0
        if status == calls.NOT_TAKEN:
            timeout_s = self.core.op_timeout_s if timeout_s is None else require_timeout(timeout_s)
            if sending and peer == self.core.rank:
                raise UsageError(
                    f"rank {peer} cannot send to itself and wait for its own receive; use isend", value=peer
                )
            request = self.start(buffer, peer, event_id, lanes, mode, engine, sending=sending)
        else:
            channel = self._channels[peer, sending]
            request = self._register(channel, buffer, channel.spare)
            channel.renew_spare()
            if status == calls.UNWELL:
                self.end(request)
            timeout_s, began_ns = self.core.op_timeout_s, self.core.calls.began_ns()
        try:
            self.wait(request, timeout_s, began_ns)
        except BaseException as error:
            if not request.is_collected():
                event = request.word(layout.OP_EVENT_ID)
                self._abandon(request, f"event {event} was given up in the middle ({type(error).__name__})")
            raise
        if request.error is not None:
            raise request.error

    def _abandon(self, request: Request, reason: str) -> None:
        channel = request.channel
        self._break(channel, reason)
        for other in [request for request in self.driver.requests.values() if request.channel is channel]:
            self.fail(other, FabricError(f"the channel to {channel.name} is unusable: {reason}", peer=channel.peer))

    def _break(self, channel: Channel, reason: str) -> None:
        channel.broken = channel.broken or reason
        if channel.kind != KIND_COPY:
            self.core.calls.set_channel(channel.peer, channel.sending, 0)

    # -- progress ---------------------------------------------------------------------------------------------------

    def poll(self, request: Request) -> None:
        """Drive all requests a little, and raise if the session is over or the request's peer has left it."""
        self.core.require_open()
        status = self.driver.progress()
        if request.is_collected():
            return
        now_ns = time.monotonic_ns()
        if status == wait.ABORTED or now_ns - request._looked_ns > _LOOK_NS:
            request._looked_ns = now_ns
            self._look(request)

    def _look(self, request: Request) -> None:
        """Raise if the session is over; end a request whose peer has left without doing its part."""
        core = self.core
        core.check_session(request.describe)
        if core.has_left(request.describe()):
            self.driver.progress()
            if not request.is_collected():
                self.fail(request, core.left(request.describe()))

    def wait(self, request: Request, timeout_s: float, began_ns: int = 0, done: int = layout.DONE_NEVER) -> None:
        """Drive all requests until this one is done.

        Args:
            request: which.
            timeout_s: deadline in seconds.
            began_ns: when the wait began; now if 0.
            done: or until it has come so far (OP_DONE).
        """
        core = self.core
        self.driver.collect()
        if request.is_collected():
            return
        assert request._record is not None
        address = request._record.address
        if began_ns == 0 and done == layout.DONE_NEVER and timeout_s * 1e9 > core.slice_ns:
            status = self._direct_wait(address)
            if status != calls.NOT_TAKEN:
                self.driver.collect()
                if request.is_collected():
                    return
                began_ns = core.calls.began_ns()
        core.require_open()
        now_ns = time.monotonic_ns()
        deadline_ns = (began_ns or now_ns) + int(timeout_s * 1e9)
        while True:
            until_ns = min(deadline_ns, now_ns + core.slice_ns)
            kernels.wait_for.call(self.driver.address, address, done, until_ns)
            self.driver.collect()
            if request.is_collected() or request.word(layout.OP_DONE) >= done:
                return
            self._look(request)
            if request.is_collected():
                return
            now_ns = time.monotonic_ns()
            if now_ns >= deadline_ns:
                raise core.timed_out(request.describe(), timeout_s)

    # -- ends -------------------------------------------------------------------------------------------------------

    def end(self, request: Request) -> None:
        """Take note of the end of an operation: nobody else touches its record."""
        record = request._record
        assert record is not None
        state = record.words[_STATE]
        if state == layout.STATE_REFUSED:
            request.error = self._mismatch(request)
        elif state != layout.STATE_DONE and request.error is None:
            request.error = self._broken_off(request, state)
            self._break(request.channel, f"event {request.word(layout.OP_EVENT_ID)} was broken off")
        if request.trace is not None and request.error is None:
            self._trace(request.trace, request, record)
        self.driver.remove(record.address)
        self.driver.pool.give_back(record)
        request._record = None

    def _trace(self, operation: Operation, request: Request, record: OperationRecord) -> None:
        if request.channel.kind == KIND_COPY:
            count, n_bytes, signal = (record.words[word // 8] for word in _OF_COPIES)
            name, peer = operation.name, request.peer
            operation.finish(partial(traced.moved, name, peer, n_bytes, units=count, signalled=signal != 0))
        else:
            words = np.array(record.words)
            traced.transferred(operation, words, self.core.rank, request.peer, request.channel.sending)

    def fail(self, request: Request, error: XcclError) -> None:
        """End a request that is under way, whatever the other side does."""
        record = request._record
        assert record is not None
        request.error = error
        # What has ended copies nothing, although it may have said that it would.
        is_dead = any(peer == request.peer for peer, _ in request.owner.core.fabric.dead_peers())
        until_ns = time.monotonic_ns() + (0 if is_dead else _SETTLE_NS)
        status = kernels.give_up.call(self.driver.address, record.address, until_ns)
        if status == wait.SLICE and not is_dead:
            _LIMBO.append(request.buffer)
        self.driver.collect()

    def _mismatch(self, request: Request) -> XcclError:
        sending, rank, peer = request.channel.sending, self.core.rank, request.peer
        own_event_id, own_lanes = request.word(layout.OP_EVENT_ID), request.word(layout.OP_LANES)
        event_id = request.word(layout.OP_PEER_EVENT_ID)
        n_bytes = request.word(layout.OP_PEER_BYTES)
        lanes = request.word(layout.OP_PEER_LANES)
        does, did = ("sends", "receives") if sending else ("receives", "sent")
        if event_id != own_event_id:
            return EventMismatch(
                f"rank {rank} {does} event {own_event_id}, but rank {peer} {did} event {event_id}",
                operation="send" if sending else "recv", event_id=own_event_id, peer_event_id=event_id,
                rank=rank, peer=peer,
            )  # fmt: skip
        return UsageError(
            f"event {event_id}: rank {rank} {does} {request.buffer.nbytes} bytes on {own_lanes} lanes, but "
            f"rank {peer} {did} {n_bytes} bytes on {lanes} lanes; both must be the same",
            event_id=event_id, rank=rank, peer=peer, value=request.buffer.nbytes, bound=n_bytes,
        )  # fmt: skip

    def _broken_off(self, request: Request, state: int) -> XcclError:
        """Why an operation that nobody refused did not end well: most often, because the other side is gone."""
        event_id, peer = request.word(layout.OP_EVENT_ID), request.peer
        # The memory of a process that dies goes before others can see that it has ended.
        until_ns = time.monotonic_ns() + (_DEATH_NS if state == layout.STATE_FAILED else 0)
        while True:
            try:
                self.core.check_session(request.describe)
            except XcclError as error:
                return error.with_traceback(None)
            if time.monotonic_ns() >= until_ns:
                break
            time.sleep(_DEATH_PAUSE_S)
        if state == layout.STATE_WITHDRAWN:
            text = f"rank {peer} gave event {event_id} up in the middle"
        else:
            text = f"event {event_id}: the buffer of rank {peer} cannot be reached any more"
        return FabricError(f"rank {self.core.rank}: {text}", rank=self.core.rank, peer=peer)

    # -- the end of the session -------------------------------------------------------------------------------------

    def require_idle(self) -> None:
        """Raise UsageError if requests are under way that somebody could still complete; of a group, its own."""
        if self.driver.requests:
            self.driver.progress()
        active = list(self.driver.requests.values())
        if self._is_group:
            active = [request for request in active if request.owner.core is self.core]
        if active and self.core.fabric.abort_word() is None:
            what = "; ".join(str(request.describe()) for request in active[:4])
            raise UsageError(
                f"rank {self.core.rank} cannot leave: {len(active)} requests are under way ({what}); wait first",
                value=len(active), bound=0,
            )  # fmt: skip

    def retire(self) -> None:
        """A group is freed, and nothing of it is under way."""
        for channel in (*self._channels.values(), *self._opened):
            channel.retire()
        self._channels.clear()
        self._opened.clear()

    def shut_down(self) -> None:
        """Stop the DMA engine, and give up what is under way, in groups too: peers must not touch freed buffers."""
        self.driver.stop_engine()
        for request in list(self.driver.requests.values()):
            if not request.is_collected():
                core = request.owner.core
                request.owner.fail(request, FabricError(f"rank {core.rank} has left the session", rank=core.rank))
