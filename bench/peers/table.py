"""The cells of the table, who takes part in each, and what xccl means to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from bench.peers.collectives import PARTS
from bench.peers.names import COPY, XCCL
from bench.peers.work import Cell
from xccl.comm.moe import PROTOCOLS

#: The way of collectives whose input lies in a symmetric array, which xccl need not stage.
SYMMETRIC: Final = "symmetric"
_LEAST_SYMMETRIC_BYTES: Final = 8 << 10
#: The protocol of dispatch and combine that was made for speed, of those that there are.
BEST_PROTOCOL: Final = next(name for name in ("auto", "direct", "pull") if name in PROTOCOLS)

_KIB, _MIB = 1 << 10, 1 << 20
_RANKS = (2, 4, 8)


@dataclass(frozen=True)
class Contestant:
    """A library, and which of its ways: for moe its rows, quantisation or protocol; else mostly nothing."""

    library: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.library} {self.variant}".strip()


Limit = Callable[[Cell], float | None]


def _no_limit(_: Cell) -> None:
    return None


@dataclass(frozen=True)
class Comparison:
    """A way of xccl beside ways of peers.

    Attributes:
        ours: the variant of xccl.
        theirs: the variant of the peers.
        limit: what the ratio of the times is to be at most, by cell.
        against: the limit is for the fastest of these peers.
        floor: the variant of what is copied, for the roofline.
        least_size: cells below have no such way.
    """

    ours: str = ""
    theirs: str = ""
    limit: Limit = _no_limit
    against: tuple[str, ...] = ("openmpi",)
    floor: str = ""
    least_size: int = 0


@dataclass(frozen=True)
class Operation:
    """A group of rows of the table."""

    op: str
    title: str
    ranks: tuple[int, ...]
    sizes: tuple[int, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def is_of_pairs(self) -> bool:
        """Is it one between two ranks?"""
        return self.ranks == (2,)

    def cells(self, ranks: Sequence[int] = (), sizes: Sequence[int] = ()) -> Iterator[Cell]:
        """By ranks, then by size: those of the table, or others."""
        chosen = self.sizes if not sizes or self.sizes == (0,) else sizes
        for n in ranks or self.ranks:
            if n == 2 or not self.is_of_pairs:
                for size in chosen:
                    yield Cell(self.op, n, size)

    def is_extra(self, contestant: Contestant) -> bool:
        """Is it a peer that no target is for?"""
        main = {(peer, comparison.theirs) for comparison in self.comparisons for peer in comparison.against}
        return contestant.library not in (XCCL, COPY) and (contestant.library, contestant.variant) not in main

    def ways(self, cell: Cell, chosen: Sequence[str] = ()) -> list[Comparison]:
        """The comparisons of a cell; of xccl's ways only those chosen, if any."""
        return [c for c in self.comparisons if cell.size >= c.least_size and (not chosen or c.ours in chosen)]


def contestants(comparisons: Sequence[Comparison], peers: Sequence[str]) -> list[Contestant]:
    """Xccl's ways, the peers' and what is copied, each once: the order of a round."""
    ours = [Contestant(XCCL, comparison.ours) for comparison in comparisons]
    theirs = [Contestant(peer, comparison.theirs) for peer in peers for comparison in comparisons]
    floors = [Contestant(COPY, comparison.floor) for comparison in comparisons]
    return list(dict.fromkeys([*ours, *theirs, *floors]))


def _always(limit: float) -> Limit:
    return lambda _: limit


def _large(limit: float, at_16_mib: float) -> Limit:
    return lambda cell: at_16_mib if cell.size >= 16 * _MIB else limit


_LATENCY = (8, _KIB, 64 * _KIB)
_STREAM = (64 * _KIB, _MIB, 4 * _MIB, 16 * _MIB)
_COLLECTIVE = (8, 64 * _KIB, _MIB)
_MPIS = ("openmpi", "mpich")


def _pair(op: str, title: str, sizes: tuple[int, ...], limit: Limit) -> Operation:
    return Operation(op, title, (2,), sizes, (Comparison(limit=limit),))


def _collective(op: str, limit: Limit = _no_limit, sizes: tuple[int, ...] = _COLLECTIVE) -> Operation:
    plain = Comparison(limit=limit, against=_MPIS)
    symmetric = Comparison(SYMMETRIC, limit=limit, against=_MPIS, least_size=_LEAST_SYMMETRIC_BYTES)
    return Operation(op, op, _RANKS, sizes, (plain, symmetric))


def _fast(cell: Cell) -> float:
    return 0.25 if cell.size <= 8 else 0.4


_MOE_LIMITS: Final[dict[str, Limit]] = {
    "auto": _fast, "direct": _fast, "pull": _always(0.65), "push": _always(0.55),
}  # fmt: skip


def _moe() -> tuple[Comparison, ...]:
    """The best protocol with each kind of rows, then the others by name."""
    by_name = {
        name: Comparison(name, "expanded", _MOE_LIMITS.get(name, _no_limit), floor="expanded") for name in PROTOCOLS
    }
    return (
        by_name.pop(BEST_PROTOCOL),
        Comparison("dedup", "dedup", _always(0.5), floor="dedup"),
        Comparison("int8", "expanded", _always(0.35), floor="int8"),
        *by_name.values(),
    )


OPERATIONS: Final = (
    _pair("sendrecv", "send + recv, half a trip", _LATENCY, _always(0.6)),
    _pair("put-signal", "put + signal + wait, half", _LATENCY, _always(0.35)),
    _pair("stream", "stream of isend + irecv", _STREAM, _large(0.65, 0.9)),
    _pair("put", "stream of put", _STREAM, _large(1.05, 0.9)),
    Operation("barrier", "barrier", _RANKS, (0,), (Comparison(limit=lambda cell: 0.9 if cell.ranks == 2 else 0.6),)),
    _collective("allreduce", _always(0.7), (8, 64 * _KIB, 4 * _MIB)),
    _collective("allgather", _always(0.7)),
    _collective("alltoall", _always(0.7)),
    _collective("alltoallv", _always(0.7)),
    _collective("reduce-scatter"),
    _collective("broadcast"),
    _collective("gather"),
    _collective("scatter"),
    Operation("moe", "MoE dispatch + combine", _RANKS, (8, 64, 128), _moe()),
)


_ALL: Final = tuple(operation.op for operation in OPERATIONS)


@dataclass(frozen=True)
class Difference:
    """Why figures are not of quite the same work, or not there; told where one of the operations was measured.

    Attributes:
        text: what is different.
        ops: the operations.
        library: the peer; all if empty.
    """

    text: str
    ops: tuple[str, ...] = _ALL
    library: str = ""


_DIFFERENCES: Final = (
    Difference("C Open MPI, OpenSHMEM, UCX: not in PyPI's wheels, and xccl is called from Python; see published.py."),
    Difference("Expanded rows of peers come grouped by source rank, those of xccl by expert, which is more.", ("moe",)),
    Difference("Experts work in place; by int8, dedup and pull they write to a symmetric array.", ("moe",)),
    Difference("INT8 dispatch is beside 16-bit rows of the peers, which have no quantising exchange.", ("moe",)),
    Difference(
        "multiprocessing has no collectives: they are a barrier and copies through shared memory, made for this table.",
        (*PARTS, "moe"), "multiprocessing",
    ),
    Difference("gloo's allreduce is in place, the others' into another array.", ("allreduce",), "gloo"),
    Difference(
        "In xccl every rank waits for every other; the peers' roots, or those that only give, may run ahead.",
        ("broadcast", "gather", "scatter"),
    ),
)  # fmt: skip


def differences(entries: Iterable[tuple[str, str]]) -> list[str]:
    """Those that bear on these operations and libraries."""
    measured = set(entries)
    return [
        d.text
        for d in _DIFFERENCES
        if any(op in d.ops and d.library in ("", library) for op, library in measured if library not in (XCCL, COPY))
    ]


def operation_of(op: str) -> Operation:
    """By name."""
    return next(operation for operation in OPERATIONS if operation.op == op)


def size_name(cell: Cell) -> str:
    """For people."""
    if cell.op == "moe":
        return f"{cell.size} tokens"
    if not cell.size:
        return "-"
    for unit, name in ((_MIB, "MiB"), (_KIB, "KiB")):
        if cell.size >= unit and not cell.size % unit:
            return f"{cell.size // unit} {name}"
    return f"{cell.size} B"
