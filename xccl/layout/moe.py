"""Layouts of dispatch and combine by the pull protocol (XDS section 3.2), and the private state of its objects.

Own managed area of one ExpertParallel object, the same offsets at every rank:

    +--------------------------+ dispatch_counts
    | counts                   |  int32 [experts]: rows for each expert, in global order
    +--------------------------+ dispatch_places
    | places                   |  int32 [rows][2]: token and slot of each row
    +--------------------------+ dispatch_scales
    | scales                   |  float32 [rows], INT8 only
    +--------------------------+ dispatch_rows
    | rows                     |  [max_tokens * top_k][row bytes], by expert, then token, then slot
    +--------------------------+ combine_rows
    | returned rows            |  [ranks * max_tokens * top_k][hidden * item size], by origin, then as the origin sent
    them +--------------------------+

The experts of a rank are neighbours, so the block for a destination is a run of rows, and `first_row` in the field says
where it starts: blocks are packed instead of having a fixed place for the worst case, which takes 1/ranks of the
memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from .record import HOT_LINE_BYTES, Record, align_up

EXPERT_FIELD = Record(
    "expert-parallel field",
    "One for each peer and direction (dispatch, combine), written by the peer (XDS section 3.2).",
)
EXF_EVENT = EXPERT_FIELD.add("event", 8, "epoch of the announced operation, published last (SYNC POINT expert-field)")
EXF_FIRST_ROW = EXPERT_FIELD.add("first_row", 8, "where the block for this rank starts in the peer's managed area")
EXF_COUNT = EXPERT_FIELD.add(
    "count", 8, "rows in it (40 bits), and the epoch of the dispatch that they belong to (24 bits)"
)
EXF_PULLED = EXPERT_FIELD.add(
    "pulled", 8, "epoch up to which the peer has pulled from this rank (SYNC POINT expert-pulled)"
)
EXPERT_FIELD_BYTES = EXPERT_FIELD.size_bytes
COUNT_BITS = 40
COUNT_MASK = (1 << COUNT_BITS) - 1
#: The low bits of an epoch that fit beside a count; the sign stays free.
EPOCH_MASK = (1 << (64 - COUNT_BITS - 1)) - 1

STATE = Record("expert-parallel state", "Private to a rank; what kernels need to know of an ExpertParallel object.")
EP_CONTROL = STATE.add("control", 8, "address of the own control area")
EP_SEGMENTS = STATE.add("segments", 8, "address of [ranks] int64: the segments of all ranks")
EP_RANK = STATE.add("rank", 8, "own rank")
EP_RANKS = STATE.add("ranks", 8, "number of ranks")
EP_EXPERTS = STATE.add("experts", 8, "number of experts, a multiple of ranks")
EP_HIDDEN = STATE.add("hidden", 8, "elements of a token")
EP_TOP_K = STATE.add("top_k", 8, "slots of a token")
EP_DTYPE = STATE.add("dtype", 8, "code of the element type")
EP_QUANT = STATE.add("quant", 8, "1 if rows are dispatched as INT8 with a scale, else 0")
EP_ROW_BYTES = STATE.add("row_bytes", 8, "bytes of a dispatched row")
EP_RETURN_BYTES = STATE.add("return_bytes", 8, "bytes of a returned row")
EP_DISPATCH_FIELDS = STATE.add("dispatch_fields", 8, "offset of [ranks] fields in every segment")
EP_COMBINE_FIELDS = STATE.add("combine_fields", 8, "offset of [ranks] fields in every segment")
EP_COUNTS = STATE.add("dispatch_counts", 8, "offset in every segment")
EP_PLACES = STATE.add("dispatch_places", 8, "offset in every segment")
EP_SCALES = STATE.add("dispatch_scales", 8, "offset in every segment")
EP_ROWS = STATE.add("dispatch_rows", 8, "offset in every segment")
EP_RETURNS = STATE.add("combine_rows", 8, "offset in every segment")
EP_DISPATCHES = STATE.add("dispatches", 8, "epoch of the last dispatch")
EP_COMBINES = STATE.add("combines", 8, "epoch of the last combine")
EP_CURSOR = STATE.add("cursor", 8, "index of the first peer that a wait has not seen")
EP_SCRATCH = STATE.add("scratch", 8, "address of int64 [max(experts, 2 * top_k)]")

#: One row of `Dispatched.source`: the token's rank, its number there, and the slot that chose the expert.
SOURCE_DTYPE: Final = np.dtype([("rank", np.int32), ("token", np.int32), ("slot", np.int32)])

ROUTING = Record(
    "routing",
    "Private to a rank: what a dispatch handle keeps, for combine to find every row again. Addresses of int64 arrays.",
)
RT_EPOCH = ROUTING.add("epoch", 8, "of the dispatch")
RT_TOKENS = ROUTING.add("tokens", 8, "tokens that this rank dispatched")
RT_ROW_OF = ROUTING.add("row_of", 8, "[tokens * top_k]: row of a token's slot, or -1")
RT_SENT_FIRST = ROUTING.add("sent_first", 8, "[experts + 1]: first row of each expert among the rows sent")
RT_GOT_COUNTS = ROUTING.add("got_counts", 8, "[ranks * local experts]: rows from each source for each local expert")
RT_GOT_FIRST = ROUTING.add("got_first", 8, "[ranks * local experts]: where they start in the output")


@dataclass(frozen=True)
class ExpertBlocks:
    """Offsets of the parts of the managed block of one ExpertParallel object, from the block's start."""

    counts: int
    places: int
    scales: int
    rows: int
    returns: int
    total_bytes: int


def expert_blocks(
    *, ranks: int, experts: int, max_tokens: int, top_k: int, row_bytes: int, return_bytes: int
) -> ExpertBlocks:
    """Where the parts of the managed block lie, sized for the worst case.

    A rank sends at most max_tokens * top_k rows, and gets at most that many from each rank.
    """
    rows = max_tokens * top_k
    at = 0
    offsets: list[int] = []
    for part_bytes in (4 * experts, 8 * rows, 4 * rows, rows * row_bytes, ranks * rows * return_bytes):
        offsets.append(at)
        at = align_up(at + part_bytes, HOT_LINE_BYTES)
    counts, places, scales, first_row, returns = offsets
    return ExpertBlocks(counts, places, scales, first_row, returns, total_bytes=at)
