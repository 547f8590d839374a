"""KV-cache transfer: paged blocks from the pool of one rank to that of another, layer by layer (XDS §3.1).

Rules and theory of operation are those of `xccl.kernels.kv`: the receiver announces its pages, the sender writes into
them. What a rank has under way, and which of its pages, is known to the rank alone (`Book`).

In a deployment with prefill and decode on different dies, a prefill die computes the KV cache of a prompt layer by
layer, into whichever pages of its pool are free; a decode die has other pages free. Both are told by the serving
system who sends which request to whom.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..kernels import driver as driver_kernels, kv as kernels
from ..layout import kv as layout
from ..layout.kv import PAGED, Area
from ..layout.ring import ENGINE_DMA, ENGINE_MTE, KIND_PAGED_RECEIVE, KIND_PAGED_SEND
from ..layout.segment import PAGE_BYTES
from .buffers import require_int
from .kv_book import Book
from .kv_requests import KVReceive, KVRequest, KVSend, page_numbers
from .sendrecv import Engine
from .symmetric import Block, SymmetricArray, collective_free, reserve

if TYPE_CHECKING:
    from .communicator import Communicator

_MAX_REQUEST_ID: Final = (1 << 63) - 1
_ENGINES: Final = {"dma": ENGINE_DMA, "mte": ENGINE_MTE}


class KVTransfer:
    """Moves blocks between the pools of KV caches of all ranks. Construction is collective.

    The pool is paged: page p of layer l is `pool.local[l, p]`, and what it holds is a block. A request is a list of
    pages at the sender and one of as many at the receiver, in any order; in every layer, block i goes from the sender's
    i-th page to the receiver's i-th page, without a copy in between. Any rank may send to any other, and to itself.

    Args:
        comm: the communicator.
        pool: symmetric array [layers, pages, ...], of any dtype; made by `comm.empty`, and freed after this object.
            Pages are watched by one object: give a pool to one.
        max_pages: the most pages of a request; all of the pool if None.
        max_requests: the most requests of a pair, in one direction, that may be announced at a time.

    Attributes:
        pool: the pool.
        layers: its layers.
        num_pages: its pages.
        page_bytes: bytes of a page in one layer.
        max_pages: the most pages of a request.
        max_requests: the most announced requests of a pair.

    Raises:
        UsageError: an argument is impossible, or differs between ranks (then at all of them).
        CapacityError: the managed area has no room for the page lists.
    """

    def __init__(
        self, comm: Communicator, pool: SymmetricArray, *, max_pages: int | None = None, max_requests: int = 16
    ) -> None:
        self.core = core = comm.core
        core.require_open()
        try:
            _require_pool(pool)
            pool.require_of(core)
            total = pool.shape[1]
            self.max_pages = require_int(total if max_pages is None else max_pages, "max_pages", 1, total)
            self.max_requests = require_int(max_requests, "max_requests", 1, 1 << 12)
        except UsageError as error:
            core.refuse(error)
        self.pool = pool
        self.layers, self.num_pages = pool.shape[:2]
        self.page_bytes = pool.nbytes // (self.layers * self.num_pages)
        self._area = Area(core.size, self.max_requests, self.max_pages)
        self._allocator = comm.heap_allocator
        arguments = {
            "max_pages": self.max_pages,
            "max_requests": self.max_requests,
            "pool (its offset)": pool.addresses[core.rank] - int(core.fabric.segments[core.rank]),
        }
        # Whole memory pages, which read as 0 without being touched: the lists cost nothing until a pair talks.
        block = Block(self._allocator, self._area.total_bytes, 0, PAGE_BYTES)
        (self._block,) = reserve(core, "KVTransfer", arguments, block)
        self._p2p = p2p = comm._p2p
        self.requests = Book(p2p, self.num_pages, self.max_requests)
        self._sends = {engine: p2p.open_channel(KIND_PAGED_SEND, engine) for engine in _ENGINES.values()}
        self._receives = p2p.open_channel(KIND_PAGED_RECEIVE, ENGINE_MTE)
        self._common = self._common_words()
        self._backed: set[tuple[int, int]] = set()
        self._freed = False

    # -- starting ---------------------------------------------------------------------------------------------------

    def isend(
        self, pages: npt.ArrayLike, dst: int, request_id: int, *, by_layer: bool = False, engine: Engine = "dma"
    ) -> KVSend:
        """Start to send the blocks in these pages to rank `dst`, as soon as it has announced its pages.

        Args:
            pages: [n] page numbers of this rank, in any order; none is a request without blocks.
            dst: the receiver.
            request_id: the caller's number, 0 or more, of which a pair has one at a time; the receiver gives the same.
            by_layer: layers are sent as `KVSend.ready` says that they are final; else all of them are final now.
            engine: "dma", by the rank's DMA engine while the rank computes; or "mte", whenever the rank is in a call.

        Returns:
            The request. It is done when all blocks are at the receiver, which needs no call of the receiver but
            `irecv`. Until then the pages must not be written, but for layers that are not ready.

        Raises:
            UsageError: an argument is wrong, a page is being received into, or the request is under way already.
        """
        self._require_usable()
        dst = require_int(dst, "dst", 0, self.core.size - 1)
        code = _ENGINES.get(str(engine))
        if code is None:
            raise UsageError(f"engine must be one of {', '.join(_ENGINES)}, got {engine!r}", value=engine)
        request_id = require_int(request_id, "request_id", 0, _MAX_REQUEST_ID)
        numbers = page_numbers(pages, self.max_pages, self.num_pages)
        self.requests.require_free(numbers, dst, request_id, sending=True)
        own, fabric = self.core.rank, self.core.fabric
        self._commit(dst, own)
        paged = self._record(request_id, numbers, dst)
        paged[layout.PG_READY // 8] = 0 if by_layer else self.layers
        paged[layout.PG_ANNOUNCEMENTS // 8] = fabric.segments[own] + self._block + self._area.announcements(dst)
        paged[layout.PG_ARRIVALS // 8] = fabric.segments[dst] + self._block + self._area.arrivals(own)
        if code == ENGINE_DMA:
            self._p2p.driver.start_engine()
        request = KVSend(self, self._sends[code], self._p2p.driver.pool.take(), paged, numbers, dst, request_id)
        self._post(request, code)
        return request

    def irecv(self, pages: npt.ArrayLike, src: int, request_id: int) -> KVReceive:
        """Announce to rank `src` into which pages it is to write a request.

        Args:
            pages: [n] different page numbers of this rank, as many as the sender sends, in any order.
            src: the sender.
            request_id: the caller's number, 0 or more, of which a pair has one at a time; the sender gives the same.

        Returns:
            The request. The sender writes by itself: this rank may compute, and look at `KVReceive.layers_arrived`.

        Raises:
            UsageError: an argument is wrong, a page is used by another request, or the request is under way already.
            CapacityError: `max_requests` requests of that sender are under way.
        """
        self._require_usable()
        src = require_int(src, "src", 0, self.core.size - 1)
        request_id = require_int(request_id, "request_id", 0, _MAX_REQUEST_ID)
        numbers = page_numbers(pages, self.max_pages, self.num_pages)
        self.requests.require_free(numbers, src, request_id, sending=False)
        self._commit(self.core.rank, src)
        slot, use = self.requests.slots(src).take()
        own, fabric = self.core.rank, self.core.fabric
        announcements = int(fabric.segments[src]) + self._block + self._area.announcements(own)
        arrivals = int(fabric.segments[own]) + self._block + self._area.arrivals(src)
        paged = self._record(request_id, numbers, src)
        paged[layout.PG_SLOT // 8] = announcements + slot * self._area.slot_bytes
        paged[layout.PG_INDEX // 8] = slot
        paged[layout.PG_USE // 8] = use
        paged[layout.PG_ARRIVAL // 8] = arrivals + slot * layout.ARRIVAL_BYTES
        request = KVReceive(self, self._receives, self._p2p.driver.pool.take(), paged, numbers, src, request_id)
        kernels.announce.call(request.address, numbers.ctypes.data)
        self._post(request, ENGINE_MTE)
        return request

    def _common_words(self) -> npt.NDArray[np.int64]:
        """What is the same in the records of all requests."""
        record = np.zeros(PAGED.size_bytes // 8, np.int64)
        record[layout.PG_LAYERS // 8] = self.layers
        record[layout.PG_SLOTS // 8] = self.max_requests
        record[layout.PG_SLOT_BYTES // 8] = self._area.slot_bytes
        record[layout.PG_OWN_POOL // 8] = self.pool.addresses[self.core.rank]
        record[layout.PG_PAGE_BYTES // 8] = self.page_bytes
        record[layout.PG_LAYER_BYTES // 8] = self.page_bytes * self.num_pages
        return record

    def _record(self, request_id: int, pages: npt.NDArray[np.int32], peer: int) -> npt.NDArray[np.int64]:
        """The record of a request for kernels, with what both sides have in common."""
        record = self._common.copy()
        record[layout.PG_PEER_CONTROL // 8] = self.core.fabric.controls[peer]
        record[layout.PG_REQUEST // 8] = request_id
        record[layout.PG_COUNT // 8] = len(pages)
        record[layout.PG_PAGES // 8] = pages.ctypes.data
        record[layout.PG_PEER_POOL // 8] = self.pool.addresses[peer]
        return record

    def _commit(self, receiver: int, sender: int) -> None:
        """Back the words of a pair by memory. Either side may come first, and touches both."""
        if (receiver, sender) in self._backed:
            return
        area, commit = self._area, self.core.fabric.commit
        commit(sender, self._block + area.announcements(receiver), area.announcements_bytes)
        commit(receiver, self._block + area.arrivals(sender), area.arrivals_bytes)
        self._backed.add((receiver, sender))

    def _post(self, request: KVRequest, engine: int) -> None:
        record = request._record
        assert record is not None
        if self.core.trace is not None:
            request.trace = self.core.trace.start(request.name, request.request_id)
        self.requests.enter(request)
        driver = self._p2p.driver
        driver.add(record, request)
        driver_kernels.post_paged.call(
            driver.address, request.channel.address, record.address, request.address, request.request_id, self.layers,
            engine,
        )  # fmt: skip
        driver.collect()

    # -- the end ----------------------------------------------------------------------------------------------------

    @property
    def under_way(self) -> list[KVRequest]:
        """Requests of this rank that have not ended, in the order of their posting. Drives all requests once."""
        return self.requests.under_way

    def free(self) -> None:
        """Give the page lists back; the pool stays. Collective: returns when all have called it.

        Raises:
            UsageError: it was freed before, or requests of a rank are under way (at all ranks: nothing is freed).
        """
        self._require_usable()
        active = self.under_way
        if active:
            self.core.refuse(
                UsageError(
                    f"rank {self.core.rank} cannot free the KVTransfer: {len(active)} requests are under way; wait for "
                    f"or cancel them first ({active[0]!r})", value=len(active), bound=0,
                )
            )  # fmt: skip
        collective_free(self.core, (self._allocator, self._block))
        for channel in (*self._sends.values(), self._receives):
            self._p2p.close_channel(channel)
        self._freed = True

    def _require_usable(self) -> None:
        self.core.require_open()
        if self._freed:
            raise UsageError("this KVTransfer was freed", value="freed")
        self.pool.require_alive()

    def __repr__(self) -> str:
        return (
            f"KVTransfer(layers={self.layers}, num_pages={self.num_pages}, page_bytes={self.page_bytes}, "
            f"rank={self.core.rank} of {self.core.size})"
        )


def _require_pool(pool: Any) -> None:
    if not isinstance(pool, SymmetricArray):
        raise UsageError(f"the pool must be a symmetric array, got {type(pool).__name__}", value=type(pool).__name__)
    if len(pool.shape) < 2 or pool.nbytes == 0 or pool.shape[0] > layout.MAX_LAYERS or pool.shape[1] >= 1 << 31:
        raise UsageError(
            f"the pool must be [layers, pages, ...] with at least one byte a page and at most {layout.MAX_LAYERS} "
            f"layers, got shape {pool.shape}", value=pool.shape, bound=layout.MAX_LAYERS,
        )  # fmt: skip
