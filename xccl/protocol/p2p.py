"""Send and receive over the ring of a pair (XDS §3.1).

Rules, as `xccl.kernels.ring` has them
- A message of b bytes over L lanes is cut into chunks: a lane's share, rounded up to MIN_CHUNK_BYTES, at most a slot.
  Chunk i belongs to lane i mod L. A message of 0 bytes is one empty chunk.
- Stages, for each chunk one after the other, and all chunks in a pipeline:
    1-2. write: the sender moves the chunk from its app data area into the receiver's ring, by its lanes (MTE2, MTE3) or
         by the DMA engine;
    3.   announce: it writes the lane's data field at the receiver;
    5-6. copy: the receiver, which polls its data fields, moves the chunk to its app data area;
    7.   acknowledge: it writes the lane's acknowledgement field at the sender: the slot is free again.
- 4, 8. await-acknowledgements: the sender returns when all chunks are acknowledged. (It polls the last chunk's word
  alone; since the receiver goes in order, that word stands for all.)
- No more chunks than the ring has slots are under way: `Description.window`.

The units of "write" and "copy" are chunks, a row for each lane. Signals and waits are counted by pair, one a chunk.

Zero-copy messages, as `xccl.kernels.zerocopy` has them
- The message stays in the sender's buffer; it is dealt in pieces over the lanes of both sides.
- Stages:
    announce: the sender writes one data field;
    accept: the receiver waits for it, and answers where its buffer is, if there are several pieces and the sender can
         reach it; if it is there first it has answered before, which changes nothing here;
    pull: the receiver reads pieces, from the front;
    push: the sender, once it has seen the answer, writes pieces, from the back, and counts them at the receiver;
    acknowledge: the receiver writes one acknowledgement field when all pieces are taken, and waits for those of the
         sender;
    await-acknowledgement: the sender waits for that.
- How many pieces the sender pushes depends on who comes when: it is an argument. A sender that computes pushes none.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..layout.ring import (
    ANSWER_BYTES,
    FIELD_BYTES,
    MAX_LANES,
    MAX_PIECE_BYTES,
    MIN_CHUNK_BYTES,
    MIN_PIECE_BYTES,
    ZERO_COPY_BYTES,
)
from ..layout.segment import Geometry
from .stage import (
    Description,
    Engine,
    Ints,
    Mover,
    Signals,
    Stage,
    Transfers,
    Waits,
    ints,
    payload_between,
    rank_columns,
)

#: A count of pieces.
_COUNT_BYTES = 8


class Chunks(NamedTuple):
    """How messages are cut; a row for each message.

    Attributes:
        number: [n] chunks.
        n_bytes: [n] bytes of each chunk but the last.
    """

    number: Ints
    n_bytes: Ints


def cut(n_bytes: npt.ArrayLike, lanes: int, slot_bytes: int) -> Chunks:
    """Cut messages into chunks, as `kernels.ring._chunk_bytes` does."""
    sizes = ints(n_bytes)
    share = -(-sizes // lanes)
    share = -(-share // MIN_CHUNK_BYTES) * MIN_CHUNK_BYTES
    chunk_bytes = np.minimum(np.maximum(share, MIN_CHUNK_BYTES), slot_bytes)
    return Chunks(np.maximum(1, -(-sizes // chunk_bytes)), chunk_bytes)


def cut_in_pieces(n_bytes: npt.ArrayLike, lanes: int) -> Chunks:
    """Cut zero-copy messages into pieces, as `kernels.zerocopy.piece_bytes` does; an empty one has none."""
    sizes = ints(n_bytes)
    share = -(-sizes // lanes)
    share = -(-share // MIN_PIECE_BYTES) * MIN_PIECE_BYTES
    piece_bytes = np.minimum(np.maximum(share, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    return Chunks(-(-sizes // piece_bytes), piece_bytes)


def send_recv(
    ranks: int,
    source: npt.ArrayLike,
    destination: npt.ArrayLike,
    n_bytes: npt.ArrayLike,
    *,
    lanes: int = 2,
    engine: Engine = "mte",
    slot_bytes: int = Geometry.slot_bytes,
    ring_slots: int = Geometry.ring_slots,
) -> Description:
    """Messages from `source` to `destination`, a row for each; all of them at once, by different pairs.

    Args:
        ranks: number of ranks.
        source: senders.
        destination: receivers.
        n_bytes: of each message.
        lanes: AIV cores of each operation, on both sides.
        engine: what moves the bytes; with "dma" the lanes only ring the engine.
        slot_bytes: payload of a ring slot.
        ring_slots: slots of a ring.

    Raises:
        UsageError: lanes or ranks are out of range.
    """
    sender, receiver, sizes = _messages(ranks, source, destination, n_bytes, lanes)
    chunks = cut(sizes, lanes, slot_bytes)
    pair, lane, units, moved = _by_lane(sizes, chunks, lanes, 0 * chunks.number, chunks.number)
    write = Transfers(sender[pair], receiver[pair], units, moved, "source", "chunks", engine, lane)
    copy = Transfers(receiver[pair], receiver[pair], units, moved, "destination", "chunks", engine, lane)
    announce = Signals(sender, receiver, chunks.number, FIELD_BYTES, "data field")
    acknowledge = Signals(receiver, sender, chunks.number, FIELD_BYTES, "acknowledgement field")
    stages = (
        Stage("write", transfers=(write,)),
        Stage("announce", signals=(announce,), streamed=True),
        Stage("copy", (Waits(receiver, sender, chunks.number, "data field"),), transfers=(copy,), streamed=True),
        Stage("acknowledge", signals=(acknowledge,), streamed=True),
        Stage("await-acknowledgements", (Waits(sender, receiver, chunks.number, "acknowledgement field"),)),
    )
    return Description(
        "sendrecv", "ring", ranks, stages, lanes, payload_between(ranks, [write]), window=ring_slots
    )  # fmt: skip


def zero_copy(
    ranks: int,
    source: npt.ArrayLike,
    destination: npt.ArrayLike,
    n_bytes: npt.ArrayLike,
    *,
    lanes: int = 2,
    engine: Engine = "mte",
    pushed: npt.ArrayLike = 0,
    answered: bool = True,
) -> Description:
    """Messages from buffer to buffer, a row for each; all of them at once, by different pairs.

    Args:
        ranks: number of ranks.
        source: senders.
        destination: receivers.
        n_bytes: of each message.
        lanes: AIV cores of each operation, on both sides.
        engine: what moves the bytes.
        pushed: pieces of each message that its sender writes; the receiver reads the others.
        answered: the sender can reach the receiver's buffer, and is told where it is if there are several pieces.

    Raises:
        UsageError: lanes, ranks or pushed are out of range.
    """
    sender, receiver, sizes = _messages(ranks, source, destination, n_bytes, lanes)
    pieces = cut_in_pieces(sizes, lanes)
    by_sender = np.broadcast_to(ints(pushed), sender.shape)
    if not ((by_sender >= 0) & (by_sender <= pieces.number)).all() or (by_sender.any() and not answered):
        raise UsageError("pushed must be 0 to the pieces of the message", value=by_sender.tolist())
    pulled = pieces.number - by_sender

    def moved_by(mover: Mover, first: Ints, last: Ints) -> Transfers:
        pair, lane, units, moved = _by_lane(sizes, pieces, lanes, first, last)
        return Transfers(sender[pair], receiver[pair], units, moved, mover, "pieces", engine, lane)

    pull = moved_by("destination", 0 * pulled, pulled)
    push = moved_by("source", pulled, pieces.number)
    one = np.ones_like(sender)
    answers = one * (pieces.number > 1) if answered else 0 * one
    helped = one * (by_sender > 0)
    stages = (
        Stage("announce", signals=(Signals(sender, receiver, one, FIELD_BYTES, "data field"),)),
        Stage(
            "accept",
            (Waits(receiver, sender, one, "data field"),),
            signals=(Signals(receiver, sender, answers, ANSWER_BYTES, "answer"),),
        ),
        Stage("pull", transfers=(pull,)),
        Stage(
            "push",
            (Waits(sender, receiver, helped, "answer"),),
            transfers=(push,),
            signals=(Signals(sender, receiver, by_sender.copy(), _COUNT_BYTES, "pushed"),),
        ),
        Stage(
            "acknowledge",
            (Waits(receiver, sender, by_sender.copy(), "pushed"),),
            signals=(Signals(receiver, sender, one, FIELD_BYTES, "acknowledgement field"),),
        ),
        Stage("await-acknowledgement", (Waits(sender, receiver, one, "acknowledgement field"),)),
    )
    return Description("sendrecv", "zero_copy", ranks, stages, lanes, payload_between(ranks, [pull, push]))


def is_zero_copy(n_bytes: int, mode: str = "auto") -> bool:
    """Does a message of this size stay in place, where ranks can reach each other's buffers?"""
    return mode == "zero_copy" or (mode == "auto" and n_bytes >= ZERO_COPY_BYTES)


def _messages(
    ranks: int, source: npt.ArrayLike, destination: npt.ArrayLike, n_bytes: npt.ArrayLike, lanes: int
) -> tuple[Ints, Ints, Ints]:
    """Senders, receivers and sizes, checked."""
    if not 1 <= lanes <= MAX_LANES:
        raise UsageError(f"lanes is {lanes}, allowed are 1 to {MAX_LANES}", value=lanes, bound=(1, MAX_LANES))
    sender, receiver = rank_columns(ranks, source, destination)
    return sender, receiver, np.broadcast_to(ints(n_bytes), sender.shape)


def _by_lane(sizes: Ints, chunks: Chunks, lanes: int, first: Ints, last: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Message, lane, chunks and bytes of each lane that has some of the chunks from `first` to before `last`."""
    index = np.arange(lanes)
    units = (last[:, None] - index + lanes - 1) // lanes - (first[:, None] - index + lanes - 1) // lanes
    moved = units * chunks.n_bytes[:, None]
    every = np.flatnonzero((last == chunks.number) & (first < last))
    # The last chunk is what is left over.
    short = chunks.number * chunks.n_bytes - sizes
    moved[every, (chunks.number[every] - 1) % lanes] -= short[every]
    message, lane = np.nonzero(units > 0)
    return message.astype(np.int64), lane.astype(np.int64), units[message, lane], moved[message, lane]
