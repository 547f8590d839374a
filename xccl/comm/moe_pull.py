"""The pull protocol of dispatch and combine (XDS section 3.2).

Rules
- Everything a rank writes for others lies in its OWN managed area; peers pull it. Into peers' segments go only 32-byte
  fields.
- Rows of a rank for its own experts go from the tokens to the output in step 7, without the managed area, unless they
  are quantised.
- Outputs of experts that lie in the own segment (in memory that `empty_outputs` lends, or in a symmetric array) are not
  written again: the field says where they are, and peers pull from there. They are in the order of dispatched rows, so
  that a peer's rows are a run for each expert; where the runs start is in the managed area, and the field says so.
  Deduplicated, a peer has one run. Ranks may differ in that: each goes by the fields.
- An operation has an epoch, the same at all ranks. Rank P announces operation e to rank R by a field in R's metadata
  area: where P's block for R starts, how many rows it has, and, last, e (SYNC POINT expert-field).
- When R has pulled all it wanted of operation e it writes e to `pulled` in the field it owns at every peer (SYNC POINT
  expert-pulled).
- A rank writes its managed area for operation e only when `pulled` of all peers is at least e - 1.
- Dispatch and combine have separate areas, fields and epochs.

Steps of both (the numbers are the paper's):
  0. await-pulled: every peer has pulled the operation before.
  1-3. write: tokens are read, quantised if asked, and written to the own managed area, one block for each peer.
  4. announce: each peer's field.
  5. await-fields: until the fields of all peers carry this epoch.
  6-7. pull: rows go from the peers' managed areas to the output. combine sums a token's rows on the way, in slot order,
       in float32.
  8. release: `pulled` at each peer.
  9. await-read, of a combine whose outputs lie in place: until `pulled` of all peers is this epoch.

Theory of operation: no operation overwrites what a slow peer still reads. Claim: while R may read P's area or its own
field from P for operation e, P writes neither for a later one. P writes the area for e + 1, and then announces e + 1,
only after step 0 of e + 1, that is after it acquired pulled >= e from R. R released that value in its step 8 of e,
after its last read of P's area and of the field in steps 5 to 7. So each of R's reads for e happens before each of P's
writes for e + 1. The word `pulled` itself has one writer and only grows, and so has the epoch. R can be at most one
operation behind P: P's step 5 of e + 1 needs R's announcement of e + 1. The starts of runs lie in the managed area, and
are part of the claim. Outputs in place are the caller's, who may write there when combine returns: that is after step
9, when P has acquired pulled >= e from all, so after their last reads. All have released before they wait in step 9, so
that nobody waits for a rank that is there. Own rows are read before an operation returns, too.

Dispatch and combine do not interact, since nothing is shared between their areas, fields and epochs; any mix of calls
in the same order at all ranks is safe, with a rank delayed at any step (tests/multirank/test_moe_delays.py does that).

The operands of combine are read where they lie, in an order fixed by the routing, so the result does not depend on
timing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels import moe_pull as kernels, moe_pull_combine as combine_kernels, words
from ..layout import moe as layout
from ..layout.moe import EXPERT_FIELD_BYTES, ExpertBlocks, expert_blocks
from ..layout.moe_direct import OUTPUTS
from . import traced_moe
from .buffers import address_of
from .dispatched import Dispatched, Outputs, Routing
from .managed import Part, Reservation
from .moe_protocol import MoeProtocol
from .moe_shape import MoeShape
from .slots import OutputArrays, any_held
from .steps import Steps

#: An object with arrays to lend takes at most one of so many parts of the address space; else it lends none.
_LARGEST_PART = 4


class Pull(MoeProtocol):
    """Peers pull rows from the rank that has them.

    Args:
        comm: the communicator.
        shape: of the ExpertParallel object.
        arguments: of its construction, which must be the same at all ranks.

    Raises:
        UsageError: ranks differ in an argument.
        CapacityError: the managed area or the memory is exhausted.
    """

    name = "pull"

    def __init__(self, comm: Any, shape: MoeShape, arguments: dict[str, int]) -> None:
        super().__init__(comm.core, shape)
        ranks = shape.ranks
        blocks, lent = _blocks_of(shape, OUTPUTS), OUTPUTS
        if blocks.total_bytes > self._core.fabric.geometry.heap_bytes // _LARGEST_PART:
            blocks, lent = _blocks_of(shape, 0), 0
        fields_bytes = 2 * ranks * EXPERT_FIELD_BYTES
        self._reserved = Reservation(
            comm, "ExpertParallel", arguments, (fields_bytes, blocks.total_bytes), (fields_bytes, blocks.rows)
        )
        self._dispatch_fields = self._reserved.fields
        self._combine_fields = self._dispatch_fields + ranks * EXPERT_FIELD_BYTES
        heap = self._reserved.block
        self._rows = Part(self._core, heap + blocks.rows, blocks.returns - blocks.rows)
        self._returns_offset = heap + blocks.returns
        self._returns = Part(self._core, self._returns_offset, blocks.outputs - blocks.returns)
        self._outputs = OutputArrays(self._core, shape, heap + blocks.outputs, blocks.outputs_bytes, lent)
        # What the caller holds stays as it is when everything else is given back.
        self._core.lent[heap] = partial(any_held, self._outputs.raws)
        self._state.fill(
            {
                layout.EP_COUNTS: heap + blocks.counts,
                layout.EP_PLACES: heap + blocks.places,
                layout.EP_SCALES: heap + blocks.scales,
                layout.EP_ROWS: heap + blocks.rows,
                layout.EP_RETURNS: heap + blocks.returns,
                layout.EP_STARTS: heap + blocks.starts,
            }
        )

    def dispatch(self, steps: Steps, x: npt.NDArray[Any], routing: Routing, outputs: Outputs) -> Dispatched:
        """See `MoeProtocol.dispatch`."""
        state, fields = self.state_address, self._dispatch_fields
        self._route(routing)
        self._rows.grow(routing.sent * self._shape.row_bytes)
        epoch = self._dispatches + 1
        steps.begin(epoch)
        steps("await-pulled")
        self._await(fields, layout.EXF_PULLED, epoch - 1, "dispatch, step 0 (peers pull the one before)")
        self._dispatches = routing.epoch = epoch
        steps("write")
        self._write(routing, x)
        steps("announce")
        kernels.dispatch_announce.call(state, routing.address, fields)
        steps("await-fields")
        self._await(fields, layout.EXF_EVENT, epoch, "dispatch, step 5 (fields of all ranks)")
        steps("pull")
        result = self._pull(x, routing, outputs)
        steps("release")
        kernels.release.call(state, fields, epoch)
        steps.finish(traced_moe.pull_dispatched, self._shape, routing)
        return result

    def _write(self, routing: Routing, x: npt.NDArray[Any]) -> None:
        state, is_new = self.state_address, routing.known is None
        has_places = is_new and not self._shape.is_dedup
        kernels.dispatch_write.call(state, routing.address, address_of(x), int(has_places))
        if is_new:
            kernels.dispatch_write_counts.call(state, routing.address)
        idx, gates = routing.idx, routing.gates
        if idx is not None and gates is not None:
            kernels.dispatch_write_entries.call(state, routing.address, address_of(idx), address_of(gates))
        routing.idx = routing.gates = None

    def _pull(self, x: npt.NDArray[Any], routing: Routing, outputs: Outputs) -> Dispatched:
        state, fields = self.state_address, self._dispatch_fields
        is_new = routing.known is None
        counts = np.empty(self._shape.local_experts, np.int64) if is_new else None
        status = kernels.dispatch_plan.call(state, routing.address, fields, 0 if counts is None else address_of(counts))
        if status < 0:
            peer = -1 - status
            raise self._bad_source(routing, peer, self._tag(fields, peer))
        result = outputs.make(routing, counts)
        has_places = is_new and not self._shape.is_dedup
        kernels.dispatch_pull.call(
            state, routing.address, fields, address_of(x), address_of(result.tokens),
            0 if result.scales is None else address_of(result.scales), address_of(result.source) if has_places else 0,
        )  # fmt: skip
        if is_new and result.index is not None and result.weights is not None:
            kernels.dispatch_pull_entries.call(
                state, routing.address, address_of(result.source), address_of(result.index), address_of(result.weights)
            )
        return result

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
        state, fields = self.state_address, self._combine_fields
        in_place = self._can_be_read_in_place(expert_out, y)
        rows, has_starts = self._returns_offset, in_place and not self._shape.is_dedup
        if in_place:
            rows = address_of(expert_out) - self._own_segment
        else:
            self._returns.grow(expert_out.nbytes)
        epoch = self._combines + 1
        steps.begin(epoch)
        steps("await-pulled")
        self._await(fields, layout.EXF_PULLED, epoch - 1, "combine, step 0 (peers pull the one before)")
        self._combines = epoch
        steps("write")
        if not in_place:
            combine_kernels.combine_write.call(state, routing.address, address_of(expert_out))
        elif has_starts:
            combine_kernels.combine_write_starts.call(state, routing.address)
        steps("announce")
        combine_kernels.combine_announce.call(state, routing.address, fields, epoch, rows, int(has_starts))
        steps("await-fields")
        self._await(fields, layout.EXF_EVENT, epoch, "combine, step 5 (fields of all ranks)")
        different = combine_kernels.combine_check.call(state, routing.address, fields)
        if different < 0:
            peer = -1 - different
            raise self._other_dispatch(routing, peer, self._tag(fields, peer))
        steps("pull")
        combine_kernels.combine_reduce.call(
            state, routing.address, fields, 0 if weights is None else address_of(weights),
            0 if shared_out is None else address_of(shared_out), address_of(y),
        )  # fmt: skip
        with_starts = self._peers_with_starts() if steps.is_watched else []
        steps("release")
        kernels.release.call(state, fields, epoch)
        if in_place:
            steps("await-read")
            self._await(fields, layout.EXF_PULLED, epoch, "combine, await-read (peers pull from outputs in place)")
        steps.finish(
            traced_moe.pull_combined, self._shape, routing, shared_out is not None, in_place=in_place,
            with_starts=with_starts,
        )  # fmt: skip

    def empty_outputs(self, rows: int) -> npt.NDArray[Any] | None:
        """See `MoeProtocol.empty_outputs`: where peers can pull from it; None if the caller holds all there are."""
        return self._outputs.take(rows)

    def _peers_with_starts(self) -> list[int]:
        """Peers whose outputs lie in place, by expert, in the combine that is under way."""
        field = self._own_segment + self._combine_fields + layout.EXF_BLOCK
        return [p for p in range(self._shape.ranks) if words.load(field + p * EXPERT_FIELD_BYTES) < 0]

    def free(self) -> None:
        """See `MoeProtocol.free`."""
        self._reserved.free()

    def _await(self, fields: int, word: int, epoch: int, operation: str) -> None:
        self._core.wait_all(self._own_segment + fields + word, EXPERT_FIELD_BYTES, epoch, operation)

    def _tag(self, fields: int, peer: int) -> int:
        """The dispatch to which a peer's announcement says that its rows belong."""
        return int(kernels.epoch_of.call(self._own_segment + fields + peer * EXPERT_FIELD_BYTES + layout.EXF_COUNT))


def _blocks_of(shape: MoeShape, lent: int) -> ExpertBlocks:
    """The parts of the managed block of an object of this shape that lends so many arrays for outputs."""
    return expert_blocks(
        ranks=shape.ranks, experts=shape.num_experts, max_tokens=shape.max_tokens, top_k=shape.top_k,
        row_bytes=shape.row_bytes, return_bytes=shape.return_bytes, dedup=shape.is_dedup, lent=lent,
    )  # fmt: skip
