"""Direct dispatch and combine, as `xccl.comm.moe_direct` executes them: no paper's protocol, but parts of several.

Rules
- Every rank reads what all have counted, and so knows where each of its rows is to lie at its rank. Rows are written
  there once, and are the result; combine sums the experts' outputs where they lie.
- Dispatch, stages:
    count: entries for each expert, into the own managed area;
    announce: a field to every peer: where it is to write;
    await-counts: those of all;
    plan: the counts of all peers for all experts, summed up on the way;
    write: tokens, quantised once each if asked, straight to the places of their rows. The lanes meet at the end:
    notify: a word to every peer;
    await-rows: those of all.
- Combine, stages:
    return: the experts' outputs to the own managed area, unless they lie where peers can read them;
    announce: a field to every peer: where they are;
    await-ready: those of all;
    reduce: the rows of a token are summed as they come, in the order of its slots;
    release: a word to every peer;
    await-read: those of all.
- Deduplicated rows are one for each token and rank that has any of its experts; they come with an entry for each
  (token, slot). Ranks count rows for each rank, too.
- A dispatch that repeats another one (cached) moves no counts, source records and entries: both sides know them.

Units. A unit of "rows" is a row; so are those of its scale and its source record, which are written one by one.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ..layout.moe import INDEX_DTYPE, SOURCE_DTYPE
from ..layout.moe_direct import DIRECT_FIELD_PART_BYTES
from ..layout.ring import MAX_LANES
from .counts import RoutingCounts
from .moe import COUNT_BYTES, SCALE_BYTES, WEIGHT_BYTES, Quant, Rows, require_square, rows_between, weights_bytes
from .stage import Description, Signals, Stage, Transfers, Waits, Work, all_pairs

WORD_BYTES: Final = 8


def dispatch(
    routing: RoutingCounts,
    *,
    hidden: int,
    item_bytes: int = 2,
    quant: Quant = "int8",
    lanes: int = MAX_LANES,
    rows: Rows = "expanded",
    cached: bool = False,
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
    """
    ranks = require_square(routing)
    row_bytes = hidden if quant == "int8" else hidden * item_bytes
    every = np.arange(ranks, dtype=np.int64)
    source, destination = all_pairs(ranks)
    moved = rows_between(routing, rows)
    n, entries = moved.ravel(), routing.rows.ravel()
    written = [Transfers(source, destination, n, n * row_bytes, "source", "rows", is_repeated=True)]
    work: tuple[Work, ...] = ()
    if quant == "int8":
        tokens = routing.sending
        work = (Work(every, "quantise", tokens, tokens * hidden * item_bytes, tokens * hidden),)
        written.append(Transfers(source, destination, n, n * SCALE_BYTES, "source", "scales"))
    counted: tuple[Transfers, ...] = ()
    planned: tuple[Transfers, ...] = ()
    scan: tuple[Work, ...] = ()
    if not cached:
        written.append(Transfers(source, destination, n, n * SOURCE_DTYPE.itemsize, "source", "sources"))
        if rows == "dedup":
            entry_bytes = INDEX_DTYPE.itemsize + WEIGHT_BYTES
            written.append(Transfers(source, destination, entries, entries * entry_bytes, "source", "entries"))
        ones = np.ones_like(every)
        counts = routing.experts + (ranks if rows == "dedup" else 0)
        counted = (Transfers(every, every, ones, ones * counts * COUNT_BYTES, "source", "counts"),)
        each = np.ones_like(source)
        read = Transfers(
            source, destination, each, each * counts * COUNT_BYTES, "destination", "counts", is_stored=False
        )
        planned = (read,)
        scan = (Work(every, "scan", ones, 0 * ones, ones * ranks * counts),)
    stages = (
        Stage("count", transfers=counted),
        Stage("announce", signals=(_signals(ranks, "field", DIRECT_FIELD_PART_BYTES),)),
        Stage("await-counts", (_waits(ranks, "field"),)),
        Stage("plan", transfers=planned, work=scan),
        Stage("write", transfers=tuple(written), work=work, lane_barrier=True),
        Stage("notify", signals=(_signals(ranks, "written", WORD_BYTES),)),
        Stage("await-rows", (_waits(ranks, "written"),)),
    )
    away = np.asarray(moved.sum(axis=1), np.int64) - np.diagonal(moved)
    payload = away * (row_bytes + (SCALE_BYTES if quant == "int8" else 0))
    return Description("dispatch", "direct", ranks, stages, lanes, payload)


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
        in_place: the experts' outputs lie where peers can read them.
    """
    ranks = require_square(routing)
    row_bytes = hidden * item_bytes
    every = np.arange(ranks, dtype=np.int64)
    origin, expert = all_pairs(ranks)
    moved = rows_between(routing, rows)
    n = moved.ravel()
    sent, received = (np.asarray(moved.sum(axis=axis), np.int64) for axis in (1, 0))
    copied = 0 * received if in_place else received
    returned = Transfers(every, every, copied, copied * row_bytes, "source", "rows")
    pulled = Transfers(expert, origin, n, n * row_bytes, "destination", "rows", is_stored=False)
    added = routing.tokens if shared_expert else 0 * routing.tokens
    summed = (routing.tokens + added) * row_bytes + weights_bytes(sent, rows)
    work = Work(every, "reduce", routing.tokens, summed, (sent + added) * hidden)
    stages = (
        Stage("return", transfers=(returned,), lane_barrier=True),
        Stage("announce", signals=(_signals(ranks, "field", DIRECT_FIELD_PART_BYTES),)),
        Stage("await-ready", (_waits(ranks, "field"),)),
        Stage("reduce", transfers=(pulled,), work=(work,)),
        Stage("release", signals=(_signals(ranks, "read", WORD_BYTES),)),
        Stage("await-read", (_waits(ranks, "read"),)),
    )
    payload = (received - np.diagonal(moved)) * row_bytes
    return Description("combine", "direct", ranks, stages, lanes, payload)


def _signals(ranks: int, what: str, size_bytes: int) -> Signals:
    rank, peer = all_pairs(ranks)
    return Signals(rank, peer, np.ones_like(rank), size_bytes, what)


def _waits(ranks: int, what: str) -> Waits:
    rank, peer = all_pairs(ranks)
    return Waits(rank, peer, np.ones_like(rank), what)
