"""Where experts live: logical and physical experts, redundant and shared replicas, and load balancing (XDS §4.5).

Theory of operation
- A router chooses *logical* experts. A *physical* expert is a slot on a rank that holds a copy of one. Ranks hold runs
  of consecutive physical experts; if the ranks do not divide their number, the first ones hold one more.
- Replicas take turns by the token's position in the batch, so every rank knows without asking which copy a token goes
  to: [position, logical expert] -> physical expert.
- Load is counted in tokens, by time slice and logical expert; replicas of an expert share its tokens evenly. In a slice
  all wait for the hottest replica, so what a layer costs is the sum over slices of the hottest replica's load.
- Selection (`choose_replicas`): with a budget of R replicas, add one after the other. XDS adds the one that lowers the
  simulated total most (`by="total"`). That can stand still while two experts are equally hot in one slice: neither
  alone lowers anything. `by="peak"`, the default, gives each next replica to the expert with the largest load per
  replica in one slice, and asks for the total among equals. Its largest load per replica is the least possible for
  every budget: any choice that does better must give some replica more to each expert that had the largest load when
  this one chose it, and then has too few left for another. Both only ever add, so more budget is never worse.
- Placement (`place_replicas`): replicas, heaviest first, on the least loaded rank with a free slot; then swaps and
  moves that lower the largest load of a rank, while there are any. Heaviest-first alone is within 4/3 of the best where
  slots do not bind and there is one slice (Graham, 1969); the exchanges are for where they do. They may still stop
  short (at 1.39 with 5 replicas in 2 slices), so up to a dozen replicas are then searched for the best placement.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from operator import add
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError, UsageError
from .stage import Ints

Floats = npt.NDArray[np.float64]

_SMALLEST_GAIN = 1e-12
#: So many replicas at most are searched for their best placement, and so many placements of single ones are tried.
_MOST_SEARCHED = 12
_MOST_STEPS = 100_000


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """Which logical expert each physical one is a copy of, and on which rank it lives.

    Attributes:
        routed: logical experts that a router chooses from, 0 to routed - 1.
        logical: [physical] the logical expert of each physical one; shared experts are numbered from `routed` on.
        first: [ranks + 1] first physical expert of each rank, and their number.
    """

    routed: int
    logical: Ints
    first: Ints

    def __post_init__(self) -> None:
        """Check that every logical expert has a home.

        Raises:
            UsageError: one has none, or the columns do not fit.
        """
        shared = int(self.logical.max(initial=-1)) + 1 - self.routed
        missing = np.flatnonzero(np.bincount(self.logical, minlength=max(self.routed, 1)) == 0)
        if self.routed < 1 or missing.size or shared < 0 or (self.logical < 0).any():
            raise UsageError(f"logical experts {missing[:8].tolist()} of {self.routed} have no physical expert")
        if (
            len(self.first) < 2
            or self.first[0] != 0
            or self.first[-1] != len(self.logical)
            or np.diff(self.first).min() < 0
        ):
            raise UsageError(
                f"first experts of ranks must rise from 0 to {len(self.logical)}, got {self.first.tolist()}",
                value=self.first.tolist(), bound=len(self.logical),
            )  # fmt: skip

    @classmethod
    def plain(cls, routed: int, ranks: int) -> ExpertMap:
        """One copy of each expert, in order; the first `routed % ranks` ranks hold one more.

        Raises:
            UsageError: there is no expert or no rank.
        """
        if routed < 1 or ranks < 1:
            raise UsageError(f"{routed} experts on {ranks} ranks: both must be at least 1", value=(routed, ranks))
        return cls(routed, np.arange(routed), _even_runs(routed, ranks))

    @classmethod
    def balanced(
        cls,
        load: npt.ArrayLike,
        ranks: int,
        *,
        redundant: int = 0,
        shared_ranks: int = 0,
        by: Literal["peak", "total"] = "peak",
    ) -> ExpertMap:
        """Replicas and places for a load: `choose_replicas`, then `place_replicas`.

        Args:
            load: [experts] or [slices, experts] tokens.
            ranks: in all; those with shared replicas come last, as XDS places them on ranks of their own.
            redundant: replicas beyond one for each expert.
            shared_ranks: ranks that each hold a replica of a shared expert, and nothing else.
            by: what selection lowers.

        Raises:
            UsageError: a number is out of range.
        """
        table = _load(load)
        routed, homes = table.shape[1], ranks - shared_ranks
        if homes < 1 or shared_ranks < 0 or redundant < 0:
            raise UsageError(
                f"{ranks} ranks, {shared_ranks} of them shared, {redundant} redundant replicas: at least one rank must "
                f"be left, and none may be negative",
                value=(ranks, shared_ranks, redundant),
            )
        replicas = choose_replicas(table, redundant, by=by)
        first = _even_runs(routed + redundant, homes)
        rank = place_replicas(table, replicas, np.diff(first))
        logical = np.repeat(np.arange(routed), replicas)
        order = np.lexsort((logical, rank))
        whole = np.concatenate([logical[order], np.full(shared_ranks, routed)])
        ends = first[-1] + np.arange(1, shared_ranks + 1)
        return cls(routed, whole.astype(np.int64), np.concatenate([first, ends]))

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.first) - 1

    @property
    def physical(self) -> int:
        """Number of physical experts."""
        return len(self.logical)

    @property
    def shared(self) -> int:
        """Number of shared logical experts."""
        return int(self.logical.max()) + 1 - self.routed

    @cached_property
    def replicas(self) -> Ints:
        """[logical] copies of each."""
        return np.bincount(self.logical, minlength=self.routed + self.shared)

    @cached_property
    def _table(self) -> Ints:
        """[logical, most replicas] physical experts in the order of their turn."""
        table = np.zeros((len(self.replicas), int(self.replicas.max())), np.int64)
        order = np.argsort(self.logical, kind="stable")
        turn = np.arange(self.physical) - np.repeat(np.cumsum(self.replicas) - self.replicas, self.replicas)
        table[self.logical[order], turn] = order
        return table

    def to_physical(self, topk_idx: npt.ArrayLike, position: int = 0) -> Ints:
        """The physical expert for each choice; replicas rotate with the position in the batch.

        Args:
            topk_idx: integers [tokens, top_k], logical routed experts, -1 for none.
            position: of the first token in the batch. Ranks that give different ones spread over replicas from their
                first token on.

        Returns:
            [tokens, top_k + shared experts]: behind a token's choices one replica of each shared expert, if there are
            any; -1 stays -1.

        Raises:
            UsageError: a choice is out of range, or the position negative.
        """
        if position < 0:
            raise UsageError(f"position is {position}, must be 0 or more", value=position, bound=0)
        idx = np.asarray(topk_idx)
        if idx.ndim != 2 or idx.dtype.kind not in "iu":
            raise UsageError(f"topk_idx must be integers [tokens, top_k], got {idx.dtype} {idx.shape}", value=idx.shape)
        if idx.size and not (idx.min() >= -1 and idx.max() < self.routed):
            raise UsageError(
                f"topk_idx holds {idx.min()} to {idx.max()}, allowed are -1 to {self.routed - 1}",
                value=(int(idx.min()), int(idx.max())), bound=self.routed - 1,
            )  # fmt: skip
        always = np.broadcast_to(self.routed + np.arange(self.shared), (len(idx), self.shared))
        chosen = np.concatenate([idx.astype(np.int64), always], axis=1)
        turn = (position + np.arange(len(idx)))[:, None] % self.replicas[chosen]
        return np.where(chosen < 0, -1, self._table[chosen, turn])

    def to_logical(self, physical: npt.ArrayLike) -> Ints:
        """The logical expert that each physical one is a copy of; -1 stays -1.

        Raises:
            UsageError: not integers, or one is out of range.
        """
        ids = self._physical_ids(physical)
        return np.where(ids < 0, -1, self.logical[ids])

    def rank_of(self, physical: npt.ArrayLike) -> Ints:
        """The rank of each physical expert; -1 stays -1.

        Raises:
            UsageError: not integers, or one is out of range.
        """
        return np.asarray(np.searchsorted(self.first, self._physical_ids(physical), side="right") - 1, np.int64)

    def local_experts(self, rank: int) -> Ints:
        """The physical experts of a rank, a run of ids; `to_logical` says whose copies they are.

        Raises:
            UsageError: there is no such rank.
        """
        if not 0 <= rank < self.ranks:
            raise UsageError(f"rank is {rank}, must be 0 to {self.ranks - 1}", value=rank, bound=self.ranks - 1)
        return np.arange(self.first[rank], self.first[rank + 1])

    def local(self, rank: int) -> Ints:
        """The logical experts that a rank holds, in the order of its physical ones.

        Raises:
            UsageError: there is no such rank.
        """
        return self.logical[self.local_experts(rank)]

    def _physical_ids(self, given: npt.ArrayLike) -> Ints:
        ids = np.asarray(given)
        if ids.dtype.kind not in "iu":
            raise UsageError(f"physical experts must be integers, got {ids.dtype}", value=str(ids.dtype))
        if ids.size and not (ids.min() >= -1 and ids.max() < self.physical):
            raise UsageError(
                f"physical experts are {ids.min()} to {ids.max()}, must be -1 to {self.physical - 1}",
                value=(int(ids.min()), int(ids.max())), bound=self.physical - 1,
            )  # fmt: skip
        return ids.astype(np.int64)

    def rank_load(self, load: npt.ArrayLike) -> Floats:
        """[slices, ranks] tokens of each rank when replicas share evenly; `load` is of the routed experts."""
        table = _load(load)
        routed = self.logical < self.routed
        each = table[:, self.logical[routed]] / self.replicas[self.logical[routed]]
        rank = self.rank_of(np.flatnonzero(routed))
        return np.stack([np.bincount(rank, row, self.ranks) for row in each])


def choose_replicas(load: npt.ArrayLike, budget: int, *, by: Literal["peak", "total"] = "peak") -> Ints:
    """How many copies each expert gets.

    Args:
        load: [experts] or [slices, experts] tokens.
        budget: copies beyond the first of each.
        by: "peak" or "total", see above.

    Returns:
        [experts], 1 at least, experts + budget in all.

    Raises:
        UsageError: the load is negative or not finite, or the budget is.
    """
    table = _load(load)
    if budget < 0:
        raise UsageError(f"a budget of {budget} replicas: must be at least 0", value=budget, bound=0)
    if by not in ("peak", "total"):
        raise UsageError(f"by must be peak or total, got {by!r}", value=by)
    hottest = table.max(axis=0)
    replicas = np.ones(table.shape[1], np.int64)
    for _ in range(budget):
        peak = hottest / replicas
        totals = _totals_with_one_more(table, replicas)
        # Least total first, or largest peak first; then the other one; then the first expert.
        keys = (totals, -peak) if by == "peak" else (-peak, totals)
        replicas[np.lexsort((np.arange(len(replicas)), *keys))[0]] += 1
    return replicas


def _totals_with_one_more(table: Floats, replicas: Ints) -> Floats:
    """[experts] the sum over slices of the hottest replica's load, if that expert had one more."""
    each = table / replicas
    order = np.argsort(-each, axis=1, kind="stable")
    slices = np.arange(len(table))
    hottest, second = each[slices, order[:, 0]], each[slices, order[:, min(1, each.shape[1] - 1)]]
    totals = np.full(table.shape[1], hottest.sum())
    for s, e in enumerate(order[:, 0].tolist()):
        relieved = table[s, e] / (replicas[e] + 1)
        totals[e] += max(relieved, second[s] if each.shape[1] > 1 else 0.0) - hottest[s]
    return totals


def place_replicas(load: npt.ArrayLike, replicas: npt.ArrayLike, slots: npt.ArrayLike) -> Ints:
    """The rank of each replica.

    Args:
        load: [experts] or [slices, experts] tokens.
        replicas: [experts] copies.
        slots: [ranks] physical experts that each rank has room for.

    Returns:
        [replicas in all], expert by expert.

    Raises:
        CapacityError: there are fewer slots than replicas.
    """
    table, copies, room = _load(load), np.asarray(replicas, np.int64), np.asarray(slots, np.int64)
    total = int(copies.sum())
    if total > room.sum():
        raise CapacityError(f"{total} replicas need as many slots, there are {room.sum()}", needed_bytes=0)
    each = np.repeat(table / copies, copies, axis=1)
    found = [_improved(each, _heaviest_first(each, room, by_slice), room) for by_slice in (False, True)]
    best = min(found, key=lambda rank: (_peak(each, rank, len(room)), _peak(each.sum(axis=0)[None], rank, len(room))))
    return best if total > _MOST_SEARCHED else _searched(each, best, room)


def _heaviest_first(each: Floats, room: Ints, by_slice: bool) -> Ints:
    """Replicas by total load, descending, each to the rank that then has the least: in all, or in its worst slice."""
    loads = np.zeros((len(room), len(each)))
    left = room.copy()
    rank = np.zeros(each.shape[1], np.int64)
    for i in np.argsort(-each.sum(axis=0), kind="stable").tolist():
        after = loads + each[:, i]
        cost = after.max(axis=1) if by_slice else after.sum(axis=1)
        best = int(np.where(left > 0, cost, np.inf).argmin())
        rank[i] = best
        loads[best] += each[:, i]
        left[best] -= 1
    return rank


def _improved(each: Floats, rank: Ints, room: Ints) -> Ints:
    """Swap with, or move to, another rank while that lowers the larger load of the two and the worst rank is one."""
    # An empty slot is a replica of nothing: a move is a swap with it.
    spare = np.repeat(np.arange(len(room)), room - np.bincount(rank, minlength=len(room)))
    each = np.concatenate([each, np.zeros((len(each), len(spare)))], axis=1)
    place = np.concatenate([rank, spare])
    loads = np.stack([each[:, place == r].sum(axis=1) for r in range(len(room))])
    for _ in range(4 * each.shape[1]):  # each step lowers the worst rank; a bound for the sake of time
        worst = int(loads.max(axis=1).argmax())
        mine, others = np.flatnonzero(place == worst), np.flatnonzero(place != worst)
        if not (mine.size and others.size):
            break
        gain = each[:, None, others] - each[:, mine, None]  # [slices, mine, others]
        here = (loads[worst][:, None, None] + gain).max(axis=0)
        there = (loads[place[others]].T[:, None, :] - gain).max(axis=0)
        larger = np.maximum(here, there)
        i, j = np.unravel_index(int(larger.argmin()), larger.shape)
        if larger[i, j] >= loads[worst].max() - _SMALLEST_GAIN:
            break
        loads[worst] += gain[:, i, j]
        loads[place[others[j]]] -= gain[:, i, j]
        place[mine[i]], place[others[j]] = place[others[j]], worst
    return place[: len(rank)]


def _searched(each: Floats, rank: Ints, room: Ints) -> Ints:
    """A placement with the lowest peak of all, by branch and bound; `rank` if none is better, or the search is long."""
    heaviest_first = np.argsort(-each.sum(axis=0), kind="stable").tolist()
    weights: list[tuple[float, ...]] = [tuple(column) for column in each.T.tolist()]
    loads: list[tuple[float, ...]] = [(0.0,) * len(each)] * len(room)
    left, place, best = room.tolist(), rank.tolist(), rank
    lowest, steps = _peak(each, rank, len(room)), _MOST_STEPS

    def put(at: int) -> None:
        nonlocal best, lowest, steps
        if at == len(heaviest_first):
            best, lowest = np.array(place, np.int64), max(map(max, loads))
            return
        replica, tried = heaviest_first[at], set()
        for r, before in enumerate(loads):
            after = tuple(map(add, before, weights[replica]))
            # Ranks of equal load and room are alike: one of them is enough.
            if not left[r] or (before, left[r]) in tried or max(after) >= lowest - _SMALLEST_GAIN or not steps:
                continue
            steps -= 1
            tried.add((before, left[r]))
            loads[r], place[replica] = after, r
            left[r] -= 1
            put(at + 1)
            loads[r] = before
            left[r] += 1

    put(0)
    return best


def _peak(each: Floats, rank: Ints, ranks: int) -> float:
    """The largest load of a rank in one slice."""
    return max(float(np.bincount(rank, row, ranks).max()) for row in each)


def _load(load: Any) -> Floats:
    """[slices, experts].

    Raises:
        UsageError: it has another shape, or is negative or not finite.
    """
    table = np.atleast_2d(np.asarray(load, np.float64))
    if table.ndim != 2 or not table.size:
        raise UsageError(f"a load is [experts] or [slices, experts], got {np.shape(load)}", value=np.shape(load))
    if not (np.isfinite(table).all() and (table >= 0).all()):
        raise UsageError("a load must be finite and at least 0", value="load")
    return table


def _even_runs(count: int, ranks: int) -> Ints:
    """[ranks + 1] where runs of count // ranks begin, the first count % ranks of them one longer."""
    sizes = np.full(ranks, count // ranks)
    sizes[: count % ranks] += 1
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
