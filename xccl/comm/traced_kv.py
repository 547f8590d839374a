"""What a side of a KV-cache transfer did, as entries of its trace (see `traced`)."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from ..layout import kv as layout, ring
from ..trace.entry import Entry
from ..trace.record import Operation

_NO_LANE = -1
_WORD_BYTES = 8


def transferred(
    operation: Operation, op: npt.NDArray[np.int64], peer: int, pages: int, page_bytes: int, *, sending: bool
) -> None:
    """A request is done; its stages were a pipeline. `op` is its operation record."""
    layers, blocks = int(op[ring.OP_DONE // 8]), int(op[ring.OP_PIECES // 8])
    if sending:
        operation.overlap("push", "notify")
        operation.finish(partial(_sent, peer, layers, blocks, page_bytes))
    else:
        operation.overlap("announce", "await-layers")
        operation.finish(partial(_received, peer, layers, pages))


def _sent(peer: int, layers: int, blocks: int, page_bytes: int) -> list[Entry]:
    data = [Entry("push", "transfer", "blocks", peer, _NO_LANE, blocks, blocks * page_bytes)] if blocks else []
    return [
        Entry("push", "wait", "announcement", peer, _NO_LANE, 1, 0),
        *data,
        Entry("notify", "signal", "layers", peer, _NO_LANE, layers, layers * _WORD_BYTES),
    ]


def _received(peer: int, layers: int, pages: int) -> list[Entry]:
    n_bytes = pages * layout.PAGE_NUMBER_BYTES
    numbers = [Entry("announce", "transfer", "page numbers", peer, _NO_LANE, 1, n_bytes)] if pages else []
    return [
        *numbers,
        Entry("announce", "signal", "announcement", peer, _NO_LANE, 1, layout.ANNOUNCED_BYTES),
        Entry("await-layers", "wait", "layers", peer, _NO_LANE, layers, 0),
    ]
