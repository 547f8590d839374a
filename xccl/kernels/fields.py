"""Fields of peers: announcing rows, saying what was pulled, and waiting for either.

Kernels get a table of peers (`xccl.layout.a2e.PEER`): the address of the field that this rank writes at each of them,
and of the field that each writes here. An entry without addresses is the rank itself; it is passed over.
"""

from __future__ import annotations

from ..layout.a2e import PEER_BYTES, PEER_CONTROL, PEER_MINE, PEER_THEIRS
from ..layout.moe import COUNT_BITS, COUNT_MASK, EPOCH_MASK, EXF_BLOCK, EXF_COUNT, EXF_EVENT, EXF_PULLED
from ..layout.segment import CTL_DOORBELL
from ._jit import device, kernel
from .atomics import load_acquire, load_i64, store_i64, store_release
from .wait import OK, relax_for, ring_for, settle


@device
def tagged(count: int, epoch: int) -> int:
    """The word `count` of a field: so many rows, of the operation with this epoch."""
    return count | ((epoch & EPOCH_MASK) << COUNT_BITS)


@device
def count_of(peer: int) -> int:
    """Rows that a peer announces."""
    return load_i64(load_i64(peer + PEER_THEIRS) + EXF_COUNT) & COUNT_MASK


@device
def announce(peer: int, event: int, first_row: int, count: int, epoch: int) -> None:
    """Tell a peer where its rows are."""
    field = load_i64(peer + PEER_MINE)
    if field == 0:
        return
    store_i64(field + EXF_BLOCK, first_row)
    store_i64(field + EXF_COUNT, tagged(count, epoch))
    # SYNC POINT expert-field: released after the rows; the peer's `wait_fields` on `event` acquires it.
    store_release(field + EXF_EVENT, event)
    ring_for(load_i64(peer + PEER_CONTROL), field + EXF_EVENT)


@kernel("void(int64, int64, int64, int64)")
def release(peers: int, count: int, start: int, epoch: int) -> None:
    """Tell each peer, from number `start` around, that this rank has pulled all it wanted from it, up to `epoch`."""
    for i in range(count):
        peer = peers + PEER_BYTES * ((start + i) % count)
        field = load_i64(peer + PEER_MINE)
        if field == 0:
            continue
        # SYNC POINT expert-pulled: released after the reads; the peer's `wait_fields` on `pulled` acquires it before it
        # writes.
        store_release(field + EXF_PULLED, epoch)
        ring_for(load_i64(peer + PEER_CONTROL), field + EXF_PULLED)


@device
def _wait_word(control: int, address: int, target: int, until_ns: int) -> int:
    n = 0
    while True:
        seq = load_acquire(control + CTL_DOORBELL)
        if load_acquire(address) >= target:
            settle(control, n)
            return OK
        n = relax_for(control, n, seq, until_ns, address)
        if n < 0:
            return n


@kernel("int64(int64, int64, int64, int64, int64, int64, int64)")
def wait_fields(control: int, peers: int, count: int, word: int, target: int, cursor: int, until_ns: int) -> int:
    """Wait until the word at offset `word` in the field of each peer is at least `target`.

    The int64 at address `cursor` holds the index of the first peer that was not seen to be so: 0 at first, where the
    next call goes on, and on time-out the one to name.
    """
    status = OK
    i = load_i64(cursor)
    while status == OK and i < count:
        field = load_i64(peers + PEER_BYTES * i + PEER_THEIRS)
        if field != 0 and load_acquire(field + word) < target:
            status = _wait_word(control, field + word, target, until_ns)
        if status == OK:
            i += 1
    store_i64(cursor, i)
    return status


@kernel("int64(int64, int64)")
def total_count(peers: int, count: int) -> int:
    """Rows that all these peers announce."""
    total = 0
    for i in range(count):
        total += count_of(peers + PEER_BYTES * i)
    return total
