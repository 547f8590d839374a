"""What an expert die does in A2E and E2A, and a trampoline besides. For the protocol see `xccl.comm.a2e`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EventMismatch, FabricError, UsageError
from ..kernels import a2e as kernels, fields as field_kernels, trampoline as trampoline_kernels
from ..layout import a2e as layout
from ..layout.a2e import DIE
from ..layout.moe import COUNT_BITS, EXF_COUNT, EXF_EVENT, EXF_PULLED, SOURCE_DTYPE
from . import traced_a2e
from .buffers import BufferPool, address_of
from .core import Core
from .deployment import Deployment
from .fields import FieldWaiter, Peers
from .managed import Part, Reservation
from .moe_input import check_outputs
from .steps import Steps

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertBatch:
    """What an expert die gets from one A2E: n rows, grouped by local expert, within one by (source rank, token, slot).

    Attributes:
        tokens: [n, hidden], int8 or the dtype of the Disaggregated object.
        scales: float32 [n], or None without quantisation; a token's values are `tokens * scales[:, None]`.
        counts: int64 [local experts], rows of each.
        source: structured [n] with fields rank, token, slot: where each row comes from.
        domain: whose tokens they are.
        microbatch: which of the domain's turn.
        turn: how often all domains have had their turn before; in a model of L layers the layer is `turn % L`.
        number: of the A2E at the expert dies, from 1.
        routing: for e2a.
        owner: the Disaggregated object it belongs to.
    """

    tokens: npt.NDArray[Any]
    scales: npt.NDArray[np.float32] | None
    counts: Ints
    source: npt.NDArray[np.void]
    domain: int
    microbatch: int
    turn: int
    number: int
    routing: BatchRouting
    owner: object


@dataclass(frozen=True, slots=True, eq=False)
class BatchRouting:
    """Where the rows of a batch came from.

    Attributes:
        epoch: of the A2E in its domain.
        got: int64 [(2 * local experts + 1) * attention dies of a domain], see `xccl.kernels.a2e`.
        tables: int32 [attention dies served, experts + 1], at a trampoline: the rows that it has forwarded.
    """

    epoch: int
    got: Ints
    tables: npt.NDArray[np.int32]

    def counts(self, attention: int) -> Ints:
        """[attention dies, local experts] rows."""
        local = (len(self.got) // attention - 1) // 2
        return self.got[: attention * local].reshape(attention, local)


class ExpertDie:
    """One expert die. Receiving and sending share nothing, so that two threads may do them at the same time."""

    def __init__(self, core: Core, shape: Deployment, reserved: Reservation, index: int) -> None:
        self._core = core
        self._shape = shape
        self._index = index
        self._is_bounced = shape.trampolines > 0
        #: By domain, the dies that hold rows for this one, and gather its outputs.
        self._holders = [self._holders_of(reserved, domain) for domain in range(shape.domains)]
        self._ranks = [np.asarray(shape.domain_ranks(domain), np.int64) for domain in range(shape.domains)]
        self._served: list[Peers] = []
        if index < shape.trampolines:
            self._served = [self._served_in(reserved, domain) for domain in range(shape.domains)]
            self._expert_dies = self._all_expert_dies(reserved)
        self.waiter_in, self.waiter_out = FieldWaiter(core), FieldWaiter(core)
        self._pool = BufferPool()
        self._received = 0
        self._received_of = [0] * shape.domains
        self._last_domain = 0
        self._sent = 0
        self._sent_of = [0] * shape.domains
        #: Who pulls what was written last, and its epoch: outputs, and what was handed on.
        self._last_returned: tuple[Peers, int] | None = None
        self._last_handed: tuple[Peers, int] | None = None
        area, block = shape.area, reserved.block
        self._tables_offset = block + area.firsts
        served = len(self._served[0]) if self._served else 0
        most = shape.max_tokens * shape.slots
        self._forwarded = Part(core, block + area.rows, served * most * shape.row_bytes)
        self._returns = Part(core, block + area.returns, shape.domain_size * most * shape.return_bytes)
        self._handed = Part(core, block + area.handed, served * most * shape.return_bytes)
        self._state = np.zeros(DIE.size_bytes // 8, np.int64)
        self._address: int = self._state.ctypes.data
        for offset, value in {
            layout.DIE_SEGMENT: int(core.fabric.segments[core.rank]),
            layout.DIE_ATTENTION: shape.domain_size,
            layout.DIE_HOLDERS: shape.holders,
            layout.DIE_EXPERTS: shape.num_experts,
            layout.DIE_LOCAL_EXPERTS: shape.local_experts,
            layout.DIE_FIRST_EXPERT: index * shape.local_experts,
            layout.DIE_QUANT: int(shape.is_int8),
            layout.DIE_ROW_BYTES: shape.row_bytes,
            layout.DIE_RETURN_BYTES: shape.return_bytes,
            layout.DIE_FIRSTS: block + area.firsts,
            layout.DIE_PLACES: block + area.places,
            layout.DIE_SCALES: block + area.scales,
            layout.DIE_ROWS: block + area.rows,
            layout.DIE_RETURNS: block + area.returns,
            layout.DIE_HANDED: block + area.handed,
        }.items():
            self._state[offset // 8] = value

    def _holders_of(self, reserved: Reservation, domain: int) -> Peers:
        shape, at = self._shape, reserved.fields
        if self._is_bounced:
            dies = range(shape.trampolines)
            mine, theirs = at + shape.fields.at_trampoline(self._index), shape.fields.by_trampoline
            return Peers(
                self._core, shape.experts[: shape.trampolines], [mine] * len(dies), [at + theirs(t) for t in dies]
            )
        return self._attention_dies(reserved, range(domain * shape.domain_size, (domain + 1) * shape.domain_size))

    def _served_in(self, reserved: Reservation, domain: int) -> Peers:
        first = domain * self._shape.domain_size
        return self._attention_dies(reserved, [first + a for a in self._shape.served(self._index)])

    def _attention_dies(self, reserved: Reservation, dies: Any) -> Peers:
        shape, at = self._shape, reserved.fields
        mine = at + shape.fields.by_expert(self._index)
        return Peers(
            self._core,
            [shape.attention[a] for a in dies],
            mine=[mine for _ in dies],
            theirs=[at + shape.fields.by_attention(a) for a in dies],
        )

    def _all_expert_dies(self, reserved: Reservation) -> Peers:
        shape, at = self._shape, reserved.fields
        mine = at + shape.fields.by_trampoline(self._index)
        theirs = [at + shape.fields.at_trampoline(x) for x in range(len(shape.experts))]
        return Peers(self._core, shape.experts, [mine] * len(theirs), theirs)

    # -- A2E --------------------------------------------------------------------------------------------------------

    def receive(self, steps: Steps, owner: object) -> ExpertBatch:
        """A2E; see `xccl.Disaggregated.a2e`."""
        shape, core = self._shape, self._core
        number = self._received + 1
        turn, place = divmod(self._received, shape.domains * shape.microbatches)
        domain, microbatch = divmod(place, shape.microbatches)
        epoch = self._received_of[domain] + 1
        self._received, self._received_of[domain], self._last_domain = number, epoch, domain
        holders, event = self._holders[domain], number if self._is_bounced else epoch
        prefix = "forward-" if self._is_bounced else ""
        steps.begin(number)
        tables = np.zeros((0, shape.num_experts + 1), np.int32)
        if self._served:
            tables = self._forward(steps, self._served[domain], number, epoch)
        steps(f"{prefix}await-fields")
        whose = f"a2e, {prefix}await-fields (of domain {domain})"
        self.waiter_in.wait(holders, EXF_EVENT, event, whose)
        steps(f"{prefix}pull")
        routing = BatchRouting(epoch, np.empty((2 * shape.local_experts + 1) * shape.domain_size, np.int64), tables)
        batch = self._pull(holders, routing, domain, microbatch, turn, number, owner)
        steps(f"{prefix}release")
        field_kernels.release.call(holders.address, len(holders), self._index % len(holders), event)
        served = self._served[domain] if self._served else None
        expert_dies = self._expert_dies if self._served else None
        steps.finish(partial(traced_a2e.received, shape, routing, core.rank, holders, served, expert_dies))
        return batch

    def nothing_has_come(self) -> bool:
        """After an A2E that was given up: has no peer announced anything for it?"""
        domain = self._last_domain
        number, epoch = self._received, self._received_of[domain]
        awaited = [(self._holders[domain], number if self._is_bounced else epoch)]
        awaited += [(self._served[domain], epoch)] if self._served else []
        return all(peers.read(i, EXF_EVENT) < event for peers, event in awaited for i in range(len(peers)))

    def _forward(self, steps: Steps, served: Peers, number: int, epoch: int) -> npt.NDArray[np.int32]:
        """What a trampoline does first; a copy of the tables that say where the rows lie."""
        core, shape, dies = self._core, self._shape, self._expert_dies
        steps("forward-await-pulled")
        self.waiter_in.wait(dies, EXF_PULLED, number - 1, "a2e, forward-await-pulled (of the one before)")
        steps("await-fields")
        self.waiter_in.wait(served, EXF_EVENT, epoch, "a2e, await-fields (of the attention dies served)")
        steps("pull")
        rows = int(field_kernels.total_count.call(served.address, len(served)))
        self._forwarded.grow(rows * shape.row_bytes)
        found = int(trampoline_kernels.collect.call(self._address, served.address, len(served)))
        if found < 0:
            raise self._contradiction(served.ranks[-1 - found], number)
        steps("release")
        field_kernels.release.call(served.address, len(served), 0, epoch)
        steps("forward-announce")
        trampoline_kernels.forward.call(self._address, dies.address, len(dies), self._index, len(served), number)
        n_bytes = 4 * len(served) * (shape.num_experts + 1)
        tables = core.fabric.view(core.rank, self._tables_offset, n_bytes).view(np.int32)
        return tables.reshape(len(served), -1).copy()

    def _pull(
        self,
        holders: Peers,
        routing: BatchRouting,
        domain: int,
        microbatch: int,
        turn: int,
        number: int,
        owner: object,
    ) -> ExpertBatch:
        shape = self._shape
        counts = np.empty(shape.local_experts, np.int64)
        got = routing.got.ctypes.data
        n = int(kernels.plan.call(self._address, holders.address, got, counts.ctypes.data))
        if n < 0:
            raise self._contradiction(holders.ranks[-1 - n], number)
        tokens = self._pool.take((n, shape.hidden), shape.token_dtype)
        scales = np.empty(n, np.float32) if shape.is_int8 else None
        source = np.empty(n, SOURCE_DTYPE)
        kernels.pull.call(
            self._address, holders.address, self._index % shape.domain_size, got, self._ranks[domain].ctypes.data,
            address_of(tokens), 0 if scales is None else scales.ctypes.data, source.ctypes.data,
        )  # fmt: skip
        return ExpertBatch(tokens, scales, counts, source, domain, microbatch, turn, number, routing, owner)

    def _contradiction(self, peer: int, number: int) -> FabricError:
        return FabricError(
            f"rank {self._core.rank}: the table of rank {peer} in A2E {number} contradicts its field",
            rank=self._core.rank, peer=peer,
        )  # fmt: skip

    # -- E2A --------------------------------------------------------------------------------------------------------

    def send(self, expert_out: npt.NDArray[Any], batch: ExpertBatch, steps: Steps, owner: object) -> None:
        """E2A; see `xccl.Disaggregated.e2a`."""
        shape, core = self._shape, self._core
        if getattr(batch, "owner", None) is not owner:
            raise UsageError(
                f"rank {core.rank} is an expert die: e2a(expert_out, batch) needs what a2e() of the same Disaggregated "
                f"object returned, got {type(batch).__name__}",
                value=type(batch).__name__,
            )  # fmt: skip
        routing, domain = batch.routing, batch.domain
        out = check_outputs(expert_out, (len(batch.source), shape.hidden), shape.dtype)
        self._returns.grow(out.nbytes)
        handed = int((routing.tables[:, -1] - routing.tables[:, 0]).sum())
        self._handed.grow(handed * shape.return_bytes)
        number = self._sent + 1
        epoch = self._sent_of[domain] + 1
        self._sent, self._sent_of[domain] = number, epoch
        holders = self._holders[domain]
        event, tag = (number, batch.number) if self._is_bounced else (epoch, routing.epoch)
        steps.begin(number)
        handed_to, handed_epoch = self._last_handed or (None, 0)
        if self._served:
            steps("forward-await-pulled")
            handed_to = handed_to or self._served[domain]
            self.waiter_out.wait(handed_to, EXF_PULLED, handed_epoch, "e2a, forward-await-pulled (of the one before)")
        steps("await-pulled")
        returned_to, returned_epoch = self._last_returned or (holders, 0)
        self.waiter_out.wait(returned_to, EXF_PULLED, returned_epoch, "e2a, await-pulled (of the one before)")
        self._last_returned = (holders, event)
        steps("write")
        got = routing.got.ctypes.data
        kernels.write_returns.call(self._address, got, address_of(out))
        steps("announce")
        own_first = int(kernels.announce_returns.call(self._address, holders.address, got, event, tag))
        if self._served:
            self._hand_on(steps, batch, number, epoch, own_first)
        served = self._served[domain] if self._served else None
        expert_dies = self._expert_dies if self._served else None
        steps.finish(
            partial(
                traced_a2e.returned, shape, routing, core.rank, holders, returned_to, served, handed_to, expert_dies
            )
        )

    def _hand_on(self, steps: Steps, batch: ExpertBatch, number: int, epoch: int, own_first: int) -> None:
        """What a trampoline does then: gather the outputs for the attention dies it serves, and tell them."""
        dies, served, routing = self._expert_dies, self._served[batch.domain], batch.routing
        tables = routing.tables.ctypes.data
        steps("await-fields")
        self.waiter_out.wait(dies, EXF_EVENT, number, "e2a, await-fields (of all expert dies)")
        found = trampoline_kernels.gather_check.call(
            self._address, dies.address, len(dies), tables, len(served), batch.number
        )
        if found < 0:
            self._raise_mismatch(-1 - int(found), batch)
        steps("pull")
        trampoline_kernels.gather.call(
            self._address, dies.address, len(dies), self._index, tables, len(served), own_first
        )
        steps("release")
        field_kernels.release.call(dies.address, len(dies), self._index, number)
        steps("forward-announce")
        self._last_handed = (served, epoch)
        trampoline_kernels.hand.call(self._address, served.address, len(served), tables, epoch, routing.epoch)

    def _raise_mismatch(self, index: int, batch: ExpertBatch) -> None:
        theirs = self._expert_dies.read(index, EXF_COUNT) >> COUNT_BITS
        peer = self._expert_dies.ranks[index]
        raise EventMismatch(
            f"rank {self._core.rank} returns A2E {batch.number}, but rank {peer} returns "
            f"{'another one' if theirs == batch.number else f'A2E {theirs}'}",
            operation="e2a", event_id=batch.number, peer_event_id=theirs, rank=self._core.rank, peer=peer,
        )  # fmt: skip
