"""Send, receive, and puts as requests: the calls of a communicator. What they do: `xccl.comm.p2p`."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..kernels import transfer_calls
from .buffers import readable
from .core import Core
from .onesided import OneSided, apart
from .p2p import PointToPoint
from .request import Request
from .symmetric import SymmetricArray

Mode = Literal["auto", "ring", "zero_copy"]
Engine = Literal["mte", "dma"]


class SendReceive(OneSided):
    """The point-to-point operations of a communicator."""

    def __init__(self, core: Core, p2p: PointToPoint) -> None:
        super().__init__(core)
        self._p2p = p2p
        self._direct_send = core.calls.bind(transfer_calls.send)
        self._direct_receive = core.calls.bind(transfer_calls.receive)
        self._direct_isend = core.calls.bind(transfer_calls.post_send)
        self._direct_irecv = core.calls.bind(transfer_calls.post_receive)

    def send(
        self,
        buffer: npt.NDArray[Any],
        dst: int,
        event_id: int,
        lanes: int = 2,
        timeout_s: float | None = None,
        mode: Mode = "auto",
        engine: Engine = "mte",
    ) -> None:
        """Send an array to rank `dst`; returns when the receiver has all of it (XDS section 3.1).

        Args:
            buffer: what to send; strided arrays are copied first.
            dst: the receiver.
            event_id: the caller's number for the transfer, 0 or more; both sides must give the same.
            lanes: emulated AIV cores over which the message is dealt, 1 to 48; both sides must give the same.
            timeout_s: deadline in seconds; the communicator's default if None.
            mode: "ring", through the receiver's managed area; "zero_copy", from buffer to buffer; "auto", zero-copy
                from 32 KiB on where both ranks can reach each other's memory. The receiver follows.
            engine: "mte", by the rank itself, or "dma", by its DMA engine, in the background.

        Raises:
            UsageError: an argument is wrong, or the receiver expects another size or number of lanes.
            EventMismatch: the receiver expects another event.
            WaitTimeout: at the deadline; the channel to `dst` is unusable then.
            FabricError: the channel is unusable, or the receiver gave the transfer up.
            PeerDied, SessionAborted: the session is over.
        """
        status = self._direct_send(buffer, dst, event_id, lanes, timeout_s, mode, engine)
        if status:
            self._p2p.blocking(status, buffer, dst, event_id, lanes, timeout_s, mode, engine, sending=True)

    def recv(
        self,
        buffer: npt.NDArray[Any],
        src: int,
        event_id: int,
        lanes: int = 2,
        timeout_s: float | None = None,
        engine: Engine = "mte",
    ) -> None:
        """Receive from rank `src` into a writable, C-contiguous array of exactly the size sent.

        Arguments and errors are those of `send`. A refused message is dropped, and the channel stays usable.
        """
        status = self._direct_receive(buffer, src, event_id, lanes, timeout_s, "auto", engine)
        if status:
            self._p2p.blocking(status, buffer, src, event_id, lanes, timeout_s, "auto", engine, sending=False)

    def isend(
        self,
        buffer: npt.NDArray[Any],
        dst: int,
        event_id: int,
        lanes: int = 2,
        mode: Mode = "auto",
        engine: Engine = "mte",
    ) -> Request:
        """Start a send; arguments as for `send`. Don't change the buffer before the request is done.

        Neither this call nor `Request.test` polls for anything: they do what can be done at once, and return (the
        asynchronous mode of XDS section 3.1).
        """
        request: Request | None = self._direct_isend(buffer, dst, event_id, lanes, mode, engine)
        return request or self._p2p.start(buffer, dst, event_id, lanes, mode, engine, sending=True)

    def irecv(
        self, buffer: npt.NDArray[Any], src: int, event_id: int, lanes: int = 2, engine: Engine = "mte"
    ) -> Request:
        """Start a receive; arguments as for `recv`. Receives from a rank complete in the order of their posting."""
        request: Request | None = self._direct_irecv(buffer, src, event_id, lanes, "auto", engine)
        return request or self._p2p.start(buffer, src, event_id, lanes, "auto", engine, sending=False)

    def iput(
        self,
        target: SymmetricArray,
        source: npt.NDArray[Any],
        peer: int,
        offset: int = 0,
        engine: Engine = "dma",
    ) -> Request:
        """Start a put; arguments as for `put`. Don't change the source before the request is done.

        When it is done, the data is at the peer; `signal` may tell it so. Puts of a rank are done in the order of their
        posting.

        Args:
            target: the symmetric array.
            source: an array of the same dtype; strided ones are copied first.
            peer: the rank to write to.
            offset: first element to write, counted in `target` as if it were flat.
            engine: "dma", by the rank's DMA engine while the rank computes; or "mte", whenever the rank is in a call.

        Raises:
            UsageError: dtype, peer, range or engine is wrong. Nothing was written.
        """
        source = readable(source, "source")
        address = self._remote(target, source, peer, offset, "source")
        source, source_address = apart(source, address)
        descriptors = np.array([[address, source_address, source.nbytes]], np.int64)
        return self._p2p.copies("put", descriptors, int(peer), (source, target), engine, (0, 0, 0))
