"""What an attention die does in A2E and E2A. The protocol and its proof are in `xccl.comm.a2e`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EventMismatch, UsageError
from ..kernels import a2e as kernels, fields as field_kernels, moe_routing
from ..layout import moe as moe_layout
from ..layout.moe import EXF_COUNT, EXF_EVENT, EXF_PULLED, STATE
from . import traced_a2e
from .buffers import BufferPool, address_of
from .core import Core
from .deployment import Deployment
from .dispatched import Routing
from .fields import FieldWaiter, Peers
from .managed import Part, Reservation
from .moe_input import bad_choice, check_choices, check_weights, check_x
from .steps import Steps

#: Where outputs land before they are summed: top_k times what remains of them, needed for a moment, and shared by all
#: dies that are threads of one process.
_LANDINGS = BufferPool()


@dataclass(frozen=True, slots=True, eq=False)
class A2EHandle:
    """What an A2E leaves with an attention die: E2A needs it to find the outputs of its experts again.

    Attributes:
        tokens: how many were sent.
        number: of the A2E at this die, from 1.
        routing: where each row went.
        owner: the Disaggregated object it belongs to.
    """

    tokens: int
    number: int
    routing: Routing
    owner: object


class AttentionDie:
    """One attention die: it writes its tokens for its peers to pull, and pulls outputs back.

    Its peers are all expert dies, or, with trampolines, the one that serves it.
    """

    def __init__(self, core: Core, shape: Deployment, reserved: Reservation, index: int) -> None:
        self._core = core
        self._shape = shape
        #: Number among the attention dies of all domains.
        self._index = index
        self.domain, place = divmod(index, shape.domain_size)
        self._served_by = place % shape.trampolines if shape.trampolines else None
        peers = range(len(shape.experts)) if self._served_by is None else [self._served_by]
        self._peers = Peers(
            core,
            [shape.experts[x] for x in peers],
            mine=[reserved.fields + shape.fields.by_attention(index) for _ in peers],
            theirs=[reserved.fields + shape.fields.by_expert(x) for x in peers],
        )
        self._prefix = "" if self._served_by is None else "forward-"
        self._waiter = FieldWaiter(core)
        self._pool = BufferPool()
        self._sent = 0
        self._returned = 0
        area, block = shape.area, reserved.block
        self._rows = Part(core, block + area.rows, shape.max_tokens * shape.slots * shape.row_bytes)
        self._outputs = block + (area.returns if self._served_by is None else area.handed)
        self._firsts = int(core.fabric.segments[core.rank]) + block + area.firsts
        words = moe_layout.scratch_words(experts=shape.num_experts, ranks=len(shape.experts), top_k=shape.slots)
        self._scratch = np.zeros(words, np.int64)
        # For the kernels of dispatch this die is the only one with a segment, and its experts lie on the expert dies.
        self._segment = core.fabric.segments[core.rank : core.rank + 1].copy()
        self._state = np.zeros(STATE.size_bytes // 8, np.int64)
        self._address: int = self._state.ctypes.data
        for offset, value in {
            moe_layout.EP_CONTROL: core.control,
            moe_layout.EP_SEGMENTS: self._segment.ctypes.data,
            moe_layout.EP_RANK: 0,
            moe_layout.EP_RANKS: len(shape.experts),
            moe_layout.EP_EXPERTS: shape.num_experts,
            moe_layout.EP_HIDDEN: shape.hidden,
            moe_layout.EP_TOP_K: shape.slots,
            moe_layout.EP_DTYPE: shape.code,
            moe_layout.EP_QUANT: int(shape.is_int8),
            moe_layout.EP_ROW_BYTES: shape.row_bytes,
            moe_layout.EP_RETURN_BYTES: shape.return_bytes,
            moe_layout.EP_PLACES: block + area.places,
            moe_layout.EP_SCALES: block + area.scales,
            moe_layout.EP_ROWS: block + area.rows,
            moe_layout.EP_SCRATCH: self._scratch.ctypes.data,
        }.items():
            self._state[offset // 8] = value

    def send(self, x: npt.NDArray[Any], topk_idx: npt.NDArray[Any], steps: Steps, owner: object) -> A2EHandle:
        """A2E; see `xccl.Disaggregated.a2e`."""
        shape = self._shape
        x = check_x(
            x, dtype=shape.dtype, hidden=shape.hidden, top_k=shape.top_k, max_tokens=shape.max_tokens,
            row_bytes=shape.row_bytes,
        )  # fmt: skip
        idx = check_choices(topk_idx, tokens=len(x), top_k=shape.top_k, num_experts=shape.routed)
        routing, rows = self._route(idx)
        self._rows.grow(rows * shape.row_bytes)
        epoch = self._sent + 1
        steps.begin(epoch)
        steps("await-pulled")
        self._waiter.wait(self._peers, EXF_PULLED, epoch - 1, "a2e, await-pulled (of the one before)")
        self._sent = routing.epoch = epoch
        steps("write")
        kernels.attention_write.call(self._address, routing.address, address_of(x), self._firsts)
        steps("announce")
        kernels.attention_announce.call(
            self._address, routing.address, self._peers.address, len(self._peers), self._index % len(self._peers)
        )
        steps.finish(partial(traced_a2e.sent, shape, routing, self._core.rank, self._peers))
        return A2EHandle(idx.shape[0], epoch, routing, owner)

    def _route(self, idx: npt.NDArray[np.int64]) -> tuple[Routing, int]:
        """Where each row goes, and how many there are."""
        shape = self._shape
        tokens = idx.shape[0]
        if idx.size and idx.max() >= shape.routed:  # would be a replica of the shared expert, or none
            raise bad_choice(idx, int(np.argmax(idx >= shape.routed)), shape.routed)
        chosen = idx
        if shape.shared:
            chosen = np.empty((tokens, shape.slots), np.int64)
            chosen[:, :-1] = idx
            chosen[:, -1] = shared_replicas(self._index, tokens, shape.routed, shape.shared)
        routing = Routing(
            tokens, shape.slots, shape.num_experts, shape.local_experts, 0, destinations=len(shape.experts)
        )
        rows = int(moe_routing.route.call(self._address, routing.address, chosen.ctypes.data))
        if rows < 0:
            raise bad_choice(chosen, -1 - rows, shape.routed)
        return routing, rows

    def receive(
        self, handle: A2EHandle, topk_weights: npt.NDArray[Any], steps: Steps, owner: object
    ) -> npt.NDArray[Any]:
        """E2A; see `xccl.Disaggregated.e2a`."""
        shape, core = self._shape, self._core
        if getattr(handle, "owner", None) is not owner:
            raise UsageError(
                f"rank {core.rank} is an attention die: e2a(handle, topk_weights) needs what a2e(x, topk_idx) of the "
                f"same Disaggregated object returned, got {type(handle).__name__}",
                value=type(handle).__name__,
            )  # fmt: skip
        routing = handle.routing
        weights = check_weights(topk_weights, (handle.tokens, shape.top_k))
        if shape.shared:  # its output is added as it is
            weights = np.concatenate([weights, np.ones((handle.tokens, 1), np.float32)], axis=1)
        epoch = self._returned + 1
        steps.begin(epoch)
        steps(f"{self._prefix}await-fields")
        self._waiter.wait(self._peers, EXF_EVENT, epoch, f"e2a, {self._prefix}await-fields (of the expert dies)")
        self._returned = epoch
        self._check_same(routing)
        steps(f"{self._prefix}pull")
        rows = int(routing.part(moe_layout.RT_SENT_FIRST, shape.num_experts + 1)[-1])
        landing = _LANDINGS.take((rows, shape.hidden), shape.dtype)
        peers, count = self._peers.address, len(self._peers)
        kernels.attention_pull.call(
            self._address, routing.address, peers, count, self._index % count, self._outputs, address_of(landing)
        )
        y: npt.NDArray[Any] = self._pool.take((handle.tokens, shape.hidden), shape.dtype)
        kernels.attention_reduce.call(
            self._address, routing.address, address_of(landing), address_of(weights), address_of(y)
        )
        steps(f"{self._prefix}release")
        field_kernels.release.call(peers, count, self._index % count, epoch)
        steps.finish(partial(traced_a2e.summed, shape, routing, core.rank, self._peers))
        return y

    def _check_same(self, routing: Routing) -> None:
        different = kernels.attention_check.call(self._address, routing.address, self._peers.address, len(self._peers))
        if different == 0:
            return
        index = -1 - different
        theirs = self._peers.read(index, EXF_COUNT) >> moe_layout.COUNT_BITS
        peer = self._peers.ranks[index]
        raise EventMismatch(
            f"rank {self._core.rank} expects the outputs of its A2E {routing.epoch}, but rank {peer} returns those of "
            f"{'another one' if theirs == routing.epoch else f'A2E {theirs}'}",
            operation="e2a", event_id=routing.epoch, peer_event_id=theirs, rank=self._core.rank, peer=peer,
        )  # fmt: skip


def shared_replicas(index: int, tokens: int, routed: int, shared: int) -> npt.NDArray[np.int64]:
    """The replica of the shared expert for each token of attention die `index`: they take turns."""
    return routed + (index + np.arange(tokens, dtype=np.int64)) % shared
