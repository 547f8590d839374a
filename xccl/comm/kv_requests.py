"""The two sides of one request of a `KVTransfer`."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import FabricError, UsageError, XcclError
from ..kernels import kv as kernels, words
from ..layout import kv as layout, ring
from ..layout.ring import STATE_REFUSED
from . import traced_kv
from .buffers import require_int
from .channel import Channel
from .core import Waiting, require_timeout
from .records import OperationRecord
from .request import Request

if TYPE_CHECKING:
    from .kv import KVTransfer


class KVRequest(Request):
    """One side of a request under way.

    Attributes:
        kv: of which transfer.
    """

    __slots__ = ("_paged", "kv", "pages", "request_id")

    def __init__(
        self, kv: KVTransfer, channel: Channel, record: OperationRecord, paged: npt.NDArray[np.int64],
        pages: npt.NDArray[np.int32], peer: int, request_id: int,
    ) -> None:  # fmt: skip
        super().__init__(kv.requests, channel, (paged, pages), record)
        self.kv = kv
        self.pages = pages
        self.peer = peer
        self.request_id = request_id
        self._paged = paged

    @property
    def name(self) -> str:
        """In messages and traces."""
        return "kv_send" if self.channel.sending else "kv_recv"

    @property
    def address(self) -> int:
        """Address of its record, for kernels."""
        return int(self._paged.ctypes.data)

    def get(self, offset: int) -> int:
        """A word of its record."""
        return int(self._paged[offset // 8])

    def describe(self) -> Waiting:
        """What this request waits for."""
        return Waiting(f"{self.name} (layers)", self.request_id, self.peer, self.kv.layers, self._layers_seen())

    @abstractmethod
    def _layers_seen(self) -> int:
        """Layers that have been sent, or have come."""

    @abstractmethod
    def settle(self, record: OperationRecord) -> None:
        """It has ended; `error` is set if this rank has given it up."""

    def failure(self, record: OperationRecord, state: int) -> XcclError:
        """Why the other side has ended it."""
        rank, peer = self.kv.core.rank, self.peer
        text = f"rank {rank}: request {self.request_id}"
        if state == STATE_REFUSED:
            does, did = ("sends", "announced") if self.channel.sending else ("announced", "sends")
            theirs = int(record.words[ring.OP_PEER_BYTES // 8])
            return UsageError(
                f"{text}: rank {rank} {does} {len(self.pages)} pages, but rank {peer} {did} {theirs}; both must be the "
                "same", rank=rank, peer=peer, request_id=self.request_id, value=len(self.pages), bound=theirs,
            )  # fmt: skip
        try:
            self.kv.core.check_session(self.describe)
        except XcclError as error:
            return error.with_traceback(None)
        return FabricError(
            f"{text}: rank {peer} has cancelled it", rank=rank, peer=peer, request_id=self.request_id
        )  # fmt: skip

    def record_trace(self, record: OperationRecord) -> None:
        """Record what it has done, if anybody wants to know."""
        if self.trace is not None:
            traced_kv.transferred(
                self.trace, np.array(record.words), self.peer, len(self.pages), self.kv.page_bytes,
                sending=self.channel.sending,
            )  # fmt: skip

    def _session_goes_on(self) -> bool:
        """When it is over the other side hears of that, and not of a request that was cancelled."""
        return self.kv.core.fabric.abort_word() is None

    def _cancelled(self) -> FabricError:
        return FabricError(
            f"rank {self.kv.core.rank}: request {self.request_id} was cancelled by this rank",
            rank=self.kv.core.rank, peer=self.peer, request_id=self.request_id,
        )  # fmt: skip

    def __repr__(self) -> str:
        state = "under way" if not self.done else "done" if self.error is None else "failed"
        return (
            f"{type(self).__name__}(request_id={self.request_id}, peer={self.peer}, pages={len(self.pages)}, {state})"
        )


class KVSend(KVRequest):
    """A request that this rank sends. Made by `KVTransfer.isend`.

    Its pages must not be written while it is under way, but for layers that are not ready yet.

    Attributes:
        request_id: the caller's number.
        peer: the other rank.
        pages: int32 [n], those of this rank.
        error: what has ended it before it was complete; None if nothing has.
    """

    __slots__ = ("_done",)

    def ready(self, layer: int | None = None) -> None:
        """Layers up to and with this one are final in all pages of the request, and may be sent.

        Returns at once. With engine "mte" it does what can be done at once.

        Args:
            layer: the highest of them; all layers if None. Lower than before changes nothing.

        Raises:
            UsageError: there is no such layer.
        """
        layers = self.kv.layers
        ready = layers if layer is None else require_int(layer, "layer", 0, layers - 1) + 1
        self.kv.core.require_open()
        if self._record is None or ready <= self.get(layout.PG_READY):
            return
        kernels.ready.call(self.address, ready, self.kv.core.control)
        if self.word(ring.OP_ENGINE) == ring.ENGINE_MTE:
            self.kv.requests.collect()

    @property
    def layers_sent(self) -> int:
        """Layers that are at the receiver."""
        return self._layers_seen()

    def cancel(self) -> bool:
        """Give the request up: on return its pages are not read any more.

        The receiver, if it has announced its pages, ends with FabricError. If it has not, it is not told: its wait ends
        by its own deadline, or when it cancels.

        Returns:
            Was it cancelled? False if it had ended before.
        """
        return self.kv.requests.give_up(self, self._cancelled())

    def _layers_seen(self) -> int:
        if self._record is not None:
            self._done = self.word(ring.OP_DONE)
        return self._done

    def settle(self, record: OperationRecord) -> None:
        """It has ended: keep its count, and tell the receiver if this rank has given it up."""
        self._done = int(record.words[ring.OP_DONE // 8])
        if self.error is not None and self._session_goes_on():
            kernels.withdraw.call(self.address)

    def describe(self) -> Waiting:
        """What this request waits for."""
        waiting = super().describe()
        if self.get(layout.PG_SLOT):
            return waiting
        return Waiting("kv_send, whose pages are not announced", self.request_id, self.peer, self.kv.layers, 0)


class KVReceive(KVRequest):
    """A request that this rank receives. Made by `KVTransfer.irecv`.

    Its pages must not be read, but for layers that have arrived, nor written, while it is under way.

    Attributes:
        request_id: the caller's number.
        peer: the other rank.
        pages: int32 [n], those of this rank.
        error: what has ended it before it was complete; None if nothing has.
    """

    __slots__ = ()

    @property
    def layers_arrived(self) -> int:
        """Layers, from the first one on, that are in the pages of this rank. Looks only, and costs one load."""
        return self._layers_seen()

    def wait_layer(self, layer: int, timeout_s: float | None = None) -> None:
        """Return when this layer and those before it are there; they may be read then.

        Args:
            layer: from 0.
            timeout_s: deadline in seconds; the communicator's default if None.

        Raises:
            UsageError, FabricError, WaitTimeout, PeerDied, SessionAborted: as for `wait`.
        """
        layer = require_int(layer, "layer", 0, self.kv.layers - 1)
        core = self.kv.core
        timeout_s = core.op_timeout_s if timeout_s is None else require_timeout(timeout_s)
        self.kv.requests.wait(self, timeout_s, layers=layer + 1)
        if self.error is not None and layer >= self.layers_arrived:
            raise self.error.with_traceback(None)

    def cancel(self, timeout_s: float | None = None) -> bool:
        """Give the request up: on return nobody writes into its pages any more.

        Args:
            timeout_s: how long to wait for the sender to stop, if it has begun; the communicator's default if None.

        Returns:
            Was it cancelled? False if it had ended before, well or not.

        Raises:
            WaitTimeout: the sender (with engine "mte", one that is in no call) has not answered: the request is under
                way, and its pages are in use. It will stop there when it can; wait for it, or cancel again.
            PeerDied, SessionAborted: the session is over.
        """
        core = self.kv.core
        core.require_open()
        timeout_s = core.op_timeout_s if timeout_s is None else require_timeout(timeout_s)
        self.kv.requests.collect()
        if self._record is None:
            return False
        if kernels.cancel.call(self.address):
            return self.kv.requests.give_up(self, self._cancelled())
        self.kv.requests.wait(self, timeout_s)
        if not isinstance(self.error, FabricError):
            return False
        self.error = self._cancelled()
        return True

    def _layers_seen(self) -> int:
        progress = int(words.load(self.get(layout.PG_ARRIVAL) + layout.AR_PROGRESS))
        if self._record is None or progress >> layout.USE_SHIFT != self.get(layout.PG_USE):
            return self._layers_at_end()
        code = progress & layout.PROGRESS_MASK
        return code if code <= self.kv.layers else self.word(ring.OP_DONE)

    def _layers_at_end(self) -> int:
        return self.kv.layers if self._record is None and self.error is None else 0

    def settle(self, record: OperationRecord) -> None:
        """It has ended: nothing of it may come any more."""
        if self.error is not None and self._session_goes_on():
            kernels.cancel.call(self.address)


def page_numbers(pages: Any, most: int, total: int) -> npt.NDArray[np.int32]:
    """[n] page numbers as int32, checked.

    Raises:
        UsageError: they are not a list of integers, too many, or no pages of the pool.
    """
    found = np.asarray(pages)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise UsageError(
            f"pages must be a list of page numbers, got an array of {found.dtype} of shape {found.shape}",
            value=str(found.dtype),
        )
    if len(found) > most:
        raise UsageError(
            f"{len(found)} pages are too many for a request: max_pages is {most}", value=len(found), bound=most
        )
    if found.size and not (int(found.min()) >= 0 and int(found.max()) < total):
        unknown = next(int(page) for page in found if not 0 <= int(page) < total)
        raise UsageError(
            f"there is no page {unknown}: the pool has {total}, numbered from 0", value=unknown, bound=total - 1
        )
    return np.array(found, np.int32)  # a copy: the caller's list may change
