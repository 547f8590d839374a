"""What an operation did, as entries of its trace: read off what it left behind, never off its description.

A test compares the two (tests/property/test_traced_is_described.py). Names of stages, of payloads and of signals are
therefore those of `xccl.protocol`, written once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from ..layout import ring as layout
from ..layout.ring import FIELD_BYTES
from ..trace.entry import Entry
from ..trace.record import Operation

Ints = npt.NDArray[np.int64]

_ANYBODY = -1
_NO_LANE = -1
_WORD_BYTES = 8


# -- one-sided --------------------------------------------------------------------------------------------------------


def moved(stage: str, peer: int, n_bytes: int, *, units: int = 1, signalled: bool = False) -> list[Entry]:
    """A put or a get, in one copy or several; with a signal behind it."""
    data = Entry(stage, "transfer", "data", peer, _NO_LANE, units, n_bytes)
    return [data, *signals(stage, "signal", [peer])] if signalled else [data]


def signals(stage: str, what: str, peers: Iterable[int], n_bytes: int = _WORD_BYTES) -> list[Entry]:
    """One small write to each of these peers."""
    return [Entry(stage, "signal", what, peer, _NO_LANE, 1, n_bytes) for peer in peers]


def waits(stage: str, what: str, peers: Iterable[int] = (_ANYBODY,)) -> list[Entry]:
    """One word from each of these peers was awaited."""
    return [Entry(stage, "wait", what, peer, _NO_LANE, 1, 0) for peer in peers]


def barrier(*, ranks: int, arrived: bool, released: bool) -> list[Entry]:
    """A barrier; after a wait that timed out, the next call goes on without arriving again."""
    found = signals("arrive", "arrival", [0] if arrived else [])
    found += signals("release", "release", range(ranks) if released else [])
    return found + waits("await-release", "release")


# -- send and receive -------------------------------------------------------------------------------------------------


def transferred(operation: Operation, op: Ints, rank: int, peer: int, sending: bool) -> None:
    """A send or a receive is done: its stages were a pipeline, chunk after chunk. `op` is its operation record."""
    ring = op[layout.OP_FORM // 8] == layout.FORM_RING
    if sending:
        if ring:
            operation.overlap("write", "announce", "await-acknowledgements")
            operation.finish(partial(_sent, op, peer))
        else:
            operation.overlap("announce", "push", "await-acknowledgement")
            operation.finish(partial(_sent_in_place, op, peer))
    elif ring:
        operation.overlap("copy", "acknowledge")
        operation.finish(partial(_received, op, rank, peer))
    else:
        operation.overlap("accept", "pull", "acknowledge")
        operation.finish(partial(_received_in_place, op, peer))


def _sent(op: Ints, peer: int) -> list[Entry]:
    done = int(op[layout.OP_DONE // 8])
    return [
        *_chunks("write", op, peer, range(done)),
        Entry("announce", "signal", "data field", peer, _NO_LANE, done, done * FIELD_BYTES),
        Entry("await-acknowledgements", "wait", "acknowledgement field", peer, _NO_LANE, done, 0),
    ]


def _received(op: Ints, rank: int, peer: int) -> list[Entry]:
    done = int(op[layout.OP_DONE // 8])
    return [
        Entry("copy", "wait", "data field", peer, _NO_LANE, done, 0),
        *_chunks("copy", op, rank, range(done)),
        Entry("acknowledge", "signal", "acknowledgement field", peer, _NO_LANE, done, done * FIELD_BYTES),
    ]


def _sent_in_place(op: Ints, peer: int) -> list[Entry]:
    """A zero-copy message, seen by its sender, who may have pushed pieces from the back."""
    pieces, pushed = int(op[layout.OP_PIECES // 8]), int(op[layout.OP_MOVED // 8])
    return [
        *signals("announce", "data field", [peer], FIELD_BYTES),
        *_if_any(Entry("push", "wait", "answer", peer, _NO_LANE, min(pushed, 1), 0)),
        *_chunks("push", op, peer, range(pieces - pushed, pieces), "pieces"),
        *_if_any(Entry("push", "signal", "pushed", peer, _NO_LANE, pushed, pushed * _WORD_BYTES)),
        *waits("await-acknowledgement", "acknowledgement field", [peer]),
    ]


def _received_in_place(op: Ints, peer: int) -> list[Entry]:
    """A zero-copy message, seen by its receiver, who has pulled pieces from the front."""
    pieces, pulled = int(op[layout.OP_PIECES // 8]), int(op[layout.OP_MOVED // 8])
    answers = int(op[layout.OP_TARGET_FORM // 8] != layout.FORM_RING)
    return [
        *waits("accept", "data field", [peer]),
        *_if_any(Entry("accept", "signal", "answer", peer, _NO_LANE, answers, answers * layout.ANSWER_BYTES)),
        *_chunks("pull", op, peer, range(pulled), "pieces"),
        *_if_any(Entry("acknowledge", "wait", "pushed", peer, _NO_LANE, pieces - pulled, 0)),
        *signals("acknowledge", "acknowledgement field", [peer], FIELD_BYTES),
    ]


def _chunks(stage: str, op: Ints, peer: int, which: range, what: str = "chunks") -> Iterator[Entry]:
    """What each lane has moved of these chunks: chunk i is in lane i mod lanes, and the last one is what was left."""
    lanes, index = int(op[layout.OP_LANES // 8]), np.arange(which.start, which.stop)
    n_bytes, chunk_bytes = int(op[layout.OP_BYTES // 8]), int(op[layout.OP_CHUNK_BYTES // 8])
    sizes = np.minimum(chunk_bytes, n_bytes - index * chunk_bytes)
    for lane in range(lanes):
        mine = sizes[index % lanes == lane]
        if len(mine):
            yield Entry(stage, "transfer", what, peer, lane, len(mine), int(mine.sum()))


def _if_any(entry: Entry) -> list[Entry]:
    return [entry] if entry.units else []
