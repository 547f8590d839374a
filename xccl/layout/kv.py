"""Layout of KV-cache transfers: page lists that receivers announce, and how far each request has come.

Managed area of one `xccl.KVTransfer`, the same offset at every rank. A pair has `requests` slots, and the receiver of a
request chooses one that is free:

    +----------------------+ announcements of receiver 0
    | requests             |  each an announcement record, and behind it int32 [max_pages], the receiver's pages
    +----------------------+ announcements of receiver 1, ...
    :                      :
    +----------------------+ arrivals from sender 0
    | requests             |  each an arrival record
    +----------------------+ arrivals from sender 1, ...
    :                      :

A slot is used again and again; its uses are numbered from 1. Both words of a slot grow only: with the use, and within
one use with what happens to the request.
"""

from __future__ import annotations

from dataclasses import dataclass

from .record import HOT_LINE_BYTES, Record, align_up
from .segment import PAGE_BYTES

ANNOUNCEMENT = Record(
    "page announcement", "In the sender's segment, by one receiver: into which of its pages it wants the request."
)
AN_STATE = ANNOUNCEMENT.add("state", 8, "4 * use + one of the PHASE_ codes (SYNC POINT kv-announced)")
AN_REQUEST = ANNOUNCEMENT.add("request", 8, "the caller's number of the request")
AN_PAGES = ANNOUNCEMENT.add("pages", 8, "how many page numbers follow")
ANNOUNCEMENT.pad_to(64)
#: What a receiver writes to announce a request, besides its page numbers.
ANNOUNCED_BYTES = 24
PAGE_NUMBER_BYTES = 4

#: The receiver has announced the request, the sender has begun with it, the receiver wants it no more.
PHASE_ANNOUNCED = 1
PHASE_ACCEPTED = 2
PHASE_CANCELLED = 3
PHASE_MASK = 3
USE_UNIT = 4

ARRIVAL = Record("arrival record", "In the receiver's segment, by one sender: how far the request in a slot has come.")
AR_PROGRESS = ARRIVAL.add(
    "progress", 8, "use << 32 | layers that are there, or a PROGRESS_ code (SYNC POINT kv-arrived)"
)
AR_PAGES = ARRIVAL.add("pages", 8, "of a refusal: how many pages the sender wants to send")
ARRIVAL_BYTES = ARRIVAL.pad_to(HOT_LINE_BYTES)

USE_SHIFT = 32
PROGRESS_MASK = (1 << USE_SHIFT) - 1
#: Of a request that does not come to its end: the numbers of pages differ, or it was given up. More than any layer.
PROGRESS_REFUSED = 1 << 30
PROGRESS_WITHDRAWN = 1 << 31
MAX_LAYERS = 1 << 20

PAGED = Record("paged transfer", "Private to a rank: its side of one request under way.")
PG_SLOT = PAGED.add("slot", 8, "address of its announcement; at a sender, 0 before it has found one")
PG_USE = PAGED.add("use", 8, "number of the use of that slot")
PG_INDEX = PAGED.add("index", 8, "which of the pair's slots it is (receiver)")
PG_ARRIVAL = PAGED.add("arrival", 8, "address of its arrival record")
PG_PEER_CONTROL = PAGED.add("peer_control", 8, "control area of the peer")
PG_REQUEST = PAGED.add("request", 8, "the caller's number")
PG_COUNT = PAGED.add("count", 8, "how many pages")
PG_PAGES = PAGED.add("pages", 8, "address of int32 [count], their numbers (sender)")
PG_LAYERS = PAGED.add("layers", 8, "layers of the pool")
PG_READY = PAGED.add("ready", 8, "layers that may be sent (sender; SYNC POINT kv-ready)")
PG_SLOTS = PAGED.add("slots", 8, "slots of a pair (sender)")
PG_SLOT_BYTES = PAGED.add("slot_bytes", 8, "distance of announcements (sender)")
PG_ANNOUNCEMENTS = PAGED.add("announcements", 8, "address of the first announcement of the receiver (sender)")
PG_ARRIVALS = PAGED.add("arrivals", 8, "address of the first arrival record of this rank, at the receiver (sender)")
PG_OWN_POOL = PAGED.add("own_pool", 8, "address of the own pool (sender)")
PG_PEER_POOL = PAGED.add("peer_pool", 8, "address of the receiver's pool (sender)")
PG_PAGE_BYTES = PAGED.add("page_bytes", 8, "bytes of a page in one layer")
PG_LAYER_BYTES = PAGED.add("layer_bytes", 8, "bytes of a layer of the pool")


@dataclass(frozen=True)
class Area:
    """Where the parts of the managed block are.

    Attributes:
        ranks: of the communicator.
        requests: slots of a pair.
        max_pages: pages of a request, at most.
    """

    ranks: int
    requests: int
    max_pages: int

    @property
    def slot_bytes(self) -> int:
        """Distance between the announcements of a pair."""
        return align_up(ANNOUNCEMENT.size_bytes + self.max_pages * PAGE_NUMBER_BYTES, HOT_LINE_BYTES)

    @property
    def announcements_bytes(self) -> int:
        """Those of one receiver, in whole memory pages: only pairs that talk take memory."""
        return align_up(self.requests * self.slot_bytes, PAGE_BYTES)

    @property
    def arrivals_bytes(self) -> int:
        """Arrival records of one sender, in whole memory pages."""
        return align_up(self.requests * ARRIVAL_BYTES, PAGE_BYTES)

    @property
    def total_bytes(self) -> int:
        """Size of the block."""
        return self.ranks * (self.announcements_bytes + self.arrivals_bytes)

    def announcements(self, receiver: int) -> int:
        """Where the announcements of a receiver start, in the block at the sender."""
        return receiver * self.announcements_bytes

    def arrivals(self, sender: int) -> int:
        """Where the arrival records of a sender start, in the block at the receiver."""
        return self.ranks * self.announcements_bytes + sender * self.arrivals_bytes
