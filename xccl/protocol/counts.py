"""The counts of a routing: how many rows go from each rank to each expert. All that a description needs to know of it.

A row is one (token, slot) with an expert: a token with eight experts makes eight rows. Deduplicated, a token makes one
row for each rank that has any of them. Experts are dealt to the ranks that hold them in runs, all equal but for the
first `experts % destinations`, which have one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .stage import Ints, ints

#: The golden ratio's fractional part: multiples of it fill a circle evenly, wherever one starts and stops.
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, eq=False)
class RoutingCounts:
    """Rows from each source to each expert.

    Attributes:
        tokens: [sources] tokens of each source.
        sending: [sources] those of them that have at least one expert.
        counts: [sources, experts] rows.
        destinations: ranks that hold experts.
        deduplicated: [sources, destinations] tokens of each source that have any expert at each destination; None if
            that is not known.
    """

    tokens: Ints
    sending: Ints
    counts: Ints
    destinations: int
    deduplicated: Ints | None = None

    def __post_init__(self) -> None:
        """Check that the columns fit.

        Raises:
            UsageError: they do not.
        """
        if self.counts.ndim != 2 or self.tokens.shape != self.sending.shape or len(self.tokens) != len(self.counts):
            raise UsageError(
                f"tokens, sending and counts have shapes {self.tokens.shape}, {self.sending.shape} and "
                f"{self.counts.shape}, not [sources], [sources] and [sources, experts]",
                value=self.counts.shape,
            )
        if self.destinations < 1:
            raise UsageError(f"experts are at {self.destinations} ranks", value=self.destinations, bound=1)
        if (self.counts < 0).any() or (self.sending > np.minimum(self.tokens, self.sent)).any():
            raise UsageError("counts must not be negative, and a token that is sent has at least one row")

    @classmethod
    def from_topk(
        cls, topk_idxs: npt.NDArray[Any] | Sequence[npt.NDArray[Any]], experts: int, destinations: int | None = None
    ) -> RoutingCounts:
        """Count real routings.

        Args:
            topk_idxs: integers [tokens, top_k] by source, tokens may differ; -1 for no expert.
            experts: experts in all.
            destinations: ranks that hold them; as many as there are sources if None.

        Raises:
            UsageError: an expert is out of range.
        """
        n = len(topk_idxs)
        destinations = n if destinations is None else destinations
        owner = np.repeat(np.arange(destinations), _dealt_runs(experts, destinations))
        deduplicated = np.zeros((n, destinations), np.int64)
        tokens = ints([len(idx) for idx in topk_idxs])
        counts = np.zeros((n, experts), np.int64)
        sending = np.zeros(n, np.int64)
        for source, idx in enumerate(topk_idxs):
            if idx.size and not (idx.min() >= -1 and idx.max() < experts):
                raise UsageError(
                    f"expert ids of rank {source} are {idx.min()} to {idx.max()}, must be -1 to {experts - 1}",
                    value=(int(idx.min()), int(idx.max())),
                    bound=experts - 1,
                )
            chosen = idx >= 0
            counts[source] = np.bincount(idx[chosen], minlength=experts)
            sending[source] = np.count_nonzero(chosen.any(axis=1))
            pairs = np.flatnonzero(chosen) // idx.shape[1] * destinations + owner[idx[chosen]]
            deduplicated[source] = np.bincount(np.unique(pairs) % destinations, minlength=destinations)
        return cls(tokens, sending, counts, destinations, deduplicated)

    @classmethod
    def from_counts(
        cls, counts: npt.ArrayLike, tokens: npt.ArrayLike, destinations: int | None = None
    ) -> RoutingCounts:
        """From a matrix of rows, when the tokens' own choices are not known.

        Args:
            counts: [sources, experts] rows; [sources, destinations] where only the ranks matter, which is to have one
                expert on each.
            tokens: tokens of each source, or of every one; all of them are sent, as far as there are rows.
            destinations: ranks that hold the experts; as many as there are sources if None.
        """
        matrix = np.asarray(counts, np.int64)
        every = np.broadcast_to(ints(tokens), len(matrix)).copy()
        sending = np.minimum(every, matrix.sum(axis=1))
        return cls(every, sending, matrix, len(matrix) if destinations is None else destinations)

    @classmethod
    def uniform(
        cls,
        sources: int,
        *,
        experts: int,
        tokens: npt.ArrayLike,
        top_k: int,
        shared: int = 0,
        destinations: int | None = None,
    ) -> RoutingCounts:
        """The uniform expectation, in whole rows: those of two experts differ by one at most, at a source and in all.

        Args:
            sources: ranks with tokens.
            experts: routed experts.
            tokens: tokens of each source, or of every one.
            top_k: routed experts of each token.
            shared: replicas of a shared expert, numbered after the routed ones; each token goes to one of them besides.
            destinations: ranks that hold the experts, shared ones included; as many as there are sources if None.
        """
        if experts < 1 or not 1 <= top_k <= experts:
            raise UsageError(f"top_k is {top_k}, must be 1 to experts ({experts})", value=top_k, bound=experts)
        every = np.broadcast_to(ints(tokens), sources).copy()
        parts = [_dealt(every * top_k, experts)]
        if shared:
            parts.append(_dealt(every, shared))
        return cls(every, every, np.concatenate(parts, axis=1), sources if destinations is None else destinations)

    @property
    def sources(self) -> int:
        """Ranks with tokens."""
        return len(self.tokens)

    @property
    def experts(self) -> int:
        """Experts in all."""
        return int(self.counts.shape[1])

    @property
    def local_experts(self) -> int:
        """Experts of each destination.

        Raises:
            UsageError: not all of them have as many.
        """
        if self.experts % self.destinations:
            raise UsageError(
                f"{self.experts} experts cannot be divided among {self.destinations} ranks",
                value=self.experts,
                bound=self.destinations,
            )
        return self.experts // self.destinations

    @cached_property
    def local(self) -> Ints:
        """[destinations] experts of each destination."""
        return _dealt_runs(self.experts, self.destinations)

    @cached_property
    def rows(self) -> Ints:
        """[sources, destinations] rows."""
        return self._by_destination(self.counts)

    @cached_property
    def runs(self) -> Ints:
        """[sources, destinations] experts that get rows: the runs in which the rows of a pair lie."""
        return self._by_destination(self.counts > 0)

    @cached_property
    def sent(self) -> Ints:
        """[sources] rows of each source."""
        return np.asarray(self.counts.sum(axis=1), np.int64)

    @cached_property
    def received(self) -> Ints:
        """[destinations] rows that each destination gets."""
        return np.asarray(self.rows.sum(axis=0), np.int64)

    def _by_destination(self, columns: npt.NDArray[Any]) -> Ints:
        until = np.zeros((self.sources, self.experts + 1), np.int64)
        np.cumsum(columns, axis=1, out=until[:, 1:])
        ends = np.cumsum(self.local)
        return np.asarray(until[:, ends] - until[:, ends - self.local], np.int64)


def _dealt_runs(experts: int, destinations: int) -> Ints:
    """[destinations] how many of the experts each gets."""
    each, more = divmod(experts, destinations)
    return each + (np.arange(destinations) < more).astype(np.int64)


def _dealt(rows: Ints, experts: int) -> Ints:
    """[sources, experts]: deal the rows of all sources like cards, one expert after the other.

    The experts' turn goes round in steps of a golden section, so that few rows of a source are spread over far experts
    too, as choices by chance would be.
    """
    step = next(s for s in range(max(round(_GOLDEN * experts), 1), 2 * experts + 1) if gcd(s, experts) == 1)
    ends = np.cumsum(rows)[:, None]
    turn = np.arange(experts)
    # Of the cards before number n, ceil((n - turn) / experts) fall to the expert with that turn.
    until = -((turn - ends) // experts)
    before = -((turn - (ends - rows[:, None])) // experts)
    counts = np.empty((len(rows), experts), np.int64)
    counts[:, turn * step % experts] = until - before
    return counts
