"""Layouts of dispatch and combine by the pull protocol (XDS section 3.2), and the private state of its objects.

Own managed area of one ExpertParallel object, the same offsets at every rank:

    +--------------------------+ dispatch_counts
    | counts                   |  int32 [experts]: entries for each expert, in global order; then, if rows are
    |                          |  deduplicated, int32 [ranks]: the first entry for each rank
    +--------------------------+ dispatch_places
    | places                   |  int32 [entries][2]: token and slot of each row; if rows are deduplicated, `ENTRY`
    +--------------------------+ dispatch_scales
    | scales                   |  float32 [rows], INT8 only
    +--------------------------+ combine_starts
    | starts                   |  int64 [ranks][local experts]: where the outputs for each origin and expert start, in
    |                          |  rows, if they lie in place, by expert; not if rows are deduplicated
    +--------------------------+ dispatch_rows
    | rows                     |  [max_tokens * top_k][row bytes], by expert, then token, then slot; if they are
    |                          |  deduplicated by rank, then token
    +--------------------------+ combine_rows
    | returned rows            |  [ranks * max_tokens * top_k][hidden * item size], by origin, then as the origin sent
    |                          |  them; of outputs that lie elsewhere
    +--------------------------+ outputs
    | outputs 0                |  [ranks * max_tokens * top_k][hidden * item size], for the caller to write into; only
    | outputs 1                |  where address space abounds
    +--------------------------+

An entry is one (token, slot) with an expert. Rows are expanded, one for each entry, or deduplicated, one for each token
and rank that has any of its experts.

The experts of a rank are neighbours, so the block for a destination is a run of rows, and `first_row` in the field says
where it starts: blocks are packed instead of having a fixed place for the worst case, which takes 1/ranks of the
memory. Ranks hold equal runs of experts, but for the first `experts % ranks` of them, which have one more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from .record import HOT_LINE_BYTES, Record, align_up
from .segment import PAGE_BYTES

EXPERT_FIELD = Record(
    "expert-parallel field",
    "One for each peer and direction (dispatch, combine), written by the peer (XDS section 3.2).",
)
EXF_EVENT = EXPERT_FIELD.add("event", 8, "epoch of the announced operation, published last (SYNC POINT expert-field)")
EXF_BLOCK = EXPERT_FIELD.add(
    "block",
    8,
    "where the block for this rank starts: its first row in the peer's managed area; of a combine its offset in the "
    "peer's segment, or minus that of outputs that lie there by expert, with `combine_starts`",
)
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
EP_EXPERTS = STATE.add("experts", 8, "number of experts")
EP_HIDDEN = STATE.add("hidden", 8, "elements of a token")
EP_TOP_K = STATE.add("top_k", 8, "slots of a token")
EP_DTYPE = STATE.add("dtype", 8, "code of the element type")
EP_QUANT = STATE.add("quant", 8, "1 if rows are dispatched as INT8 with a scale, else 0")
EP_ROW_BYTES = STATE.add("row_bytes", 8, "bytes of a dispatched row")
EP_RETURN_BYTES = STATE.add("return_bytes", 8, "bytes of a returned row")
EP_COUNTS = STATE.add("dispatch_counts", 8, "offset in every segment")
EP_PLACES = STATE.add("dispatch_places", 8, "offset in every segment")
EP_SCALES = STATE.add("dispatch_scales", 8, "offset in every segment")
EP_ROWS = STATE.add("dispatch_rows", 8, "offset in every segment")
EP_RETURNS = STATE.add("combine_rows", 8, "offset in every segment")
EP_STARTS = STATE.add("combine_starts", 8, "offset in every segment")
EP_SCRATCH = STATE.add("scratch", 8, "address of int64 [scratch_words]")

#: One row of `Dispatched.source`: the token's rank, its number there, and the slot that chose the expert.
SOURCE_DTYPE: Final = np.dtype([("rank", np.int32), ("token", np.int32), ("slot", np.int32)])
#: One entry of `Dispatched.index`: the row that its expert is to work on, the local expert, and the token's slot.
INDEX_DTYPE: Final = np.dtype([("row", np.int32), ("expert", np.int32), ("slot", np.int32)])

ENTRY = Record("entry", "One (token, slot) with an expert, in the pull protocol with deduplicated rows.")
EN_TOKEN = ENTRY.add("token", 4, "number of the token at its rank", align=4)
EN_SLOT = ENTRY.add("slot", 4, "which of its choices this is", align=4)
EN_ROW = ENTRY.add("row", 4, "its row in the block for the expert's rank", align=4)
EN_WEIGHT = ENTRY.add("weight", 4, "float32, its gate weight", align=4)
ENTRY_BYTES = ENTRY.size_bytes

ROUTING = Record(
    "routing",
    "Private to a rank: what a dispatch handle keeps, for combine to find every row again. Addresses of int64 arrays.",
)
RT_EPOCH = ROUTING.add("epoch", 8, "of the dispatch")
RT_TOKENS = ROUTING.add("tokens", 8, "tokens that this rank dispatched")
RT_ROW_OF = ROUTING.add(
    "row_of",
    8,
    "[tokens * top_k]: rank << 40 | row of a token's slot; -1 for none, -2 minus that if an earlier slot has the row. "
    "Rows are numbered as they are sent; once a direct dispatch has begun, as they lie at that rank",
)
RT_SENT_FIRST = ROUTING.add("sent_first", 8, "[experts + 1]: first entry of each expert among those sent")
RT_GOT_COUNTS = ROUTING.add("got_counts", 8, "[ranks * groups]: rows of each run that comes from each source")
RT_GOT_FIRST = ROUTING.add("got_first", 8, "[ranks * groups]: where they start in the output")
RT_ROOT = ROUTING.add("root", 8, "epoch of the dispatch that made this routing; its own unless it repeats one")
RT_SENT_ROWS = ROUTING.add("sent_rows", 8, "[ranks + 1]: first row for each rank among those sent")
RT_GROUPS = ROUTING.add("groups", 8, "runs of rows of a source: its local experts, or 1 if rows are deduplicated")
RT_ENTRY_COUNTS = ROUTING.add("entry_counts", 8, "[ranks * local experts]: entries from each source for each expert")
RT_ENTRY_FIRST = ROUTING.add("entry_first", 8, "[ranks * local experts]: where they start in the output")
RT_ROWS = ROUTING.add("rows", 8, "rows that have come")
RT_ENTRIES = ROUTING.add("entries", 8, "entries that have come; as many as rows if those are expanded")
RT_PLACES = ROUTING.add("places", 8, "[rows]: token << 32 | slot of each row that has come; push only")
RT_ARRIVING = ROUTING.add("arriving", 8, "[ranks]: rows that come to each rank from all; direct only")
RT_COUNTS = ROUTING.add("counts", 8, "[local experts]: entries that have come for each; direct only")
RT_AT = ROUTING.add("at", 8, "[tokens * top_k]: scratch of an operation, the addresses of rows, as they were sent")
ROUTING_WORDS = ROUTING.size_bytes // 8


def first_expert(rank: int, experts: int, ranks: int) -> int:
    """The first expert of a rank: the first `experts % ranks` ranks hold one more than the others."""
    each, more = divmod(experts, ranks)
    return rank * each + min(rank, more)


def scratch_words(*, experts: int, ranks: int, top_k: int) -> int:
    """Words of scratch memory: a cursor for each expert and two words for each rank, or a sum's rows and weights."""
    return max(experts + 2 * ranks, 2 * (top_k + 1))


@dataclass(frozen=True)
class ExpertBlocks:
    """Offsets of the parts of the managed block of one ExpertParallel object, from the block's start."""

    counts: int
    places: int
    scales: int
    starts: int
    rows: int
    returns: int
    outputs: int
    outputs_bytes: int
    total_bytes: int


def expert_blocks(
    *,
    ranks: int,
    experts: int,
    max_tokens: int,
    top_k: int,
    row_bytes: int,
    return_bytes: int,
    dedup: bool = False,
    lent: int = 0,
) -> ExpertBlocks:
    """Where the parts of the managed block lie, sized for the worst case, with so many arrays of outputs to be lent.

    A rank sends at most max_tokens * top_k rows, and gets at most that many from each rank; deduplicated, a row for
    each token and rank.
    """
    entries = max_tokens * top_k
    rows = max_tokens * min(top_k, ranks) if dedup else entries
    returned = ranks * (max_tokens if dedup else entries)
    counts_bytes = 4 * (experts + (ranks if dedup else 0))
    places_bytes = entries * (ENTRY_BYTES if dedup else 8)
    starts_bytes = 0 if dedup else 8 * ranks * -(-experts // ranks)
    outputs_bytes = align_up(returned * return_bytes, PAGE_BYTES)
    at = 0
    offsets: list[int] = []
    for part_bytes in (counts_bytes, places_bytes, 4 * rows, starts_bytes, rows * row_bytes, returned * return_bytes):
        offsets.append(at)
        at = align_up(at + part_bytes, HOT_LINE_BYTES)
    counts, places, scales, starts, first_row, returns = offsets
    outputs = align_up(at, PAGE_BYTES)
    return ExpertBlocks(
        counts, places, scales, starts, first_row, returns, outputs, outputs_bytes,
        total_bytes=outputs + lent * outputs_bytes,
    )  # fmt: skip
