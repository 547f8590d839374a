"""Expert-parallel dispatch and combine.

How rows move is up to a protocol: `xccl.comm.moe_pull` (XDS section 3.2), `xccl.comm.moe_push` (CM384 §4.2.1), or
`xccl.comm.moe_direct`, which is no paper's. All of them give the same bits.

Rows are expanded, one for each (token, slot) with an expert, or deduplicated, one for each token and rank that has any
of its experts. Deduplicated rows take their gate weights along: the rank of the experts sums their outputs (in the
order of the token's slots, in float32, rounded to the dtype), and combine sums those partial rows (in the order of each
rank's first slot, in float32, rounded again).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..kernels import moe_sums as kernels
from .buffers import BufferPool, address_of, require_int
from .core import Core
from .dispatched import Dispatched, Outputs, Routing
from .moe_direct import Direct, blocks_of
from .moe_input import (
    check_active,
    check_choices,
    check_output,
    check_outputs,
    check_shared,
    check_weights,
    check_x,
    require_choice,
)
from .moe_protocol import MoeProtocol
from .moe_pull import Pull
from .moe_push import Push
from .moe_shape import MoeShape, make_shape
from .steps import FREED, StepHook, Steps, unusable

#: Names of protocols; the position stands for the name among ranks.
PROTOCOLS = (Pull.name, Push.name, Direct.name)
#: Stands for one of them.
AUTO = "auto"

_MAX_BUFFER_BYTES = 1 << 62


class ExpertParallel:
    """Dispatch and combine of one mixture-of-experts layer shape, over all ranks of a communicator.

    Experts are dealt to ranks in runs: each rank holds num_experts // ranks of them, and the first num_experts % ranks
    ranks one more. Replicas of an expert are experts of their own here (see `xccl.placement`). Construction is
    collective: all ranks pass the same arguments.

    Args:
        comm: the communicator.
        num_experts: experts in all.
        hidden: elements of a token.
        top_k: slots of a token, 1 or more.
        max_tokens: the most tokens that a rank may dispatch at once; sizes the buffers.
        dtype: bfloat16 (ml_dtypes), float16 or float32.
        quant: "int8" sends rows as INT8 with one float32 scale a token; "none" or None sends them as they are.
        protocol: "pull", "push", "direct", or "auto" for the fastest one that has room: direct, or pull if the managed
            area has no address space for direct's slots.
        rows: "expanded", or "dedup" for one row for each token and rank.
        buffer_bytes: of the buffers of the push protocol, as `xccl.buffer_size_hint` counts them; None for what that
            says. More is needed only if tokens name an expert more than once.

    Attributes:
        protocol: the one in use.
        first_expert: the first expert of this rank.
        local_experts: how many it holds.
        on_step: called with (operation, step) before each step; for tests and tools.

    Raises:
        UsageError: an argument is out of range, or differs between ranks (then at all of them).
        CapacityError: `buffer_bytes` is too small, or the managed area or the memory is exhausted.
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
        rows: str = "expanded",
        buffer_bytes: int | None = None,
    ) -> None:
        core: Core = comm.core
        self._core = core
        core.require_open()
        try:
            shape = make_shape(
                core, num_experts=num_experts, hidden=hidden, top_k=top_k, max_tokens=max_tokens, dtype=dtype,
                quant=quant, rows=rows,
            )  # fmt: skip
            self.protocol = require_choice(protocol, "protocol", (*PROTOCOLS, AUTO))
            if self.protocol == AUTO:
                self.protocol = _fastest(core, shape)
            if buffer_bytes is not None:
                if self.protocol != Push.name:
                    raise UsageError(f"buffer_bytes is for protocol push, not {self.protocol}", value=buffer_bytes)
                buffer_bytes = require_int(buffer_bytes, "buffer_bytes", 0, _MAX_BUFFER_BYTES)
        except UsageError as error:
            core.refuse(error)
        self._shape: MoeShape = shape
        self.num_experts, self.hidden, self.top_k = shape.num_experts, shape.hidden, shape.top_k
        self.max_tokens, self.dtype, self.token_dtype = shape.max_tokens, shape.dtype, shape.token_dtype
        self.first_expert, self.local_experts = shape.first_expert, shape.local_experts
        self.quant, self.rows = "int8" if shape.is_int8 else "none", rows
        self._pool = BufferPool()
        self._broken: str | None = None
        self.on_step: StepHook | None = None
        arguments = shape.as_arguments() | {
            "protocol": PROTOCOLS.index(self.protocol),
            "buffer_bytes": -1 if buffer_bytes is None else buffer_bytes,
        }
        self._protocol: MoeProtocol
        if self.protocol == Push.name:
            self._protocol = Push(comm, shape, arguments, buffer_bytes)
        elif self.protocol == Direct.name:
            self._protocol = Direct(comm, shape, arguments)
        else:
            self._protocol = Pull(comm, shape, arguments)

    # -- dispatch ---------------------------------------------------------------------------------------------------

    def dispatch(
        self,
        x: npt.NDArray[Any],
        topk_idx: npt.NDArray[Any] | None = None,
        *,
        topk_weights: npt.NDArray[Any] | None = None,
        active: npt.NDArray[Any] | int | None = None,
        handle: Dispatched | None = None,
        out: npt.NDArray[Any] | tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None,
    ) -> Dispatched:
        """Send each token to the ranks of its experts; collective.

        Args:
            x: [tokens, hidden] in the dtype of this object; tokens may differ between ranks, and be 0.
            topk_idx: integers [tokens, top_k]; -1 for no expert.
            topk_weights: float [tokens, top_k], with deduplicated rows, which take them along; used as float32.
            active: bool [tokens], or how many of the first tokens are active; the others are as if all their slots had
                -1, and neither their elements nor their choices are looked at. All if None.
            handle: what an earlier dispatch returned, instead of `topk_idx`: repeat it with other tokens. The routing
                and the counts are known then, and are not sent again. All ranks pass the one of the same dispatch.
            out: where to put the rows, [capacity, hidden], capacity being n or more; or a pair of that and float32
                scales [capacity]. Memory of this object if None.

        Returns:
            The rows for this rank's experts. Its arrays are the caller's, for as long as it keeps them; of a dispatch
            that repeats another one, all but tokens and scales are those of the first. By the direct protocol they lie
            in the managed area, where peers can read what the caller makes of them in place.

        Raises:
            UsageError: a dtype, shape or expert is wrong. Nothing was sent; the other ranks wait for this one.
            CapacityError: more tokens than max_tokens, a block that is too small for tokens that name an expert more
                than once, or no memory. Nothing was sent; the others wait. If `out` is too small for what has come,
                everything has been sent and received; the error has the result as its attribute `dispatched`. By the
                direct protocol ranks learn only from all counts how much memory they need: if there is none, no rows
                are sent, and the object cannot be used any more.
            EventMismatch: ranks repeat different dispatches, or not all of them do.
            WaitTimeout, PeerDied, SessionAborted: see `xccl.errors`.
        """
        if active is None and handle is None and out is None and self._may_be_quick:
            try:
                dispatched = self._protocol.quick_dispatch(self, x, topk_idx, topk_weights)
            except BaseException as error:
                self._break_off("dispatch", self._protocol.is_under_way, error)
                raise
            if dispatched is not None:
                return dispatched
        self._require_usable()
        outputs = Outputs(self, self._shape, self._pool, out)
        if handle is None:
            x, routing = self._new_routing(x, topk_idx, topk_weights, active)
        else:
            if topk_idx is not None or topk_weights is not None or active is not None:
                raise UsageError(
                    "dispatch with a handle repeats its routing: topk_idx, topk_weights and active do not go with it",
                    value="handle",
                )
            self._require_own(handle, "handle")
            x = self._check_x(x)
            if len(x) != handle.routing.tokens:
                raise UsageError(
                    f"x has {len(x)} tokens, the dispatch to be repeated had {handle.routing.tokens}",
                    value=len(x), bound=handle.routing.tokens,
                )  # fmt: skip
            routing = Routing.again(handle)
            outputs.require(routing.rows)
        steps = Steps(self._core, self.on_step, "dispatch")
        try:
            result = self._protocol.dispatch(steps, x, routing, outputs)
        except BaseException as error:
            self._break_off("dispatch", steps.begun, error)
            raise
        if outputs.problem is not None:
            outputs.problem.__dict__["dispatched"] = result
            raise outputs.problem
        return result

    def _new_routing(
        self,
        x: npt.NDArray[Any],
        topk_idx: npt.NDArray[Any] | None,
        topk_weights: npt.NDArray[Any] | None,
        active: npt.NDArray[Any] | int | None,
    ) -> tuple[npt.NDArray[Any], Routing]:
        """Checked tokens, and where they go."""
        shape = self._shape
        if topk_idx is None:
            raise UsageError("dispatch needs topk_idx, or the handle of an earlier dispatch", value=None)
        x = self._check_x(x)
        tokens = len(x)
        idx = check_choices(topk_idx, tokens=tokens, top_k=shape.top_k, num_experts=shape.num_experts)
        if (topk_weights is not None) != shape.is_dedup:
            raise UsageError(
                "dispatch of deduplicated rows needs topk_weights"
                if shape.is_dedup
                else "topk_weights are for rows='dedup'; with expanded rows they are an argument of combine",
                value=self.rows,
            )
        weights = None if topk_weights is None else check_weights(topk_weights, (tokens, shape.top_k))
        if active is not None:
            idx = np.where(check_active(active, tokens)[:, None], idx, -1)
        routing = Routing(
            tokens, shape.top_k, shape.num_experts, shape.local_experts, shape.ranks, dedup=shape.is_dedup
        )
        routing.idx, routing.gates = idx, weights
        return x, routing

    def _check_x(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        shape = self._shape
        return check_x(
            x, dtype=shape.dtype, hidden=shape.hidden, top_k=shape.top_k, max_tokens=shape.max_tokens,
            row_bytes=shape.row_bytes,
        )  # fmt: skip

    # -- combine ----------------------------------------------------------------------------------------------------

    def combine(
        self,
        expert_out: npt.NDArray[Any],
        dispatched: Dispatched,
        topk_weights: npt.NDArray[Any] | None = None,
        *,
        shared_out: npt.NDArray[Any] | None = None,
        out: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """Bring each token's expert outputs back and sum them with the gate weights; collective.

        Args:
            expert_out: [n, hidden] in the dtype of this object, in the order of `dispatched.tokens`. With deduplicated
                rows these are sums over the local experts of each row; see `reduce_local`. The protocols direct and
                pull copy them, unless they lie in this rank's segment: in `empty_outputs`, in a symmetric array, or
                (direct) in `dispatched.tokens`.
            dispatched: what the dispatch returned; all ranks pass the one of the same dispatch.
            topk_weights: float [tokens, top_k]; used as float32. None with deduplicated rows.
            shared_out: [tokens, hidden] in the dtype of this object, the output of a shared expert on this rank, added
                as it is.
            out: where to put the result, [tokens, hidden] in the dtype of this object. It may be `shared_out`.

        Returns:
            y [tokens, hidden]: y[t] = sum over slots k of weights[t, k] * out(t, k), in float32, in slot order, then
            shared_out[t], rounded to nearest even. Slots with -1 add nothing, whatever their weight. A NaN is the
            positive quiet NaN. With deduplicated rows y[t] = sum of the partial rows of its ranks, in the order of each
            rank's first slot.

        Raises:
            UsageError: a dtype or shape is wrong, or `dispatched` belongs to another object. Nothing was sent.
            EventMismatch: ranks combine different dispatches; raised by those that see it, with "pull" by all.
            CapacityError, WaitTimeout, PeerDied, SessionAborted: see `xccl.errors`.
        """
        if shared_out is None and self._may_be_quick and getattr(dispatched, "owner", None) is self:
            routing = dispatched.routing
            y = self._pool.take((routing.tokens, self.hidden), self.dtype) if out is None else out
            try:
                if self._protocol.quick_combine(expert_out, routing, topk_weights, y):
                    return y
            except BaseException as error:
                self._break_off("combine", self._protocol.is_under_way, error)
                raise
        self._require_usable()
        self._require_own(dispatched, "dispatched")
        shape, routing = self._shape, dispatched.routing
        expert_out = check_outputs(expert_out, (routing.rows, shape.hidden), shape.dtype)
        weights = None
        if (topk_weights is None) != shape.is_dedup:
            raise UsageError(
                "with deduplicated rows the weights were an argument of dispatch: combine takes none"
                if shape.is_dedup
                else "combine needs topk_weights",
                value=self.rows,
            )
        if topk_weights is not None:
            weights = check_weights(topk_weights, (routing.tokens, shape.top_k))
        result = (routing.tokens, shape.hidden)
        y = self._pool.take(result, shape.dtype) if out is None else check_output(out, result, shape.dtype)
        shared = None if shared_out is None else check_shared(shared_out, result, shape.dtype, y)
        steps = Steps(self._core, self.on_step, "combine")
        try:
            self._protocol.combine(steps, expert_out, routing, weights, shared, y)
        except BaseException as error:
            self._break_off("combine", steps.begun, error)
            raise
        return y

    def empty_outputs(self, dispatched: Dispatched) -> npt.NDArray[Any]:
        """Memory for what is combined, where no protocol has to copy it if that can be helped; local.

        Args:
            dispatched: what the dispatch returned.

        Returns:
            An uninitialised array [n, hidden] in the dtype of this object, the caller's for as long as it keeps it. By
            the protocols direct and pull the first two that are held at once lie where peers read them in place, by
            pull if the object then takes at most a quarter of the managed area's address space.

        Raises:
            UsageError: `dispatched` belongs to another object.
            CapacityError: there is no memory.
        """
        self._require_usable()
        self._require_own(dispatched, "dispatched")
        rows = dispatched.routing.rows
        lent = self._protocol.empty_outputs(rows)
        if lent is not None:
            return lent
        private: npt.NDArray[Any] = self._pool.take((rows, self._shape.hidden), self._shape.dtype)
        return private

    def reduce_local(self, expert_out: npt.NDArray[Any], dispatched: Dispatched) -> npt.NDArray[Any]:
        """Sum what this rank's experts have made of each deduplicated row; local.

        Args:
            expert_out: [m, hidden] in the dtype of this object, in the order of `dispatched.index`.
            dispatched: what the dispatch returned.

        Returns:
            [n, hidden], to be combined: row r is the sum of weights[i] * expert_out[i] over its entries i, in float32,
            in the order of slots, rounded to nearest even.

        Raises:
            UsageError: a dtype or shape is wrong, or rows are not deduplicated.
        """
        self._core.require_open()
        self._require_own(dispatched, "dispatched")
        shape, index, weights = self._shape, dispatched.index, dispatched.weights
        if index is None or weights is None:
            raise UsageError("reduce_local is for rows='dedup'; combine sums expanded rows itself", value=self.rows)
        rows, entries = dispatched.routing.rows, dispatched.routing.entries
        expert_out = check_outputs(expert_out, (entries, shape.hidden), shape.dtype)
        if entries and not 0 <= index["row"].min() <= index["row"].max() < rows:
            raise UsageError(f"dispatched.index was changed: it names rows beyond the {rows} there are", bound=rows)
        partials = self.empty_outputs(dispatched)
        scratch = np.empty(rows + 1 + 4 * entries, np.int64)
        kernels.reduce_local.call(
            shape.code, shape.hidden, shape.return_bytes, rows, entries, address_of(index), address_of(weights),
            address_of(expert_out), address_of(scratch), address_of(partials),
        )  # fmt: skip
        return partials

    def free(self) -> None:
        """Give the managed area back; results that are held stay valid. Collective: returns when all have called it.

        Raises:
            UsageError: it was freed before, or ranks free different objects.
        """
        self._require_usable()
        self._protocol.free()
        self._broken = FREED

    # -- shared -----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return (
            f"ExpertParallel(num_experts={self.num_experts}, hidden={self.hidden}, top_k={self.top_k}, "
            f"max_tokens={self.max_tokens}, dtype={self.dtype}, quant={self.quant!r}, protocol={self.protocol!r}, "
            f"rows={self.rows!r}, rank={self._core.rank} of {self._core.size})"
        )

    @property
    def _may_be_quick(self) -> bool:
        return self._protocol.is_quick and self.on_step is None and self._broken is None

    def _break_off(self, call: str, begun: bool, error: BaseException) -> None:
        """What breaks an operation off after its checks makes the object unusable."""
        if begun:
            self._broken = f"{call} was given up in the middle ({type(error).__name__})"

    def _require_usable(self) -> None:
        self._core.require_open()
        if self._broken is not None:
            raise unusable(self._core, "ExpertParallel", self._broken)

    def _require_own(self, dispatched: Dispatched, name: str) -> None:
        if getattr(dispatched, "owner", None) is not self:
            raise UsageError(
                f"{name} must be what dispatch of the same ExpertParallel object returned, not another "
                f"{type(dispatched).__name__}",
                value=type(dispatched).__name__,
            )


def _fastest(core: Core, shape: MoeShape) -> str:
    """The protocol that was fastest wherever it was measured (docs/performance.md), if it fits the managed area."""
    needed_bytes = blocks_of(shape).total_bytes
    return Direct.name if needed_bytes <= core.fabric.geometry.heap_bytes else Pull.name
