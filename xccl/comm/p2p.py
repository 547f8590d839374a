"""Send and receive between two ranks (XDS section 3.1), and copies as requests: how they begin, and their channels.

Rules and theory of operation are those of `xccl.kernels.ring`, `zerocopy` and `driver`. Who moves requests on:
`xccl.comm.progress`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..errors import FabricError, UsageError
from ..kernels import calls, driver as kernels, transfer_calls
from ..layout import calls as calls_layout, ring as layout
from ..layout.ring import KIND_RECEIVE, KIND_SEND, MAX_LANES
from .buffers import address_of, readable, require_int, require_one_of, writable
from .channel import Channel
from .core import Core, Waiting, require_timeout
from .driver import Driver
from .progress import Progress
from .records import OperationRecord
from .request import Request, slot_offsets

_MAX_EVENT_ID = (1 << 63) - 1
_MODES: Final = ("auto", "ring", "zero_copy")
_ENGINES: Final = ("mte", "dma")


class PointToPoint(Progress):
    """Channels of one rank in one communicator, and its requests.

    Args:
        core: waits of this rank.
        world: of the session, when this is a group's: the requests of all communicators of a rank are driven together.
    """

    def __init__(self, core: Core, world: PointToPoint | None = None) -> None:
        super().__init__(core, Driver(core) if world is None else world.driver)
        core.calls.words[calls_layout.CA_DRIVER // 8] = self.driver.address
        for word, value in slot_offsets(self).items():
            core.calls.words[word // 8] = value
        self._is_group = world is not None
        self._channels: dict[tuple[int, bool], Channel] = {}
        #: Those that others have opened, and not closed.
        self._opened: list[Channel] = []

    # -- starting ---------------------------------------------------------------------------------------------------

    def start(
        self, buffer: Any, peer: int, event_id: int, lanes: int, mode: str, engine: str, *, sending: bool
    ) -> Request:
        """Post a send or receive by the long way: check all arguments, whatever they are, and trace."""
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
            channel.make_like(Request(self, channel, None, None))
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
        self.driver.add(record, request)
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
            if status == transfer_calls.UNWELL:
                self.end(request)
            timeout_s, began_ns = self.core.op_timeout_s, self.core.calls.began_ns()
        try:
            self.wait(request, timeout_s, began_ns)
        except BaseException as error:
            if not request.is_collected():
                event = request.word(layout.OP_EVENT_ID)
                self.abandon(request, f"event {event} was given up in the middle ({type(error).__name__})")
            raise
        if request.error is not None:
            raise request.error

    # -- the end of the session -------------------------------------------------------------------------------------

    def require_idle(self) -> None:
        """Raise UsageError if requests are under way that somebody could still complete; of a group, its own."""
        if self.driver.requests:
            self.driver.progress()
        active = self.driver.requests
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
        for request in self.driver.requests:
            if not request.is_collected():
                core = request.owner.core
                request.owner.fail(request, FabricError(f"rank {core.rank} has left the session", rank=core.rank))
