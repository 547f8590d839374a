"""Status records: written so that no reader takes a torn one."""

from __future__ import annotations

from ..layout.status import ST_SEQUENCE
from ._jit import kernel
from .atomics import fence_seq_cst, load_i64, store_i64, store_release


@kernel("void(int64, int64, int64)")
def publish(record: int, source: int, words: int) -> None:
    """Write `words` words from address `source` into a status record, behind its sequence number."""
    sequence = load_i64(record + ST_SEQUENCE)
    # SYNC POINT status: odd before any of the words changes, even again after all of them have; `runtime.sessions`
    # reads it before and after.
    store_release(record + ST_SEQUENCE, sequence + 1)
    fence_seq_cst()
    for i in range(1, words + 1):
        store_i64(record + 8 * i, load_i64(source + 8 * (i - 1)))
    store_release(record + ST_SEQUENCE, sequence + 2)
