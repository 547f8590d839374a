"""Layouts of direct dispatch and combine (docs/adr/0029): each row is written once, where the caller finds it.

Metadata of one object, the same offsets at every rank: `DIRECT_FIELD` [ranks], one written by each peer.

Managed block:

    +--------------------------+ counts
    | counts                   |  int32 [experts]: entries that this rank sends to each expert; then, if rows are
    |                          |  deduplicated, int32 [ranks]: rows that it sends to each rank
    +--------------------------+ slots
    | slot 0                   |  the parts of a result: rows | scales, INT8 only | source | index | weights. The first
    |                          |  three are [most rows], the others [most entries] and there if rows are deduplicated
    | slot 1 ...               |
    +--------------------------+ returns
    | returned rows            |  [most rows][hidden * item size], in the order of the dispatched rows
    +--------------------------+ outputs
    | outputs 0                |  the same, for the caller to write into
    | outputs 1 ...            |
    +--------------------------+

A slot holds the result of one dispatch for as long as the caller does, and so do outputs. Address space is reserved for
the worst case; memory is taken for what comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .moe import INDEX_DTYPE, SOURCE_DTYPE
from .record import HOT_LINE_BYTES, Record, align_up
from .segment import PAGE_BYTES

#: Results of an object that may lie in its slots: all but one of them, which takes what comes when those are held.
SLOTS: Final = 4
#: Arrays for the experts' outputs that may lie where peers read them.
OUTPUTS: Final = 2

DIRECT_FIELD = Record("direct field", "One for each peer, written by the peer.")
DF_COUNTED = DIRECT_FIELD.add("counted", 8, "epoch of the dispatch that it has counted (SYNC POINT direct-counts)")
DF_SLOT = DIRECT_FIELD.add("slot", 8, "where the peer's slot for the rows of that dispatch is in its segment")
DF_CAPACITY = DIRECT_FIELD.add("capacity", 8, "rows for which there is memory in that slot")
DF_ROOT = DIRECT_FIELD.add("root", 8, "epoch of the dispatch by whose routing the peer sends (23 bits)")
DF_WRITTEN = DIRECT_FIELD.add("written", 8, "epoch of the dispatch whose rows are written (SYNC POINT direct-rows)")
DF_READY = DIRECT_FIELD.add("ready", 8, "epoch of the combine whose rows are there (SYNC POINT direct-returns)")
DF_RETURNS = DIRECT_FIELD.add("returns", 8, "where its returned rows start in the peer's segment")
DF_DISPATCH = DIRECT_FIELD.add("dispatch", 8, "epoch of the dispatch that those rows belong to")
DF_READ = DIRECT_FIELD.add("read", 8, "epoch of the combine whose rows the peer has read (SYNC POINT direct-read)")
DIRECT_FIELD.pad_to(HOT_LINE_BYTES)
DIRECT_FIELD_BYTES: Final = DIRECT_FIELD.size_bytes
#: What an announcement writes of it: four words of dispatch, or three of combine and what fills the line up.
DIRECT_FIELD_PART_BYTES: Final = 32

DIRECT = Record("direct state", "Private to a rank; what the kernels of the direct protocol need to know.")
DI_FIELDS = DIRECT.add("fields", 8, "offset of the fields in every segment")
DI_COUNTS = DIRECT.add("counts", 8, "offset of the counts in every segment")
DI_SCALES = DIRECT.add("scales", 8, "where the scales are in a slot")
DI_SOURCE = DIRECT.add("source", 8, "where the source records are in a slot")
DI_INDEX = DIRECT.add("index", 8, "where the index is in a slot")
DI_WEIGHTS = DIRECT.add("weights", 8, "where the weights are in a slot")
DI_SLOT = DIRECT.add("slot", 8, "offset in the own segment of the slot for this dispatch")
DI_CAPACITY = DIRECT.add("capacity", 8, "rows for which there is memory in it")
DI_DEDUP = DIRECT.add("dedup", 8, "1 if rows are deduplicated, else 0")
DI_STAGE = DIRECT.add("stage", 8, "number of the stage at which the operation goes on")
DI_CURSOR = DIRECT.add("cursor", 8, "first peer that a wait has not seen")
DI_RESULT = DIRECT.add("result", 8, "the peer, or the element of topk_idx, that is wrong")

EXPERT_CALLS = Record("expert calls", "Private to a rank: what the direct calls of one object look at.")
XC_CALLS = EXPERT_CALLS.add("calls", 8, "address of the call state of its communicator")
XC_STATE = EXPERT_CALLS.add("state", 8, "address of the expert-parallel state")
XC_DIRECT = EXPERT_CALLS.add("direct", 8, "address of the direct state")
XC_DISPATCH = EXPERT_CALLS.add("dispatch", 8, "address of the kernel that dispatches")
XC_COMBINE = EXPERT_CALLS.add("combine", 8, "address of the kernel that combines")
XC_DTYPE = EXPERT_CALLS.add("dtype", 8, "the dtype of tokens")
XC_FLOAT32 = EXPERT_CALLS.add("float32", 8, "the dtype float32")
XC_MAX_TOKENS = EXPERT_CALLS.add("max_tokens", 8, "the most tokens of a dispatch")
XC_SEGMENT_BYTES = EXPERT_CALLS.add("segment_bytes", 8, "size of a segment")
XC_HEAD = EXPERT_CALLS.add("head", 8, "address of [words of a routing][2]: an offset or number, and 1 for an address")
XC_OFFSETS = EXPERT_CALLS.add("offsets", 8, "address of [SLOTS]: where each slot is in the segment")
XC_RETURNS = EXPERT_CALLS.add("returns", 8, "offset in the own segment to which outputs are copied that lie elsewhere")
XC_RETURNS_BYTES = EXPERT_CALLS.add("returns_bytes", 8, "how much memory there is")
XC_CAPACITIES = EXPERT_CALLS.add("capacities", 8, "address of [SLOTS]: rows for which there is memory in each")


@dataclass(frozen=True)
class DirectBlocks:
    """Where the parts of the managed block of one object are, from its start; those of a slot, from the slot's start.

    Attributes:
        slots: slot 0.
        slot_bytes: distance between slots.
        scales: of a slot.
        source: of a slot.
        index: of a slot.
        weights: of a slot.
        returns: returned rows.
        outputs: outputs 0.
        outputs_bytes: distance between outputs.
        total_bytes: all of it; counts come first.
    """

    slots: int
    slot_bytes: int
    scales: int
    source: int
    index: int
    weights: int
    returns: int
    outputs: int
    outputs_bytes: int
    total_bytes: int


def direct_blocks(
    *, ranks: int, experts: int, max_tokens: int, top_k: int, row_bytes: int, return_bytes: int, int8: bool, dedup: bool
) -> DirectBlocks:
    """The parts, sized for the worst case: all tokens of all ranks come to one, with all of their slots."""
    tokens = max(ranks * max_tokens, 1)
    entries = tokens * top_k
    rows = tokens if dedup else entries
    ends = [0]
    for part_bytes in (
        rows * row_bytes,
        4 * rows if int8 else 0,
        SOURCE_DTYPE.itemsize * rows,
        INDEX_DTYPE.itemsize * entries if dedup else 0,
        4 * entries if dedup else 0,
    ):
        ends.append(align_up(ends[-1] + part_bytes, PAGE_BYTES))
    scales, source, index, weights, slot_bytes = ends[1:]
    slots = align_up(4 * (experts + ranks), PAGE_BYTES)
    returns = slots + SLOTS * slot_bytes
    outputs_bytes = align_up(rows * return_bytes, PAGE_BYTES)
    outputs = returns + outputs_bytes
    return DirectBlocks(
        slots, slot_bytes, scales, source, index, weights, returns, outputs, outputs_bytes,
        total_bytes=outputs + OUTPUTS * outputs_bytes,
    )  # fmt: skip
