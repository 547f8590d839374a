"""What a rank has under way in one `KVTransfer`: requests by number, slots by sender, and who uses which page."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError, UsageError, XcclError
from ..layout import kv as layout, ring
from ..layout.ring import STATE_DONE
from .kv_requests import KVRequest
from .p2p import PointToPoint
from .request import Request


class Slots:
    """Slots of one sender's announcements, of which this rank, the receiver, chooses free ones."""

    def __init__(self, sender: int, count: int) -> None:
        self._sender = sender
        self._free = list(range(count - 1, -1, -1))
        self._uses = [0] * count

    def take(self) -> tuple[int, int]:
        """A free slot, and the number of its use.

        Raises:
            CapacityError: there is none.
        """
        if not self._free:
            count = len(self._uses)
            raise CapacityError(
                f"{count} requests from rank {self._sender} are under way: max_requests allows no more",
                needed=count + 1, available=count, peer=self._sender,
            )  # fmt: skip
        slot = self._free.pop()
        self._uses[slot] += 1
        return slot, self._uses[slot]

    def give_back(self, slot: int) -> None:
        """The request in it has ended."""
        self._free.append(slot)


class Book:
    """The book of one KVTransfer, and the owner of its requests (see `request.Owner`).

    Args:
        p2p: whose driver moves the requests.
        pages: of the pool.
        slots: of a pair.
    """

    def __init__(self, p2p: PointToPoint, pages: int, slots: int) -> None:
        self.core = p2p.core
        self._p2p = p2p
        self._slots_of_a_pair = slots
        self._slots: dict[int, Slots] = {}
        self._under_way: dict[tuple[bool, int, int], KVRequest] = {}
        #: By page: requests that read it, and whether one writes it.
        self._readers = np.zeros(pages, np.int32)
        self._written = np.zeros(pages, np.bool_)
        self.poll = p2p.poll
        self.fail = p2p.fail
        self.direct_wait = p2p.direct_wait

    # -- beginnings -------------------------------------------------------------------------------------------------

    @property
    def under_way(self) -> list[KVRequest]:
        """Requests that have not ended, in the order of their posting."""
        self.collect()
        return list(self._under_way.values())

    def require_free(self, pages: npt.NDArray[np.int32], peer: int, request_id: int, *, sending: bool) -> None:
        """Check that a request may begin, now that what has ended is taken note of.

        Raises:
            UsageError: its number is taken, a page is in use, or one would be written twice.
        """
        self.collect()
        if (sending, peer, request_id) in self._under_way:
            what = f"to rank {peer}" if sending else f"from rank {peer}"
            raise UsageError(f"request {request_id} {what} is under way already", value=request_id, peer=peer)
        used = self._written[pages]
        if not sending:
            used |= self._readers[pages] > 0
        if used.any():
            page = int(pages[np.argmax(used)])
            user = next(request for request in self._under_way.values() if page in request.pages)
            does = f"sent to rank {user.peer}" if user.channel.sending else f"received from rank {user.peer}"
            raise UsageError(
                f"page {page} is in use: request {user.request_id} is being {does}",
                value=page, request_id=user.request_id,
            )  # fmt: skip
        if not sending:
            values, counts = np.unique(pages, return_counts=True)
            if len(values) != len(pages):
                page = int(values[np.argmax(counts)])
                raise UsageError(f"page {page} is in the list twice: one block would overwrite the other", value=page)

    def slots(self, sender: int) -> Slots:
        """Those of a sender."""
        return self._slots.setdefault(sender, Slots(sender, self._slots_of_a_pair))

    def enter(self, request: KVRequest) -> None:
        """A request begins to use its pages."""
        self._under_way[request.channel.sending, request.peer, request.request_id] = request
        if request.channel.sending:
            np.add.at(self._readers, request.pages, 1)
        else:
            self._written[request.pages] = True

    # -- the owner of requests --------------------------------------------------------------------------------------

    def wait(self, request: Request, timeout_s: float, began_ns: int = 0, layers: int = ring.DONE_NEVER) -> None:
        """Drive all requests of the rank until this one has ended, or so many of its layers are there."""
        self._p2p.wait(request, timeout_s, began_ns, layers)

    def collect(self) -> None:
        """Drive all requests of the rank once, and take note of those that have ended."""
        self._p2p.driver.progress()

    def give_up(self, request: KVRequest, error: XcclError) -> bool:
        """End a request with this error, unless it has ended; was it so?"""
        self.core.require_open()
        self.collect()
        if request.is_collected():
            return False
        self.fail(request, error)
        return request.error is error

    def end(self, request: Request) -> None:
        """Take note of the end of an operation, whose record nobody else touches: pages, slot and number are free."""
        assert isinstance(request, KVRequest)
        record = request._record
        assert record is not None
        state = int(record.words[ring.OP_STATE // 8])
        if state == STATE_DONE:
            request.error = None  # it was given up too late
            request.record_trace(record)
        request.settle(record)
        if state != STATE_DONE and request.error is None:
            request.error = request.failure(record, state)
        self._p2p.driver.remove(record)
        request._record = None
        del self._under_way[request.channel.sending, request.peer, request.request_id]
        if request.channel.sending:
            np.subtract.at(self._readers, request.pages, 1)
        else:
            self._written[request.pages] = False
            self._slots[request.peer].give_back(request.get(layout.PG_INDEX))
