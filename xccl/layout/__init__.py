"""What bytes mean: element types, and the layout of everything in global memory. No I/O and no compiled code."""

from __future__ import annotations

from .a2e import DIE, PEER
from .calls import CALLS, SYMMETRIC
from .collectives import COLLECTIVE_RECORD, COLLECTIVE_STATE, COMMUNICATOR_BLOCK, INVITATION, PLAN
from .kv import ANNOUNCEMENT, ARRIVAL, PAGED
from .moe import ENTRY, EXPERT_FIELD, ROUTING, STATE
from .moe_direct import DIRECT, DIRECT_FIELD, EXPERT_CALLS
from .moe_push import PACKET, PACKET_ENTRY, PUSH, PUSH_FIELD, PUSH_STATUS, RETURN_PACKET
from .record import Field, Record
from .ring import ACK_FIELD, ANSWER, CHANNEL, COPY, DATA_FIELD, DRIVER, OPERATION, REFUSAL, SLOT, TRANSFER
from .segment import CONTROL, HEADER
from .status import STATUS

#: Every record, in the order of the documentation: shared ones first, then those that are private to a rank.
ALL_RECORDS: tuple[Record, ...] = (
    HEADER,
    CONTROL,
    STATUS,
    DATA_FIELD,
    ACK_FIELD,
    REFUSAL,
    ANSWER,
    SLOT,
    TRANSFER,
    EXPERT_FIELD,
    COMMUNICATOR_BLOCK,
    COLLECTIVE_RECORD,
    INVITATION,
    ENTRY,
    PUSH_FIELD,
    PUSH_STATUS,
    PACKET,
    PACKET_ENTRY,
    RETURN_PACKET,
    ANNOUNCEMENT,
    ARRIVAL,
    DIRECT_FIELD,
    CHANNEL,
    OPERATION,
    COPY,
    DRIVER,
    CALLS,
    SYMMETRIC,
    STATE,
    ROUTING,
    PUSH,
    PAGED,
    DIRECT,
    EXPERT_CALLS,
    PEER,
    DIE,
    COLLECTIVE_STATE,
    PLAN,
)

__all__ = ["ALL_RECORDS", "Field", "Record"]
