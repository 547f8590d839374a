"""Layouts of send/receive: metadata fields, ring slots, and the private state of channels and operations."""

from __future__ import annotations

from .record import Record

#: AIV cores of a die (XDS section 3.1): the largest number of lanes of one operation.
MAX_LANES = 48
FIELD_BYTES = 32

DATA_FIELD = Record(
    "data field",
    "One for each peer and lane, in the receiver's metadata area, written by the sender (XDS section 3.1).",
)
DATA_EVENT_ID = DATA_FIELD.add("event_id", 8, "the caller's number for the operation")
DATA_CHUNK_ID = DATA_FIELD.add("chunk_id", 8, "number of the chunk within its message")
DATA_TAIL = DATA_FIELD.add("tail", 8, "ring position after this chunk, published last (SYNC POINT ring-data)")
DATA_MESSAGE_BYTES = DATA_FIELD.add("message_bytes", 8, "size of the whole message")

ACK_FIELD = Record(
    "acknowledgement field",
    "One for each peer and lane, in the sender's metadata area, written by the receiver.",
)
ACK_EVENT_ID = ACK_FIELD.add("event_id", 8, "the event ID of the receive")
ACK_CHUNK_ID = ACK_FIELD.add("chunk_id", 8, "number of the chunk within its message")
ACK_HEAD = ACK_FIELD.add("head", 8, "ring position up to which slots are free again (SYNC POINT ring-ack)")
ACK_RESERVED = ACK_FIELD.add("reserved", 8, "0")

REFUSAL = Record(
    "refusal",
    "One for each peer and ring slot, in the sender's metadata area, written by the receiver of a message that it did "
    "not expect. It belongs to the slot of the message's first chunk.",
)
RF_EVENT_ID = REFUSAL.add("event_id", 8, "the event ID that the receiver expected")
RF_BYTES = REFUSAL.add("bytes", 8, "the size that it expected")
RF_LANES = REFUSAL.add("lanes", 8, "the lanes that it expected")
RF_STAMP = REFUSAL.add("stamp", 8, "1 + ring position of the refused message, published last (SYNC POINT ring-refusal)")
REFUSAL_BYTES = REFUSAL.size_bytes

ANSWER = Record(
    "answer",
    "One for each peer and ring slot, in the sender's metadata area, written by the receiver of a zero-copy message: "
    "where the message goes, so that the sender may write a part of it there. It may come before the message.",
)
AN_FORM = ANSWER.add("form", 8, "what `place` means: one of the FORM_ codes")
AN_PLACE = ANSWER.add("place", 8, "where the receiver's buffer is")
AN_STAMP = ANSWER.add("stamp", 8, "1 + ring position of the message, published last (SYNC POINT ring-answer)")
AN_EVENT_ID = ANSWER.add("event_id", 8, "the event ID that the receiver expects")
AN_BYTES = ANSWER.add("bytes", 8, "the size that it expects")
AN_LANES = ANSWER.add("lanes", 8, "the lanes that it expects")
ANSWER.pad_to(64)
ANSWER_BYTES = ANSWER.size_bytes

#: Where the bytes of a message are: in the ring; or left in the buffers of both sides (zero-copy), of which each may
#: be in the app data area of its rank (`place` is an offset in its segment), or in private memory (`place` is an
#: address in its process).
FORM_RING = 0
FORM_SEGMENT = 1
FORM_PRIVATE = 2

SLOT = Record(
    "ring slot",
    "The ring of a pair lies in the receiver's managed data area. Slots describe themselves: many messages fit.",
)
SLOT_EVENT_ID = SLOT.add("event_id", 8, "the caller's number for the operation")
SLOT_FIRST = SLOT.add("first", 8, "ring position of the first chunk of the message")
SLOT_MESSAGE_BYTES = SLOT.add("message_bytes", 8, "size of the whole message")
SLOT_LANES = SLOT.add("lanes", 8, "lanes over which the message is dealt")
SLOT_CHUNK_BYTES = SLOT.add("chunk_bytes", 8, "bytes of a full chunk of this message")
SLOT_FORM = SLOT.add("form", 8, "where the message is: one of the FORM_ codes")
SLOT_PLACE = SLOT.add("place", 8, "zero-copy: where the sender's buffer is")
SLOT_CLAIMS = SLOT.add(
    "claims",
    8,
    "zero-copy: pieces taken by the receiver, plus CLAIM_BACK for each taken by the sender, plus CLAIM_CLOSED",
)
SLOT_PAYLOAD = SLOT.add("payload", 0, "slot_bytes of payload; or, zero-copy, a transfer record", align=64)
SLOT_HEADER_BYTES = SLOT_PAYLOAD

TRANSFER = Record(
    "transfer record",
    "In the slot of a zero-copy message, instead of payload.",
)
TR_PULLED = TRANSFER.add("pulled", 8, "pieces that the receiver has copied")

PUSHES = Record("pushes", "One for each peer and ring slot, in the receiver's metadata area, written by the sender.")
PU_COUNT = PUSHES.add("count", 8, "pieces pushed so far, of all messages with this slot (SYNC POINT ring-pushed)")
PUSHES_BYTES = PUSHES.size_bytes
#: A count that says that the sender could not write to the receiver's buffer.
PUSH_FAILED = 1 << 62

CLAIM_FRONT = 1
CLAIM_BACK = 1 << 30
#: One side has given the message up: nothing more may be taken.
CLAIM_CLOSED = 1 << 60
CLAIM_MASK = CLAIM_BACK - 1

#: Pieces of different messages that one call of the operating system's kernel copies, and about how many bytes.
BATCH = 8
BATCH_BYTES = 256 << 10

CHANNEL = Record(
    "channel state",
    "Private to a rank: one for each peer it sends to, one for each it receives from, and one for its own copies. "
    "Not shared.",
)
CH_KIND = CHANNEL.add("kind", 8, "which operations it carries: one of the KIND_ codes")
CH_OWN_CONTROL = CHANNEL.add("own_control", 8, "address of the own control area")
CH_PEER_CONTROL = CHANNEL.add("peer_control", 8, "address of the peer's control area")
CH_RING = CHANNEL.add("ring", 8, "address of the ring")
CH_DATA_FIELDS = CHANNEL.add("data_fields", 8, "address of the data fields, at the receiver")
CH_ACK_FIELDS = CHANNEL.add("ack_fields", 8, "address of the acknowledgement fields, at the sender")
CH_SLOTS = CHANNEL.add("slots", 8, "slots in the ring")
CH_SLOT_BYTES = CHANNEL.add("slot_bytes", 8, "payload bytes of a slot")
CH_SLOT_STRIDE = CHANNEL.add("slot_stride_bytes", 8, "distance between slots")
CH_NEXT = CHANNEL.add("next", 8, "ring position of the next chunk to write or to read")
CH_REFUSAL_TABLE = CHANNEL.add("refusal_table", 8, "address of the refusals, at the sender")
CH_ANSWER_TABLE = CHANNEL.add("answer_table", 8, "address of the answers, at the sender")
CH_PUSHES = CHANNEL.add("pushes", 8, "address of the counts of pieces pushed, at the receiver")
CH_PUSHED = CHANNEL.add(
    "pushed", 8, "address of [slots] int64: pieces pushed of messages with each slot; at the receiver, if acknowledged"
)
CH_STALE_FIRST = CHANNEL.add("stale_first", 8, "start of the message that is being skipped (receiver)")
CH_STALE_LANES = CHANNEL.add("stale_lanes", 8, "its lanes (receiver)")
CH_SLOT_LANES = CHANNEL.add("slot_lanes", 8, "address of [slots] int64: the lane that last used each slot (sender)")
CH_STARTS = CHANNEL.add(
    "starts", 8, "address of [slots] int64: 1 while a message that started there is under way (sender)"
)
CH_OWN_SEGMENT = CHANNEL.add("own_segment", 8, "address of the own segment")
CH_SEGMENT_BYTES = CHANNEL.add("segment_bytes", 8, "its size")
CH_PEER_SEGMENT = CHANNEL.add("peer_segment", 8, "address of the peer's segment")
CH_REACH = CHANNEL.add("reach", 8, "how the peer's private memory is reached: one of the REACH_ codes")
CH_PEER_PID = CHANNEL.add("peer_pid", 8, "process of the peer, for REACH_KERNEL")
CH_VECTORS = CHANNEL.add("vectors", 4 * 8, "two `struct iovec` for the kernel: here and there")
CH_OWN_VECTORS = CHANNEL.add("own_vectors", BATCH * 16, "the same for pieces that are copied together: here")
CH_PEER_VECTORS = CHANNEL.add("peer_vectors", BATCH * 16, "the same: there")
CH_BATCH = CHANNEL.add("batch", BATCH * 8, "addresses of the operations whose pieces they are")
CH_BROKEN = CHANNEL.add("broken", 8, "1 once a receive was broken off in the middle: those behind it go no further")
CH_HEAD = CHANNEL.add("head", 8, "address of the first operation that has not ended, 0 if there is none")
CH_TAIL = CHANNEL.add("tail", 8, "address of the last one")
CH_LOCK = CHANNEL.add("lock", 8, "1 while a thread drives the channel, if there is a DMA engine")
CH_ONLY = CHANNEL.add("only", 8, "1 + the ENGINE_ code of all its operations, 0 if either engine may have some")
CH_SPARE = CHANNEL.add("spare", 8, "address of the operation record of the next blocking call")
CH_TEMPLATE = CHANNEL.add("template", 8, "address of a Python object: what requests of this channel are like")

#: What a channel carries.
KIND_SEND = 0
KIND_RECEIVE = 1
KIND_COPY = 2
KIND_PAGED_SEND = 3
KIND_PAGED_RECEIVE = 4

#: How a peer's private memory is reached: not at all, by load and store (threads of one process), or by the operating
#: system's kernel (process_vm_readv and process_vm_writev). The last one is told apart for collectives only: the kernel
#: is slow at it on this machine.
REACH_NONE = 0
REACH_DIRECT = 1
REACH_KERNEL = 2
REACH_SLOWLY = 3

OPERATION = Record("operation", "Private to a rank: one send, receive or list of copies under way.")
OP_STATE = OPERATION.add("state", 8, "one of the STATE_ codes, published last (SYNC POINT operation-ended)")
OP_RESULT = OPERATION.add("result", 8, "the same, before the operation has left its channel")
OP_BUFFER = OPERATION.add("buffer", 8, "address of the user's buffer; of copies, of their list")
OP_BYTES = OPERATION.add("bytes", 8, "its size; of copies, their sum")
OP_EVENT_ID = OPERATION.add("event_id", 8, "the caller's number")
OP_LANES = OPERATION.add("lanes", 8, "lanes, 1 to MAX_LANES")
OP_ENGINE = OPERATION.add("engine", 8, "who drives it: one of the ENGINE_ codes")
OP_FORM = OPERATION.add("form", 8, "where the message is: one of the FORM_ codes; a receive learns it from the slot")
OP_PLACE = OPERATION.add("place", 8, "zero-copy: where the sender's buffer is")
OP_FIRST = OPERATION.add("first", 8, "ring position of its first chunk")
OP_CHUNKS = OPERATION.add("chunks", 8, "ring positions that it takes; 0 before it has started; of copies, their number")
OP_CHUNK_BYTES = OPERATION.add("chunk_bytes", 8, "bytes of a full chunk, or of a full piece of a zero-copy message")
OP_DONE = OPERATION.add("done", 8, "chunks written or read; copies that are complete; layers of a KV-cache transfer")
OP_PIECES = OPERATION.add("pieces", 8, "zero-copy: pieces of the message")
OP_MOVED = OPERATION.add("moved", 8, "zero-copy: pieces copied by this rank; of a copy under way, bytes")
OP_TAKES = OPERATION.add("takes", 8, "zero-copy: one of the TAKES_ codes")
OP_TARGET_FORM = OPERATION.add("target_form", 8, "zero-copy send: where the receiver's buffer is, once it has said so")
OP_TARGET_PLACE = OPERATION.add("target_place", 8, "the same")
OP_PUSHED = OPERATION.add("pushed", 8, "zero-copy receive, acknowledged: what the sender's count has to come to")
OP_SIGNAL = OPERATION.add("signal", 8, "copies: address of the word to add to behind them, 0 if there is none")
OP_SIGNAL_VALUE = OPERATION.add("signal_value", 8, "what to add")
OP_SIGNAL_CONTROL = OPERATION.add("signal_control", 8, "control area of the rank to wake")
OP_PEER_EVENT_ID = OPERATION.add("peer_event_id", 8, "of a refusal: the event ID on the other side")
OP_PEER_BYTES = OPERATION.add("peer_bytes", 8, "of a refusal: the size on the other side")
OP_PEER_LANES = OPERATION.add("peer_lanes", 8, "of a refusal: the lanes on the other side")
OP_CHANNEL = OPERATION.add("channel", 8, "address of its channel")
OP_LINK = OPERATION.add(
    "link", 8, "address of the next operation of its channel, of those that have ended, or of those that are free"
)
OP_OBJECT = OPERATION.add(
    "object", 8, "address of the Python object that stands for this record, and knows its request"
)
OP_DIRECT = OPERATION.add("direct", 8, "1 if compiled code may take note of its end, should it be a good one")
OP_NUMBER = OPERATION.add("number", 8, "how many operations of the rank were posted before it")

#: More than `done` can be.
DONE_NEVER = 1 << 62
#: Of an operation. FAILED: the other side's memory could not be read or written.
STATE_UNDER_WAY = 0
STATE_DONE = 1
STATE_REFUSED = 2
STATE_WITHDRAWN = 3
STATE_FAILED = 4

#: Does this side of a zero-copy message take pieces? It does not yet (a sender waits for the answer), it does, it has
#: found that none are left or may not take any; or it has broken off.
TAKES_LATER = 0
TAKES = 1
TAKES_NO_MORE = 2
TAKES_FAILED = 3

#: Who drives an operation: the rank itself whenever it is in a call, or its DMA engine.
ENGINE_MTE = 0
ENGINE_DMA = 1

COPY = Record("copy descriptor", "One of a list of copies; private to a rank.")
CP_DESTINATION = COPY.add("destination", 8, "address")
CP_SOURCE = COPY.add("source", 8, "address")
CP_BYTES = COPY.add("bytes", 8, "how many")

DRIVER = Record("driver", "Private to a rank: all channels of all its communicators, for the kernels that drive them.")
DR_CONTROL = DRIVER.add("control", 8, "address of the own control area")
DR_CHANNELS = DRIVER.add("channels", 8, "address of the addresses of all channels")
DR_COUNT = DRIVER.add("count", 8, "how many there are")
DR_ENDED = DRIVER.add("ended", 8, "address of the operation that ended last and was not collected yet, 0 if none")
DR_REQUESTS = DRIVER.add(
    "requests", 8, "requests that are under way: while there are any, calls that wait drive them, and go the long way"
)
DR_FREE = DRIVER.add("free", 8, "address of an operation that nobody uses, 0 if there is none")
DR_POSTED = DRIVER.add("posted", 8, "operations posted so far")
DR_HAS_ENGINE = DRIVER.add("has_engine", 8, "1 once there is a DMA engine, and channels are locked")
DR_QUEUED = DRIVER.add("queued", 8, "operations of the DMA engine that have not ended")
DR_BELL = DRIVER.add("bell", 8, "the DMA engine's own doorbell, raised for each new descriptor")
DR_IDLE = DRIVER.add("idle", 8, "1 while it sleeps on it")
DR_STOP = DRIVER.add("stop", 8, "1 when it is to end")

#: A message is never dealt in chunks smaller than this: UB writes 512 bytes whole or not at all (UBEP).
MIN_CHUNK_BYTES = 512
#: A zero-copy message is dealt in pieces of at most this size.
MAX_PIECE_BYTES = 256 << 10
#: And of at least this one, if there are several.
MIN_PIECE_BYTES = 16 << 10
#: From here on `mode="auto"` leaves messages in place, where both sides can reach each other's memory. Below, two
#: copies through the ring take less time than two calls of the kernel.
ZERO_COPY_BYTES = 32 << 10
