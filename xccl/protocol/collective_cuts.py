"""Collectives: who has parts for whom, and how a call is cut into steps. `xccl.protocol.collectives` has the rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from ..errors import UsageError
from ..layout.collectives import INLINE_BYTES, MESH_RANKS, aligned_part
from ..layout.ring import REACH_DIRECT, REACH_KERNEL, REACH_NONE, REACH_SLOWLY
from ..layout.segment import Geometry

Kind = Literal[
    "allgather", "allreduce", "reduce_scatter", "alltoall", "alltoallv", "broadcast", "gather", "scatter", "agreement"
]
Algorithm = Literal["mesh", "two-step"]
ALGORITHMS: Final = ("mesh", "two-step")

#: The most that each half of a rank's staging area holds, and those of all ranks together.
_STAGE_BYTES: Final = 8 << 20
_STAGES_BYTES: Final = 1 << 30
#: What a rank stages in a step stays in its core's cache, where the others find it: the whole staging area would not.
#: A step costs as much as copying some 10 KiB, more if ranks share a core, so there is a least size for a part. Of two
#: ranks each has a cache of its own, most often, and steps may be larger.
_STEP_BYTES: Final = (256 << 10, 128 << 10)
_LEAST_PART_BYTES: Final = 32 << 10
#: Of an input, for each other rank: staging so many bytes takes as long as the step that closes a call in which inputs
#: are read where they lie. Where only the root gives, it is the only one that stages.
_EXPOSE_BYTES: Final = 1 << 10
_EXPOSE_AT_ROOT_BYTES: Final = {"broadcast": 4 << 10, "gather": 4 << 10, "scatter": 8 << 10}
#: Reading private memory by the operating system's kernel costs a microsecond for each rank that is read, and then each
#: page, so what is staged once and read by many is better staged. By parts for two and for more ranks, and by inputs
#: without parts for two and for up to four.
_EXPOSE_PARTS_BY_KERNEL_BYTES: Final = (6 << 10, 24 << 10)
_EXPOSE_BY_KERNEL_BYTES: Final = (6 << 10, 96 << 10)
#: The same for all numbers of ranks where the kernel is slow: copied twice, through staging areas, is sooner there.
_EXPOSE_PARTS_SLOWLY_BYTES: Final = 256 << 10
_EXPOSE_SLOWLY_BYTES: Final = 512 << 10
#: With two ranks, the root of a larger gather would copy everything from memory, alone.
_EXPOSE_GATHER_MOST_BYTES: Final = 512 << 10
_NEVER: Final = 1 << 62
LINE_BYTES: Final = 64


@dataclass(frozen=True)
class Flow:
    """Who has data for whom.

    Attributes:
        parts: the input has a part for each rank, else one for all.
        keeps: the output has a part from each rank, else one.
        from_root: only the root gives.
        to_root: only the root takes.
        reduces: the parts of all ranks are reduced to one.
    """

    parts: bool = False
    keeps: bool = False
    from_root: bool = False
    to_root: bool = False
    reduces: bool = False

    @property
    def rooted(self) -> bool:
        """Does it have a root?"""
        return self.from_root or self.to_root


FLOWS: Final[dict[Kind, Flow]] = {
    "allgather": Flow(keeps=True),
    "allreduce": Flow(reduces=True),
    "reduce_scatter": Flow(parts=True, reduces=True),
    "alltoall": Flow(parts=True, keeps=True),
    "alltoallv": Flow(parts=True, keeps=True),
    "broadcast": Flow(from_root=True),
    "gather": Flow(keeps=True, to_root=True),
    "scatter": Flow(parts=True, from_root=True),
    "agreement": Flow(keeps=True),
}
#: Those that have an algorithm of two steps.
TWO_STEP: Final = frozenset({"allreduce", "broadcast"})


def stage_bytes(ranks: int, heap_bytes: int = Geometry.heap_bytes) -> int:
    """Size of each half of the staging area: what a rank can give in one step."""
    return min(_STAGE_BYTES, _STAGES_BYTES // ranks, heap_bytes // 4) // LINE_BYTES * LINE_BYTES


def _step_bytes(ranks: int) -> int:
    """What a rank stages in a step, if parts are not small."""
    return _STEP_BYTES[int(ranks > 2)]


def counts_arrivals(ranks: int) -> bool:
    """Are arrivals counted, rather than written to each rank by each?"""
    return ranks > MESH_RANKS


@dataclass(frozen=True)
class Cut:
    """How a call is cut into steps.

    Attributes:
        algorithm: "mesh" or "two-step".
        inline: parts travel in the records.
        chunk_bytes: bytes of a part that go in one step; with two steps, of a window.
        steps: number of steps.
        results: two-step: where results start in a half of the staging area; alltoallv: where sizes do.
        half_bytes: bytes that are used of each half.
        expose_bytes: from so many bytes on, an input in the own segment is not staged.
        expose_private_bytes: the same, of one in private memory.
    """

    algorithm: Algorithm
    inline: bool
    chunk_bytes: int
    steps: int
    results: int
    half_bytes: int
    expose_bytes: int
    expose_private_bytes: int


def choose(kind: Kind, ranks: int, n_bytes: int) -> Algorithm:
    """The algorithm for parts of `n_bytes`."""
    if kind == "allreduce" and ranks > 2:
        return "two-step" if n_bytes * ranks > 64 << 10 else "mesh"
    return "mesh"


def cut(
    kind: Kind, ranks: int, n_bytes: int, algorithm: str = "auto", half_bytes: int | None = None,
    reach: int = REACH_NONE,
) -> Cut:  # fmt: skip
    """Cut a call.

    Args:
        kind: which collective.
        ranks: number of ranks.
        n_bytes: size of a part: what a rank has for one rank, or for all; in alltoallv the largest of all.
        algorithm: "auto", "mesh", or for allreduce and broadcast "two-step".
        half_bytes: of each half of the staging area; `stage_bytes` if None.
        reach: how all others reach private memory of the rank: one of the REACH_ codes.

    Raises:
        UsageError: there is no such algorithm for this collective.
    """
    if half_bytes is None:
        half_bytes = stage_bytes(ranks)
    if algorithm == "auto":
        algorithm = choose(kind, ranks, n_bytes)
    if algorithm == "two-step" and kind in TWO_STEP:
        return _cut_in_two(ranks, n_bytes, half_bytes, reach)
    if algorithm != "mesh":
        known = ("auto", *ALGORITHMS) if kind in TWO_STEP else ("auto", "mesh")
        raise UsageError(
            f"algorithm of {kind} must be one of {', '.join(known)}, got {algorithm!r}", value=algorithm, bound=known
        )
    flow, counts = FLOWS[kind], counts_arrivals(ranks)
    places = ranks if flow.parts else 1
    sizes_bytes = aligned_part(8 * ranks) if kind == "alltoallv" else 0
    chunk_bytes = (half_bytes - sizes_bytes) // places // LINE_BYTES * LINE_BYTES
    chunk_bytes = min(chunk_bytes, max(_step_bytes(ranks) // places // LINE_BYTES * LINE_BYTES, _LEAST_PART_BYTES))
    if kind != "alltoallv":
        chunk_bytes = min(chunk_bytes, max(aligned_part(n_bytes), LINE_BYTES))
    # A single record says the same to all ranks.
    inline = kind != "alltoallv" and n_bytes <= INLINE_BYTES and not (counts and flow.parts)
    steps = 1 if inline else max(1, -(-n_bytes // chunk_bytes))
    used_bytes = 0 if inline else places * chunk_bytes + sizes_bytes
    expose = _expose_bytes(kind, ranks, n_bytes, reach, inline=inline)
    chunk_bytes, results = INLINE_BYTES if inline else chunk_bytes, places * chunk_bytes
    return Cut("mesh", inline, chunk_bytes, steps, results, used_bytes, *expose)


def _expose_bytes(
    kind: Kind, ranks: int, n_bytes: int, reach: int, *, inline: bool = False, two_step: bool = False
) -> tuple[int, int]:
    """From which size of an input on it is worth a step more not to stage it: of a symmetric, and a private one."""
    if inline or ranks == 1 or (kind == "alltoallv" and counts_arrivals(ranks)):
        return _NEVER, _NEVER
    if kind == "gather" and ranks == 2 and n_bytes > _EXPOSE_GATHER_MOST_BYTES:
        return _NEVER, _NEVER
    least_bytes = _EXPOSE_AT_ROOT_BYTES.get(kind, _EXPOSE_BYTES) * (ranks - 1)
    if reach == REACH_DIRECT:
        return least_bytes, least_bytes
    # The kernel moves bytes; it does not reduce them, and a slice would be moved twice.
    moves = reach in (REACH_KERNEL, REACH_SLOWLY) and not FLOWS[kind].reduces and not two_step
    return least_bytes, _expose_by_kernel_bytes(kind, ranks, reach) if moves else _NEVER


def _expose_by_kernel_bytes(kind: Kind, ranks: int, reach: int) -> int:
    more, slowly = int(ranks > 2), reach == REACH_SLOWLY
    if FLOWS[kind].parts:
        return (_EXPOSE_PARTS_SLOWLY_BYTES if slowly else _EXPOSE_PARTS_BY_KERNEL_BYTES[more]) * ranks
    least_bytes = _EXPOSE_SLOWLY_BYTES if slowly else _EXPOSE_BY_KERNEL_BYTES[more]
    return least_bytes if ranks == 2 or (kind == "allgather" and ranks <= 4) else _NEVER


def _cut_in_two(ranks: int, n_bytes: int, half_bytes: int, reach: int) -> Cut:
    # A window, and behind it the results of a slice of one.
    window_bytes = (half_bytes - LINE_BYTES) * ranks // (ranks + 1) // LINE_BYTES * LINE_BYTES
    window_bytes = min(window_bytes, max(2 * _STEP_BYTES[1], ranks * _LEAST_PART_BYTES))
    window_bytes = min(window_bytes, max(aligned_part(n_bytes), LINE_BYTES))
    steps = 1 + -(-n_bytes // window_bytes)
    used_bytes = window_bytes + -(-window_bytes // (LINE_BYTES * ranks)) * LINE_BYTES
    expose = _expose_bytes("allreduce", ranks, n_bytes, reach, two_step=True)
    return Cut("two-step", False, window_bytes, steps, window_bytes, used_bytes, *expose)


def part_elements(kind: Kind, size_bytes: int, item_bytes: int, ranks: int) -> int:
    """Elements of a part, of what a rank has for one rank or for all, if the larger of its buffers has `size_bytes`."""
    flow = FLOWS[kind]
    places = ranks if flow.parts or flow.keeps else 1
    return max(size_bytes // (item_bytes * places), 1)


# -- descriptions -----------------------------------------------------------------------------------------------------
