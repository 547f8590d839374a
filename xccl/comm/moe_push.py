"""The push protocol of dispatch and combine: CANN's fused operators (CM384 §4.2.1).

Rules
- Every rank has a block of packets for each peer, which only that peer writes, and a place for each (token, slot) of
  its own, to which that token's row returns. A message is one row, in a packet that says where it came from.
- Rows of a rank for its own experts stay where they are, tokens until they are assembled, outputs until they are
  summed: of a packet to the rank itself only the header is written, and no flag. Quantised tokens go in whole packets,
  and so do outputs if the result overwrites some of them.
- Dispatch: a rank writes packets straight into its block at each peer, at places that it computes from its own counts
  alone; then, for each peer, the counts for the peer's experts and, last, a flag with its epoch (SYNC POINT push-flag).
- Combine: a rank writes each row straight to its place at its origin, and adds 1 to the flag of its token there as soon
  as the row is written (SYNC POINT push-token). Flags of tokens count up over all combines; the origin knows what each
  is to reach. Doorbells ring once for each origin, after all rows: whoever waits, waits for all of its tokens.
- There are no acknowledgements. The rules for when a rank may write are these:
    counts, and the word `count` in a flag: two of each, used in turn by even and odd epochs; at any time;
    packets: in its first dispatch; and when the last dispatch was combined since it was made ("in turn");
    rows that return: when there was a dispatch since the last combine, or no combine yet ("in turn").
  An operation that comes out of turn (a second dispatch before the combine of the first, a second combine of one
  dispatch) begins with a round: each rank tells all that it has read all it got so far, and waits for the same of all
  (SYNC POINT push-taken). All ranks make the same calls, so all know when that is.

Theory of operation: nothing is overwritten while it is read. Operations have one order, the same at all ranks. A rank
begins one when it has ended the one before. P, Q and R are any ranks.

- P is at most one dispatch ahead of R: P ends dispatch e when it has acquired the flag that R released in its own
  dispatch e, after R ended its dispatch e - 1.
- Counts. P writes those of dispatch e at R, after P has ended dispatch e - 1, so after R has ended e - 2. R may still
  read those of e - 1, which lie apart. The event word only grows, and R waits for at least e.
- Packets. P writes its block at R in dispatch e. R reads there, in dispatches before e, only as many packets as P sent.
  In turn: of dispatch e - 1, let P have sent R some packets. P has ended a combine of e - 1 since, for which it needed
  the rows that R returned, which R did after it had ended dispatch e - 1. If P sent R none, R reads none. Of dispatches
  before e - 1 the same was known, or follows from a round, when P wrote in e - 1. After a round R has read everything.
- Own rows. Tokens are read by their rank before dispatch returns, outputs before combine does; nobody else sees them.
- Returned rows. Q writes at P in combine c. P reads there in combines before c. In turn: a dispatch d came between
  combine c - 1 and c. Q has ended d, so it has acquired P's flag of d, which P released after it had ended combine
  c - 1. After a round P has ended it, too. Hence P's flags of tokens are also complete for c - 1 when Q adds for c, and
  those that P waits for in c are exactly those of c.
- Dispatch and combine share nothing but the order: packets, counts and flags of one are never touched by the other.

Any mix of operations in the same order at all ranks is safe, with a rank delayed at any step
(tests/multirank/test_moe_delays.py does that), and alternating dispatches and combines never need a round.

Memory (docs/adr/0016): blocks are reserved for the worst case, by the formula of the paper. A sender backs its block at
a peer with memory before it writes there, as far as it is about to; an origin backs its places when it dispatches. So
memory grows with the rows that pairs have exchanged, and too little of it is an error of the rank that wants to send,
before it has sent anything.

Rows are summed where they lie, in an order fixed by the routing, so the result does not depend on timing.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError
from ..kernels import moe_push as kernels, moe_push_combine as combine_kernels, wait, words
from ..kernels.moe import ROW_BITS
from ..layout import moe_push as layout
from ..layout.moe import COUNT_BITS, RT_ROW_OF, RT_SENT_ROWS
from ..layout.record import HOT_LINE_BYTES, align_up
from ..layout.ring import FIELD_BYTES
from ..layout.segment import PAGE_BYTES
from ..protocol.moe_push import buffer_size_hint, message_bytes
from . import traced_moe
from .buffers import address_of
from .core import Waiting
from .dispatched import Dispatched, Outputs, Routing
from .managed import Part, Reservation
from .moe_input import bad_choice
from .moe_protocol import MoeProtocol, overlap
from .moe_shape import MoeShape
from .steps import Steps


class Push(MoeProtocol):
    """Ranks write rows straight into the memory of the rank that wants them.

    Args:
        comm: the communicator.
        shape: of the ExpertParallel object.
        arguments: of its construction, which must be the same at all ranks.
        buffer_bytes: of all messages that a rank has room for, headers not counted, as `buffer_size_hint` has it; what
            that says if None.

    Raises:
        UsageError: ranks differ in an argument.
        CapacityError: `buffer_bytes` is too small, or the managed area or the memory is exhausted.
    """

    name = "push"

    def __init__(self, comm: Any, shape: MoeShape, arguments: dict[str, int], buffer_bytes: int | None = None) -> None:
        super().__init__(comm.core, shape)
        ranks, item_bytes = shape.ranks, shape.dtype.itemsize
        message = message_bytes(shape.hidden, item_bytes=item_bytes, quant="int8" if shape.is_int8 else "none")
        most_rows = 1 if shape.is_dedup else shape.top_k
        needed_bytes = buffer_size_hint(
            ranks=ranks, local_batch=shape.max_tokens, top_k=most_rows, experts_per_die=shape.most_local,
            hidden=shape.hidden, item_bytes=item_bytes, quant="int8" if shape.is_int8 else "none",
        ).total_bytes  # fmt: skip
        buffer_bytes = needed_bytes if buffer_bytes is None else buffer_bytes
        if buffer_bytes < needed_bytes:
            failure = CapacityError(
                f"buffer_bytes is {buffer_bytes}, must be at least {needed_bytes}: see xccl.buffer_size_hint",
                needed_bytes=needed_bytes, available_bytes=buffer_bytes,
            )  # fmt: skip
            self._core.agree("ExpertParallel", arguments, failure)
        self._message_bytes = message
        #: Of a packet in the block of each peer, over all ranks, and of its row on the way back.
        self._place_bytes = ranks * (message + shape.return_bytes)
        #: Packets for which there is room in each block.
        self._places = min(buffer_bytes // self._place_bytes, shape.max_tokens * most_rows)
        header = layout.header_bytes(shape.top_k if shape.is_dedup else 0)
        self._packet_bytes = layout.packet_bytes(message, header)
        self._block_bytes = self._places * self._packet_bytes
        self._return_packet_bytes = layout.return_packet_bytes(shape.return_bytes)
        returns_bytes = max(ranks * self._places, shape.max_tokens * shape.top_k) * self._return_packet_bytes
        packets_bytes = align_up(ranks * self._block_bytes, HOT_LINE_BYTES)
        at = layout.push_metadata(ranks=ranks, most_local=shape.most_local, max_tokens=shape.max_tokens)
        self._reserved = Reservation(
            comm, "ExpertParallel", arguments,
            (at.total_bytes, packets_bytes + returns_bytes), (at.total_bytes, 0),
        )  # fmt: skip
        fields, heap = self._reserved.fields, self._reserved.block
        self._fields, self._status, self._flags = fields, fields + at.status, fields + at.flags
        self._counts_bytes = at.counts_bytes
        self._packets = heap
        self._returns = Part(self._core, heap + packets_bytes, returns_bytes)
        #: By peer: packets for which this rank's block there is backed by memory.
        self._backed = np.zeros(ranks, np.int64)
        self._targets = np.zeros(shape.max_tokens, np.int64)
        self._cursor = np.zeros(1, np.int64)
        #: By peer: how long rows take that are written there.
        self._writes = np.zeros((ranks, layout.PUSH_WRITES.size_bytes // 8), np.int64)
        self._push = np.zeros(layout.PUSH.size_bytes // 8, np.int64)
        self._push_address = address_of(self._push)
        for offset, value in {
            layout.PU_FIELDS: fields,
            layout.PU_COUNTS: fields + at.counts,
            layout.PU_COUNTS_BYTES: at.counts_bytes,
            layout.PU_STATUS: self._status,
            layout.PU_FLAGS: self._flags,
            layout.PU_PACKETS: self._packets,
            layout.PU_BLOCK_BYTES: self._block_bytes,
            layout.PU_PACKET_BYTES: self._packet_bytes,
            layout.PU_HEADER_BYTES: header,
            layout.PU_SCALE: align_up(header + shape.row_bytes, 4),
            layout.PU_RETURNS: heap + packets_bytes,
            layout.PU_RETURN_PACKET_BYTES: self._return_packet_bytes,
            layout.PU_TARGETS: address_of(self._targets),
            layout.PU_BACKED: address_of(self._backed),
            layout.PU_WRITES: address_of(self._writes),
            layout.PU_KEPT: -1,
        }.items():
            self._push[offset // 8] = value
        #: Operations that have ended, and what makes the next one come in turn.
        self._operations = 0
        self._is_dispatch_in_turn = True
        self._is_combine_in_turn = True

    # -- dispatch ---------------------------------------------------------------------------------------------------

    def dispatch(self, steps: Steps, x: npt.NDArray[Any], routing: Routing, outputs: Outputs) -> Dispatched:
        """See `MoeProtocol.dispatch`."""
        state, push, shape = self.state_address, self._push_address, self._shape
        idx = routing.idx
        status = kernels.dispatch_route.call(
            state, push, routing.address, 0 if idx is None else address_of(idx), int(shape.is_dedup)
        )
        if status < 0:
            assert idx is not None
            raise bad_choice(idx, -1 - status, shape.num_experts)
        if status == kernels.BACK:
            self._back(routing)
        self._returns.grow(routing.tokens * shape.top_k * self._return_packet_bytes)
        epoch, in_turn = self._dispatches + 1, self._is_dispatch_in_turn
        steps.begin(epoch)
        if not in_turn:
            self._meet(steps, "dispatch")
        self._dispatches = routing.epoch = epoch
        steps("send")
        idx_address = weights_address = 0
        if idx is not None and routing.gates is not None:
            idx_address, weights_address = address_of(idx), address_of(routing.gates)
        kernels.dispatch_send.call(state, push, routing.address, address_of(x), idx_address, weights_address)
        routing.idx = routing.gates = None
        steps("notify")
        kernels.dispatch_notify.call(state, push, routing.address, int(routing.known is None))
        steps("await-flags")
        self._core.wait_all(
            self._own_segment + self._fields + layout.PF_EVENT, FIELD_BYTES, epoch,
            "dispatch, await-flags (of all ranks)",
        )  # fmt: skip
        steps("assemble")
        result = self._assemble(x, routing, outputs)
        self._operations += 1
        self._is_dispatch_in_turn, self._is_combine_in_turn = False, True
        steps.finish(
            traced_moe.push_dispatched, shape, routing, in_turn=in_turn, packet_bytes=self._packet_bytes,
            header_bytes=self._packet_bytes - self._message_bytes, counts_bytes=self._counts_bytes,
        )  # fmt: skip
        return result

    def _back(self, routing: Routing) -> None:
        """Back the own blocks at all peers for what is to be sent.

        Raises:
            CapacityError: a block is too small, or there is no memory.
        """
        rows = np.diff(routing.part(RT_SENT_ROWS, self._shape.ranks + 1))
        most = int(rows.max(initial=0))
        if most > self._places:
            needed_bytes = most * self._place_bytes
            raise CapacityError(
                f"{most} rows go to rank {int(rows.argmax())}, whose buffer has room for {self._places}, since a token "
                f"names an expert more than once; buffer_bytes must be at least {needed_bytes}",
                needed_bytes=needed_bytes, available_bytes=self._places * self._place_bytes,
                value=most, bound=self._places,
            )  # fmt: skip
        fabric, rank = self._core.fabric, self._core.rank
        for peer in np.flatnonzero(rows > self._backed).tolist():
            n_bytes = int(rows[peer]) * self._packet_bytes
            # A quarter more, so that a routing that changes a little does not come here again and again.
            n_bytes = min(align_up(n_bytes + n_bytes // 4, PAGE_BYTES), self._block_bytes)
            fabric.commit(peer, self._packets + rank * self._block_bytes, n_bytes)
            self._backed[peer] = n_bytes // self._packet_bytes

    def _meet(self, steps: Steps, operation: str) -> None:
        """The round before an operation that comes out of turn."""
        steps("release")
        kernels.release.call(self.state_address, self._push_address, self._operations)
        steps("await-taken")
        self._core.wait_all(
            self._own_segment + self._fields + layout.PF_TAKEN, FIELD_BYTES, self._operations,
            f"{operation}, await-taken (peers read what came before)",
        )  # fmt: skip

    def _assemble(self, x: npt.NDArray[Any], routing: Routing, outputs: Outputs) -> Dispatched:
        state, push = self.state_address, self._push_address
        is_new = routing.known is None
        counts = np.empty(self._shape.local_experts, np.int64) if is_new else None
        status = kernels.dispatch_plan.call(state, push, routing.address, 0 if counts is None else address_of(counts))
        if status < 0:
            peer = -1 - status
            word = self._fields + peer * FIELD_BYTES + layout.PF_COUNT + 8 * (routing.epoch & 1)
            raise self._bad_source(routing, peer, words.load(self._own_segment + word) >> COUNT_BITS)
        result = outputs.make(routing, counts)
        if is_new:
            routing.make_places()
        kernels.dispatch_assemble.call(
            state, push, routing.address, address_of(x), address_of(result.tokens),
            0 if result.scales is None else address_of(result.scales), address_of(result.source) if is_new else 0,
        )  # fmt: skip
        if is_new and result.index is not None and result.weights is not None:
            kernels.dispatch_assemble_entries.call(
                state, push, routing.address, address_of(result.index), address_of(result.weights)
            )
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
        state, push = self.state_address, self._push_address
        epoch, in_turn = self._combines + 1, self._is_combine_in_turn
        steps.begin(epoch)
        if not in_turn:
            self._meet(steps, "combine")
        self._combines = epoch
        # A sum may only overwrite rows that it does not read.
        are_kept = not overlap(expert_out, y)
        steps("send")
        combine_kernels.combine_send.call(
            state, push, routing.address, address_of(expert_out), epoch, self._core.rank if are_kept else -1
        )
        steps("flag")
        combine_kernels.combine_ring.call(state, push, routing.address)
        steps("await-flags")
        self._await_tokens(routing, epoch)
        steps("reduce")
        missing = combine_kernels.combine_reduce.call(
            state, push, routing.address, epoch, address_of(expert_out), 0 if weights is None else address_of(weights),
            0 if shared_out is None else address_of(shared_out), address_of(y),
        )  # fmt: skip
        if missing >= 0:  # flags are complete, but somebody else's rows have raised them
            peer = self._owner(routing, missing)
            self._require_same_dispatch(routing, epoch, peer)
            raise self._other_dispatch(routing, peer, routing.epoch)
        self._operations += 1
        self._is_combine_in_turn = False
        if routing.epoch == self._dispatches:
            self._is_dispatch_in_turn = True
        steps.finish(
            traced_moe.push_combined, self._shape, routing, shared_out is not None, in_turn=in_turn,
            are_kept=are_kept, packet_bytes=self._return_packet_bytes,
        )  # fmt: skip

    def _await_tokens(self, routing: Routing, epoch: int) -> None:
        """Wait for the rows of all own tokens; where they do not come, see that peers make the same combine."""
        core = self._core
        self._cursor[0] = 0
        deadline_ns = time.monotonic_ns() + int(core.op_timeout_s * 1e9)
        status = self._look_at_tokens(routing, core.until_ns(deadline_ns))
        if status != wait.OK:
            self._go_on_for_tokens(status, routing, epoch, deadline_ns)

    def _look_at_tokens(self, routing: Routing, until_ns: int) -> int:
        """The kernel: go on where the last call ended."""
        flags, targets, cursor = self._own_segment + self._flags, address_of(self._targets), address_of(self._cursor)
        call = combine_kernels.wait_tokens.call
        return int(call(self._core.control, flags, targets, routing.tokens, cursor, until_ns))

    def _go_on_for_tokens(self, status: int, routing: Routing, epoch: int, deadline_ns: int) -> None:
        """The rest of `_await_tokens`: a function of its own, since closures are made when a function is entered."""
        cursor = self._cursor

        def check(status: int) -> int:
            if status == wait.SLICE:
                peer = self._missing_peer(routing, epoch, int(cursor[0]))
                if peer is not None:
                    self._require_same_dispatch(routing, epoch, peer)
            return status

        def step(until_ns: int) -> int:
            return check(self._look_at_tokens(routing, until_ns))

        def describe() -> Waiting:
            token = min(int(cursor[0]), routing.tokens - 1)
            peer = self._missing_peer(routing, epoch, token)
            seen = int(words.load(self._own_segment + self._flags + token * HOT_LINE_BYTES))
            return Waiting(f"combine, await-flags (token {token})", epoch, peer, int(self._targets[token]), seen)

        self._core.finish(check(status), step, describe, self._core.op_timeout_s, deadline_ns)

    def _missing_peer(self, routing: Routing, epoch: int, token: int) -> int | None:
        """A rank whose row for a token is not there; None if all are."""
        i = combine_kernels.first_missing.call(self.state_address, self._push_address, routing.address, epoch, token)
        return None if i < 0 else self._owner(routing, i)

    @staticmethod
    def _owner(routing: Routing, i: int) -> int:
        """The rank of the expert of (token, slot) number i."""
        return int(routing.part(RT_ROW_OF, i + 1)[i]) >> ROW_BITS

    def _require_same_dispatch(self, routing: Routing, epoch: int, peer: int) -> None:
        """Raise EventMismatch if a peer combines another dispatch; looks at what it says of itself.

        That is in the peer's own segment, and is read only where its row does not come. It may be in another combine,
        or in none yet; then it says nothing.
        """
        status = int(self._core.fabric.segments[peer]) + self._status
        # SYNC POINT push-status: acquires what the peer combines.
        if words.load(status + layout.PS_COMBINE) == epoch:
            theirs = int(words.load(status + layout.PS_DISPATCH))
            if theirs != routing.epoch:
                raise self._other_dispatch(routing, peer, theirs)

    def free(self) -> None:
        """See `MoeProtocol.free`."""
        self._reserved.free()
