"""The first words that the members of a group exchange: each pair by itself, since nothing is shared yet."""

from __future__ import annotations

from ..layout.collectives import IN_BLOCK, IN_DIGEST, IN_NUMBER
from ..layout.segment import CTL_DOORBELL
from ._jit import kernel
from .atomics import load_acquire, load_i64, store_i64, store_release
from .wait import OK, relax_for, ring_for, settle


@kernel("void(int64, int64, int64, int64, int64, int64)")
def invite(controls: int, addresses: int, numbers: int, count: int, digest: int, block: int) -> None:
    """Write an invitation to each of `count` members.

    Args:
        controls: address of [count] int64, control areas.
        addresses: address of [count] int64, where each invitation goes.
        numbers: address of [count] int64, its number.
        count: number of members.
        digest: of the list of members.
        block: offset of this rank's communicator block, or -1.
    """
    for i in range(count):
        at = load_i64(addresses + 8 * i)
        store_i64(at + IN_DIGEST, digest)
        store_i64(at + IN_BLOCK, block)
        # SYNC POINT invitation: released after the rest, and after the block was zeroed; `await_invited` acquires it.
        store_release(at + IN_NUMBER, load_i64(numbers + 8 * i))
        ring_for(load_i64(controls + 8 * i), at + IN_NUMBER)


@kernel("int64(int64, int64, int64, int64, int64, int64)")
def await_invited(control: int, addresses: int, numbers: int, count: int, cursor: int, until_ns: int) -> int:
    """Wait for the invitations of all `count` members; `cursor` as in `wait.wait_all`."""
    for i in range(load_i64(cursor), count):
        n = 0
        word = load_i64(addresses + 8 * i) + IN_NUMBER
        while True:
            seq = load_acquire(control + CTL_DOORBELL)
            # SYNC POINT invitation.
            if load_acquire(word) >= load_i64(numbers + 8 * i):
                break
            n = relax_for(control, n, seq, until_ns, word)
            if n < 0:
                store_i64(cursor, i)
                return n
        settle(control, n)
    store_i64(cursor, count)
    return OK
