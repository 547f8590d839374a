"""Collectives: who has parts for whom, how they are cut into steps, and the stages of each.

Rules
- A call is a number of steps. In each, every rank writes its data to a staging area in its own segment, tells all
  others so, waits until all others have told it, and then reads what it needs from where the others have staged it. One
  such step is a full mesh: no rank passes on what it got from another.
- Parts of at most INLINE_BYTES travel inside of the messages by which ranks tell each other.
- "mesh": one step for small parts. Larger ones are cut into pieces of a size that stays in a core's cache. What is
  reduced, is reduced by each rank that wants it, from the data of all ranks where they lie, in the order of ranks.
- Large inputs are not staged where the others can read them in place: one more step, which moves nothing, says that
  they have.
- "two-step" (allreduce, broadcast): of each window each rank reduces (or reads from the root) a slice, and passes it
  on: reduce-scatter and allgather. A step carries the results of the window before and the operands of the next one,
  so there is one step more than windows.
- Up to MESH_RANKS ranks, each writes a record to each other in every step. With more, a rank writes a record into its
  own segment and adds 1 to a count at rank 0, which releases all ranks when all have arrived; they then read the
  records of all.

Stages. "stage" the own data; "announce" it to all others; "await-records" of all others; "read" what they have staged,
and reduce it. Where arrivals are counted: "stage", "arrive" at rank 0, "await-arrivals" and "release" (of rank 0),
"await-release", "read". Those of several steps are taken together.

A ring would move no more bytes, in 2 (ranks - 1) steps that each wait for a neighbour: below about 16 MB one logical
step is faster on the fabric (STRATA section 8), and sums along a ring start at a different rank for each slice, so
their bits would differ from those of the mesh.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..layout.collectives import CR_PAYLOAD, INLINE_BYTES
from ..layout.ring import REACH_NONE
from .collective_cuts import (
    FLOWS,
    LINE_BYTES,
    Cut,
    Kind,
    counts_arrivals,
    cut,
)
from .stage import (
    Description,
    Ints,
    Signals,
    Stage,
    Transfers,
    Waits,
    Work,
    all_pairs,
    ints,
    payload_between,
    rank_columns,
)


def describe(
    kind: Kind,
    ranks: int,
    n_bytes: int,
    *,
    item_bytes: int = 1,
    root: int = 0,
    algorithm: str = "auto",
    half_bytes: int | None = None,
    registered: bool = False,
    reach: int = REACH_NONE,
    lanes: int = 1,
) -> Description:
    """The stages of a collective other than alltoallv.

    Args:
        kind: which collective.
        ranks: number of ranks.
        n_bytes: size of a part: what a rank has for one rank, or for all.
        item_bytes: size of an element.
        root: the rank that gives (broadcast, scatter) or takes (gather).
        algorithm: as for `cut`.
        half_bytes: of each half of the staging area; `stage_bytes` if None.
        registered: inputs are symmetric arrays: large ones are read where they lie.
        reach: how all ranks reach each other's private memory, one of the REACH_ codes: where the others' inputs are.
        lanes: of each rank.

    Raises:
        UsageError: there is no such algorithm or root.
    """
    rank_columns(ranks, root)
    how = cut(kind, ranks, n_bytes, algorithm, half_bytes, reach)
    exposed = n_bytes * (ranks if FLOWS[kind].parts else 1) >= _least_exposed(how, registered)
    if exposed and how.algorithm == "mesh":
        how = replace(how, chunk_bytes=max(n_bytes, 1), steps=2)
    if how.algorithm == "two-step":
        return _two_step(kind, ranks, n_bytes, item_bytes, root, how, lanes, exposed=exposed)
    flow = FLOWS[kind]
    sources, destinations = all_pairs(ranks)
    used = np.ones(len(sources), np.bool_)
    if flow.from_root:
        used &= sources == root
    if flow.to_root:
        used &= destinations == root
    sizes = np.where(used, n_bytes, -1)
    return _mesh(kind, ranks, sizes.reshape(ranks, ranks), item_bytes, how, lanes, exposed=np.full(ranks, exposed))


def _least_exposed(how: Cut, registered: bool) -> int:
    return how.expose_bytes if registered else how.expose_private_bytes


def alltoallv(
    sizes_bytes: npt.ArrayLike, *, half_bytes: int | None = None, registered: bool = False, reach: int = REACH_NONE,
    lanes: int = 1,
) -> Description:  # fmt: skip
    """The stages of alltoallv.

    Args:
        sizes_bytes: [ranks, ranks] bytes from each rank (row) to each other.
        half_bytes: of each half of the staging area; `stage_bytes` if None.
        registered: as for `describe`.
        reach: the same.
        lanes: of each rank.
    """
    sizes: Ints = np.atleast_2d(np.asarray(sizes_bytes, np.int64))
    # Those that stay are not cut.
    away = sizes * (1 - np.eye(len(sizes), dtype=np.int64))
    largest = away.max(axis=1, initial=0)
    how = cut("alltoallv", len(sizes), int(largest.max()), "mesh", half_bytes, reach)
    exposed = largest * len(sizes) >= _least_exposed(how, registered)
    if exposed.any():
        # If nobody stages anything, all is read in one step.
        if (exposed | (largest <= INLINE_BYTES)).all():
            how = replace(how, chunk_bytes=int(largest.max()), steps=1)
        how = replace(how, steps=how.steps + 1)
    return _mesh("alltoallv", len(sizes), sizes, 1, how, lanes, exposed=exposed)


def _mesh(
    kind: Kind, ranks: int, sizes: Ints, item_bytes: int, how: Cut, lanes: int, *, exposed: npt.NDArray[np.bool_]
) -> Description:
    """Steps in which each rank reads what all others have staged. `sizes` [source, destination]; -1: nothing to do.

    Those that are `exposed` do not stage their inputs.
    """
    flow, counts = FLOWS[kind], counts_arrivals(ranks)
    sources, destinations = all_pairs(ranks)
    n_bytes = np.maximum(sizes, 0).reshape(-1)
    pieces = -(-n_bytes // how.chunk_bytes)
    away = sources != destinations
    inline = np.full(len(n_bytes), how.inline)
    if kind == "alltoallv":
        inline = (n_bytes <= INLINE_BYTES) & (not counts)
    by_record, staged = inline & away & (pieces > 0), ~inline & away & (pieces > 0)
    read_mask = staged | (by_record & counts)

    copied = staged & ~exposed[sources]
    stages = [_local(ranks, sources, pieces, n_bytes, copied, "parts", once=not flow.parts)]
    pushed = [_transfers(sources, destinations, pieces, n_bytes, by_record, "source", "payload")]
    if counts:
        # A record of one's own carries the part for all.
        givers = np.unique(sources[by_record] if not flow.to_root else sources)
        size = ints(n_bytes.max(initial=0) if how.inline else 0)
        pushed = [Transfers(givers, givers, 0 * givers + (size > 0), 0 * givers + size, "source", "payload")]
    reads = [_transfers(sources, destinations, pieces, n_bytes, read_mask, "destination", "parts")]
    if not counts:
        reads.append(_local(ranks, destinations, pieces, n_bytes, by_record, "payload"))
    work: tuple[Work, ...] = ()
    if flow.reduces:
        every = np.arange(ranks, dtype=np.int64)
        part = int(n_bytes.max(initial=0))
        work = (_reduction(every, ranks, 0 * every + int(pieces.max(initial=0)), 0 * every + part, item_bytes),)
    elif kind != "broadcast":
        own = ~away & (sizes.reshape(-1) >= 0) & (pieces > 0)
        reads.append(_transfers(sources, destinations, np.minimum(pieces, 1), n_bytes, own, "destination", "own part"))
    payload = payload_between(ranks, [_transfers(sources, destinations, pieces, n_bytes, away, "source", "parts")])
    steps = _steps(ranks, how.steps, stages, pushed, reads, work)
    return Description(kind, how.algorithm, ranks, steps, lanes, payload)


def _two_step(
    kind: Kind, ranks: int, n_bytes: int, item_bytes: int, root: int, how: Cut, lanes: int, *, exposed: bool
) -> Description:
    """Of each window a slice for each rank, which it makes and passes on."""
    every = np.arange(ranks, dtype=np.int64)
    starts = np.arange(0, n_bytes, how.chunk_bytes, dtype=np.int64)
    windows = np.minimum(how.chunk_bytes, n_bytes - starts)[:, None]
    slice_bytes = -(-windows // (LINE_BYTES * ranks)) * LINE_BYTES
    first = np.minimum(every * slice_bytes, windows)
    size = np.minimum(slice_bytes, windows - first)
    rest = windows - first - size
    made_units, made = (size > 0).sum(axis=0), size.sum(axis=0)
    staged_units = ((first > 0).astype(np.int64) + (rest > 0)).sum(axis=0)
    staged = (windows - size).sum(axis=0)
    rooted = FLOWS[kind].from_root
    if rooted:
        only = every == root
        staged_units, staged = staged_units * only, staged * only
    stage = Transfers(every, every, staged_units, staged, "source", "parts")
    sources, destinations = all_pairs(ranks)
    away = sources != destinations
    operands = away & (sources == root) if rooted else away
    passed = away & (destinations != root) if rooted else away
    kept = every != root if rooted else every >= 0
    reads = [
        _transfers(
            sources, destinations, made_units[destinations], made[destinations], operands, "destination", "parts"
        ),
        Transfers(every, every, made_units, made, "destination", "results"),
        Transfers(every[kept], every[kept], made_units[kept], made[kept], "destination", "own part"),
        _transfers(sources, destinations, made_units[sources], made[sources], passed, "destination", "results"),
    ]
    work = () if rooted else (_reduction(every, ranks, made_units, made, item_bytes),)
    payload = payload_between(ranks, [reads[0], reads[3]])
    stages = _steps(ranks, how.steps, [] if exposed else [stage], [], reads, work)
    return Description(kind, how.algorithm, ranks, stages, lanes, payload)


def _steps(
    ranks: int, steps: int, staged: list[Transfers], pushed: list[Transfers], reads: list[Transfers],
    work: tuple[Work, ...],
) -> tuple[Stage, ...]:  # fmt: skip
    """The stages that all have in common, with what is moved in them."""
    every = np.arange(ranks, dtype=np.int64)
    pairs = all_pairs(ranks)
    source, destination = (column[pairs[0] != pairs[1]] for column in pairs)
    some = np.full_like(source, steps)
    if not counts_arrivals(ranks):
        return (
            Stage("stage", transfers=tuple(staged)),
            Stage("announce", (), tuple(pushed), signals=(Signals(source, destination, some, CR_PAYLOAD, "record"),)),
            Stage("await-records", (Waits(destination, source, some, "record"),)),
            Stage("read", (), tuple(reads), work),
        )
    others, zero = every[1:], ints(0)
    arrivals = Signals(every, 0 * every, 0 * every + steps, 8, "arrival", atomic=True)
    records = Transfers(source, destination, 0 * source + 1, 0 * source + CR_PAYLOAD, "destination", "record")
    return (
        Stage("stage", transfers=tuple(staged)),
        Stage("arrive", (), tuple(pushed), signals=(arrivals,)),
        Stage("await-arrivals", (Waits(zero, zero - 1, zero + ranks * steps, "arrival"),)),
        Stage("release", signals=(Signals(0 * others, others, 0 * others + steps, 8, "release"),)),
        Stage("await-release", (Waits(others, 0 * others, 0 * others + steps, "release"),)),
        Stage("read", (), (records, *reads), work),
    )


def _transfers(
    sources: Ints, destinations: Ints, units: Ints, n_bytes: Ints, used: npt.NDArray[np.bool_],
    mover: Literal["source", "destination"], what: str,
) -> Transfers:  # fmt: skip
    return Transfers(sources[used], destinations[used], units[used], n_bytes[used], mover, what)


def _local(
    ranks: int, rank: Ints, units: Ints, n_bytes: Ints, used: npt.NDArray[np.bool_], what: str, *, once: bool = False
) -> Transfers:
    """Copies within ranks: all that are used, or the first of each rank only."""
    total = np.zeros((2, ranks), np.int64)
    rank, units, n_bytes = rank[used], units[used], n_bytes[used]
    if once:
        rank, first = np.unique(rank, return_index=True)
        units, n_bytes = units[first], n_bytes[first]
    np.add.at(total[0], rank, units)
    np.add.at(total[1], rank, n_bytes)
    every = np.arange(ranks, dtype=np.int64)
    return Transfers(every, every, total[0], total[1], "source", what)


def _reduction(every: Ints, ranks: int, units: Ints, n_bytes: Ints, item_bytes: int) -> Work:
    """The own operand is read and the result written; the other operands come by transfers."""
    return Work(every, "reduce", units, 2 * n_bytes, n_bytes // item_bytes * ranks)
