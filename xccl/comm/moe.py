"""Expert-parallel dispatch and combine by the pull protocol (XDS section 3.2).

Rules
- Everything a rank writes for others lies in its OWN managed area; peers pull it. Into peers' segments go only 32-byte
  fields.
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

Theory of operation: no operation overwrites what a slow peer still reads. Claim: while R may read P's area or its own
field from P for operation e, P writes neither for a later one. P writes the area for e + 1, and then announces e + 1,
only after step 0 of e + 1, that is after it acquired pulled >= e from R. R released that value in its step 8 of e,
after its last read of P's area and of the field in steps 5 to 7. So each of R's reads for e happens before each of P's
writes for e + 1. The word `pulled` itself has one writer and only grows, and so has the epoch. R can be at most one
operation behind P: P's step 5 of e + 1 needs R's announcement of e + 1. Dispatch and combine do not interact, since
nothing is shared between their areas, fields and epochs; any mix of calls in the same order at all ranks is safe, with
a rank delayed at any step (tests/multirank/test_moe_delays.py does that).

The operands of combine are read where they lie, in an order fixed by the routing, so the result does not depend on
timing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EventMismatch, FabricError, UsageError
from ..kernels import moe as kernels
from ..layout import moe as layout
from ..layout.moe import EXPERT_FIELD_BYTES, SOURCE_DTYPE, STATE, expert_blocks
from ..layout.record import align_up
from ..trace.record import Operation
from . import traced
from .buffers import BufferPool, address_of, require_int
from .core import Core
from .dispatched import Dispatched, Routing
from .moe_input import bad_choice, check_outputs, check_tokens, check_weights, require_choice, require_float
from .symmetric import Block, SymmetricAllocator, collective_free, reserve

#: Rows of the managed area are committed in units of this.
_COMMIT_BYTES = 2 << 20


class ExpertParallel:
    """Dispatch and combine of one mixture-of-experts layer shape, over all ranks of a communicator.

    Expert e lives on rank e // (num_experts / ranks). Construction is collective: all ranks pass the same arguments.

    Args:
        comm: the communicator.
        num_experts: experts in all; a multiple of the number of ranks.
        hidden: elements of a token.
        top_k: slots of a token, 1 or more.
        max_tokens: the most tokens that a rank may dispatch at once; sizes the managed area.
        dtype: bfloat16 (ml_dtypes), float16 or float32.
        quant: "int8" sends rows as INT8 with one float32 scale a token; "none" or None sends them as they are.
        protocol: "pull".

    Raises:
        UsageError: an argument is out of range, or differs between ranks (then at all of them).
        CapacityError: the managed area or the memory is exhausted.
    """

    def __init__(
        self,
        comm: Any,
        *,
        num_experts: int,
        hidden: int,
        top_k: int,
        max_tokens: int,
        dtype: npt.DTypeLike,
        quant: str | None = "int8",
        protocol: str = "pull",
    ) -> None:
        self._core: Core = comm.core
        self._core.require_open()
        try:
            code = self._set_shape(num_experts, hidden, top_k, max_tokens, dtype, quant, protocol)
        except UsageError as error:
            self._core.refuse("ExpertParallel", error)
        self._is_int8 = self.quant == "int8"
        self.token_dtype: np.dtype[Any] = np.dtype(np.int8) if self._is_int8 else self.dtype
        self._row_bytes = self.hidden * self.token_dtype.itemsize
        self._return_bytes = self.hidden * self.dtype.itemsize
        self._pool = BufferPool()
        self._broken: str | None = None
        #: Called with (operation, step) before each step; for tests and tools.
        self.on_step: Callable[[str, str], None] | None = None
        self._allocate(comm, code)

    def _set_shape(
        self,
        num_experts: int,
        hidden: int,
        top_k: int,
        max_tokens: int,
        dtype: npt.DTypeLike,
        quant: str | None,
        protocol: str,
    ) -> int:
        """Check and keep the arguments; the code of the dtype."""
        ranks = self._core.size
        self.num_experts = require_int(num_experts, "num_experts", 1, 1 << 20)
        if self.num_experts % ranks:
            raise UsageError(
                f"num_experts must be a multiple of the {ranks} ranks, got {num_experts}",
                value=num_experts,
                bound=ranks,
            )
        self.local_experts = self.num_experts // ranks
        self.hidden = require_int(hidden, "hidden", 1, 1 << 20)
        self.top_k = require_int(top_k, "top_k", 1, 1 << 10)
        self.max_tokens = require_int(max_tokens, "max_tokens", 0, 1 << 20)
        self.dtype, code = require_float(dtype)
        self.quant = require_choice(quant if quant is not None else "none", "quant", ("int8", "none"))
        self.protocol = require_choice(protocol, "protocol", ("pull",))
        return code

    def _allocate(self, comm: Any, code: int) -> None:
        core, ranks = self._core, self._core.size
        blocks = expert_blocks(
            ranks=ranks, experts=self.num_experts, max_tokens=self.max_tokens, top_k=self.top_k,
            row_bytes=self._row_bytes, return_bytes=self._return_bytes,
        )  # fmt: skip
        self._allocators: tuple[SymmetricAllocator, SymmetricAllocator] = (comm.metadata_allocator, comm.heap_allocator)
        sizes = (2 * ranks * EXPERT_FIELD_BYTES, blocks.total_bytes)
        arguments = {
            "num_experts": self.num_experts,
            "hidden": self.hidden,
            "top_k": self.top_k,
            "max_tokens": self.max_tokens,
            "dtype": code,
            "quant": int(self._is_int8),
        }
        self._offsets = reserve(
            core, "ExpertParallel", arguments,
            Block(self._allocators[0], sizes[0]), Block(self._allocators[1], sizes[1], blocks.rows),
        )  # fmt: skip
        fields, heap = self._offsets
        self._dispatch_fields = fields
        self._combine_fields = fields + ranks * EXPERT_FIELD_BYTES
        self._rows = heap + blocks.rows
        self._returns = heap + blocks.returns
        #: By part: bytes that are backed by memory, and bytes that there are.
        self._committed = {self._rows: 0, self._returns: 0}
        self._part_bytes = {self._rows: self._returns - self._rows, self._returns: blocks.total_bytes - blocks.returns}
        self._scratch = np.zeros(max(self.num_experts, 2 * self.top_k), np.int64)
        self._state = np.zeros(STATE.size_bytes // 8, np.int64)
        self._address: int = self._state.ctypes.data
        self._own_segment = int(core.fabric.segments[core.rank])
        self._dispatches = 0
        self._combines = 0
        for offset, value in {
            layout.EP_CONTROL: core.control,
            layout.EP_SEGMENTS: core.segments_address,
            layout.EP_RANK: core.rank,
            layout.EP_RANKS: ranks,
            layout.EP_EXPERTS: self.num_experts,
            layout.EP_HIDDEN: self.hidden,
            layout.EP_TOP_K: self.top_k,
            layout.EP_DTYPE: code,
            layout.EP_QUANT: int(self._is_int8),
            layout.EP_ROW_BYTES: self._row_bytes,
            layout.EP_RETURN_BYTES: self._return_bytes,
            layout.EP_COUNTS: heap + blocks.counts,
            layout.EP_PLACES: heap + blocks.places,
            layout.EP_SCALES: heap + blocks.scales,
            layout.EP_ROWS: self._rows,
            layout.EP_RETURNS: self._returns,
            layout.EP_SCRATCH: self._scratch.ctypes.data,
        }.items():
            self._state[offset // 8] = value

    # -- dispatch ---------------------------------------------------------------------------------------------------

    def dispatch(self, x: npt.NDArray[Any], topk_idx: npt.NDArray[Any]) -> Dispatched:
        """Send each token to the ranks of its experts; collective.

        Args:
            x: [tokens, hidden] in the dtype of this object; tokens may differ between ranks, and be 0.
            topk_idx: integers [tokens, top_k]; -1 for no expert.

        Returns:
            The rows for this rank's experts. Its arrays are the caller's, for as long as it keeps them.

        Raises:
            UsageError: a dtype, shape or expert is wrong. Nothing was sent; the other ranks wait for this one.
            CapacityError: more tokens than max_tokens, or no memory. Nothing was sent; the others wait.
            WaitTimeout, PeerDied, SessionAborted: see `xccl.errors`.
        """
        self._require_usable()
        x, idx = check_tokens(
            x, topk_idx, dtype=self.dtype, hidden=self.hidden, top_k=self.top_k, max_tokens=self.max_tokens,
            num_experts=self.num_experts, row_bytes=self._row_bytes,
        )  # fmt: skip
        core = self._core
        operation = None if core.trace is None else core.trace.start("dispatch", self._dispatches + 1)
        routing = Routing(idx.shape[0], self.top_k, self.num_experts, self.local_experts, core.size)
        rows = kernels.route.call(self._address, routing.address, address_of(idx))
        if rows < 0:
            raise bad_choice(idx, -1 - rows, self.num_experts)
        self._commit(self._rows, rows * self._row_bytes)
        epoch = self._dispatches + 1
        fields = self._dispatch_fields
        try:
            self._step("dispatch", "await-pulled", operation)
            self._await(fields, layout.EXF_PULLED, epoch - 1, "dispatch, step 0 (peers pull the one before)")
            self._dispatches = routing.epoch = epoch
            self._step("dispatch", "write", operation)
            kernels.dispatch_write.call(self._address, routing.address, address_of(x))
            self._step("dispatch", "announce", operation)
            kernels.dispatch_announce.call(self._address, routing.address, fields)
            self._step("dispatch", "await-fields", operation)
            self._await(fields, layout.EXF_EVENT, epoch, "dispatch, step 5 (fields of all ranks)")
            self._step("dispatch", "pull", operation)
            result = self._pull(routing, fields)
            self._step("dispatch", "release", operation)
            kernels.release.call(self._address, fields, epoch)
        except BaseException as error:
            self._broken = f"dispatch {epoch} was given up in the middle ({type(error).__name__})"
            raise
        if operation is not None:
            operation.finish(partial(traced.dispatched, self, routing, core.rank, core.size))
        return result

    def _pull(self, routing: Routing, fields: int) -> Dispatched:
        counts = np.empty(self.local_experts, np.int64)
        n = kernels.dispatch_plan.call(self._address, routing.address, fields, address_of(counts))
        if n < 0:
            source = -1 - n
            raise FabricError(
                f"rank {self._core.rank}: the counts of rank {source} in dispatch {routing.epoch} contradict its field",
                rank=self._core.rank, peer=source,
            )  # fmt: skip
        tokens = self._pool.take((n, self.hidden), self.token_dtype)
        scales = np.empty(n, np.float32) if self._is_int8 else None
        source_rows = np.empty(n, SOURCE_DTYPE)
        kernels.dispatch_pull.call(
            self._address, routing.address, fields, address_of(tokens),
            0 if scales is None else address_of(scales), address_of(source_rows),
        )  # fmt: skip
        return Dispatched(tokens, scales, counts, source_rows, routing, self)

    # -- combine ----------------------------------------------------------------------------------------------------

    def combine(
        self, expert_out: npt.NDArray[Any], dispatched: Dispatched, topk_weights: npt.NDArray[Any]
    ) -> npt.NDArray[Any]:
        """Bring each token's expert outputs back and sum them with the gate weights; collective.

        Args:
            expert_out: [n, hidden] in the dtype of this object, in the order of `dispatched.tokens`.
            dispatched: what the dispatch returned; all ranks pass the one of the same dispatch.
            topk_weights: float [tokens, top_k]; used as float32.

        Returns:
            y [tokens, hidden]: y[t] = sum over slots k of weights[t, k] * out(t, k), in float32, in slot order, rounded
            to nearest even. Slots with -1 add nothing, whatever their weight. A NaN is the positive quiet NaN.

        Raises:
            UsageError: a dtype or shape is wrong, or `dispatched` belongs to another object. Nothing was sent.
            EventMismatch: ranks combine different dispatches; raised at all ranks.
            CapacityError, WaitTimeout, PeerDied, SessionAborted: see `xccl.errors`.
        """
        self._require_usable()
        if getattr(dispatched, "owner", None) is not self:
            raise UsageError(
                "combine needs what dispatch of the same ExpertParallel object returned",
                value=type(dispatched).__name__,
            )
        routing = dispatched.routing
        out = check_outputs(expert_out, (dispatched.source.shape[0], self.hidden), self.dtype)
        weights = check_weights(topk_weights, (routing.tokens, self.top_k))
        core = self._core
        operation = None if core.trace is None else core.trace.start("combine", self._combines + 1)
        self._commit(self._returns, out.nbytes)
        epoch = self._combines + 1
        fields = self._combine_fields
        try:
            self._step("combine", "await-pulled", operation)
            self._await(fields, layout.EXF_PULLED, epoch - 1, "combine, step 0 (peers pull the one before)")
            self._combines = epoch
            self._step("combine", "write", operation)
            kernels.combine_write.call(self._address, routing.address, address_of(out))
            self._step("combine", "announce", operation)
            kernels.combine_announce.call(self._address, routing.address, fields, epoch)
            self._step("combine", "await-fields", operation)
            self._await(fields, layout.EXF_EVENT, epoch, "combine, step 5 (fields of all ranks)")
            self._check_same_dispatch(routing, fields)
            self._step("combine", "pull", operation)
            y: npt.NDArray[Any] = self._pool.take((routing.tokens, self.hidden), self.dtype)
            kernels.combine_reduce.call(
                self._address, routing.address, fields, address_of(weights), address_of(y)
            )  # fmt: skip
            self._step("combine", "release", operation)
            kernels.release.call(self._address, fields, epoch)
        except BaseException as error:
            self._broken = f"combine {epoch} was given up in the middle ({type(error).__name__})"
            raise
        if operation is not None:
            operation.finish(partial(traced.combined, self, routing, core.rank, core.size))
        return y

    def _check_same_dispatch(self, routing: Routing, fields: int) -> None:
        different = kernels.combine_check.call(self._address, routing.address, fields)
        if different == 0:
            return
        peer = -1 - different
        count_address = self._own_segment + fields + peer * EXPERT_FIELD_BYTES + layout.EXF_COUNT
        theirs = int(kernels.epoch_of.call(count_address))
        raise EventMismatch(
            f"rank {self._core.rank} combines dispatch {routing.epoch}, but rank {peer} combines "
            f"{'another one' if theirs == routing.epoch else f'dispatch {theirs}'}",
            operation="combine", event_id=routing.epoch, peer_event_id=theirs, rank=self._core.rank, peer=peer,
        )  # fmt: skip

    def free(self) -> None:
        """Give the managed area back; results that are held stay valid. Collective: returns when all have called it.

        Raises:
            UsageError: it was freed before, or ranks free different objects.
        """
        self._require_usable()
        collective_free(self._core, *zip(self._allocators, self._offsets, strict=True))
        self._broken = "it was freed"

    # -- shared -----------------------------------------------------------------------------------------------------

    def _step(self, name: str, step: str, operation: Operation | None) -> None:
        if self.on_step is not None:
            self.on_step(name, step)
        if operation is not None:
            operation.begin_stage(step)

    def _await(self, fields: int, word: int, epoch: int, operation: str) -> None:
        self._core.wait_all(self._own_segment + fields + word, EXPERT_FIELD_BYTES, epoch, operation)

    def _commit(self, area: int, n_bytes: int) -> None:
        """Back the first `n_bytes` of a part of the own managed area."""
        committed = self._committed[area]
        if n_bytes > committed:
            target = min(align_up(n_bytes, _COMMIT_BYTES), self._part_bytes[area])
            self._core.fabric.commit(self._core.rank, area + committed, target - committed)
            self._committed[area] = target

    def _require_usable(self) -> None:
        self._core.require_open()
        if self._broken is not None:
            raise FabricError(f"rank {self._core.rank}: this ExpertParallel object is unusable: {self._broken}")
