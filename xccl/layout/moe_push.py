"""Layouts of dispatch and combine by the push protocol (CM384 §4.2.1).

Metadata of one object, the same offsets at every rank; peers write there:

    +--------------------------+ fields
    | fields                   |  `PUSH_FIELD` [ranks], one written by each peer
    +--------------------------+ counts
    | counts                   |  int32 [2][ranks][local experts, padded]: entries for each expert, from each peer; of
    |                          |  dispatches with an even epoch, then of those with an odd one
    +--------------------------+ status
    | status                   |  `PUSH_STATUS`, written by the rank itself
    +--------------------------+ flags
    | flags                    |  int64 [max_tokens], two cache lines apart: rows that have come back for each token,
    |                          |  over all combines
    +--------------------------+

Managed block:

    +--------------------------+ packets
    | packets                  |  [ranks][places][packet]: a block for each peer, which writes there
    +--------------------------+ returns
    | returned packets         |  [max_tokens * top_k][packet]: a place for each (token, slot) of this rank
    +--------------------------+

    packet of dispatch:   header (`PACKET`, entries) | row | scale, in a block of 512 bytes
    packet of combine:    header (`RETURN_PACKET`) | row

Packets are as long as those of CANN (see `xccl.protocol.moe_push`), and start on cache lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .record import HOT_LINE_BYTES, Record, align_up
from .ring import FIELD_BYTES

_LINE_BYTES: Final = 64

#: A scale, aligned: the smallest write that UB makes whole (CM384 §4.2.1).
SCALE_BLOCK_BYTES: Final = 512
#: What makes a dispatched row of 7168 elements 8.0 kB (CM384 Table 6).
DISPATCH_HEADER_BYTES: Final = 320
#: What makes a combined row of 7168 elements 15.1 kB (CM384 Table 6).
COMBINE_HEADER_BYTES: Final = 768

PUSH_FIELD = Record("push field", "One for each peer, written by the peer.")
PF_EVENT = PUSH_FIELD.add("event", 8, "epoch of the peer's dispatch, published last (SYNC POINT push-flag)")
PF_COUNT = PUSH_FIELD.add(
    "count",
    16,
    "[2], of dispatches with an even and an odd epoch: rows (40 bits), and the epoch of the dispatch by whose routing "
    "they go (24 bits)",
)
PF_TAKEN = PUSH_FIELD.add("taken", 8, "operations up to which the peer has read all (SYNC POINT push-taken)")
assert PUSH_FIELD.size_bytes == FIELD_BYTES

PUSH_STATUS = Record("push status", "What a rank combines, for a peer that waits in vain for its rows to look at.")
PS_COMBINE = PUSH_STATUS.add("combine", 8, "epoch of its combine, published last (SYNC POINT push-status)")
PS_DISPATCH = PUSH_STATUS.add("dispatch", 8, "epoch of the dispatch whose rows it returns")
PUSH_STATUS.pad_to(HOT_LINE_BYTES)

PACKET = Record("packet header", "In front of a dispatched row: where it came from.")
PK_RANK = PACKET.add("rank", 4, "source rank", align=4)
PK_TOKEN = PACKET.add("token", 4, "batch slot: number of the token there", align=4)
PK_SLOT = PACKET.add("slot", 4, "key offset: which of the token's choices; the first one if deduplicated", align=4)
PK_ENTRIES = PACKET.add("entries", 4, "how many of the token's choices are here; only if deduplicated", align=4)
PACKET.pad_to(32)

PACKET_ENTRY = Record("packet entry", "Behind the header of a deduplicated row, one for each choice that is here.")
PE_SLOT = PACKET_ENTRY.add("slot", 4, "which of the token's choices", align=4)
PE_EXPERT = PACKET_ENTRY.add("expert", 4, "local expert", align=4)
PE_WEIGHT = PACKET_ENTRY.add("weight", 4, "float32, its gate weight", align=4)
PACKET_ENTRY_BYTES = PACKET_ENTRY.size_bytes

RETURN_PACKET = Record("returned packet header", "In front of a row that comes back.")
RP_COMBINE = RETURN_PACKET.add("combine", 8, "epoch of the combine")
RP_DISPATCH = RETURN_PACKET.add("dispatch", 8, "epoch of the dispatch that the row belongs to")

PUSH_WRITES = Record("push writes", "Private to a rank, one for each peer: how long rows take that are written there.")
PW_ROWS = PUSH_WRITES.add("rows", 8, "written since the last that were timed")
PW_CACHED_NS = PUSH_WRITES.add("cached_ns", 8, "of a row written through the caches; 0 if none was timed")
PW_STREAMED_NS = PUSH_WRITES.add("streamed_ns", 8, "of one written past them; 0 if none was timed")

PUSH = Record("push state", "Private to a rank; what the kernels of the push protocol need to know besides.")
PU_FIELDS = PUSH.add("fields", 8, "offset in every segment")
PU_COUNTS = PUSH.add("counts", 8, "offset in every segment")
PU_COUNTS_BYTES = PUSH.add("counts_bytes", 8, "of one peer's counts")
PU_STATUS = PUSH.add("status", 8, "offset in every segment")
PU_FLAGS = PUSH.add("flags", 8, "offset in every segment")
PU_PACKETS = PUSH.add("packets", 8, "offset in every segment")
PU_BLOCK_BYTES = PUSH.add("block_bytes", 8, "of one peer's block of packets")
PU_PACKET_BYTES = PUSH.add("packet_bytes", 8, "distance between dispatched packets")
PU_HEADER_BYTES = PUSH.add("header_bytes", 8, "where the row starts in one")
PU_SCALE = PUSH.add("scale", 8, "where the scale is in one")
PU_RETURNS = PUSH.add("returns", 8, "offset in every segment")
PU_RETURN_PACKET_BYTES = PUSH.add("return_packet_bytes", 8, "distance between returned packets")
PU_TARGETS = PUSH.add("targets", 8, "address of int64 [max_tokens]: what each flag is to reach")
PU_BACKED = PUSH.add("backed", 8, "address of int64 [ranks]: packets for which the own block at each peer has memory")
PU_WRITES = PUSH.add("writes", 8, "address of `PUSH_WRITES` [ranks]")
PU_KEPT = PUSH.add("kept", 8, "the own rank, if the combine under way sends no packets to itself; else -1")


def header_bytes(entries: int) -> int:
    """Bytes of the header of a dispatched packet with room for so many entries."""
    return max(DISPATCH_HEADER_BYTES, align_up(PACKET.size_bytes + entries * PACKET_ENTRY_BYTES, _LINE_BYTES))


def packet_bytes(message_bytes: int, header: int = DISPATCH_HEADER_BYTES) -> int:
    """Bytes of a dispatched packet: header, and the message (row and scale block) as it is."""
    return align_up(header + message_bytes, _LINE_BYTES)


def return_packet_bytes(row_bytes: int) -> int:
    """Bytes of a returned packet."""
    return align_up(COMBINE_HEADER_BYTES + row_bytes, _LINE_BYTES)


@dataclass(frozen=True)
class PushMetadata:
    """Offsets of the parts of the metadata, from their start.

    Attributes:
        counts: those of all peers.
        counts_bytes: of one peer's, for one dispatch.
        status: of the rank.
        flags: of tokens.
        total_bytes: all of it; fields come first.
    """

    counts: int
    counts_bytes: int
    status: int
    flags: int
    total_bytes: int


def push_metadata(*, ranks: int, most_local: int, max_tokens: int) -> PushMetadata:
    """Where the parts of the metadata lie; `most_local` is the largest number of experts at a rank."""
    counts = align_up(ranks * FIELD_BYTES, HOT_LINE_BYTES)
    counts_bytes = align_up(4 * most_local, FIELD_BYTES)
    status = align_up(counts + 2 * ranks * counts_bytes, HOT_LINE_BYTES)
    flags = status + PUSH_STATUS.size_bytes
    return PushMetadata(counts, counts_bytes, status, flags, flags + max_tokens * HOT_LINE_BYTES)
