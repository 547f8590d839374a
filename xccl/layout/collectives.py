"""Layouts of collectives: what the ranks of a communicator tell each other in each step, and private state.

Each rank of a communicator has a block in its metadata area; blocks of different ranks may lie at different offsets.

    +-----------------+ 0
    | words           |  arrivals and releases, of steps and of barriers
    +-----------------+ HEADERS_OFFSET
    | headers         |  [2] collective records: what this rank tells all others, in communicators that count arrivals
    +-----------------+ RECORDS_OFFSET
    | records         |  [2][ranks] collective records: what each rank tells this one, in those of up to MESH_RANKS
    +-----------------+ block_bytes(ranks)

The two of each kind are used in turn, by even and odd steps.
"""

from __future__ import annotations

from typing import Final

from .record import HOT_LINE_BYTES, Record, align_up

#: Up to this many ranks, each writes a record to each other rank in every step; with more, arrivals are counted.
MESH_RANKS: Final = 32

COLLECTIVE_RECORD = Record(
    "collective record",
    "What one rank says in one step of a collective: what it was called with, and where its data is. Small data comes "
    "with it.",
)
CR_STEP = COLLECTIVE_RECORD.add("step", 8, "number of the step, published last (SYNC POINT collective-step)")
CR_SIGNATURE = COLLECTIVE_RECORD.add(
    "signature", 8, "kind of call, algorithm, operator, root and element type; the same at all ranks"
)
CR_BYTES = COLLECTIVE_RECORD.add("bytes", 8, "size of a part, the same at all ranks; in alltoallv for this receiver")
CR_LIMIT = COLLECTIVE_RECORD.add(
    "limit", 8, "4 times the size of the sender's largest part (alltoallv), plus EXPOSED, plus PRIVATE"
)
CR_AT = COLLECTIVE_RECORD.add(
    "at", 8, "where the parts for this receiver, or for all, start in the sender's segment, or in its private memory"
)
CR_STRIDE = COLLECTIVE_RECORD.add("stride", 8, "distance of parts for two ranks there, in a record for all")
CR_RESULTS = COLLECTIVE_RECORD.add("results", 8, "two-step: where results are; alltoallv, in a record for all: sizes")
COLLECTIVE_RECORD.add("rest", 200, "not used")
RECORD_BYTES: Final = COLLECTIVE_RECORD.size_bytes
#: A small part stands here instead of what says where it is.
CR_PAYLOAD: Final = CR_AT
#: Parts of up to this size travel in the records.
INLINE_BYTES: Final = RECORD_BYTES - CR_PAYLOAD

#: In `limit`: the sender's input is read where it lies; that is in its private memory, and `at` an address there.
EXPOSED: Final = 1
PRIVATE: Final = 2
#: The rest of `limit` are these bits and those above.
LIMIT_SHIFT: Final = 2

#: Words that a rank can say in an agreement: they travel in the record.
AGREE_MAX_VALUES: Final = INLINE_BYTES // 8

COMMUNICATOR_BLOCK = Record("communicator block", "Start of a rank's block of one communicator.")
CB_ARRIVALS = COMMUNICATOR_BLOCK.add(
    "arrivals", 8, "arrivals of all ranks at steps, counted at rank 0 (SYNC POINT collective-arrival)"
)
CB_RELEASE = COMMUNICATOR_BLOCK.add(
    "release", 8, "last step at which all have arrived, written by rank 0", align=HOT_LINE_BYTES
)
CB_BARRIER_ARRIVALS = COMMUNICATOR_BLOCK.add(
    "barrier_arrivals", 8, "groups: as in the control area", align=HOT_LINE_BYTES
)
CB_BARRIER_RELEASE = COMMUNICATOR_BLOCK.add(
    "barrier_release", 8, "groups: as in the control area", align=HOT_LINE_BYTES
)
COMMUNICATOR_BLOCK.pad_to(HOT_LINE_BYTES)

HEADERS_OFFSET: Final = COMMUNICATOR_BLOCK.size_bytes
RECORDS_OFFSET: Final = HEADERS_OFFSET + 2 * RECORD_BYTES


def block_bytes(ranks: int) -> int:
    """Size of a rank's block."""
    return RECORDS_OFFSET + (2 * ranks * RECORD_BYTES if ranks <= MESH_RANKS else 0)


INVITATION = Record(
    "invitation",
    "What one rank tells another when both make a group; two a pair of ranks, in the receiver's metadata area.",
)
IN_NUMBER = INVITATION.add("number", 8, "groups that the two have made, published last (SYNC POINT invitation)")
IN_DIGEST = INVITATION.add("digest", 8, "of the list of members")
IN_BLOCK = INVITATION.add("block", 8, "where the sender's communicator block is, or -1 if it has no room for one")
INVITATION.pad_to(HOT_LINE_BYTES // 2)
INVITATION_BYTES: Final = INVITATION.size_bytes

COLLECTIVE_STATE = Record("collective state", "Private to a rank: one for each communicator.")
CS_CONTROL = COLLECTIVE_STATE.add("control", 8, "address of the own control area")
CS_CONTROLS = COLLECTIVE_STATE.add("controls", 8, "address of [ranks] int64: the control areas of all ranks")
CS_SEGMENTS = COLLECTIVE_STATE.add("segments", 8, "address of [ranks] int64: the segments of all ranks")
CS_BLOCKS = COLLECTIVE_STATE.add("blocks", 8, "address of [ranks] int64: the blocks of all ranks")
CS_ROWS = COLLECTIVE_STATE.add("rows", 8, "address of [ranks] int64: room for addresses of operands")
CS_TARGET = COLLECTIVE_STATE.add("target", 8, "address to which the operands in `rows` are reduced")
CS_RANK = COLLECTIVE_STATE.add("rank", 8, "own rank")
CS_RANKS = COLLECTIVE_STATE.add("ranks", 8, "number of ranks")
CS_COUNTS = COLLECTIVE_STATE.add("counts", 8, "1 if arrivals are counted, 0 if each rank writes to each")
CS_SEGMENT_BYTES = COLLECTIVE_STATE.add("segment_bytes", 8, "size of the own segment")
CS_STAGE = COLLECTIVE_STATE.add("stage", 8, "offset of the staging area in the own segment")
CS_STEP = COLLECTIVE_STATE.add("step", 8, "steps published so far")
CS_PHASE = COLLECTIVE_STATE.add("phase", 8, "idle, about to publish, or awaiting the others")
CS_PLAN = COLLECTIVE_STATE.add("plan", 8, "address of the plan of the call under way")
CS_INDEX = COLLECTIVE_STATE.add("index", 8, "step within the call")
CS_STEPS = COLLECTIVE_STATE.add("steps", 8, "steps of the call")
CS_CURSOR = COLLECTIVE_STATE.add("cursor", 8, "first rank whose record was not seen yet")
CS_CHUNK = COLLECTIVE_STATE.add("chunk_bytes", 8, "bytes of a part that go in one step of the call")
CS_LARGEST = COLLECTIVE_STATE.add("largest", 8, "alltoallv: size of the largest part that this rank sends")
CS_EXPOSED = COLLECTIVE_STATE.add("exposed", 8, "EXPOSED and PRIVATE, if the others read the own input where it lies")
CS_CLOSES = COLLECTIVE_STATE.add("closes", 8, "1 if the last step moves nothing: it says that the inputs were read")
CS_TABLE = COLLECTIVE_STATE.add("table", 8, "alltoallv: address of int64 [columns][ranks], see `TABLE_COLUMNS`")
CS_CAME = COLLECTIVE_STATE.add("came", 8, "alltoallv: rows that came from all ranks together")
CS_TAKES = COLLECTIVE_STATE.add("takes", 8, "alltoallv: 1 if what comes is what was expected, and has room")
CS_PROCESSES = COLLECTIVE_STATE.add(
    "processes", 8, "address of [ranks] int64: processes whose private memory must be asked for; 0: it is loaded"
)
CS_VECTORS = COLLECTIVE_STATE.add("vectors", 32, "room for two struct iovec")
CS_METER = COLLECTIVE_STATE.add("meter", 8, "address of [kinds][ranks][2] int64: units and bytes moved; 0 for none")

PLAN = Record("collective plan", "Private to a rank: a call with its arguments but for the addresses of data.")
PL_SIGNATURE = PLAN.add("signature", 8, "for the records")
PL_BYTES = PLAN.add("bytes", 8, "for the records: size of a part; -1: as in `table`")
PL_SEND_STRIDE = PLAN.add("send_stride", 8, "between the parts for two ranks in the input; 0: the same part for all")
PL_RECV_STRIDE = PLAN.add("recv_stride", 8, "between the parts from two ranks in the output")
PL_SENDER = PLAN.add("sender", 8, "the rank that gives; -1: all do")
PL_RECEIVER = PLAN.add("receiver", 8, "the rank that takes; -1: all do")
PL_FOLD = PLAN.add("fold", 8, "what to do with the parts of all ranks: -1 keep them, else dtype code * 4 + operator")
PL_ITEM_BYTES = PLAN.add("item_bytes", 8, "bytes of an element, for operators")
PL_TWO_STEP = PLAN.add("two_step", 8, "1: each rank works on a slice for all, and passes it on")
PL_CHUNK = PLAN.add("chunk_bytes", 8, "bytes of a part (two steps: of all) that go in one step")
PL_STEPS = PLAN.add("steps", 8, "number of steps; not in alltoallv")
PL_INLINE = PLAN.add("inline", 8, "1: parts travel in the records")
PL_EXPOSE = PLAN.add("expose_bytes", 8, "from so many bytes on an input in the own segment is not staged")
PL_EXPOSE_PRIVATE = PLAN.add("expose_private_bytes", 8, "the same of an input in private memory")
PL_HALF = PLAN.add("half", 8, "distance of the two halves of the staging area")
PL_RESULTS = PLAN.add("results", 8, "two steps: where results start in a half; alltoallv: where sizes do")
PL_X_BYTES = PLAN.add("x_bytes", 8, "bytes of the input; -1: there is none")
PL_OUT_BYTES = PLAN.add("out_bytes", 8, "bytes of the output; -1: there is none, or it is the input")
PL_IN_PLACE = PLAN.add("in_place", 8, "where in the output the input may lie; -1: nowhere")

#: Table of alltoallv: rows for each rank, and expected from each (-1: any number), by the caller; then bytes for each
#: and where they start, bytes from each and where they go, and rows that came from each.
TABLE_COLUMNS: Final = 7
TB_ROWS, TB_EXPECTED, TB_SENT, TB_SENT_AT, TB_RECEIVED, TB_RECEIVED_AT, TB_CAME = range(TABLE_COLUMNS)

#: What a meter counts, by kind: records and payloads written to a rank, waits for it, arrivals at it, releases of it;
#: bytes staged, copied from the own input, pulled from a rank, taken from records that it wrote here, reduced; results
#: staged, and pulled from a rank.
METER_KINDS: Final = (
    "record", "payload", "await", "arrival", "release", "stage", "own", "pull", "unpack", "fold", "result", "gather"
)  # fmt: skip
METER_RECORD, METER_PAYLOAD, METER_AWAIT, METER_ARRIVAL, METER_RELEASE, METER_STAGE = range(6)
METER_OWN, METER_PULL, METER_UNPACK, METER_FOLD, METER_RESULT, METER_GATHER = range(6, 12)

#: Operators, by code.
OPERATORS: Final = ("sum", "prod", "max", "min")


def aligned_part(n_bytes: int) -> int:
    """Distance of parts in the staging area: parts start at cache lines."""
    return align_up(n_bytes, 64)
