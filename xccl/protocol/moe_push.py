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
- Dispatch and combine have buffers of their own: a fast rank's combine must not overwrite what a slow one still reads.

Each rank is a peer of itself too. Two rows of one token for experts of one rank are two messages.

Sizes. The text gives 7.5 KB a dispatched row at hidden 7168 (7168 B of INT8, and 512 B for the aligned scale) and 14 KB
a combined one. Latency times bandwidth in CM384 Table 6 is 8.02 to 8.05 kB and 14.97 to 15.10 kB a row at EP8, 32 and
256. The surplus is taken for header and alignment.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import numpy as np

from ..layout.record import align_up
from ..layout.ring import FIELD_BYTES, MAX_LANES
from .counts import RoutingCounts
from .moe import COUNT_BYTES, PLACE_BYTES, SCALE_BYTES, WEIGHT_BYTES, Quant, require_square
from .stage import Description, Signals, Stage, Transfers, Waits, Work, all_pairs

#: A scale, aligned: the smallest write that UB makes whole (CM384 §4.2.1).
SCALE_BLOCK_BYTES: Final = 512
#: What makes a dispatched row of 7168 elements 8.0 kB (CM384 Table 6).
DISPATCH_HEADER_BYTES: Final = 8_000 - (7168 + SCALE_BLOCK_BYTES)
#: What makes a combined row of 7168 elements 15.1 kB (CM384 Table 6).
COMBINE_HEADER_BYTES: Final = 15_100 - 2 * 7168
#: A flag of a token that counts its rows: one 32-bit word.
FLAG_BYTES: Final = 4


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
    header_bytes: int = DISPATCH_HEADER_BYTES,
    scale_bytes: int = SCALE_BLOCK_BYTES,
    flags_per: Literal["peer", "expert"] = "peer",
) -> Description:
    """Each token to the ranks of its experts.

    Args:
        routing: how many rows go where; it has as many sources as destinations.
        hidden: elements of a token.
        item_bytes: of an element before quantisation.
        quant: "int8", with a float32 scale a token, or "none".
        lanes: of each rank.
        header_bytes: of a row, with what aligns it.
        scale_bytes: of a quantised row's scale, or scales, aligned.
        flags_per: "peer": a block of counts and a flag to each peer, as the paper's text has it. "expert": one field
            for each expert, with its count and a flag.
    """
    ranks = require_square(routing)
    packet_bytes = header_bytes + (hidden + scale_bytes if quant == "int8" else hidden * item_bytes)
    row_bytes = hidden if quant == "int8" else hidden * item_bytes
    every = np.arange(ranks, dtype=np.int64)
    source, destination = all_pairs(ranks)
    rows, ones = routing.rows.ravel(), np.ones_like(source)
    send = Transfers(source, destination, rows, rows * packet_bytes, "source", "packets")
    received, each = routing.received, np.ones_like(every)
    assembled = [
        Transfers(every, every, received, received * row_bytes, "destination", "rows", has_header=True),
        Transfers(every, every, np.minimum(received, 1), received * PLACE_BYTES, "destination", "places"),
        Transfers(every, every, each, each * COUNT_BYTES * routing.local_experts, "destination", "counts"),
    ]
    work: tuple[Work, ...] = ()
    if quant == "int8":
        tokens = routing.sending
        work = (Work(every, "quantise", tokens, tokens * hidden * item_bytes, tokens * hidden),)
        scales = received * SCALE_BYTES
        assembled.append(Transfers(every, every, np.minimum(received, 1), scales, "destination", "scales"))
    signals: tuple[Signals, ...]
    if flags_per == "peer":
        counts_bytes = align_up(COUNT_BYTES * routing.local_experts, FIELD_BYTES)
        signals = (
            Signals(source, destination, ones, counts_bytes, "counts"),
            Signals(source, destination, ones, FIELD_BYTES, "flag"),
        )
        flags = ones
    else:
        flags = ones * routing.local_experts
        signals = (Signals(source, destination, flags, FIELD_BYTES, "flag"),)
    scanned = each * ranks * routing.local_experts
    offsets = Work(every, "scan", each, scanned * COUNT_BYTES, scanned)
    stages = (
        Stage("send", transfers=(send,), work=work, lane_barrier=True),
        Stage("notify", signals=signals),
        Stage("await-flags", (Waits(destination, source, flags, "flag"),)),
        Stage("assemble", transfers=tuple(assembled), work=(offsets,)),
    )
    away = routing.sent - np.diagonal(routing.rows)
    payload = away * (row_bytes + (SCALE_BYTES if quant == "int8" else 0))
    return Description("dispatch", "push", ranks, stages, lanes, payload)


def combine(
    routing: RoutingCounts,
    *,
    hidden: int,
    item_bytes: int = 2,
    lanes: int = MAX_LANES,
    header_bytes: int = COMBINE_HEADER_BYTES,
    shared_expert: bool = False,
) -> Description:
    """The outputs of each token's experts back to it, and their weighted sum.

    Args:
        routing: that of the dispatch.
        hidden: elements of a token.
        item_bytes: of an element.
        lanes: of each rank.
        header_bytes: of a row, with what aligns it.
        shared_expert: each rank adds the output of a shared expert of its own, which no link carries.
    """
    ranks = require_square(routing)
    row_bytes = hidden * item_bytes
    every = np.arange(ranks, dtype=np.int64)
    origin, expert = all_pairs(ranks)
    rows = routing.rows.ravel()
    send = Transfers(expert, origin, rows, rows * (row_bytes + header_bytes), "source", "packets")
    flag = Signals(expert, origin, rows, FLAG_BYTES, "flag", atomic=True)
    added = routing.sent + (routing.tokens if shared_expert else 0)
    gathered = (added + routing.tokens) * row_bytes + routing.sent * WEIGHT_BYTES
    stages = (
        Stage("send", transfers=(send,)),
        Stage("flag", signals=(flag,), streamed=True),
        Stage("await-flags", (Waits(origin, expert, rows, "flag"),)),
        Stage("reduce", work=(Work(every, "reduce", routing.tokens, gathered, added * hidden),)),
    )
    payload = (routing.received - np.diagonal(routing.rows)) * row_bytes
    return Description("combine", "push", ranks, stages, lanes, payload)
