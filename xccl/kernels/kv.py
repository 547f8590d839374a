"""KV-cache transfers: paged blocks from pool to pool, layer by layer (XDS section 3.1 names the use).

Rules
- The receiver announces a request: it writes the numbers of its pages into a slot in the sender's segment, then the
  slot's state. A slot belongs to one ordered pair; its receiver alone chooses which slot a request takes.
- The sender looks for an announcement of its request. It accepts it, and from then on writes into the receiver's pages
  by itself: block i of a layer goes from its i-th page to the receiver's i-th page. Nothing is copied in between.
- Layers go in order, each when the sender has it ready. Behind each the sender writes how many are there into the
  arrival record in the receiver's segment. That of the last one is the completion; the receiver writes nothing back.
- If the numbers of pages differ the sender refuses: nothing is written, and both sides hear of it.
- Requests of a rank are independent: one that waits for its layer or its announcement does not hold up others. Those
  that can go on share the copying in the order of their posting.

Theory of operation. No page is written while somebody else uses it: the sender writes only between its acceptance and
its last word in the arrival record (all layers, refused, or withdrawn), and the receiver takes its pages back only
after it has read that word, or after it has taken back an announcement that was not accepted. The latter two exclude
each other: both are an exchange of the same state, "announced", for another. A receiver that wants to give up an
accepted request asks for it by the state, and the sender, which looks there at every step, answers by "withdrawn".
So a cancelled page is quiet when `cancel` returns, whatever engine copies.

No slot is written while it is read: its receiver uses it again after the sender's last word, behind which the sender
does not look there; or after it has taken the announcement back, when a sender that is still reading the slot fails to
exchange a state that has a later use in it.
"""

from __future__ import annotations

from ..layout.kv import (
    AN_PAGES,
    AN_REQUEST,
    AN_STATE,
    ANNOUNCEMENT,
    AR_PAGES,
    AR_PROGRESS,
    ARRIVAL_BYTES,
    PAGE_NUMBER_BYTES,
    PG_ANNOUNCEMENTS,
    PG_ARRIVAL,
    PG_ARRIVALS,
    PG_COUNT,
    PG_LAYER_BYTES,
    PG_LAYERS,
    PG_OWN_POOL,
    PG_PAGE_BYTES,
    PG_PAGES,
    PG_PEER_CONTROL,
    PG_PEER_POOL,
    PG_READY,
    PG_REQUEST,
    PG_SLOT,
    PG_SLOT_BYTES,
    PG_SLOTS,
    PG_USE,
    PHASE_ACCEPTED,
    PHASE_ANNOUNCED,
    PHASE_CANCELLED,
    PHASE_MASK,
    PROGRESS_MASK,
    PROGRESS_REFUSED,
    PROGRESS_WITHDRAWN,
    USE_SHIFT,
    USE_UNIT,
)
from ..layout.ring import (
    OP_BUFFER,
    OP_DONE,
    OP_MOVED,
    OP_PEER_BYTES,
    OP_PIECES,
    OP_RESULT,
    STATE_DONE,
    STATE_REFUSED,
    STATE_WITHDRAWN,
)
from ._jit import device, kernel
from .atomics import compare_and_swap, load_acquire, load_i32, load_i64, store_i64, store_release
from .copy import copy_bytes
from .wait import PENDING, ring, ring_for
from .zerocopy import ENDED, MOVED

_HEADER_BYTES = ANNOUNCEMENT.size_bytes
#: What a layer or a block costs at least, counted in bytes of copying.
_LEAST_BYTES = 512


# -- sender -----------------------------------------------------------------------------------------------------------


@device
def _accept(transfer: int) -> bool:
    """Look for the announcement of the request, and accept it."""
    request = load_i64(transfer + PG_REQUEST)
    slot = load_i64(transfer + PG_ANNOUNCEMENTS)
    arrival = load_i64(transfer + PG_ARRIVALS)
    for _ in range(load_i64(transfer + PG_SLOTS)):
        # SYNC POINT kv-announced: acquires what `announce` wrote before it released the state.
        state = load_acquire(slot + AN_STATE)
        if state & PHASE_MASK == PHASE_ANNOUNCED and load_i64(slot + AN_REQUEST) == request:
            accepted = state - PHASE_ANNOUNCED + PHASE_ACCEPTED
            if compare_and_swap(slot + AN_STATE, state, accepted) == state:
                store_i64(transfer + PG_USE, state // USE_UNIT)
                store_i64(transfer + PG_ARRIVAL, arrival)
                store_i64(transfer + PG_SLOT, slot)
                return True
        slot += load_i64(transfer + PG_SLOT_BYTES)
        arrival += ARRIVAL_BYTES
    return False


@device
def _tell(transfer: int, progress: int) -> None:
    """Write to the receiver how far the request has come."""
    # SYNC POINT kv-arrived: released after the blocks; `step_receive` and `wait_until` acquire it.
    word = (load_i64(transfer + PG_USE) << USE_SHIFT) + progress
    address = load_i64(transfer + PG_ARRIVAL) + AR_PROGRESS
    store_release(address, word)
    ring_for(load_i64(transfer + PG_PEER_CONTROL), address)


@device
def _copy_blocks(transfer: int, layer: int, first: int, budget_bytes: int) -> int:
    """Copy blocks of a layer from the `first` one on, until the budget is spent; how many."""
    page_bytes = load_i64(transfer + PG_PAGE_BYTES)
    start = layer * load_i64(transfer + PG_LAYER_BYTES)
    own_pool = load_i64(transfer + PG_OWN_POOL) + start
    peer_pool = load_i64(transfer + PG_PEER_POOL) + start
    own_pages = load_i64(transfer + PG_PAGES)
    peer_pages = load_i64(transfer + PG_SLOT) + _HEADER_BYTES
    count = load_i64(transfer + PG_COUNT)
    i = first
    while i < count and budget_bytes > 0:
        own = own_pool + load_i32(own_pages + i * PAGE_NUMBER_BYTES) * page_bytes
        peer = peer_pool + load_i32(peer_pages + i * PAGE_NUMBER_BYTES) * page_bytes
        copy_bytes(peer, own, page_bytes)
        budget_bytes -= max(page_bytes, _LEAST_BYTES)
        i += 1
    return i - first


@device
def step_send(op: int, budget_bytes: int) -> tuple[int, int]:
    """Do what can be done at once for a request: its status, and what is left of the budget."""
    transfer = load_i64(op + OP_BUFFER)
    if load_i64(transfer + PG_SLOT) == 0:
        if not _accept(transfer):
            return PENDING, budget_bytes
        slot = load_i64(transfer + PG_SLOT)
        if load_i64(slot + AN_PAGES) != load_i64(transfer + PG_COUNT):
            store_i64(op + OP_PEER_BYTES, load_i64(slot + AN_PAGES))
            store_i64(load_i64(transfer + PG_ARRIVAL) + AR_PAGES, load_i64(transfer + PG_COUNT))
            _tell(transfer, PROGRESS_REFUSED)
            store_i64(op + OP_RESULT, STATE_REFUSED)
            return ENDED, budget_bytes
    if load_acquire(load_i64(transfer + PG_SLOT) + AN_STATE) & PHASE_MASK == PHASE_CANCELLED:
        _tell(transfer, PROGRESS_WITHDRAWN)
        store_i64(op + OP_RESULT, STATE_WITHDRAWN)
        return ENDED, budget_bytes
    layer, moved = load_i64(op + OP_DONE), load_i64(op + OP_MOVED)
    # SYNC POINT kv-ready: acquires what the rank has written into the pages of these layers.
    ready = load_acquire(transfer + PG_READY)
    status = PENDING
    while layer < ready and budget_bytes > 0:
        copied = _copy_blocks(transfer, layer, moved, budget_bytes)
        budget_bytes -= max(copied * load_i64(transfer + PG_PAGE_BYTES), _LEAST_BYTES)
        store_i64(op + OP_PIECES, load_i64(op + OP_PIECES) + copied)
        moved += copied
        if moved == load_i64(transfer + PG_COUNT):
            layer += 1
            moved = 0
            _tell(transfer, layer)
        store_i64(op + OP_DONE, layer)
        store_i64(op + OP_MOVED, moved)
        status = MOVED
    if layer == load_i64(transfer + PG_LAYERS):
        store_i64(op + OP_RESULT, STATE_DONE)
        return ENDED, budget_bytes
    return status, budget_bytes


@kernel("void(int64, int64, int64)")
def ready(transfer: int, layers: int, control: int) -> None:
    """So many layers may be sent; wake whoever of this rank sends them."""
    # SYNC POINT kv-ready: released after what the rank has written into its pages; `step_send` acquires it.
    store_release(transfer + PG_READY, layers)
    ring(control)


@kernel("void(int64)")
def withdraw(transfer: int) -> None:
    """Tell the receiver, if it has announced the request, that it does not come; its operation is in no channel."""
    if load_i64(transfer + PG_SLOT) != 0 or _accept(transfer):
        _tell(transfer, PROGRESS_WITHDRAWN)


# -- receiver ---------------------------------------------------------------------------------------------------------


@kernel("void(int64, int64)")
def announce(transfer: int, pages: int) -> None:
    """Write a request and its pages, int32 [count] at address `pages`, into its slot at the sender."""
    slot, count = load_i64(transfer + PG_SLOT), load_i64(transfer + PG_COUNT)
    store_i64(slot + AN_REQUEST, load_i64(transfer + PG_REQUEST))
    store_i64(slot + AN_PAGES, count)
    copy_bytes(slot + _HEADER_BYTES, pages, count * PAGE_NUMBER_BYTES)
    # SYNC POINT kv-announced: released after the page numbers; `_accept` acquires it.
    store_release(slot + AN_STATE, load_i64(transfer + PG_USE) * USE_UNIT + PHASE_ANNOUNCED)
    ring_for(load_i64(transfer + PG_PEER_CONTROL), slot + AN_STATE)


@device
def step_receive(op: int) -> int:
    """See how far the request has come."""
    transfer = load_i64(op + OP_BUFFER)
    # SYNC POINT kv-arrived: acquires the blocks that `_tell` has released.
    word = load_acquire(load_i64(transfer + PG_ARRIVAL) + AR_PROGRESS)
    if word >> USE_SHIFT != load_i64(transfer + PG_USE):
        return PENDING
    progress = word & PROGRESS_MASK
    if progress == PROGRESS_WITHDRAWN:
        store_i64(op + OP_RESULT, STATE_WITHDRAWN)
        return ENDED
    if progress == PROGRESS_REFUSED:
        store_i64(op + OP_PEER_BYTES, load_i64(load_i64(transfer + PG_ARRIVAL) + AR_PAGES))
        store_i64(op + OP_RESULT, STATE_REFUSED)
        return ENDED
    store_i64(op + OP_DONE, progress)
    if progress != load_i64(transfer + PG_LAYERS):
        return PENDING
    store_i64(op + OP_RESULT, STATE_DONE)
    return ENDED


@kernel("int64(int64)")
def cancel(transfer: int) -> int:
    """Take an announcement back: 1 if nobody had accepted it; else the sender is asked to answer, unless it has."""
    slot = load_i64(transfer + PG_SLOT)
    state = load_i64(transfer + PG_USE) * USE_UNIT
    cancelled = state + PHASE_CANCELLED
    if compare_and_swap(slot + AN_STATE, state + PHASE_ANNOUNCED, cancelled) == state + PHASE_ANNOUNCED:
        return 1
    compare_and_swap(slot + AN_STATE, state + PHASE_ACCEPTED, cancelled)
    ring_for(load_i64(transfer + PG_PEER_CONTROL), slot + AN_STATE)
    return 0
