"""The cells of the table, who takes part in each, and what xccl means to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from bench.peers.work import Cell

XCCL: Final = "xccl"
#: Those that xccl is compared with, and what each stands for.
PEERS: Final = {
    "openmpi": "Open MPI through mpi4py",
    "mpich": "MPICH through mpi4py",
    "gloo": "gloo through torch.distributed",
    "multiprocessing": "pipes, barriers and shared memory of the standard library",
}

_KIB, _MIB = 1 << 10, 1 << 20
_RANKS = (2, 4, 8)
_COLLECTIVES = ("allgather", "alltoall", "alltoallv")


@dataclass(frozen=True)
class Contestant:
    """A library, and which of its ways: for moe its rows, quantisation or protocol; else nothing."""

    library: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.library} {self.variant}".strip()


@dataclass(frozen=True)
class Comparison:
    """A way of xccl beside ways of peers.

    Attributes:
        ours: the variant of xccl.
        theirs: the variant of the peers.
        limit: what the ratio of the times is to be at most, by cell.
        against: the limit is for the fastest of these peers.
    """

    ours: str
    theirs: str
    limit: Callable[[Cell], float]
    against: tuple[str, ...] = ("openmpi",)


@dataclass(frozen=True)
class Operation:
    """A group of rows of the table."""

    op: str
    title: str
    ranks: tuple[int, ...]
    sizes: tuple[int, ...]
    comparisons: tuple[Comparison, ...]

    def cells(self) -> Iterator[Cell]:
        """By ranks, then by size."""
        for ranks in self.ranks:
            for size in self.sizes:
                yield Cell(self.op, ranks, size)

    def contestants(self, peers: list[str]) -> list[Contestant]:
        """Xccl's ways and the peers', each once: the order of a turn."""
        ours = dict.fromkeys(Contestant(XCCL, comparison.ours) for comparison in self.comparisons)
        theirs = dict.fromkeys(Contestant(peer, comparison.theirs) for peer in peers for comparison in self.comparisons)
        return [*ours, *theirs]


def _always(limit: float) -> Callable[[Cell], float]:
    return lambda _: limit


def _large(limit: float, at_16_mib: float) -> Callable[[Cell], float]:
    return lambda cell: at_16_mib if cell.size >= 16 * _MIB else limit


def _one(limit: Callable[[Cell], float], against: tuple[str, ...] = ("openmpi",)) -> tuple[Comparison, ...]:
    return (Comparison("", "", limit, against),)


_LATENCY = (8, _KIB, 64 * _KIB)
_STREAM = (64 * _KIB, _MIB, 4 * _MIB, 16 * _MIB)
_MPIS = ("openmpi", "mpich")

OPERATIONS: Final = (
    Operation("send-recv", "send/recv, half round trip", (2,), _LATENCY, _one(_always(0.6))),
    Operation("put-signal", "put + signal + wait, half round trip", (2,), _LATENCY, _one(_always(0.35))),
    Operation("stream", "send/recv stream, a message", (2,), _STREAM, _one(_large(0.65, 0.9))),
    Operation("put", "put stream, a put", (2,), _STREAM, _one(_large(1.05, 0.9))),
    Operation("barrier", "barrier", _RANKS, (0,), _one(lambda cell: 0.9 if cell.ranks == 2 else 0.6)),
    Operation("allreduce", "allreduce of float32", _RANKS, (8, 64 * _KIB, 4 * _MIB), _one(_always(0.7), _MPIS)),
    *(Operation(op, op, _RANKS, (8, 64 * _KIB, _MIB), _one(_always(0.7), _MPIS)) for op in _COLLECTIVES),
    Operation(
        "moe",
        "MoE dispatch + combine",
        _RANKS,
        (8, 64, 128),
        (
            Comparison("auto", "expanded", lambda cell: 0.25 if cell.size <= 8 else 0.4),
            Comparison("dedup", "dedup", _always(0.5)),
            Comparison("int8", "expanded", _always(0.35)),
            Comparison("pull", "expanded", _always(0.65)),
            Comparison("push", "expanded", _always(0.55)),
        ),
    ),
)

#: What is compared with no figure here, and why.
NOT_COMPARED: Final = (
    "C Open MPI, OpenSHMEM and UCX: not in PyPI's wheels, and xccl is called from Python; see published.py.",
    "Expanded MoE rows of peers come grouped by source rank, those of xccl by expert: xccl does more.",
    "INT8 dispatch of xccl is compared with 16-bit rows of the peers, which have no quantising exchange.",
    "multiprocessing has no collectives: they are a barrier and copies through shared memory, written for this table.",
    "gloo's allreduce is in place, the others' into another array.",
)


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
