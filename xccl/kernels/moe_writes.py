"""Rows that are written into a peer's memory: through the caches or past them, whichever is faster.

A line that the peer has read is in its cache. If both cores share the last cache, storing to it is cheap. If they do
not, each line is fetched from the other cache first, 7 GB/s at best, and stores that go past the caches are twice as
fast; the reader finds the row in memory sooner than in a cache that is so far away, too. Nothing tells a virtual
machine which is the case, and its host moves it from one to the other within seconds. So rows are timed.

Measured on a 2-core Zen 3 VM, GB/s of each of two cores that write 256 rows of 14 KiB to each other, by whether the
cores were 50 or 240 ns apart at the time:

                                near     far
    through the caches         14-20     7.0
    past them                     11      16
"""

from __future__ import annotations

from ..layout.moe_push import PU_WRITES, PUSH_WRITES, PW_CACHED_NS, PW_ROWS, PW_STREAMED_NS
from ._jit import device
from .atomics import load_i64, store_i64
from .copy import copy_bytes, copy_bytes_streaming
from .wait import now_ns

#: Of so many rows to a peer, one is written each way and timed. If the slower way takes three times as long as the
#: faster one, that costs 3% of the time of writing.
SAMPLED_ROWS = 64
#: Shorter rows are over before their stores are: their times say little.
TIMED_BYTES = 4096
#: An estimate moves by this part of itself towards each sample, whatever its size: so it is about the median, and a
#: row during which another process had the core counts no more than any other.
_STEP = 8
#: Whoever reads a row that went past the caches takes about as long again as its writer saw; one in the last cache that
#: both share costs the reader little.
_READERS_SHARE = 2

_RECORD_BYTES = PUSH_WRITES.size_bytes


@device
def _note(estimate: int, took_ns: int) -> None:
    """Move the estimate at this address towards a sample."""
    known_ns = load_i64(estimate)
    if known_ns == 0:
        store_i64(estimate, took_ns)
    elif took_ns > known_ns:
        store_i64(estimate, known_ns + known_ns // _STEP + 1)
    elif took_ns < known_ns:
        store_i64(estimate, known_ns - known_ns // _STEP)


@device
def write_row(push: int, peer: int, dst: int, src: int, n_bytes: int, streamed: bool) -> None:
    """Write a row to a peer: past the caches if it is to be streamed, or if that has been faster for both.

    Args:
        push: address of the push state.
        peer: the rank.
        dst: address of the row there.
        src: address of the row here.
        n_bytes: bytes of the row.
        streamed: do the rows of this operation outgrow the caches?
    """
    if streamed:
        copy_bytes_streaming(dst, src, n_bytes)
        return
    if n_bytes < TIMED_BYTES:
        copy_bytes(dst, src, n_bytes)
        return
    record = load_i64(push + PU_WRITES) + peer * _RECORD_BYTES
    cached, streamed_ns = record + PW_CACHED_NS, record + PW_STREAMED_NS
    turn = load_i64(record + PW_ROWS)
    store_i64(record + PW_ROWS, turn + 1 if turn + 1 < SAMPLED_ROWS else 0)
    if turn == SAMPLED_ROWS - 2:
        began_ns = now_ns()
        copy_bytes_streaming(dst, src, n_bytes)
        _note(streamed_ns, now_ns() - began_ns)
    elif turn == SAMPLED_ROWS - 1:
        began_ns = now_ns()
        copy_bytes(dst, src, n_bytes)
        _note(cached, now_ns() - began_ns)
    elif 0 < _READERS_SHARE * load_i64(streamed_ns) < load_i64(cached):
        copy_bytes_streaming(dst, src, n_bytes)
    else:
        copy_bytes(dst, src, n_bytes)
