"""Who holds whom up: what `xccl top` concludes from the waits of all ranks of a session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from xccl.runtime.observed import ObservedRank, Wait
from xccl.runtime.sessions import ObservedSession


@dataclass(frozen=True)
class Blocked:
    """Ranks that wait for the same.

    Attributes:
        ranks: those that wait.
        wait: what for, as the one says that has waited longest.
    """

    ranks: tuple[int, ...]
    wait: Wait


@dataclass(frozen=True)
class Root:
    """A rank that holds others up, or has ended.

    Attributes:
        rank: which.
        why: what it does instead.
        since_ns: since when it is waited for; None if it is not.
    """

    rank: int
    why: str
    since_ns: int | None


@dataclass(frozen=True)
class Analysis:
    """What is to be said of a session.

    Attributes:
        waits: by rank, with the ranks that have not come to a barrier found.
        blocked: those that wait longest first.
        roots: ranks that are waited for, and wait for nobody; and those that died or failed.
        cycle: ranks that wait for each other, each for the next one; empty if there are none.
    """

    waits: Mapping[int, tuple[Wait, ...]]
    blocked: tuple[Blocked, ...]
    roots: tuple[Root, ...]
    cycle: tuple[int, ...]


def analyse(session: ObservedSession) -> Analysis:
    """Group the waits of a session, and find out where they begin."""
    waits = _without_those_present({rank.rank: rank.waits for rank in session.ranks})
    edges = {rank: _awaited(own) for rank, own in waits.items() if own}
    return Analysis(waits, _blocked(waits), _roots(session, waits, edges), _cycle(edges))


def ranges(ranks: Iterable[int]) -> str:
    """`[3, 4, 5, 9]` as "3-5, 9"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def named(ranks: Iterable[int]) -> str:
    """`[3, 4]` as "ranks 3-4"."""
    ranks = list(ranks)
    return f"rank{'s' * (len(ranks) != 1)} {ranges(ranks)}"


_Party = tuple[str, int | None, frozenset[int]]


def _without_those_present(shown: Mapping[int, tuple[Wait, ...]]) -> dict[int, tuple[Wait, ...]]:
    """Waits by rank; of those for some of several ranks, without those that wait, too: they have done their part."""
    present: dict[_Party, set[int]] = {}
    parties: dict[tuple[int, Wait], _Party] = {}
    for rank, own in shown.items():
        for wait in own:
            if wait.who == "some":
                party = wait.operation, wait.event, frozenset((rank, *wait.ranks))
                parties[rank, wait] = party
                present.setdefault(party, set()).add(rank)

    def without(rank: int, wait: Wait) -> Wait:
        if wait.who != "some":
            return wait
        here = present[parties[rank, wait]]
        missing = tuple(other for other in wait.ranks if other not in here)
        if not missing:
            return wait  # all are there: the last one has come just now
        count = None if wait.expected is None or wait.seen is None else wait.expected - wait.seen
        # With fewer to come than are missing, somebody has come who does not show it yet.
        return replace(wait, ranks=missing, who="some" if count is not None and count < len(missing) else "all")

    return {rank: tuple(without(rank, wait) for wait in own) for rank, own in shown.items()}


def _blocked(waits: Mapping[int, tuple[Wait, ...]]) -> tuple[Blocked, ...]:
    groups: dict[tuple[object, ...], list[tuple[int, Wait]]] = {}
    for rank, own in waits.items():
        for wait in own:
            # Those that wait for any other rank wait for the same, though none waits for itself.
            whom = (rank, *wait.ranks) if wait.who == "any" else wait.ranks
            key = wait.operation, wait.event, wait.who, tuple(sorted(whom))
            groups.setdefault(key, []).append((rank, wait))
    found = []
    for members in groups.values():
        oldest = min((wait for _, wait in members), key=lambda wait: wait.since_ns)
        found.append(Blocked(tuple(sorted({rank for rank, _ in members})), oldest))
    return tuple(sorted(found, key=lambda blocked: blocked.wait.since_ns))


def _awaited(waits: Iterable[Wait]) -> set[int]:
    return {other for wait in waits if wait.who != "any" for other in wait.ranks}


def _roots(
    session: ObservedSession, waits: Mapping[int, tuple[Wait, ...]], edges: Mapping[int, set[int]]
) -> tuple[Root, ...]:
    """Ranks that are waited for and do not wait, and those that have ended badly."""
    by_rank = {rank.rank: rank for rank in session.ranks}
    since: dict[int, int] = {}
    for own in waits.values():
        for wait in own:
            for other in wait.ranks if wait.who != "any" else ():
                since[other] = min(since.get(other, wait.since_ns), wait.since_ns)
    found = []
    for rank in sorted({*since, *by_rank}):
        observed = by_rank.get(rank)
        if observed is None:
            found.append(Root(rank, "has not joined, or has ended", since[rank]))
        elif (why := ending(observed)) or (rank in since and not edges.get(rank)):
            found.append(Root(rank, why or _doing(observed, waits[rank]), since.get(rank)))
    return tuple(found)


def ending(rank: ObservedRank) -> str:
    """Why a rank will not go on; empty if it may."""
    if rank.state == "failed":
        return f"has failed: {rank.last_words}" if rank.last_words else "has failed"
    if rank.state == "left":
        return ""
    if rank.process.activity == "dead":
        during = "".join(f", in {describe(wait)}" for wait in rank.waits[:1])
        return f"died{during}"
    return "is stopped, by a signal or a debugger" if rank.process.activity == "stopped" else ""


def _doing(rank: ObservedRank, waits: tuple[Wait, ...]) -> str:
    if rank.state == "left":
        return "has done its work and left the session"
    if waits:
        return f"waits for any rank, in {describe(waits[0])}"
    process = rank.process
    does = {"running": "computes", "sleeping": "sleeps", "blocked": "is blocked in the operating system"}
    doing = does.get(process.activity)
    if doing is None:
        return "waits for nobody"
    return f"waits for nobody: its process {doing} ({process.cpu_s:.1f} s of CPU time so far)"


def describe(wait: Wait) -> str:
    """Operation and event, as errors name them."""
    return wait.operation if wait.event is None else f"{wait.operation} (event {wait.event})"


def _cycle(edges: Mapping[int, set[int]]) -> tuple[int, ...]:
    """Ranks that wait for each other, in the order of the waits."""
    left = dict(edges)
    while ends := [rank for rank, others in left.items() if not others & left.keys()]:
        for rank in ends:
            del left[rank]
    if not left:
        return ()
    path = [min(left)]
    while (following := min(left[path[-1]] & left.keys())) not in path:
        path.append(following)
    return tuple(path[path.index(following) :])
