"""What the collectives of one communicator rest on: its block, its staging area, its plans, and how a call is made."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NoReturn, Self

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError, FabricError, UsageError
from ..kernels import collectives as kernels, words
from ..kernels.wait import MISMATCH, OK
from ..layout import collectives as layout
from ..layout.collectives import AGREE_MAX_VALUES, RECORD_BYTES, TABLE_COLUMNS, block_bytes
from ..protocol.collective_cuts import Kind, counts_arrivals, stage_bytes
from .buffers import address_of
from .core import PROGRESS_SLICE_NS, SLICE_NS, Core, Waiting
from .known import KnownCalls
from .plans import Plan, disagreement, make_plan, make_refusal, make_rows_plan
from .symmetric import SymmetricAllocator, give_back

Array = npt.NDArray[Any]

#: Plans that are kept for calls with the same arguments.
_MAX_PLANS: Final = 4096
#: When private memory cannot be read any more: how long it may take until its process is seen to have died.
_DEATH_S: Final = 0.5


class Exchange:
    """The collective part of one communicator.

    Args:
        core: waits of this rank.
        heap: where the staging area is allocated, when it is first needed; each rank does so by itself.
        blocks: int64 [ranks], addresses of the communicator's blocks.

    Attributes:
        address: of the state as kernels know it.
        blocks: see above.
        broken: why no collective is possible any more.
        known: calls that can be made at once. It is emptied when anything is to be done before a call, so that the
            usual call needs to look at nothing else.
        table: alltoallv: [columns, ranks], see `layout.collectives`.
    """

    def __init__(
        self,
        core: Core,
        heap: SymmetricAllocator,
        blocks: npt.NDArray[np.int64],
    ) -> None:
        self.core = core
        self.blocks = blocks
        self.broken: str | None = None
        self._heap = heap
        self._stage: int | None = None
        #: Bytes of each half of the staging area that are backed by memory.
        self._committed = 0
        self._half_bytes = stage_bytes(core.size, core.fabric.geometry.heap_bytes)
        #: What this rank has said without waiting for the others.
        self._owed: Plan | None = None
        self._plans: dict[Any, Plan] = {}
        self._by_address: dict[int, Plan] = {}
        self._rows = np.zeros(core.size, np.int64)
        self.table = np.zeros((TABLE_COLUMNS, 0), np.int64)
        self._said = np.zeros(AGREE_MAX_VALUES, np.int64)
        self.state = np.zeros(layout.COLLECTIVE_STATE.size_bytes // 8, np.int64)
        self.address: int = self.state.ctypes.data
        for offset, value in {
            layout.CS_CONTROL: core.control,
            layout.CS_CONTROLS: core.controls_address,
            layout.CS_SEGMENTS: core.segments_address,
            layout.CS_BLOCKS: blocks.ctypes.data,
            layout.CS_ROWS: self._rows.ctypes.data,
            layout.CS_PROCESSES: core.fabric.processes.ctypes.data,
            layout.CS_SEGMENT_BYTES: core.fabric.segment_bytes,
            layout.CS_RANK: core.rank,
            layout.CS_RANKS: core.size,
            layout.CS_COUNTS: int(counts_arrivals(core.size)),
        }.items():
            self.state[offset // 8] = value
        self.known = KnownCalls(core.calls, self.address)

    @classmethod
    def of_session(cls, core: Core, heap: SymmetricAllocator, metadata: SymmetricAllocator) -> Self:
        """That of the session's communicator; its blocks are at the same offset in all segments."""
        fabric, size, n_bytes = core.fabric, core.size, block_bytes(core.size)
        offset = metadata.alloc(n_bytes)
        # Where arrivals are counted, a rank writes to its own block and to that of rank 0 alone.
        for peer in {0, core.rank} if counts_arrivals(size) else range(size):
            fabric.commit(peer, offset, n_bytes)
        return cls(core, heap, fabric.segments + offset)

    # -- plans --------------------------------------------------------------------------------------------------------

    def plan(
        self, kind: Kind, n_bytes: int, dtype: np.dtype[Any], operator: str | None = None, root: int | None = None,
        algorithm: str = "auto",
    ) -> Plan:  # fmt: skip
        """The plan for a call; arguments and errors are those of `make_plan`.

        Raises:
            CapacityError: the managed data area is too small for a staging area.
        """
        core = self.core

        def make() -> Plan:
            arguments = n_bytes, dtype, operator, root, algorithm
            return make_plan(kind, core.rank, core.size, *arguments, self._half_bytes, core.fabric.reached)

        return self._kept(kind, (kind, n_bytes, dtype, operator, root, algorithm), make)

    def plan_rows(self, dtype: np.dtype[Any], row_bytes: int) -> Plan:
        """The plan for alltoallv of such rows.

        Raises:
            CapacityError: the managed data area is too small for a staging area.
        """
        size = self.core.size
        if not self.table.size:
            self.table = np.zeros((TABLE_COLUMNS, size), np.int64)
            self.state[layout.CS_TABLE // 8] = self.table.ctypes.data
        half_bytes, reached = self._half_bytes, self.core.fabric.reached
        return self._kept(
            "alltoallv", (dtype, row_bytes), lambda: make_rows_plan(size, dtype, row_bytes, half_bytes, reached)
        )

    def _kept(self, kind: Kind, key: Any, make: Callable[[], Plan]) -> Plan:
        plan = self._plans.get(key)
        if plan is None:
            size, heap_bytes = self.core.size, self.core.fabric.geometry.heap_bytes
            if kind != "agreement" and self._half_bytes < 128 * size:
                raise CapacityError(
                    f"heap_bytes is {heap_bytes}: too little for the staging area of {size} ranks",
                    needed_bytes=512 * size, available_bytes=heap_bytes,
                )  # fmt: skip
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
                self._by_address.clear()
                self.known.clear()
            plan = self._plans[key] = make()
            self._by_address[plan.address] = plan
        return plan

    # -- calls --------------------------------------------------------------------------------------------------------

    def prepare(self, plan: Plan) -> None:
        """Do what must be done before a call: the end of the last one, and a staging area.

        Args:
            plan: the call.

        Raises:
            CapacityError: there is no room; the other ranks hear of it.
            FabricError: a call was given up in the middle.
        """
        core = self.core
        if self.broken is not None:
            raise FabricError(f"rank {core.rank}: no collective is possible: {self.broken}", rank=core.rank)
        self._settle()
        if plan.half_bytes > self._committed:
            try:
                self._grow(plan.half_bytes)
            except CapacityError as error:
                self.refuse(error)

    def run(self, plan: Plan, x: Array | None, out: Array | None, timeout_s: float | None = None) -> int:
        """Make a call that was prepared, to its end or until sizes are known.

        Args:
            plan: the call.
            x: the input.
            out: the output.
            timeout_s: deadline in seconds; the communicator's default if None.

        Returns:
            OK; for alltoallv also SIZES_KNOWN or WRONG_ROWS.

        Raises:
            UsageError: ranks have made different calls; at all of them.
            CapacityError: a rank has no room for the staging area; at all of them.
            FabricError: the private memory of a rank that has given up cannot be read any more.
            WaitTimeout, PeerDied, SessionAborted: see `xccl.errors`.
        """
        slice_ns = SLICE_NS if self.core.progress is None else PROGRESS_SLICE_NS
        status = int(kernels.collective.call(self.address, plan.address, *_places(x), *_places(out), -slice_ns))
        return status if status == OK else self.finish(plan, status, x, out, timeout_s)

    def finish(
        self, plan: Plan, status: int, x: Array | None, out: Array | None, timeout_s: float | None = None
    ) -> int:
        """Go on with a call whose kernel has returned another status than OK; otherwise as `run`."""
        core = self.core
        args = self.address, plan.address, *_places(x), *_places(out)
        timeout_s = core.op_timeout_s if timeout_s is None else timeout_s
        try:
            if status == kernels.BUSY:
                raise FabricError(f"rank {core.rank}: another collective was given up in the middle", rank=core.rank)
            if status < 0 and status != MISMATCH:
                status = core.finish(
                    status,
                    lambda until_ns: int(kernels.collective.call(*args, until_ns)),
                    lambda: self._waiting(plan.name),
                    timeout_s,
                    time.monotonic_ns() + int(timeout_s * 1e9),
                )
            if status == kernels.UNREACHABLE:
                raise self._unreachable(plan.name)
        except BaseException as error:
            if x is not None:
                self.core.fabric.keep(x)
            self._break(f"{plan.name} was given up in the middle ({type(error).__name__})")
            raise
        if status == MISMATCH:
            raise disagreement(plan.name, core.rank, self._said_by_all(plan))
        return status

    def rows_that_came(self) -> int:
        """Alltoallv: rows of the last call, of all ranks together."""
        return int(self.state[layout.CS_CAME // 8])

    def under_way(self) -> Plan:
        """The plan of the call that a direct call has begun."""
        return self._by_address[int(self.state[layout.CS_PLAN // 8])]

    def tell_all(self, call: str, values: list[int]) -> npt.NDArray[np.int64]:
        """Tell all ranks at most AGREE_MAX_VALUES words.

        Args:
            call: what for; all ranks are in a call of this kind, if not in the same one.
            values: the words, as many at all ranks.

        Returns:
            [ranks, len(values)], those of all ranks.

        Raises:
            UsageError: another rank is in a collective on data, or has refused.
            WaitTimeout, PeerDied, SessionAborted: see `xccl.errors`.
        """
        self._said[: len(values)] = values
        plan = self.plan("agreement", self._said.nbytes, self._said.dtype)
        plan.name = call
        self.prepare(plan)
        # It has no output: with n ranks as threads, all words of all of them would be n * n.
        self.run(plan, self._said, None)
        heard = np.empty((self.core.size, len(values)), np.int64)
        heard[self.core.rank] = values
        kernels.read_said.call(self.address, heard.ctypes.data, 8 * len(values))
        return heard

    def refuse(self, error: UsageError | CapacityError) -> NoReturn:
        """Raise `error` at once, and let the call of the other ranks fail instead of waiting for this one."""
        if self.broken is None and not self.core.closed:
            self._settle()
            self._owed = make_refusal(self.core.size, error)
            self.known.clear()
            kernels.refuse.call(self.address, self._owed.address)
        raise error

    def _settle(self) -> None:
        """Wait for the others' part of a step that this rank has refused: it is never two steps ahead of another."""
        owed = self._owed
        if owed is not None:
            try:
                self.run(owed, None, None)
            except (UsageError, CapacityError):
                pass  # this rank has said so itself
            self._owed = None

    def _grow(self, half_bytes: int) -> None:
        """Back so much of each half of the staging area with memory."""
        fabric, rank = self.core.fabric, self.core.rank
        if self._stage is None:
            self._stage = self._heap.alloc(2 * self._half_bytes)
            self.state[layout.CS_STAGE // 8] = self._stage
        for half in (0, self._half_bytes):
            fabric.commit(rank, self._stage + half, half_bytes)
        self._committed = half_bytes

    def _break(self, reason: str) -> None:
        self.broken = reason
        self.known.clear()

    def free(self) -> None:
        """Give the staging area back. No rank reads it any more."""
        self._break("it was freed")
        if self._stage is not None:
            give_back(self.core, self._heap, self._stage)
            self._stage = None

    # -- what ranks say -----------------------------------------------------------------------------------------------

    def _record(self, peer: int) -> int:
        """Address of what `peer` says in the step under way."""
        step = int(self.state[layout.CS_STEP // 8])
        if counts_arrivals(self.core.size):
            return int(self.blocks[peer]) + layout.HEADERS_OFFSET + step % 2 * RECORD_BYTES
        own = int(self.blocks[self.core.rank])
        return own + layout.RECORDS_OFFSET + (step % 2 * self.core.size + peer) * RECORD_BYTES

    def _waiting(self, name: str) -> Waiting:
        """The first rank that has not published the step under way."""
        step = int(self.state[layout.CS_STEP // 8])

        def missing(first: int) -> list[int]:
            return [peer for peer in range(first, self.core.size) if self._seen(peer, step) < step]

        for peer in range(self.core.size):
            seen = self._seen(peer, step)
            if seen < step:
                return Waiting(name, step, peer, step, seen, missing=partial(missing, peer))
        return Waiting(name, step, None, step, step)

    def _seen(self, peer: int, step: int) -> int:
        """The last step that `peer` has published, as far as this rank sees, which has published `step`."""
        return step if peer == self.core.rank else int(words.load(self._record(peer) + layout.CR_STEP))

    def _unreachable(self, name: str) -> FabricError:
        """The error when the input of a rank cannot be read any more, unless that is because it died or left."""
        core, peer = self.core, int(self.state[layout.CS_CURSOR // 8])
        waiting = Waiting(name, None, peer)
        deadline = time.monotonic() + _DEATH_S
        while time.monotonic() < deadline:
            core.check_session(lambda: waiting)
            if core.has_left(waiting):
                raise core.left(waiting)
            time.sleep(0.001)
        return FabricError(
            f"rank {core.rank}: {name}: the input of rank {peer} cannot be read any more", rank=core.rank, peer=peer
        )

    def _said_by_all(self, plan: Plan) -> dict[int, tuple[int, int]]:
        """Signature and size of a part, by rank."""
        said = {}
        for peer in range(self.core.size):
            said[peer] = plan.signature, plan.part_bytes
            if peer != self.core.rank:
                record = self._record(peer)
                said[peer] = int(words.load(record + layout.CR_SIGNATURE)), int(words.load(record + layout.CR_BYTES))
        return said


def _places(array: Array | None) -> tuple[int, int]:
    """Address and rows of an array, as kernels take them."""
    if array is None:
        return 0, -1
    return address_of(array), len(array) if array.ndim else 0
