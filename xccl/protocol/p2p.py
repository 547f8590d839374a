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
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..layout.ring import FIELD_BYTES, MAX_LANES, MIN_CHUNK_BYTES
from ..layout.segment import Geometry
from .stage import Description, Engine, Ints, Signals, Stage, Transfers, Waits, ints, payload_between, rank_columns


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
    if not 1 <= lanes <= MAX_LANES:
        raise UsageError(f"lanes is {lanes}, allowed are 1 to {MAX_LANES}", value=lanes, bound=(1, MAX_LANES))
    sender, receiver = rank_columns(ranks, source, destination)
    sizes = np.broadcast_to(ints(n_bytes), sender.shape)
    chunks = cut(sizes, lanes, slot_bytes)
    pair, lane, units, moved = _by_lane(sizes, chunks, lanes)
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


def _by_lane(sizes: Ints, chunks: Chunks, lanes: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Message, lane, chunks and bytes of each lane that has chunks."""
    index = np.arange(lanes)
    units = (chunks.number[:, None] - index + lanes - 1) // lanes
    moved = units * chunks.n_bytes[:, None]
    every = np.arange(len(sizes))
    # The last chunk is what is left over.
    moved[every, (chunks.number - 1) % lanes] += sizes - chunks.number * chunks.n_bytes
    message, lane = np.nonzero(units > 0)
    return message.astype(np.int64), lane.astype(np.int64), units[message, lane], moved[message, lane]
