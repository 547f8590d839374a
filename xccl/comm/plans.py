"""Plans of collectives: calls with all their arguments but the data, and the signatures by which ranks compare them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from ..errors import CapacityError, UsageError, XcclError
from ..layout import collectives as layout
from ..layout.collectives import OPERATORS
from ..layout.dtypes import CODE_OF
from ..protocol.collective_cuts import ALGORITHMS, FLOWS, Cut, Kind, cut
from .core import grouped

_KINDS: Final[tuple[Kind, ...]] = tuple(FLOWS)
#: What a rank says that does not take part: its argument was impossible, or it has no room.
_REFUSED, _FULL = len(_KINDS), len(_KINDS) + 1
_NO_ROOT: Final = 0xFFFF
#: Where the input may be a part of the output: at its start, or at the part of the own rank.
_AT_START: Final = frozenset({"allreduce", "broadcast"})
_AT_OWN_PART: Final = frozenset({"allgather", "gather"})

#: Element types by the checksums that stand for them.
_DTYPE_NAMES: Final[dict[int, str]] = {}


class Plan:
    """A collective call with all its arguments but the data. Kept, and used again by calls with the same arguments.

    Attributes:
        kind: which collective.
        name: of the call, for errors.
        half_bytes: what it needs of each half of the staging area.
        address: of the plan as kernels know it.
        dtype: element type.
        leads: what comes before the shape of a part in that of the output: (ranks,) or nothing.
    """

    __slots__ = ("_words", "address", "dtype", "half_bytes", "kind", "leads", "name")

    def __init__(self, kind: Kind, how: Cut, words: dict[int, int], dtype: np.dtype[Any], ranks: int) -> None:
        self.kind = kind
        self.name: str = kind
        self.half_bytes = how.half_bytes
        self.dtype = dtype
        self.leads = (ranks,) if FLOWS[kind].keeps else ()
        self._words = np.zeros(layout.PLAN.size_bytes // 8, np.int64)
        self.address: int = self._words.ctypes.data
        cut_words = {
            layout.PL_CHUNK: how.chunk_bytes,
            layout.PL_STEPS: how.steps,
            layout.PL_INLINE: int(how.inline),
            layout.PL_TWO_STEP: int(how.algorithm == "two-step"),
            layout.PL_RESULTS: how.results,
            layout.PL_EXPOSE: how.expose_bytes,
            layout.PL_EXPOSE_PRIVATE: how.expose_private_bytes,
        }
        for offset, value in (cut_words | words).items():
            self._words[offset // 8] = value

    @property
    def signature(self) -> int:
        """What stands for the call in records."""
        return int(self._words[layout.PL_SIGNATURE // 8])

    @property
    def part_bytes(self) -> int:
        """Size of a part, -1 in alltoallv."""
        return int(self._words[layout.PL_BYTES // 8])


def make_plan(
    kind: Kind, rank: int, ranks: int, n_bytes: int, dtype: np.dtype[Any], operator: str | None, root: int | None,
    algorithm: str, half_bytes: int, reach: int,
) -> Plan:  # fmt: skip
    """The plan for a call other than alltoallv.

    Args:
        kind: which collective.
        rank: own rank.
        ranks: number of ranks.
        n_bytes: size of a part.
        dtype: element type.
        operator: of those that reduce.
        root: of those that have one.
        algorithm: see `protocol.collective_cuts.cut`.
        half_bytes: size of each half of the staging area.
        reach: how the other ranks reach private memory of this one: one of the REACH_ codes.

    Raises:
        UsageError: there is no such algorithm or operator, or no operator for this element type.
    """
    flow = FLOWS[kind]
    fold = _fold(dtype, operator) if flow.reduces else -1
    how = cut(kind, ranks, n_bytes, algorithm, half_bytes, reach)
    at_root = _NO_ROOT if root is None else root
    gives, takes = not flow.from_root or root == rank, not flow.to_root or root == rank
    in_place = 0 if kind in _AT_START else rank * n_bytes if kind in _AT_OWN_PART else -1
    overwrites = takes and not (kind == "broadcast" and gives)
    algorithm_code, operator_code = ALGORITHMS.index(how.algorithm), max(fold, 0) % len(OPERATORS)
    return Plan(kind, how, {
        layout.PL_SIGNATURE: _signature(_KINDS.index(kind), algorithm_code, operator_code, at_root, _checksum(dtype)),
        layout.PL_BYTES: n_bytes,
        layout.PL_SEND_STRIDE: n_bytes if flow.parts else 0,
        layout.PL_RECV_STRIDE: n_bytes if flow.keeps else 0,
        layout.PL_SENDER: at_root if flow.from_root else -1,
        layout.PL_RECEIVER: at_root if flow.to_root else -1,
        layout.PL_FOLD: fold,
        layout.PL_ITEM_BYTES: dtype.itemsize,
        layout.PL_HALF: half_bytes,
        layout.PL_X_BYTES: (n_bytes * ranks if flow.parts else n_bytes) if gives else -1,
        layout.PL_OUT_BYTES: (n_bytes * ranks if flow.keeps else n_bytes) if overwrites else -1,
        layout.PL_IN_PLACE: in_place,
    }, dtype, ranks)  # fmt: skip


def make_rows_plan(ranks: int, dtype: np.dtype[Any], row_bytes: int, half_bytes: int, reach: int) -> Plan:
    """The plan for alltoallv of rows of that size; how many go where is in the table of the communicator."""
    rows = _checksum(f"{dtype} in rows of {row_bytes} bytes")
    return Plan("alltoallv", cut("alltoallv", ranks, -1, "mesh", half_bytes, reach), {
        layout.PL_SIGNATURE: _signature(_KINDS.index("alltoallv"), dtype=rows),
        layout.PL_BYTES: -1,
        layout.PL_SENDER: -1,
        layout.PL_RECEIVER: -1,
        layout.PL_FOLD: -1,
        layout.PL_ITEM_BYTES: row_bytes,
        layout.PL_HALF: half_bytes,
        layout.PL_X_BYTES: -1,
        layout.PL_OUT_BYTES: -1,
        layout.PL_IN_PLACE: -1,
    }, dtype, ranks)  # fmt: skip


def make_refusal(ranks: int, error: UsageError | CapacityError) -> Plan:
    """What a rank says that does not take part."""
    nothing = np.dtype(np.int8)
    return Plan("agreement", cut("agreement", ranks, 0), {
        layout.PL_SIGNATURE: _signature(_FULL if isinstance(error, CapacityError) else _REFUSED),
        layout.PL_SENDER: -1,
        layout.PL_RECEIVER: -1,
        layout.PL_FOLD: -1,
    }, nothing, ranks)  # fmt: skip


def disagreement(name: str, rank: int, said: dict[int, tuple[int, int]]) -> XcclError:
    """The error when ranks have made different calls; at all of them the same one.

    Args:
        name: of this rank's call.
        rank: this rank.
        said: signature and size of a part, by rank.
    """
    for peer, (signature, _) in said.items():
        if signature >> 56 == _REFUSED:
            return UsageError(f"{name}: rank {peer} was given an impossible argument", value=name, peer=peer)
        if signature >> 56 == _FULL:
            return CapacityError(f"{name}: rank {peer} has no room for it, so no rank goes on", peer=peer)
    for argument, read in _ARGUMENTS.items():
        by_rank = {peer: read(*what) for peer, what in said.items()}
        if len(set(by_rank.values())) > 1:
            return UsageError(
                f"{name}: ranks disagree in {argument}: {grouped(by_rank)}; it must be the same at all ranks",
                argument=argument, value=by_rank[rank], by_rank=by_rank,
            )  # fmt: skip
    return UsageError(f"{name}: ranks disagree in its arguments", value=name)


def _fold(dtype: np.dtype[Any], operator: str | None) -> int:
    if operator not in OPERATORS:
        raise UsageError(f"op must be one of {', '.join(OPERATORS)}, got {operator!r}", value=operator)
    code = CODE_OF.get(dtype)
    if code is None:
        raise UsageError(f"op {operator} is for {', '.join(map(str, CODE_OF))}; got {dtype}", value=str(dtype))
    return code * len(OPERATORS) + OPERATORS.index(operator)


def _checksum(dtype: object) -> int:
    """24 bits that stand for an element type."""
    checksum = zlib.crc32(str(dtype).encode()) & 0xFFFFFF
    _DTYPE_NAMES[checksum] = str(dtype)
    return checksum


def _signature(kind: int, algorithm: int = 0, operator: int = 0, root: int = _NO_ROOT, dtype: int = 0) -> int:
    return kind << 56 | algorithm << 48 | operator << 40 | root << 24 | dtype


def _root(signature: int) -> int | None:
    root = signature >> 24 & 0xFFFF
    return None if root == _NO_ROOT else root


#: Arguments that ranks may disagree in, from signature and size of a part; the first one tells.
_ARGUMENTS: Final[dict[str, Callable[[int, int], object]]] = {
    "the call": lambda signature, _: _KINDS[signature >> 56],
    "root": lambda signature, _: _root(signature),
    "dtype": lambda signature, _: _DTYPE_NAMES.get(signature & 0xFFFFFF, f"dtype {signature & 0xFFFFFF:#x}"),
    "op": lambda signature, _: OPERATORS[signature >> 40 & 0xFF],
    "bytes": lambda _, n_bytes: n_bytes,
    "algorithm": lambda signature, _: ALGORITHMS[signature >> 48 & 0xFF],
}
