"""Dispatch and combine by the pull protocol (XDS §3.2), as `xccl.comm.moe` executes them.

Rules
- Everything a rank writes for others lies in its own managed area; peers pull it. Into peers' segments go only fields.
- Each rank tells each peer, itself included, where the block for it starts (a 32-byte field), and later that it has
  pulled all it wanted (an 8-byte word). A field is written for an empty block, too: each rank waits for those of all.
- Stages of both:
    await-pulled: every peer has pulled the operation before. The very first operation looks at the words, too.
    write: tokens, quantised once each if asked, into the own managed area, a row for each expert of a token. The lanes
           meet at the end: a field speaks for the rows of all of them.
    announce: a field to every peer.
    await-fields: those of every peer.
    pull: the rows from every peer's area. Dispatch pulls the peer's counts, scales and places (token and slot) with
          them; combine sums the rows of a token on the way, in the order of its slots, in float32.
    release: the word "pulled" at every peer.
- Deduplicated rows are one for each token and rank that has any of its experts. They come with an entry for each
  (token, slot) instead of places, and with the rank's first entry beside the counts.
- A dispatch that repeats another one (cached) moves neither counts nor places: both sides know them.
- Rows for the own experts are a block of the own managed area, too, as the paper has it. Without `loopback` they go
  from the tokens to the output; that is what `xccl.comm.moe` does with rows that are not quantised.
- Outputs that lie in the own segment (`in_place`) are not written again. They are in the order of dispatched rows, so
  that the area has, for each peer and expert, where the runs of rows start; deduplicated, a peer has one run, and the
  field says it. The operation ends with
    await-read: every peer has pulled this one; then the caller may write there.

Units. A unit of "rows" is a row: a token passes a core's unified buffer as a whole. Scales and places lie side by side:
in "write" they are one unit, in "pull" one for each run of rows with the same source and expert. Quantising writes its
result as one of the rows, and the sum reads the rows that are pulled, so their work counts what is left: the token that
is read, the sum and the weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from ..errors import UsageError
from ..layout.moe import ENTRY_BYTES, EXPERT_FIELD_BYTES
from ..layout.ring import MAX_LANES
from .counts import RoutingCounts
from .stage import Description, Ints, Signals, Stage, Transfers, Waits, Work, all_pairs

Quant = Literal["int8", "none"]
Rows = Literal["expanded", "dedup"]

SCALE_BYTES = 4
#: Token and slot of a row, int32 each.
PLACE_BYTES = 8
COUNT_BYTES = 4
WEIGHT_BYTES = 4
#: Where a run of rows starts.
START_BYTES = 8
PULLED_BYTES = 8


def dispatch(
    routing: RoutingCounts,
    *,
    hidden: int,
    item_bytes: int = 2,
    quant: Quant = "int8",
    lanes: int = MAX_LANES,
    rows: Rows = "expanded",
    cached: bool = False,
    loopback: bool = True,
) -> Description:
    """Each token to the ranks of its experts.

    Args:
        routing: how many rows go where; it has as many sources as destinations.
        hidden: elements of a token.
        item_bytes: of an element before quantisation.
        quant: "int8", with a float32 scale a token, or "none".
        lanes: of each rank.
        rows: "expanded", or "dedup" for one row for each token and rank.
        cached: the routing is that of an earlier dispatch.
        loopback: rows for the own experts go through the managed area.
    """
    ranks = require_square(routing)
    row_bytes = hidden if quant == "int8" else hidden * item_bytes
    every = np.arange(ranks, dtype=np.int64)
    source, destination = all_pairs(ranks)
    moved = rows_between(routing, rows)
    n, entries = moved.ravel(), routing.rows.ravel()
    sent, ones = np.asarray(moved.sum(axis=1), np.int64), np.ones_like(every)
    runs = np.minimum(n, 1) if rows == "dedup" else routing.runs.ravel()
    away = sent - np.diagonal(moved)
    through = sent if loopback else away
    written = [replace(_local(every, through, through * row_bytes, "rows"), is_repeated=True)]
    pulled = [Transfers(source, destination, n, n * row_bytes, "destination", "rows")]
    if not cached:
        first_bytes = COUNT_BYTES if rows == "dedup" else 0
        written.append(_local(every, ones, ones * (COUNT_BYTES * routing.experts + first_bytes * ranks), "counts"))
        local_bytes = np.tile(COUNT_BYTES * routing.local + first_bytes, ranks)
        pulled.append(Transfers(source, destination, np.ones_like(n), local_bytes, "destination", "counts"))
        what, place_bytes = ("entries", ENTRY_BYTES) if rows == "dedup" else ("places", PLACE_BYTES)
        written.append(_local(every, np.minimum(sent, 1), routing.sent * place_bytes, what))
        pulled.append(Transfers(source, destination, runs, entries * place_bytes, "destination", what))
    work: tuple[Work, ...] = ()
    if quant == "int8":
        written.append(_local(every, np.minimum(sent, 1), sent * SCALE_BYTES, "scales"))
        pulled.append(Transfers(source, destination, runs, n * SCALE_BYTES, "destination", "scales"))
        tokens = routing.sending
        work = (Work(every, "quantise", tokens, tokens * hidden * item_bytes, tokens * hidden),)
    stages = _stages(
        ranks,
        Stage("write", transfers=tuple(written), work=work, lane_barrier=True),
        Stage("pull", transfers=tuple(pulled)),
    )
    payload = away * (row_bytes + (SCALE_BYTES if quant == "int8" else 0))
    return Description("dispatch", "pull", ranks, stages, lanes, payload)


def combine(
    routing: RoutingCounts,
    *,
    hidden: int,
    item_bytes: int = 2,
    lanes: int = MAX_LANES,
    rows: Rows = "expanded",
    shared_expert: bool = False,
    in_place: bool = False,
) -> Description:
    """The outputs of each token's experts back to it, and their weighted sum.

    Args:
        routing: that of the dispatch.
        hidden: elements of a token.
        item_bytes: of an element.
        lanes: of each rank.
        rows: those of the dispatch; deduplicated ones are weighted already.
        shared_expert: each rank adds the output of a shared expert of its own, which no link carries.
        in_place: the experts' outputs lie where peers can read them, at all ranks.
    """
    ranks = require_square(routing)
    row_bytes = hidden * item_bytes
    every = np.arange(ranks, dtype=np.int64)
    origin, expert = all_pairs(ranks)
    moved = rows_between(routing, rows)
    n = moved.ravel()
    sent, received = (np.asarray(moved.sum(axis=axis), np.int64) for axis in (1, 0))
    written = _local(every, received, received * row_bytes, "rows")
    pulled = [Transfers(expert, origin, n, n * row_bytes, "destination", "rows", is_stored=False)]
    if in_place:
        starts_bytes = START_BYTES * routing.local * (rows == "expanded")
        written = _local(every, np.minimum(starts_bytes, 1), ranks * starts_bytes, "starts")
        if rows == "expanded":
            some = np.minimum(n, 1)
            pulled.append(Transfers(expert, origin, some, some * starts_bytes[expert], "destination", "starts"))
    added = routing.tokens if shared_expert else 0 * routing.tokens
    summed = (routing.tokens + added) * row_bytes + weights_bytes(sent, rows)
    work = Work(every, "reduce", routing.tokens, summed, (sent + added) * hidden)
    stages = _stages(
        ranks,
        Stage("write", transfers=(written,), lane_barrier=True),
        Stage("pull", transfers=tuple(pulled), work=(work,)),
    )
    if in_place:
        stages += (Stage("await-read", (Waits(origin, expert, np.ones_like(n), "pulled"),)),)
    payload = (received - np.diagonal(moved)) * row_bytes
    return Description("combine", "pull", ranks, stages, lanes, payload)


def rows_between(routing: RoutingCounts, rows: Rows) -> Ints:
    """[sources, destinations] rows that go from rank to rank.

    Raises:
        UsageError: they are deduplicated, and the routing does not say how many that makes.
    """
    if rows == "expanded":
        return routing.rows
    if routing.deduplicated is None:
        raise UsageError("deduplicated rows follow from the choices of tokens, not from counts", value=rows)
    return routing.deduplicated


def weights_bytes(summed: Ints, rows: Rows) -> Ints:
    """Bytes of the weights of so many rows; deduplicated ones have none any more."""
    return summed * (0 if rows == "dedup" else WEIGHT_BYTES)


def require_square(routing: RoutingCounts) -> int:
    """The number of ranks, which all have tokens and experts.

    Raises:
        UsageError: sources and destinations differ in number.
    """
    if routing.sources != routing.destinations:
        raise UsageError(
            f"{routing.sources} ranks have tokens, {routing.destinations} have experts; here they are the same ranks",
            value=routing.sources,
            bound=routing.destinations,
        )
    return routing.sources


def _stages(ranks: int, write: Stage, pull: Stage) -> tuple[Stage, ...]:
    rank, peer = all_pairs(ranks)
    ones = np.ones_like(rank)
    return (
        Stage("await-pulled", (Waits(rank, peer, ones, "pulled"),)),
        write,
        Stage("announce", signals=(Signals(rank, peer, ones, EXPERT_FIELD_BYTES, "field"),)),
        Stage("await-fields", (Waits(rank, peer, ones, "field"),)),
        pull,
        Stage("release", signals=(Signals(rank, peer, ones, PULLED_BYTES, "pulled"),)),
    )


def _local(rank: Ints, units: Ints, n_bytes: Ints, what: str) -> Transfers:
    return Transfers(rank, rank, units, n_bytes, "source", what)
