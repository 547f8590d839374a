"""Layouts of send/receive: metadata fields, ring slots, and the private state of a channel and of one operation."""

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

SLOT = Record(
    "ring slot",
    "The ring of a pair lies in the receiver's managed data area. Slots describe themselves: many messages fit.",
)
SLOT_EVENT_ID = SLOT.add("event_id", 8, "the caller's number for the operation")
SLOT_FIRST = SLOT.add("first", 8, "ring position of the first chunk of the message")
SLOT_MESSAGE_BYTES = SLOT.add("message_bytes", 8, "size of the whole message")
SLOT_LANES = SLOT.add("lanes", 8, "lanes over which the message is dealt")
SLOT_CHUNK_BYTES = SLOT.add("chunk_bytes", 8, "bytes of a full chunk of this message")
SLOT_PAYLOAD = SLOT.add("payload", 0, "slot_bytes of payload", align=64)
SLOT_HEADER_BYTES = SLOT_PAYLOAD

CHANNEL = Record(
    "channel state",
    "Private to a rank: one for each peer it sends to, and one for each it receives from. Not shared.",
)
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
CH_PEER_EVENT_ID = CHANNEL.add("peer_event_id", 8, "of the last refusal: the event ID on the other side")
CH_PEER_BYTES = CHANNEL.add("peer_bytes", 8, "of the last refusal: the size on the other side")
CH_PEER_LANES = CHANNEL.add("peer_lanes", 8, "of the last refusal: the lanes on the other side")
CH_TURN = CHANNEL.add("turn", 8, "ticket of the operation that may use the ring now")
CH_TICKETS = CHANNEL.add("tickets", 8, "tickets given out")
CH_STALE_FIRST = CHANNEL.add("stale_first", 8, "start of the message that is being skipped (receiver)")
CH_STALE_LANES = CHANNEL.add("stale_lanes", 8, "its lanes (receiver)")
CH_SLOT_LANES = CHANNEL.add("slot_lanes", 8, "address of [slots] int64: the lane that last used each slot (sender)")
CH_STARTS = CHANNEL.add(
    "starts", 8, "address of [slots] int64: 1 while a message that started there is under way (sender)"
)

OPERATION = Record("operation", "Private to a rank: one send or receive under way.")
OP_BUFFER = OPERATION.add("buffer", 8, "address of the user's buffer")
OP_BYTES = OPERATION.add("bytes", 8, "its size")
OP_EVENT_ID = OPERATION.add("event_id", 8, "the caller's number")
OP_LANES = OPERATION.add("lanes", 8, "lanes, 1 to MAX_LANES")
OP_TICKET = OPERATION.add("ticket", 8, "its place in the channel's order")
OP_FIRST = OPERATION.add("first", 8, "ring position of its first chunk")
OP_CHUNKS = OPERATION.add("chunks", 8, "number of chunks; 0 before it has started")
OP_CHUNK_BYTES = OPERATION.add("chunk_bytes", 8, "bytes of a full chunk")
OP_DONE = OPERATION.add("done", 8, "chunks written or read")

#: A message is never dealt in chunks smaller than this: UB writes 512 bytes whole or not at all (UBEP).
MIN_CHUNK_BYTES = 512
