"""The direct protocol of dispatch and combine: each row is written once, where the caller finds it, and read there.

No paper has it as a whole. Writing straight to the final place once counts are known is what UBEP and DeepEP's normal
kernels do; reading outputs where they lie is XDS's combine (section 3.2) without the copy before it.

Rules
- A rank has slots in its managed area. A slot takes the rows of one dispatch, and is then the caller's result: it is
  not used again while anybody refers to it. One slot is never given away; if it is the only one left, what has come is
  copied out of it (docs/adr/0029).
- Dispatch e, stages:
    count: each rank counts what it sends to each expert, into its OWN managed area;
    announce: a field to every rank: where its slot is, for how many rows there is memory in it, and, last, e (SYNC
           POINT direct-counts);
    await-counts: those of all ranks;
    plan: from the counts of all, read where they lie, each rank computes what comes to every rank, and where its own
           rows go there: by expert, source, token, slot. If that is more than a slot has memory for, every rank backs
           it, which comes to the same whoever does it, and however often;
    write: each row, quantised once a token if asked, straight to its place, with its scale, source and entries;
    notify: each rank is told e (SYNC POINT direct-rows);
    await-rows: until all have told this rank.
- Combine c, stages:
    return: the experts' outputs are copied to the own managed area, in one piece; nothing, if they lie in the own
           segment already: in the dispatched slot, in the outputs that it lends, or in a symmetric array;
    announce: where they are, and, last, c (SYNC POINT direct-returns);
    await-ready: those of all ranks;
    reduce: the rows of each token are summed where they lie, in slot order, in float32;
    release: c to every rank (SYNC POINT direct-read);
    await-read: until all have read what lies here.
- A dispatch that repeats another one neither counts nor lays out: fields say where slots are, and the rows follow.

Theory of operation: nothing is overwritten while it is read. Dispatch and combine share nothing but slots.

- A slot of R. Peers write there between R's announcement of e and their notification, and R ends e when it has acquired
  those of all. So nobody writes there while the caller has it. Peers read there only in a combine whose outputs lie in
  it, and R ends that combine when it has acquired that all have read. So it is R's alone when R chooses it again.
- Counts, fields. R reads those of P for dispatch e before it releases direct-rows of e. P changes them in e + 1, after
  it has ended e, so after it has acquired direct-rows of R. The same holds of combine, with direct-read.
- Returned rows. R has read those of P for combine c before it releases direct-read of c; P ends c after that. So both
  the managed area and the caller's own array may be written when combine returns.
- Epochs only grow, and have one writer. A rank is at most one operation ahead, since it ends none without all others.

Any mix of operations in the same order at all ranks is safe, with a rank delayed at any stage
(tests/multirank/test_moe_delays.py does that). Rows are summed in an order fixed by the routing, so the result does not
depend on timing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ..kernels import copy, expert_calls, moe_direct as kernels, moe_direct_combine as combine_kernels, wait, words
from ..layout import moe_direct as layout
from ..layout.moe import RT_ARRIVING
from ..layout.moe_direct import DIRECT_FIELD_BYTES, DirectBlocks, direct_blocks
from . import traced_moe
from .buffers import address_of
from .callstate import bind_to
from .core import Waiting
from .dispatched import Dispatched, Outputs, Routing, routing_shape
from .managed import Part, Reservation
from .moe_input import bad_choice
from .moe_protocol import MoeProtocol
from .moe_shape import MoeShape
from .slots import OutputArrays, Slots, any_held
from .steps import Steps

if TYPE_CHECKING:
    from .moe import ExpertParallel

_FLOAT32: Final[np.dtype[np.float32]] = np.dtype(np.float32)
_DISPATCH = ("count", "announce", "await-counts", "plan", "write", "notify", "await-rows")
_COMBINE = ("return", "announce", "await-ready", "reduce", "release", "await-read")
#: For what each wait waits.
_WORDS = {
    "await-counts": layout.DF_COUNTED,
    "await-rows": layout.DF_WRITTEN,
    "await-ready": layout.DF_READY,
    "await-read": layout.DF_READ,
}


class Direct(MoeProtocol):
    """Each row is written once, to its final place, and summed where it lies.

    Args:
        comm: the communicator.
        shape: of the ExpertParallel object.
        arguments: of its construction, which must be the same at all ranks.

    Raises:
        UsageError: ranks differ in an argument.
        CapacityError: the managed area or the memory is exhausted.
    """

    name = "direct"
    is_quick = True

    def __init__(self, comm: Any, shape: MoeShape, arguments: dict[str, int]) -> None:
        super().__init__(comm.core, shape)
        blocks = blocks_of(shape)
        fields_bytes = shape.ranks * DIRECT_FIELD_BYTES
        self._reserved = Reservation(
            comm, "ExpertParallel", arguments, (fields_bytes, blocks.total_bytes), (fields_bytes, blocks.slots)
        )
        heap = self._reserved.block
        self._fields = self._own_segment + self._reserved.fields
        self._slots = Slots(self._core, shape, blocks, heap + blocks.slots)
        self._outputs = OutputArrays(self._core, shape, heap + blocks.outputs, blocks.outputs_bytes)
        # What the caller holds stays as it is when everything else is given back.
        self._core.lent[heap] = partial(any_held, self._slots.raws, self._outputs.raws)
        self._returns_offset = heap + blocks.returns
        self._returns = Part(self._core, self._returns_offset, blocks.outputs_bytes)
        self._direct = np.zeros(layout.DIRECT.size_bytes // 8, np.int64)
        self._direct_address = address_of(self._direct)
        for offset, value in {
            layout.DI_FIELDS: self._reserved.fields,
            layout.DI_COUNTS: heap,
            layout.DI_SCALES: blocks.scales,
            layout.DI_SOURCE: blocks.source,
            layout.DI_INDEX: blocks.index,
            layout.DI_WEIGHTS: blocks.weights,
            layout.DI_DEDUP: int(shape.is_dedup),
        }.items():
            self._direct[offset // 8] = value
        self._prepare_calls()

    def _prepare_calls(self) -> None:
        """The record that direct calls look at; what it has addresses of lives as long as this object."""
        core, shape, slots = self._core, self._shape, self._slots
        routing = routing_shape(
            0, shape.top_k, shape.num_experts, shape.local_experts, shape.ranks, shape.ranks, shape.is_dedup
        )
        self._routing_words = routing.words
        self._head = np.stack([routing.head, routing.is_address], axis=1)
        self._calls = np.zeros(layout.EXPERT_CALLS.size_bytes // 8, np.int64)
        for offset, value in {
            layout.XC_CALLS: core.calls.address,
            layout.XC_STATE: self.state_address,
            layout.XC_DIRECT: self._direct_address,
            layout.XC_DISPATCH: kernels.dispatch.address,
            layout.XC_COMBINE: combine_kernels.combine.address,
            layout.XC_DTYPE: id(shape.dtype),
            layout.XC_FLOAT32: id(_FLOAT32),
            layout.XC_MAX_TOKENS: shape.max_tokens,
            layout.XC_SEGMENT_BYTES: self._segment_bytes,
            layout.XC_HEAD: address_of(self._head),
            layout.XC_OFFSETS: address_of(slots.offsets),
            layout.XC_CAPACITIES: address_of(slots.capacities),
            layout.XC_RETURNS: self._returns_offset,
        }.items():
            self._calls[offset // 8] = value
        record = address_of(self._calls)
        self._call_dispatch = bind_to(record, expert_calls.dispatch, expert_calls.NOT_MADE)
        self._call_combine = bind_to(record, expert_calls.combine, expert_calls.NOT_MADE)

    # -- dispatch ---------------------------------------------------------------------------------------------------

    def dispatch(self, steps: Steps, x: npt.NDArray[Any], routing: Routing, outputs: Outputs) -> Dispatched:
        """See `MoeProtocol.dispatch`."""
        direct, slots = self._direct, self._slots
        slot, may_give = slots.choose()
        direct[layout.DI_SLOT // 8] = slots.offsets[slot]
        direct[layout.DI_CAPACITY // 8] = slots.capacities[slot]
        epoch = self._dispatches + 1
        steps.begin(epoch)
        routing.epoch = epoch
        call = self._dispatching(x, routing)
        status = self._through(steps, _DISPATCH, call, "dispatch", epoch, self._with_memory(routing))
        if status == kernels.BAD_CHOICE:
            steps.withdraw()
        self._require_dispatched(status, routing)
        self._dispatches = epoch
        result = self._result(slot, may_give, routing, outputs)
        steps.finish(traced_moe.direct_dispatched, self._shape, routing)
        return result

    def quick_dispatch(self, owner: ExpertParallel, x: Any, topk_idx: Any, gates: Any) -> Dispatched | None:
        """See `MoeProtocol.quick_dispatch`."""
        slot, may_give = self._slots.choose()
        if not may_give or type(x) is not np.ndarray:
            return None
        shape, epoch = self._shape, self._dispatches + 1
        tokens = x.size // shape.hidden
        record = np.empty(self._routing_words + tokens * shape.top_k, np.int64)
        self.is_under_way = True
        status = self._call_dispatch(x, topk_idx, gates, record, slot, epoch)
        if status == expert_calls.NOT_MADE:
            self.is_under_way = False
            return None
        routing = Routing.filled(record, tokens, shape.ranks)
        if status != wait.OK:
            routing.idx, routing.gates = topk_idx, gates
            step = partial(self._dispatching(x, routing), len(_DISPATCH))
            status = self._go_on(
                status, _DISPATCH, step, "dispatch", epoch, self._quick_deadline_ns(), self._with_memory(routing)
            )
            self.is_under_way = status != kernels.BAD_CHOICE
            self._require_dispatched(status, routing)
        self._dispatches = epoch
        self.is_under_way = False
        return Dispatched.unread(routing, owner, (self._slots, slot, self._slots.raws[slot]))

    def _dispatching(self, x: npt.NDArray[Any], routing: Routing) -> Callable[[int, int], int]:
        """The kernel, to be given the number of stages to be done, and until when."""
        idx, gates = routing.idx, routing.gates
        return partial(
            kernels.dispatch.call, self.state_address, self._direct_address, routing.address, address_of(x),
            0 if idx is None else address_of(idx), 0 if gates is None else address_of(gates),
        )  # fmt: skip

    def _require_dispatched(self, status: int, routing: Routing) -> None:
        """Raise what the kernel has found wrong; forget what has been sent."""
        if status == kernels.BAD_CHOICE:
            assert routing.idx is not None
            raise bad_choice(routing.idx, int(self._direct[layout.DI_RESULT // 8]), self._shape.num_experts)
        if status == wait.MISMATCH:
            peer = int(self._direct[layout.DI_RESULT // 8])
            raise self._bad_source(routing, peer, words.load(self._field(peer) + layout.DF_ROOT))
        routing.idx = routing.gates = None

    def _with_memory(self, routing: Routing) -> Callable[[], None]:
        """Back slots with memory, at all ranks to which more comes than theirs have."""

        def back() -> None:
            arriving = routing.part(RT_ARRIVING, self._shape.ranks)
            for peer, rows in enumerate(arriving.tolist()):
                field = self._field(peer)
                if rows > words.load(field + layout.DF_CAPACITY):
                    self._slots.back(peer, words.load(field + layout.DF_SLOT), rows)

        return back

    def _result(self, slot: int, may_give: bool, routing: Routing, outputs: Outputs) -> Dispatched:
        """The slot itself; or a copy, if the caller wants the rows elsewhere, or holds all other slots."""
        tokens, scales = self._slots.rows(slot, routing)
        counts = source = index = weights = None
        if routing.known is None:
            counts = self._slots.counts(routing)
            source, index, weights = self._slots.origins(slot, routing)
        if may_give and not outputs.are_given:
            return outputs.wrap(routing, tokens, scales, counts, source, index, weights)
        result = outputs.make(routing, counts)
        for there, here in (
            (result.tokens, tokens), (result.scales, scales), (result.source, source), (result.index, index),
            (result.weights, weights),
        ):  # fmt: skip
            if there is not None and here is not None:
                copy.copy.call(address_of(there), address_of(here), here.nbytes)
        return result

    # -- combine ----------------------------------------------------------------------------------------------------

    def combine(
        self,
        steps: Steps,
        expert_out: npt.NDArray[Any],
        routing: Routing,
        weights: npt.NDArray[np.float32] | None,
        shared_out: npt.NDArray[Any] | None,
        y: npt.NDArray[Any],
    ) -> None:
        """See `MoeProtocol.combine`."""
        copied, returns = self._place_of(expert_out, y)
        if copied:
            self._returns.grow(expert_out.nbytes)
            self._calls[layout.XC_RETURNS_BYTES // 8] = self._returns.committed_bytes
        epoch = self._combines + 1
        steps.begin(epoch)
        call = self._combining(routing, epoch, copied, returns, weights, shared_out, y)
        status = self._through(steps, _COMBINE, call, "combine", epoch)
        self._require_combined(status, routing)
        self._combines = epoch
        steps.finish(traced_moe.direct_combined, self._shape, routing, shared_out is not None, copied=copied != 0)

    def quick_combine(self, expert_out: Any, routing: Routing, weights: Any, y: npt.NDArray[Any]) -> bool:
        """See `MoeProtocol.quick_combine`."""
        epoch = self._combines + 1
        self.is_under_way = True
        status = self._call_combine(expert_out, routing.record, weights, y, epoch)
        if status == expert_calls.NOT_MADE:
            self.is_under_way = False
            return False
        if status != wait.OK:
            copied, returns = self._place_of(expert_out, y)
            step = partial(self._combining(routing, epoch, copied, returns, weights, None, y), len(_COMBINE))
            status = self._go_on(status, _COMBINE, step, "combine", epoch, self._quick_deadline_ns(), None)
            self._require_combined(status, routing)
        self._combines = epoch
        self.is_under_way = False
        return True

    def _combining(
        self, routing: Routing, epoch: int, copied: int, returns: int, weights: npt.NDArray[np.float32] | None,
        shared_out: npt.NDArray[Any] | None, y: npt.NDArray[Any],
    ) -> Callable[[int, int], int]:  # fmt: skip
        """The kernel, to be given the number of stages to be done, and until when."""
        return partial(
            combine_kernels.combine.call, self.state_address, self._direct_address, routing.address, epoch, copied,
            returns, 0 if weights is None else address_of(weights), 0 if shared_out is None else address_of(shared_out),
            address_of(y),
        )  # fmt: skip

    def _require_combined(self, status: int, routing: Routing) -> None:
        """Raise what the kernel has found wrong."""
        if status == wait.MISMATCH:
            peer = int(self._direct[layout.DI_RESULT // 8])
            raise self._other_dispatch(routing, peer, words.load(self._field(peer) + layout.DF_DISPATCH))

    def empty_outputs(self, rows: int) -> npt.NDArray[Any] | None:
        """See `MoeProtocol.empty_outputs`: where peers can read it; None if the caller holds all there are."""
        return self._outputs.take(rows)

    def _place_of(self, expert_out: npt.NDArray[Any], y: npt.NDArray[Any]) -> tuple[int, int]:
        """Where outputs are copied from, 0 if they are not, and the offset in the own segment where peers read them."""
        address = address_of(expert_out)
        if self._can_be_read_in_place(expert_out, y):
            return 0, address - self._own_segment
        return address, self._returns_offset

    # -- both -------------------------------------------------------------------------------------------------------

    def _through(
        self,
        steps: Steps,
        stages: tuple[str, ...],
        call: Callable[[int, int], int],
        operation: str,
        epoch: int,
        back: Callable[[], None] | None = None,
    ) -> int:
        """Go through all stages: with one call of the kernel, or with one for each if somebody listens to steps.

        Args:
            steps: told of each, if somebody listens.
            stages: their names.
            call: the kernel, given the number of stages to be done, and until when.
            operation: its name.
            epoch: of the operation.
            back: called if slots need memory.

        Returns:
            The kernel's status, when it is neither that of a wait nor BACK.
        """
        core = self._core
        deadline_ns = time.monotonic_ns() + int(core.op_timeout_s * 1e9)
        if not steps.is_watched:
            status = call(len(stages), core.until_ns(deadline_ns))
            return (
                status
                if status == wait.OK
                else self._go_on(status, stages, partial(call, len(stages)), operation, epoch, deadline_ns, back)
            )
        for stop, name in enumerate(stages, 1):
            steps(name)
            deadline_ns = time.monotonic_ns() + int(core.op_timeout_s * 1e9)
            status = call(stop, core.until_ns(deadline_ns))
            status = self._go_on(status, stages, partial(call, stop), operation, epoch, deadline_ns, back)
            if status != wait.OK:
                return status
        return wait.OK

    def _quick_deadline_ns(self) -> int:
        """Of the wait in which the direct call has left an operation."""
        return self._core.calls.began_ns() + int(self._core.op_timeout_s * 1e9)

    def _go_on(
        self,
        status: int,
        stages: tuple[str, ...],
        step: Callable[[int], int],
        operation: str,
        epoch: int,
        deadline_ns: int,
        back: Callable[[], None] | None,
    ) -> int:
        """Go on after a first call of the kernel that ended with `status`. Each wait has the whole deadline."""
        core = self._core
        timeout_s = core.op_timeout_s

        def describe() -> Waiting:
            stage = stages[int(self._direct[layout.DI_STAGE // 8])]
            peer = int(self._direct[layout.DI_CURSOR // 8])
            word = _WORDS[stage]
            seen = int(words.load(self._field(peer) + word))
            what = f"{operation}, {stage} (of all ranks)"
            return Waiting(what, epoch, peer, epoch, seen, missing=lambda: missing(peer, word))

        def missing(first: int, word: int) -> list[int]:
            return [r for r in range(first, core.size) if words.load(self._field(r) + word) < epoch]

        while True:
            status = core.finish(status, step, describe, timeout_s, deadline_ns)
            if status == kernels.BACK:
                assert back is not None
                back()
            elif status != kernels.MOVED:
                return status
            deadline_ns = time.monotonic_ns() + int(timeout_s * 1e9)
            status = step(core.until_ns(deadline_ns))

    def _field(self, peer: int) -> int:
        """Address of the field that a peer writes here."""
        return self._fields + peer * DIRECT_FIELD_BYTES

    def free(self) -> None:
        """See `MoeProtocol.free`. If results are held, the memory of all slots is kept."""
        self._reserved.free()


def blocks_of(shape: MoeShape) -> DirectBlocks:
    """The parts of the managed block of an object of this shape."""
    return direct_blocks(
        ranks=shape.ranks, experts=shape.num_experts, max_tokens=shape.max_tokens, top_k=shape.top_k,
        row_bytes=shape.row_bytes, return_bytes=shape.return_bytes, int8=shape.is_int8, dedup=shape.is_dedup,
    )  # fmt: skip
