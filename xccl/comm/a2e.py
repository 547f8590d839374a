"""A2E and E2A: attention and experts on different dies (XDS §3.3).

Rules
- Everything a die writes for others lies in its OWN managed area; peers pull it. Into peers' segments go only 32-byte
  fields, one for each ordered pair of dies that talk. A die waits only on the fields in its own segment.
- Attention dies write rows for experts (A2E), expert dies write outputs (E2A). Their peers are the dies that HOLD rows:
  directly each other, 160 attention dies and 288 expert dies, all with all; with trampolines an attention die talks to
  one trampoline, and only trampolines talk to all expert dies.
- A die announces rows by a field: where they start, how many they are, of which A2E they are, and, last, its epoch
  (SYNC POINT expert-field). Whoever has pulled all it wanted says so by `pulled` in the field that it writes there
  (SYNC POINT expert-pulled); that word belongs to the operation that comes the other way.
- A die writes a part of its area, or a field, for one operation only when all who read it in the operation before have
  pulled. Rows sent, rows forwarded, outputs returned and outputs handed on are parts of their own.
- Domains have turns: an expert die's A2Es are `microbatches` of domain 0, then as many of domain 1, and so on, and then
  those of domain 0 again. Attention dies know nothing of it: they announce, and are pulled when it is their turn. All
  expert dies make the same calls in the same order.

Stages, with those of trampolines in brackets; "forward-" is the second leg (`xccl.protocol.a2e` has them in full):

    A2E   attention die     await-pulled, write, announce
          [trampoline       forward-await-pulled, await-fields, pull, release, forward-announce]
          expert die        [forward-]await-fields, [forward-]pull, [forward-]release
    E2A   expert die        await-pulled, write, announce
          [trampoline       forward-await-pulled; then, after that: await-fields, pull, release, forward-announce]
          attention die     [forward-]await-fields, [forward-]pull, [forward-]release

Theory of operation: nothing is overwritten while it is read. Take any part, its writer P and its operations in order, n
being one of them. P writes for n after it has acquired `pulled` of n - 1 from each reader of n - 1. A reader releases
that word after its last read for n - 1. By induction every reader of every operation before n has done its reads then,
also one of another domain, whose turn was longer ago. The field by which P announces n to reader R was read by R last
for P's operation before with R, which is one of those. So no read of an earlier operation comes after a write of a
later one.

No deadlock among dies that make the calls in the same order: an attention die in A2E waits only for pulls of its A2E
before; an expert die in A2E for announcements of the same one, in E2A for pulls of the E2A before, by attention dies of
one domain that may have gone ahead by further A2Es of their turn. With M microbatches, and an expert die that takes E2A
n before A2E n + 1, a domain's A2E m waits for the pull of A2E m - 1, that is for E2A m - 2 to be written, that is for
E2A m - 3 to be pulled, which the attention dies do after M A2Es: it needs m - 3 <= m - M, so M is 3 at most.

Outputs are summed at the attention die in the order of a token's slots, in float32, from memory in an order fixed by
the routing; so results depend neither on timing nor on the route.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar, overload

import numpy.typing as npt

from ..errors import UsageError
from .a2e_attention import A2EHandle, AttentionDie
from .a2e_experts import ExpertBatch, ExpertDie
from .core import Core
from .deployment import Dies, make_deployment
from .managed import Reservation
from .steps import FREED, StepHook, Steps, unusable

Array = npt.NDArray[Any]
_Result = TypeVar("_Result")


class Disaggregated:
    """A2E and E2A between attention dies and the dies of a mixture of experts. Construction is collective.

    The routed experts, and after them the replicas of the shared one, are dealt to the expert dies in equal runs. Ranks
    that are neither attention nor expert dies take part in construction and `free` only.

    Args:
        comm: the communicator.
        attention: attention dies of each domain, or the ranks of those of all domains, ascending, domain after domain.
        experts: expert dies, or their ranks, ascending. Numbers take the lowest ranks that are free, attention first.
        num_experts: routed experts in all.
        hidden: elements of a token.
        top_k: routed experts of a token, 1 or more.
        max_tokens: the most tokens that an attention die may send at once.
        dtype: bfloat16 (ml_dtypes), float16 or float32.
        quant: "int8" sends rows as INT8 with one float32 scale a token; "none" or None sends them as they are.
        shared: replicas of a shared expert. Each token goes to one of them besides; they take turns.
        route: "trampoline", by way of some expert dies, or "direct".
        trampolines: how many expert dies are trampolines; as many as there are attention dies in a domain if None, as
            far as there are enough expert dies.
        domains: data-parallel domains of attention dies that share the experts, one at a time.
        microbatches: A2Es of a domain in its turn, 1 to 3.

    Attributes:
        role: "attention", "expert", or None for a rank that has no part in it.
        domain: of an attention die; None otherwise.
        local_experts: experts of each expert die; those of the i-th one begin with i * local_experts.
        first_expert: the first expert of an expert die; None otherwise.
        on_step: called with (operation, step) before each step; for tests and tools.

    Raises:
        UsageError: an argument is out of range, or differs between ranks (then at all of them).
        CapacityError: the managed area or the memory is exhausted.
    """

    def __init__(
        self,
        comm: Any,
        *,
        attention: Dies,
        experts: Dies,
        num_experts: int,
        hidden: int,
        top_k: int,
        max_tokens: int,
        dtype: npt.DTypeLike,
        quant: str | None = "int8",
        shared: int = 0,
        route: str = "trampoline",
        trampolines: int | None = None,
        domains: int = 1,
        microbatches: int = 1,
    ) -> None:
        core: Core = comm.core
        self._core = core
        core.require_open()
        try:
            shape = make_deployment(
                core.size, attention=attention, experts=experts, num_experts=num_experts, hidden=hidden, top_k=top_k,
                max_tokens=max_tokens, dtype=dtype, quant=quant, shared=shared, route=route, trampolines=trampolines,
                domains=domains, microbatches=microbatches,
            )  # fmt: skip
        except UsageError as error:
            core.refuse(error)
        self.shape = shape
        self.on_step: StepHook | None = None
        self._broken: str | None = None
        rank, at = core.rank, shape.area
        is_attention, is_expert = rank in shape.attention, rank in shape.experts
        # The small parts, up to the rows, are used by whoever holds rows.
        holds = is_attention or rank in shape.experts[: shape.trampolines]
        fields_bytes = shape.fields.bytes_at(expert=is_expert) if is_attention or is_expert else 0
        reserved_fields_bytes = max(shape.fields.bytes_at(expert=True), shape.fields.bytes_at(expert=False))
        self._reserved = Reservation(
            comm, "Disaggregated", shape.as_arguments(),
            (reserved_fields_bytes, at.total_bytes), (fields_bytes, at.rows if holds else 0),
        )  # fmt: skip
        self.local_experts = shape.local_experts
        self.role: Literal["attention", "expert"] | None = None
        self.domain: int | None = None
        self.first_expert: int | None = None
        self._attention: AttentionDie | None = None
        self._expert: ExpertDie | None = None
        if is_attention:
            self.role = "attention"
            self._attention = AttentionDie(core, shape, self._reserved, shape.attention.index(rank))
            self.domain = self._attention.domain
        elif is_expert:
            self.role = "expert"
            index = shape.experts.index(rank)
            self._expert = ExpertDie(core, shape, self._reserved, index)
            self.first_expert = index * shape.local_experts

    @overload
    def a2e(self) -> ExpertBatch: ...
    @overload
    def a2e(self, x: Array, topk_idx: npt.NDArray[Any]) -> A2EHandle: ...
    def a2e(self, x: Array | None = None, topk_idx: npt.NDArray[Any] | None = None) -> ExpertBatch | A2EHandle:
        """Attention to experts. An attention die calls it with its tokens, an expert die without arguments.

        An attention die returns when its rows lie ready to be pulled; an expert die when it has pulled those for its
        experts, from all attention dies of the domain whose turn it is.

        Args:
            x: [tokens, hidden] in the dtype of this object; tokens may differ between dies, and be 0.
            topk_idx: integers [tokens, top_k], routed experts; -1 for none.

        Returns:
            At an attention die a handle for `e2a`. At an expert die the rows for its experts; the arrays are the
            caller's, for as long as it keeps them.

        Raises:
            UsageError: a dtype, shape or expert is wrong, or this rank has the other role. Nothing was sent; the other
                ranks wait for this one.
            CapacityError: more tokens than max_tokens, or no memory.
            WaitTimeout, PeerDied, SessionAborted: see `xccl.errors`.
        """
        self._require_usable()
        if self._attention is not None:
            if x is None or topk_idx is None:
                raise UsageError(
                    f"rank {self._core.rank} is an attention die: call a2e(x, topk_idx)", value="no tokens"
                )
            return self._guarded("a2e", partial(self._attention.send, x, topk_idx))
        expert = self._require_expert("a2e")
        if x is not None or topk_idx is not None:
            raise UsageError(
                f"rank {self._core.rank} is an expert die: it has no tokens to send, call a2e()", value="tokens"
            )
        return self._guarded("a2e", expert.receive)

    @overload
    def e2a(self, first: A2EHandle, second: npt.NDArray[Any]) -> Array: ...
    @overload
    def e2a(self, first: Array, second: ExpertBatch) -> None: ...
    def e2a(self, first: Any, second: Any) -> Array | None:
        """Experts to attention: with (handle, topk_weights) at an attention die, (expert_out, batch) at an expert die.

        An expert die returns when its outputs lie ready to be pulled (a trampoline when it has handed them on), an
        attention die when it has summed its own.

        Args:
            first: what `a2e` returned to this attention die; or the outputs of this die's experts, [n, hidden] in the
                dtype of this object, in the order of `batch.tokens`.
            second: float [tokens, top_k], used as float32; or what `a2e` returned to this expert die. All dies pass
                what belongs to the same A2E.

        Returns:
            At an attention die y [tokens, hidden]: y[t] = sum over slots k of weights[t, k] * out(t, k), in float32, in
            slot order, then the output of the shared expert as it is, rounded to nearest even. Slots with -1 add
            nothing, whatever their weight. A NaN is the positive quiet NaN. At an expert die None.

        Raises:
            UsageError: a dtype or shape is wrong, or an argument is that of another object or role. Nothing was sent.
            EventMismatch: dies return different A2Es; raised by those that see it.
            CapacityError, WaitTimeout, PeerDied, SessionAborted: see `xccl.errors`.
        """
        self._require_usable()
        if self._attention is not None:
            return self._guarded("e2a", partial(self._attention.receive, first, second))
        expert = self._require_expert("e2a")
        return self._guarded("e2a", partial(expert.send, first, second))

    @property
    def expert_die(self) -> ExpertDie | None:
        """The expert die that this rank is, for `ExpertLoop`."""
        return self._expert

    def free(self) -> None:
        """Give the managed area back; results that are held stay valid. Collective: returns when all have called it.

        Raises:
            UsageError: it was freed before, or ranks free different objects.
        """
        self._require_usable()
        self._reserved.free()
        self._broken = FREED

    def __repr__(self) -> str:
        shape = self.shape
        return (
            f"Disaggregated(attention={len(shape.attention)}, experts={len(shape.experts)}, role={self.role!r}, "
            f"rank={self._core.rank} of {self._core.size})"
        )

    def _require_expert(self, call: str) -> ExpertDie:
        if self._expert is None:
            raise UsageError(
                f"rank {self._core.rank} is neither an attention die nor an expert die: it has no part in {call}",
                value=self.role,
            )  # fmt: skip
        return self._expert

    def _require_usable(self) -> None:
        self._core.require_open()
        if self._broken is not None:
            raise unusable(self._core, "Disaggregated", self._broken)

    def _guarded(self, call: str, operate: Callable[[Steps, object], _Result]) -> _Result:
        """Run an operation; what breaks it off after its checks makes the object unusable."""
        steps = Steps(self._core, self.on_step, call)
        try:
            return operate(steps, self)
        except BaseException as error:
            if steps.begun:
                self._broken = f"{call} was given up in the middle ({type(error).__name__})"
            raise
