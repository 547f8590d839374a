"""Medians, ratios of medians, and how sure they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_RESAMPLES = 4000
_CONFIDENCE = 0.95

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """A median over another, and the interval that holds the true one with 95% confidence."""

    value: float
    low: float
    high: float

    def verdict(self, limit: float) -> str:
        """Is it at most `limit`: "met" or "missed" if the whole interval says so, "unsure" if the limit lies in it."""
        if self.high <= limit:
            return "met"
        return "missed" if self.low > limit else "unsure"


def ratio(ours: npt.ArrayLike, theirs: npt.ArrayLike, seed: int = 0) -> Ratio:
    """The median of `ours` over that of `theirs`, with a percentile bootstrap interval (Efron, 1979).

    Args:
        ours: [rounds] figures above 0, NaN in rounds without one.
        theirs: [rounds] the same. Rounds that both have count.
        seed: of the resampling: the same figures give the same interval.

    Rounds are resampled, since what disturbs the machine for a while disturbs both figures of a round. With one round
    nothing can be said of the interval: it is everything from 0 to infinity.

    Raises:
        ValueError: no round that both have.
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    rounds = min(len(a), len(b))
    both = np.isfinite(a[:rounds]) & np.isfinite(b[:rounds])
    a, b = a[:rounds][both], b[:rounds][both]
    turns = len(a)
    if not turns:
        raise ValueError("a ratio needs a round of both")
    value = float(np.median(a) / np.median(b))
    if turns == 1:
        return Ratio(value, 0.0, float("inf"))
    chosen = np.random.default_rng(seed).integers(0, turns, (_RESAMPLES, turns))
    ratios = np.median(a[chosen], axis=1) / np.median(b[chosen], axis=1)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(ratios, (tail, 1 - tail)).tolist()
    return Ratio(value, low, high)


def median(figures: Any) -> float:
    """As a float, of those that are not NaN."""
    return float(np.nanmedian(np.asarray(figures, np.float64)))
