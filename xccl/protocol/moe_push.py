"""Fused dispatch and combine by the push protocol of CANN (CM384 §4.2.1).

Rules
- Every rank has a buffer for each peer (`buffer_size_hint`). A message is one row: a token for one of its experts, with
  its source rank, batch slot and key offset, so that it says by itself where it came from.
- Dispatch, stages:
    send: tokens are quantised, one after the other, and each row written straight into its peer's buffer (AIV-Direct);
          the three steps overlap. At the end the lanes meet, so that all rows are written:
    notify: the peer's counts and a completion flag go to every peer;
    await-flags: each rank polls until the flags of all are set;
    assemble: offsets are computed from the counts of all, and all cores copy the rows to contiguous outputs, by expert.
- Combine, stages:
    send: the experts' outputs, each row written straight into its origin's buffer, at the place that its
          message named;
    flag: for each row an atomic addition to the flag of its token there, as soon as the row is written;
    await-flags: the origin polls until the flags of its tokens are complete. A real core sums a token as soon as that
          one is complete; but the last of eight rows from eight peers is there after 8/9 of the time on average, so
          that "all are complete" is close.
    reduce: it gathers the rows of each token, scales and sums them, and adds the output of a shared
          expert on this rank.
- An operation that is not the next one of an alternation of dispatch and combine begins with a round:
    release: each rank tells every peer that it has read all that it got so far;
    await-taken: and waits for the same of all (see `xccl.comm.moe_push`).
- Deduplicated rows are one for each token and rank that has any of its experts; their packets name the experts. A
  dispatch that repeats another one (cached) sends no counts, and assembles rows only.
- Dispatch and combine have buffers of their own: a fast rank's combine must not overwrite what a slow one still reads.

Each rank is a peer of itself too. Without `loopback`, which is how `xccl.comm.moe_push` does it with tokens that are
not quantised and with outputs, the own rows stay where they are until they are assembled or summed: of packets to the
rank itself only headers are written, and there are no flags for them. Two rows of one token for experts of one rank are
two messages.

Sizes. The text gives 7.5 KB a dispatched row at hidden 7168 (7168 B of INT8, and 512 B for the aligned scale) and 14 KB
a combined one. Latency times bandwidth in CM384 Table 6 is 8.02 to 8.05 kB and 14.97 to 15.10 kB a row at EP8, 32 and
256. The surplus is taken for header and alignment (`xccl.layout.moe_push`): 8,000 and 15,104 B.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import numpy as np

from ..layout.moe_push import PACKET_ENTRY_BYTES, SCALE_BLOCK_BYTES, packet_bytes, return_packet_bytes
from ..layout.record import align_up
from ..layout.ring import FIELD_BYTES, MAX_LANES
from .counts import RoutingCounts
from .moe import COUNT_BYTES, PLACE_BYTES, SCALE_BYTES, Quant, Rows, require_square, rows_between, weights_bytes
from .stage import Description, Signals, Stage, Transfers, Waits, Work, all_pairs

#: A flag of a token that counts its rows: one 64-bit word.
FLAG_BYTES: Final = 8
TAKEN_BYTES: Final = 8


class BufferSize(NamedTuple):
    """Buffers of a rank.

    Attributes:
        dispatch_bytes: for dispatched rows.
        combine_bytes: for combined rows.
    """

    dispatch_bytes: int
    combine_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both: they must not share memory."""
        return self.dispatch_bytes + self.combine_bytes


def message_bytes(hidden: int, *, item_bytes: int = 2, quant: Quant = "int8") -> int:
    """A dispatched row without header: the token, and its scale if it is quantised."""
    return hidden + SCALE_BLOCK_BYTES if quant == "int8" else hidden * item_bytes


def buffer_size_hint(
    *,
    ranks: int,
    local_batch: int,
    top_k: int,
    experts_per_die: int,
    hidden: int,
    item_bytes: int = 2,
    quant: Quant = "int8",
) -> BufferSize:
    """Bytes of the buffers that a rank needs: ranks x max_tokens x message (CM384 §4.2.1).

    max_tokens = local_batch x min(top_k, experts_per_die). At 320 ranks, a batch of 96, one expert a die and hidden
    7168 that is 225 MiB for dispatch and 420 MiB for combine, 645 MiB in all (MB in the paper). A message counts
    without its header, as it does there.
    """
    max_tokens = local_batch * min(top_k, experts_per_die)
    dispatched = message_bytes(hidden, item_bytes=item_bytes, quant=quant)
    return BufferSize(ranks * max_tokens * dispatched, ranks * max_tokens * hidden * item_bytes)


def dispatch(
    routing: RoutingCounts,
    *,
    hidden: int,
    item_bytes: int = 2,
    quant: Quant = "int8",
    lanes: int = MAX_LANES,
    header_bytes: int | None = None,
    scale_bytes: int = SCALE_BLOCK_BYTES,
    flags_per: Literal["peer", "expert"] = "peer",
    rows: Rows = "expanded",
    cached: bool = False,
    in_turn: bool = True,
    loopback: bool = True,
) -> Description:
    """Each token to the ranks of its experts.

    Args:
        routing: how many rows go where; it has as many sources as destinations.
        hidden: elements of a token.
        item_bytes: of an element before quantisation.
        quant: "int8", with a float32 scale a token, or "none".
        lanes: of each rank.
        header_bytes: of a row, with what aligns it; those of CANN, and up to the next cache line, if None.
        scale_bytes: of a quantised row's scale, or scales, aligned.
        flags_per: "peer": a block of counts and a flag to each peer, as the paper's text has it. "expert": one field
            for each expert, with its count and a flag.
        rows: "expanded", or "dedup" for one row for each token and rank.
        cached: the routing is that of an earlier dispatch.
        in_turn: the last dispatch was combined, or there was none.
        loopback: rows for the own experts go in packets.
    """
    ranks = require_square(routing)
    message = hidden + scale_bytes if quant == "int8" else hidden * item_bytes
    packet = packet_bytes(message) if header_bytes is None else header_bytes + message
    row_bytes = hidden if quant == "int8" else hidden * item_bytes
    every = np.arange(ranks, dtype=np.int64)
    source, destination = all_pairs(ranks)
    moved, ones = rows_between(routing, rows), np.ones_like(source)
    own = np.diagonal(moved)
    n = moved.ravel() if loopback else (moved - np.diag(own)).ravel()
    send = [Transfers(source, destination, n, n * packet, "source", "packets")]
    if not loopback:
        send.append(Transfers(every, every, own, own * (packet - message), "source", "headers"))
    sent, received = (np.asarray(moved.sum(axis=axis), np.int64) for axis in (1, 0))
    each, some, entries = np.ones_like(every), np.minimum(received, 1), routing.received
    assembled = [Transfers(every, every, received, received * row_bytes, "destination", "rows", has_header=True)]
    if not cached:
        assembled += [
            Transfers(every, every, some, received * PLACE_BYTES, "destination", "places"),
            Transfers(every, every, each, COUNT_BYTES * routing.local, "destination", "counts"),
        ]
        if rows == "dedup":
            assembled.append(Transfers(every, every, some, entries * PACKET_ENTRY_BYTES, "destination", "entries"))
    work: tuple[Work, ...] = ()
    if quant == "int8":
        tokens = routing.sending
        work = (Work(every, "quantise", tokens, tokens * hidden * item_bytes, tokens * hidden),)
        scales = received * SCALE_BYTES
        assembled.append(Transfers(every, every, some, scales, "destination", "scales"))
    signals: tuple[Signals, ...]
    if flags_per == "peer":
        # Those of every peer have the size of the largest.
        counts_bytes = align_up(COUNT_BYTES * int(routing.local.max()), FIELD_BYTES)
        signals = (
            Signals(source, destination, 0 * ones if cached else ones, counts_bytes, "counts"),
            Signals(source, destination, ones, FIELD_BYTES, "flag"),
        )
        flags = ones
    else:
        flags = np.tile(routing.local, ranks)
        signals = (Signals(source, destination, flags, FIELD_BYTES, "flag"),)
    scanned = 0 * each if cached else ranks * routing.local
    offsets = Work(every, "scan", 0 * each if cached else each, scanned * COUNT_BYTES, scanned)
    stages = (
        *_meeting(ranks, in_turn),
        Stage("send", transfers=tuple(send), work=work, lane_barrier=True),
        Stage("notify", signals=signals),
        Stage("await-flags", (Waits(destination, source, flags, "flag"),)),
        Stage("assemble", transfers=tuple(assembled), work=(offsets,)),
    )
    away = sent - own
    payload = away * (row_bytes + (SCALE_BYTES if quant == "int8" else 0))
    return Description("dispatch", "push", ranks, stages, lanes, payload)


def combine(
    routing: RoutingCounts,
    *,
    hidden: int,
    item_bytes: int = 2,
    lanes: int = MAX_LANES,
    header_bytes: int | None = None,
    rows: Rows = "expanded",
    shared_expert: bool = False,
    in_turn: bool = True,
    loopback: bool = True,
) -> Description:
    """The outputs of each token's experts back to it, and their weighted sum.

    Args:
        routing: that of the dispatch.
        hidden: elements of a token.
        item_bytes: of an element.
        lanes: of each rank.
        header_bytes: of a row, with what aligns it; those of CANN, and up to the next cache line, if None.
        rows: those of the dispatch; deduplicated ones are weighted already.
        shared_expert: each rank adds the output of a shared expert of its own, which no link carries.
        in_turn: there was a dispatch since the last combine, or no combine yet.
        loopback: rows of the own experts go in packets, too.
    """
    ranks = require_square(routing)
    row_bytes = hidden * item_bytes
    every = np.arange(ranks, dtype=np.int64)
    origin, expert = all_pairs(ranks)
    packet = return_packet_bytes(row_bytes) if header_bytes is None else header_bytes + row_bytes
    moved = rows_between(routing, rows)
    own = np.diagonal(moved)
    n = moved.ravel() if loopback else (moved - np.diag(own)).ravel()
    sent, received = (np.asarray(moved.sum(axis=axis), np.int64) for axis in (1, 0))
    send = Transfers(expert, origin, n, n * packet, "source", "packets")
    flag = Signals(expert, origin, n, FLAG_BYTES, "flag", atomic=True)
    added = sent + (routing.tokens if shared_expert else 0)
    gathered = (added + routing.tokens) * row_bytes + weights_bytes(sent, rows)
    stages = (
        *_meeting(ranks, in_turn),
        Stage("send", transfers=(send,)),
        Stage("flag", signals=(flag,), streamed=True),
        Stage("await-flags", (Waits(origin, expert, n, "flag"),)),
        Stage("reduce", work=(Work(every, "reduce", routing.tokens, gathered, added * hidden),)),
    )
    payload = (received - own) * row_bytes
    return Description("combine", "push", ranks, stages, lanes, payload)


def _meeting(ranks: int, in_turn: bool) -> tuple[Stage, ...]:
    """The round before an operation that comes out of turn."""
    if in_turn:
        return ()
    rank, peer = all_pairs(ranks)
    ones = np.ones_like(rank)
    return (
        Stage("release", signals=(Signals(rank, peer, ones, TAKEN_BYTES, "taken"),)),
        Stage("await-taken", (Waits(rank, peer, ones, "taken"),)),
    )
