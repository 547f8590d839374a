"""What an operation did, as entries of its trace: read off what it left behind, never off its description.

A test compares the two (tests/property/test_traced_is_described.py). Names of stages, of payloads and of signals are
therefore those of `xccl.protocol`, written once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..layout import moe as moe_layout
from ..layout import ring as layout
from ..layout.moe import EXPERT_FIELD_BYTES
from ..layout.ring import FIELD_BYTES
from ..trace.entry import Entry
from ..trace.record import Operation

if TYPE_CHECKING:
    from .dispatched import Routing
    from .moe import ExpertParallel

Ints = npt.NDArray[np.int64]

_ANYBODY = -1
_NO_LANE = -1
_WORD_BYTES = 8
_INT32_BYTES = 4
_PLACE_BYTES = 2 * _INT32_BYTES
_FLOAT32_BYTES = 4


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


# -- dispatch and combine ---------------------------------------------------------------------------------------------


def dispatched(ep: ExpertParallel, routing: Routing, rank: int, ranks: int) -> list[Entry]:
    """A dispatch, from its routing: what was written by expert, and what came from each rank for each expert."""
    row_bytes, local = ep.hidden * ep.token_dtype.itemsize, ep.local_experts
    got = routing.part(moe_layout.RT_GOT_COUNTS, ranks * local).reshape(ranks, local)
    rows = int(routing.part(moe_layout.RT_SENT_FIRST, ep.num_experts + 1)[-1])
    written = {"rows": (rows, rows * row_bytes), "places": (min(rows, 1), rows * _PLACE_BYTES)}
    written["counts"] = (1, ep.num_experts * _INT32_BYTES)
    found: list[Entry] = []
    if ep.token_dtype != ep.dtype:
        written["scales"] = (min(rows, 1), rows * _FLOAT32_BYTES)
        row_of = routing.part(moe_layout.RT_ROW_OF, routing.tokens * ep.top_k).reshape(routing.tokens, ep.top_k)
        tokens = int(np.count_nonzero((row_of >= 0).any(axis=1)))
        read_bytes = tokens * ep.hidden * ep.dtype.itemsize
        found += _if_any(Entry("write", "work", "quantise", rank, _NO_LANE, tokens, read_bytes))
    for what, (units, n_bytes) in written.items():
        found += _if_any(Entry("write", "transfer", what, rank, _NO_LANE, units, n_bytes))
    for peer in range(ranks):
        rows, runs = int(got[peer].sum()), int(np.count_nonzero(got[peer]))
        pulled = {"rows": (rows, rows * row_bytes), "places": (runs, rows * _PLACE_BYTES)}
        pulled["counts"] = (1, local * _INT32_BYTES)
        if ep.token_dtype != ep.dtype:
            pulled["scales"] = (runs, rows * _FLOAT32_BYTES)
        for what, (units, n_bytes) in pulled.items():
            found += _if_any(Entry("pull", "transfer", what, peer, _NO_LANE, units, n_bytes))
    return found + _handshake(ranks)


def combined(ep: ExpertParallel, routing: Routing, rank: int, ranks: int) -> list[Entry]:
    """A combine, from the routing of its dispatch: what came is returned, and what was sent is pulled back."""
    row_bytes, local = ep.hidden * ep.dtype.itemsize, ep.local_experts
    returned = int(routing.part(moe_layout.RT_GOT_COUNTS, ranks * local).sum())
    first = routing.part(moe_layout.RT_SENT_FIRST, ep.num_experts + 1)[::local]
    found = _if_any(Entry("write", "transfer", "rows", rank, _NO_LANE, returned, returned * row_bytes))
    for peer, rows in enumerate(np.diff(first).tolist()):
        found += _if_any(Entry("pull", "transfer", "rows", peer, _NO_LANE, rows, rows * row_bytes))
    summed = routing.tokens * row_bytes + int(first[-1]) * _FLOAT32_BYTES
    found += _if_any(Entry("pull", "work", "reduce", rank, _NO_LANE, routing.tokens, summed))
    return found + _handshake(ranks)


def _handshake(ranks: int) -> list[Entry]:
    """Fields and `pulled`, of and for every rank, the own one too."""
    peers = range(ranks)
    return [
        *waits("await-pulled", "pulled", peers),
        *signals("announce", "field", peers, EXPERT_FIELD_BYTES),
        *waits("await-fields", "field", peers),
        *signals("release", "pulled", peers),
    ]


def _if_any(entry: Entry) -> list[Entry]:
    return [entry] if entry.units else []
