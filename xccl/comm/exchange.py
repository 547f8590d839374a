"""What collectives rest on: the block of a communicator, the staging area, and the calls with their arguments."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError, FabricError, UsageError, XcclError
from ..kernels import collectives as kernels
from ..kernels import words
from ..kernels.wait import MISMATCH, OK
from ..layout import collectives as layout
from ..layout.collectives import OPERATORS, RECORD_BYTES, block_bytes
from ..layout.dtypes import CODE_OF
from ..layout.segment import AGREE_MAX_VALUES
from ..protocol.collectives import ALGORITHMS, FLOWS, STAGE_BYTES, Cut, Kind, counts_arrivals, cut
from .core import PROGRESS_SLICE_NS, SLICE_NS, Core, Waiting, grouped
from .symmetric import give_back

if TYPE_CHECKING:
    from .symmetric import SymmetricAllocator

_KINDS: Final[tuple[Kind, ...]] = tuple(FLOWS)
#: What a rank says that does not take part: its argument was impossible, or it has no room.
_REFUSED, _FULL = len(_KINDS), len(_KINDS) + 1
_NO_ROOT: Final = 0xFFFF
#: Plans that are kept for calls with the same arguments.
_MAX_PLANS: Final = 4096

_DTYPE_NAMES: dict[int, str] = {}


def _checksum(dtype: object) -> int:
    """24 bits that stand for an element type in signatures."""
    checksum = zlib.crc32(str(dtype).encode()) & 0xFFFFFF
    _DTYPE_NAMES[checksum] = str(dtype)
    return checksum


def _signature(kind: int, algorithm: int = 0, operator: int = 0, root: int = _NO_ROOT, dtype: int = 0) -> int:
    return kind << 56 | algorithm << 48 | operator << 40 | root << 24 | dtype


class Plan:
    """A collective call with all its arguments but the data. Kept, and used again by calls with the same arguments.

    Attributes:
        kind: which collective.
        name: of the call, for errors.
        cut: its steps.
        address: of the plan as kernels know it.
        row_bytes: alltoallv: size of a row.
        table: alltoallv: [4, ranks] bytes sent, where they start, bytes received, where they go.
    """

    def __init__(self, kind: Kind, cut: Cut, words: dict[int, int], ranks: int = 0, row_bytes: int = 0) -> None:
        self.kind = kind
        self.name: str = kind
        self.cut = cut
        self.half_bytes = cut.half_bytes
        self.state = np.zeros(layout.PLAN.size_bytes // 8, np.int64)
        self.address: int = self.state.ctypes.data
        self.row_bytes = row_bytes
        self.table = np.zeros((4, ranks), np.int64)
        words[layout.PL_TABLE] = self.table.ctypes.data
        for offset, value in words.items():
            self.state[offset // 8] = value


class Exchange:
    """The collective part of one communicator: its block, its staging area, and its plans.

    Args:
        core: waits of this rank.
        heap: where the staging area is allocated, when it is first needed; each rank does so by itself.
        blocks: int64 [ranks], addresses of the communicator's blocks.
        commit: backs with memory the blocks that this rank writes to; called before the first call.
    """

    def __init__(
        self,
        core: Core,
        heap: SymmetricAllocator,
        blocks: npt.NDArray[np.int64],
        commit: Callable[[], None] | None = None,
    ) -> None:
        self.core = core
        self.blocks = blocks
        #: Why no collective is possible any more.
        self.broken: str | None = None
        self._heap = heap
        self._stage: int | None = None
        self._commit = commit
        #: Bytes of each half of the staging area that are backed by memory; -1 before the first call.
        self._committed = -1
        self.half_bytes = min(STAGE_BYTES, core.fabric.geometry.heap_bytes // 4 // 64 * 64)
        #: A step that this rank has published without waiting for the others.
        self._owed: Plan | None = None
        self._plans: dict[Any, Plan] = {}
        self._rows = np.zeros(core.size, np.int64)
        self._said = np.zeros(AGREE_MAX_VALUES, np.int64)
        self._heard = np.zeros((core.size, AGREE_MAX_VALUES), np.int64)
        self.state = np.zeros(layout.COLLECTIVE_STATE.size_bytes // 8, np.int64)
        self.address: int = self.state.ctypes.data
        for offset, value in {
            layout.CS_CONTROL: core.control,
            layout.CS_CONTROLS: core.controls_address,
            layout.CS_SEGMENTS: core.segments_address,
            layout.CS_BLOCKS: blocks.ctypes.data,
            layout.CS_ROWS: self._rows.ctypes.data,
            layout.CS_RANK: core.rank,
            layout.CS_RANKS: core.size,
            layout.CS_COUNTS: int(counts_arrivals(core.size)),
        }.items():
            self.state[offset // 8] = value

    @classmethod
    def of_session(cls, core: Core, heap: SymmetricAllocator, metadata: SymmetricAllocator) -> Self:
        """That of the session's communicator; its blocks are at the same offset in all segments."""
        fabric, size, n_bytes = core.fabric, core.size, block_bytes(core.size)
        offset = metadata.alloc(n_bytes)

        def commit() -> None:
            # Where arrivals are counted, a rank writes to its own block and to that of rank 0 alone.
            for peer in {0, core.rank} if counts_arrivals(size) else range(size):
                fabric.commit(peer, offset, n_bytes)

        return cls(core, heap, fabric.segments + offset, commit)

    # -- plans --------------------------------------------------------------------------------------------------------

    def plan(
        self,
        kind: Kind,
        n_bytes: int,
        dtype: np.dtype[Any],
        operator: str | None = None,
        root: int | None = None,
        algorithm: str = "auto",
    ) -> Plan:
        """The plan for a call.

        Args:
            kind: which collective.
            n_bytes: size of a part, -1 in alltoallv.
            dtype: element type.
            operator: of those that reduce.
            root: of those that have one.
            algorithm: see `protocol.collectives.cut`.

        Raises:
            UsageError: there is no such algorithm, operator or root, or no operator for this element type.
            CapacityError: the managed data area is too small for a staging area.
        """
        key = (kind, n_bytes, dtype, operator, root, algorithm)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._make_plan(kind, n_bytes, dtype, operator, root, algorithm)
        return plan

    def _make_plan(
        self, kind: Kind, n_bytes: int, dtype: np.dtype[Any], operator: str | None, root: int | None, algorithm: str
    ) -> Plan:
        flow, size = FLOWS[kind], self.core.size
        self._require_room()
        fold = self._fold(dtype, operator) if flow.reduces else -1
        cut_ = cut(kind, size, n_bytes, algorithm, self.half_bytes)
        at_root = _NO_ROOT if root is None else root
        operator_code = max(fold, 0) % len(OPERATORS)
        algorithm_code = ALGORITHMS.index(cut_.algorithm)
        code = _signature(_KINDS.index(kind), algorithm_code, operator_code, at_root, _checksum(dtype))
        return Plan(kind, cut_, {
            layout.PL_SIGNATURE: code,
            layout.PL_BYTES: n_bytes,
            layout.PL_SEND_STRIDE: n_bytes if flow.parts else 0,
            layout.PL_RECV_STRIDE: n_bytes if flow.keeps else 0,
            layout.PL_SENDER: at_root if flow.from_root else -1,
            layout.PL_RECEIVER: at_root if flow.to_root else -1,
            layout.PL_FOLD: fold,
            layout.PL_ITEM_BYTES: dtype.itemsize,
            layout.PL_TWO_STEP: int(cut_.algorithm == "two-step"),
            layout.PL_CHUNK: cut_.chunk_bytes,
            layout.PL_STEPS: cut_.steps,
            layout.PL_INLINE: int(cut_.inline),
            layout.PL_HALF: self.half_bytes,
            layout.PL_RESULTS: cut_.results,
        })  # fmt: skip

    def plan_rows(self, dtype: np.dtype[Any], row_bytes: int) -> Plan:
        """The plan for alltoallv of such rows; what goes where is filled into its table.

        Raises:
            CapacityError: the managed data area is too small for a staging area.
        """
        key = (dtype, row_bytes)
        plan = self._plans.get(key)
        if plan is None:
            self._require_room()
            cut_ = cut("alltoallv", self.core.size, -1, "mesh", self.half_bytes)
            rows = _checksum(f"{dtype} in rows of {row_bytes} bytes")
            plan = self._plans[key] = Plan("alltoallv", cut_, {
                layout.PL_SIGNATURE: _signature(_KINDS.index("alltoallv"), dtype=rows),
                layout.PL_BYTES: -1,
                layout.PL_SENDER: -1,
                layout.PL_RECEIVER: -1,
                layout.PL_FOLD: -1,
                layout.PL_CHUNK: cut_.chunk_bytes,
                layout.PL_STEPS: 1,
                layout.PL_HALF: self.half_bytes,
                layout.PL_RESULTS: cut_.results,
            }, self.core.size, row_bytes)  # fmt: skip
        return plan

    def _require_room(self) -> None:
        size, heap_bytes = self.core.size, self.core.fabric.geometry.heap_bytes
        if self.half_bytes < 128 * size:
            raise CapacityError(
                f"heap_bytes is {heap_bytes}: too little for the staging area of {size} ranks",
                needed_bytes=512 * size, available_bytes=heap_bytes,
            )  # fmt: skip

    @staticmethod
    def _fold(dtype: np.dtype[Any], operator: str | None) -> int:
        if operator not in OPERATORS:
            raise UsageError(f"op must be one of {', '.join(OPERATORS)}, got {operator!r}", value=operator)
        code = CODE_OF.get(dtype)
        if code is None:
            raise UsageError(f"op {operator} is for {', '.join(map(str, CODE_OF))}; got {dtype}", value=str(dtype))
        return code * len(OPERATORS) + OPERATORS.index(operator)

    # -- calls --------------------------------------------------------------------------------------------------------

    def run(self, plan: Plan, x: int, out: int, timeout_s: float | None = None) -> int:
        """Make a call, to its end or until sizes are known.

        Args:
            plan: the call.
            x: address of the input.
            out: address of the output.
            timeout_s: deadline in seconds; the communicator's default if None.

        Returns:
            OK or SIZES_KNOWN.

        Raises:
            UsageError: ranks have made different calls; at all of them.
            CapacityError: a rank has no room for the staging area; at all of them.
            WaitTimeout, PeerDied, SessionAborted: see `xccl.errors`.
        """
        core = self.core
        if plan.half_bytes > self._committed or self._owed is not None or self.broken is not None:
            self._prepare(plan)
        slice_ns = SLICE_NS if core.progress is None else PROGRESS_SLICE_NS
        status = int(kernels.collective.call(self.address, plan.address, x, out, -slice_ns))
        if status >= OK and status != kernels.BUSY:
            return status
        return self._finish(plan, status, x, out, timeout_s)

    def _finish(self, plan: Plan, status: int, x: int, out: int, timeout_s: float | None) -> int:
        core = self.core
        timeout_s = core.op_timeout_s if timeout_s is None else timeout_s
        try:
            if status == kernels.BUSY:
                raise FabricError(f"rank {core.rank}: another collective was given up in the middle", rank=core.rank)
            if status != MISMATCH:
                status = core.finish(
                    status,
                    lambda until_ns: int(kernels.collective.call(self.address, plan.address, x, out, until_ns)),
                    lambda: self._waiting(plan.name),
                    timeout_s,
                    time.monotonic_ns() + int(timeout_s * 1e9),
                )
        except BaseException as error:
            self.broken = f"{plan.name} was given up in the middle ({type(error).__name__})"
            raise
        if status == MISMATCH:
            raise self._mismatch(plan)
        return status

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
        self.run(plan, self._said.ctypes.data, self._heard.ctypes.data)
        return self._heard[:, : len(values)].copy()

    def refuse(self, error: UsageError | CapacityError) -> NoReturn:
        """Raise `error` at once, and let the call of the other ranks fail instead of waiting for this one."""
        if self.broken is None and not self.core.closed:
            if self._commit is not None:
                self._commit()
                self._commit = None
            self._settle()
            kind = _FULL if isinstance(error, CapacityError) else _REFUSED
            self._owed = Plan("agreement", cut("agreement", self.core.size, 0), {
                layout.PL_SIGNATURE: _signature(kind), layout.PL_SENDER: -1, layout.PL_RECEIVER: -1,
                layout.PL_FOLD: -1, layout.PL_INLINE: 1, layout.PL_CHUNK: 64, layout.PL_STEPS: 1,
            })  # fmt: skip
            kernels.refuse.call(self.address, self._owed.address)
        raise error

    def _settle(self) -> None:
        """Wait for the others' part of the step that this rank has refused. So it is never two steps ahead."""
        owed = self._owed
        if owed is not None:
            status = int(kernels.collective.call(self.address, owed.address, 0, 0, -SLICE_NS))
            if status not in (OK, MISMATCH):
                self._finish_owed(owed, status)
            self._owed = None

    def _finish_owed(self, owed: Plan, status: int) -> None:
        try:
            self._finish(owed, status, 0, 0, None)
        except (UsageError, CapacityError):
            pass  # this rank knew

    def _prepare(self, plan: Plan) -> None:
        """What is seldom needed before a call: an end of the last one, and a staging area."""
        if self.broken is not None:
            raise FabricError(f"rank {self.core.rank}: no collective is possible: {self.broken}", rank=self.core.rank)
        if self._commit is not None:
            self._commit()
            self._commit = None
        self._settle()
        if plan.half_bytes > self._committed:
            try:
                self._grow(plan.half_bytes)
            except CapacityError as error:
                self.refuse(error)

    def _grow(self, half_bytes: int) -> None:
        """Back so much of each half of the staging area with memory."""
        fabric, rank = self.core.fabric, self.core.rank
        if self._stage is None and half_bytes:
            self._stage = self._heap.alloc(2 * self.half_bytes)
            self.state[layout.CS_STAGE // 8] = self._stage
        for half in (0, self.half_bytes):
            if self._stage is not None:
                fabric.commit(rank, self._stage + half, half_bytes)
        self._committed = half_bytes

    def free(self) -> None:
        """Give the staging area back. No rank reads it any more."""
        if self._stage is not None:
            give_back(self.core, self._heap, self._stage)
            self._stage = None
            self._committed = 0
        self.broken = "it was freed"

    # -- what ranks say -----------------------------------------------------------------------------------------------

    def _word(self, offset: int) -> int:
        return int(self.state[offset // 8])

    def _record(self, peer: int) -> int:
        """Address of what `peer` says in the step under way."""
        step = self._word(layout.CS_STEP)
        if counts_arrivals(self.core.size):
            return int(self.blocks[peer]) + layout.HEADERS_OFFSET + step % 2 * RECORD_BYTES
        own = int(self.blocks[self.core.rank])
        return own + layout.RECORDS_OFFSET + (step % 2 * self.core.size + peer) * RECORD_BYTES

    def _waiting(self, kind: str) -> Waiting:
        """The first rank that has not published the step under way."""
        step, rank = self._word(layout.CS_STEP), self.core.rank
        for peer in range(self.core.size):
            seen = step if peer == rank else int(words.load(self._record(peer) + layout.CR_STEP))
            if seen < step:
                return Waiting(kind, step, peer, step, seen)
        return Waiting(kind, step, None, step, step)

    def _mismatch(self, plan: Plan) -> XcclError:
        """The error when ranks have made different calls; the same at all of them."""
        rank = self.core.rank
        said: dict[int, tuple[int, int]] = {}
        for peer in range(self.core.size):
            if peer == rank:
                said[peer] = int(plan.state[layout.PL_SIGNATURE // 8]), int(plan.state[layout.PL_BYTES // 8])
            else:
                record = self._record(peer)
                said[peer] = int(words.load(record + layout.CR_SIGNATURE)), int(words.load(record + layout.CR_BYTES))
        for peer, (signature, _) in said.items():
            if signature >> 56 == _REFUSED:
                text = f"{plan.name}: rank {peer} was given an impossible argument"
                return UsageError(text, value=plan.name, peer=peer)
            if signature >> 56 == _FULL:
                return CapacityError(f"{plan.name}: rank {peer} has no room for it, so no rank goes on", peer=peer)
        for name, read in _ARGUMENTS.items():
            by_rank = {peer: read(*what) for peer, what in said.items()}
            if len(set(by_rank.values())) > 1:
                return UsageError(
                    f"{plan.name}: ranks disagree in {name}: {grouped(by_rank)}; it must be the same at all ranks",
                    argument=name, value=by_rank[rank], by_rank=by_rank,
                )  # fmt: skip
        return UsageError(f"{plan.name}: ranks disagree in its arguments", value=plan.name)


def _root(signature: int) -> int | None:
    root = signature >> 24 & 0xFFFF
    return None if root == _NO_ROOT else root


_ARGUMENTS: Final[dict[str, Callable[[int, int], object]]] = {
    "the call": lambda signature, _: _KINDS[signature >> 56],
    "root": lambda signature, _: _root(signature),
    "dtype": lambda signature, _: _DTYPE_NAMES.get(signature & 0xFFFFFF, f"dtype {signature & 0xFFFFFF:#x}"),
    "op": lambda signature, _: OPERATORS[signature >> 40 & 0xFF],
    "bytes": lambda _, n_bytes: n_bytes,
    "algorithm": lambda signature, _: ALGORITHMS[signature >> 48 & 0xFF],
}
