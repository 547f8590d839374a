"""Requests: operations under way, as users see them. Who moves them on: `xccl.comm.progress`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ..errors import XcclError
from ..kernels.objects import slot_offset
from ..kernels.transfer_calls import UNDER_WAY
from ..kernels.wait import OK
from ..layout import calls as calls_layout, ring as layout
from ..layout.ring import KIND_COPY
from ..trace.record import Operation
from .channel import Channel
from .core import Core, Waiting, require_timeout
from .records import OperationRecord

_STATE = layout.OP_STATE // 8


class Owner(Protocol):
    """Who started a request, and is told of its end."""

    core: Core
    #: Wait for a request by compiled code, see `kernels.transfer_calls.wait`.
    direct_wait: Callable[[Request], int]

    def poll(self, request: Request) -> None:
        """Drive all requests a little, and raise if the session is over or the request's peer has left it."""

    def wait(self, request: Request, timeout_s: float, began_ns: int = 0) -> None:
        """Drive all requests until this one is done; the wait began then, or begins now if that is 0."""

    def end(self, request: Request) -> None:
        """Take note of the end of an operation: nobody else touches its record."""

    def fail(self, request: Request, error: XcclError) -> None:
        """End a request that is under way, whatever the other side does."""


class Request:
    """One send, receive or put under way. Made by `isend`, `irecv` and `iput`; keeps its buffer alive.

    The buffer must not be changed (isend, iput) or read (irecv) before the request is done.
    """

    # Compiled code makes requests, too (`kernels.transfer_calls`): one for each message of a stream.
    __slots__ = (
        "_looked_ns", "_record", "_wait", "buffer", "channel", "error", "owner", "peer", "trace",
    )  # fmt: skip

    def __init__(self, owner: Owner, channel: Channel, buffer: Any, record: OperationRecord | None) -> None:
        self.owner = owner
        self._record = record
        self.channel = channel
        self.buffer = buffer
        self.peer = channel.peer
        self.error: XcclError | None = None
        self.trace: Operation | None = None
        self._looked_ns = 0
        self._wait = owner.direct_wait

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
        began_ns = 0
        if timeout_s is None:
            status = self._wait(self)
            if status == OK:
                return
            timeout_s = self.owner.core.op_timeout_s
            if status == UNDER_WAY:
                began_ns = self.owner.core.calls.began_ns()
        else:
            timeout_s = require_timeout(timeout_s)
        if self._record is not None:
            self.owner.wait(self, timeout_s, began_ns)
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


def slot_offsets(owner: Owner) -> dict[int, int]:
    """Where requests and records have what compiled code reads and writes, by word of the call state."""
    request = Request(owner, _NoChannel(), object(), None)  # type: ignore[arg-type]
    record = OperationRecord(memoryview(b""), 1 << 40)
    # So that no two slots refer to the same.
    for name in ("_record", "error"):
        setattr(request, name, object())
    record.request = request
    return {
        calls_layout.CA_REQUEST_BYTES: Request.__basicsize__,
        calls_layout.CA_REQUEST_BUFFER: slot_offset(request, "buffer"),
        calls_layout.CA_REQUEST_RECORD: slot_offset(request, "_record"),
        calls_layout.CA_REQUEST_ERROR: slot_offset(request, "error"),
        calls_layout.CA_RECORD_REQUEST: slot_offset(record, "request"),
        calls_layout.CA_RECORD_ADDRESS: slot_offset(record, "address"),
    }


class _NoChannel:
    """Of the request above."""

    peer = 0
