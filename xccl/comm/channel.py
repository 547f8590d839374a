"""Channels of a rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..layout import ring as layout
from ..layout.ring import (
    KIND_COPY,
    KIND_PAGED_RECEIVE,
    KIND_PAGED_SEND,
    KIND_RECEIVE,
    KIND_SEND,
)
from .core import Core
from .records import OperationRecord

if TYPE_CHECKING:
    from .driver import Driver
    from .request import Request

_NAMES = {
    KIND_SEND: "send to rank {}",
    KIND_RECEIVE: "recv from rank {}",
    KIND_COPY: "copies",
    KIND_PAGED_SEND: "KV sends",
    KIND_PAGED_RECEIVE: "KV receives",
}


class Channel:
    """One direction of a pair, with its ring, which is committed when the pair first talks in that direction.

    Attributes:
        peer: the other rank.
        sending: this rank sends.
        kind: what it carries, one of the KIND_ codes.
        broken: why the channel can't be used any more; None if it can.
        spare: the record for the next blocking call.
        template: what all requests in it are like, for compiled code that makes them; None if none does.
    """

    def __init__(self, core: Core, driver: Driver, peer: int, *, kind: int, only: int | None = None) -> None:
        self.peer = peer
        self.sending = kind not in (KIND_RECEIVE, KIND_PAGED_RECEIVE)
        self.name = _NAMES[kind].format(peer)
        self.kind = kind
        self.broken: str | None = None
        self._core = core
        self._driver = driver
        self._state = driver.take_state()
        self._slots = np.zeros((3, core.fabric.geometry.ring_slots), np.int64)
        self.address: int = self._state.ctypes.data
        self._set({layout.CH_KIND: kind, layout.CH_OWN_CONTROL: core.control})
        if only is not None:
            self._set({layout.CH_ONLY: only + 1})
        if kind in (KIND_SEND, KIND_RECEIVE):
            self._set_up_ring(kind)
        self.renew_spare()
        self.template: Request | None = None

    def _set(self, words: dict[int, int]) -> None:
        for offset, value in words.items():
            self._state[offset // 8] = value

    def _set_up_ring(self, kind: int) -> None:
        fabric, rank, peer = self._core.fabric, self._core.rank, self.peer
        geometry, segments = fabric.geometry, fabric.segments
        sender, receiver = (rank, peer) if kind == KIND_SEND else (peer, rank)
        fields = geometry.data_fields_offset(sender)
        acks = geometry.ack_fields_offset(receiver)
        ring_offset = geometry.ring_offset(sender)
        # Either side may come first, and touches both; committing twice costs nothing.
        fabric.commit(receiver, fields, geometry.ack_fields_offset(0) - geometry.data_fields_offset(0))
        fabric.commit(sender, acks, geometry.data_fields_offset(1) - geometry.ack_fields_offset(0))
        fabric.commit(receiver, ring_offset, geometry.ring_bytes)
        reach, pid = fabric.private_reach(peer)
        self._set(
            {
                layout.CH_PEER_CONTROL: int(fabric.controls[peer]),
                layout.CH_RING: int(segments[receiver]) + ring_offset,
                layout.CH_DATA_FIELDS: int(segments[receiver]) + fields,
                layout.CH_PUSHES: int(segments[receiver]) + geometry.pushes_offset(sender),
                layout.CH_ACK_FIELDS: int(segments[sender]) + acks,
                layout.CH_SLOTS: geometry.ring_slots,
                layout.CH_SLOT_BYTES: geometry.slot_bytes,
                layout.CH_SLOT_STRIDE: geometry.slot_stride_bytes,
                layout.CH_SLOT_LANES: self._slots[0].ctypes.data,
                layout.CH_STARTS: self._slots[1].ctypes.data,
                layout.CH_PUSHED: self._slots[2].ctypes.data,
                layout.CH_REFUSAL_TABLE: int(segments[sender]) + geometry.refusals_offset(receiver),
                layout.CH_ANSWER_TABLE: int(segments[sender]) + geometry.answers_offset(receiver),
                layout.CH_OWN_SEGMENT: int(segments[rank]),
                layout.CH_SEGMENT_BYTES: fabric.segment_bytes,
                layout.CH_PEER_SEGMENT: int(segments[peer]),
                layout.CH_REACH: reach,
                layout.CH_PEER_PID: pid,
            }
        )

    def reaches(self, address: int, n_bytes: int) -> bool:
        """Can the peer reach a buffer of this rank without the ring?"""
        if self._state[layout.CH_REACH // 8] != layout.REACH_NONE:
            return True
        offset = address - int(self._state[layout.CH_OWN_SEGMENT // 8])
        return offset >= 0 and offset + n_bytes <= int(self._state[layout.CH_SEGMENT_BYTES // 8])

    def renew_spare(self) -> None:
        """The spare record was used for a request: take another one."""
        self.spare: OperationRecord = self._driver.pool.take()
        self._set({layout.CH_SPARE: self.spare.address})

    def make_like(self, template: Request) -> None:
        """Requests that compiled code makes are to be like this one."""
        self.template = template
        self._set({layout.CH_TEMPLATE: id(template)})

    def retire(self) -> None:
        """Nobody uses the channel any more, and nothing is under way."""
        self._driver.give_back_state(self._state)
        self._driver.pool.give_back(self.spare)
