"""Who moves the requests of a communicator on, waits for them, and takes note of their ends.

Progress. A request moves on whenever its rank is in `test`, `wait`, or any call that waits; all requests of the rank
are driven then, so two ranks that send to each other before they receive do not block each other. A rank that computes
makes no progress meanwhile, but for what was given to its DMA engine, and for zero-copy messages that its peers pull.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np

from ..errors import XcclError
from ..kernels import driver as kernels, transfer_calls, wait
from ..layout import ring as layout
from ..layout.ring import KIND_COPY
from ..trace.record import Operation
from . import traced
from .channel import Channel
from .core import Core
from .driver import Driver
from .records import OperationRecord
from .request import Request
from .status import ShownWait
from .transfer_errors import broken_off, mismatch, unusable

#: A request that is polled looks at the session so often.
_LOOK_NS = 1_000_000
#: The other side may be copying a piece of a message that is given up: that long this rank waits for it.
_SETTLE_NS = 1_000_000_000
#: Buffers that are still written to by a peer which does not come to an end: they must never be freed.
_LIMBO: list[Any] = []

_STATE = layout.OP_STATE // 8
_OF_COPIES = (layout.OP_CHUNKS, layout.OP_BYTES, layout.OP_SIGNAL)


class Progress:
    """The owner of requests, see `request.Owner`.

    Args:
        core: waits of this rank.
        driver: who drives the requests of this rank.
    """

    def __init__(self, core: Core, driver: Driver) -> None:
        self.core = core
        self.driver = driver
        self.direct_wait = core.calls.bind(transfer_calls.wait)

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
        core.require_open()
        now_ns = time.monotonic_ns()
        deadline_ns = (began_ns or now_ns) + int(timeout_s * 1e9)
        shown: ShownWait | None = None
        try:
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
                shown = shown or core.board.wait(core.rank, deadline_ns, timeout_s)
                shown.show(request.describe(), now_ns)
        finally:
            if shown is not None:
                shown.end()

    # -- ends -------------------------------------------------------------------------------------------------------

    def end(self, request: Request) -> None:
        """Take note of the end of an operation: nobody else touches its record."""
        record = request._record
        assert record is not None
        state = record.words[_STATE]
        if state == layout.STATE_REFUSED:
            request.error = mismatch(self.core, request)
        elif state != layout.STATE_DONE and request.error is None:
            request.error = broken_off(self.core, request, state)
            self.abandon(request, f"event {request.word(layout.OP_EVENT_ID)} was broken off")
        if request.trace is not None and request.error is None:
            self._trace(request.trace, request, record)
        self.driver.remove(record)
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

    def abandon(self, request: Request, reason: str) -> None:
        """Give a request up in the middle, and all others of its channel, which nobody can use from now on."""
        channel = request.channel
        self._break(channel, reason)
        for other in self.driver.requests:
            if other.channel is channel and not other.done:
                self.fail(other, unusable(self.core, other, reason))

    def _break(self, channel: Channel, reason: str) -> None:
        channel.broken = channel.broken or reason
        if channel.kind != KIND_COPY:
            self.core.calls.set_channel(channel.peer, channel.sending, 0)
