"""Stragglers: when each rank calls an operation."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

#: exponential: most ranks are nearly on time, a few are far behind. normal: jitter, alike on both sides.
Distribution = Literal["exponential", "normal"]
DISTRIBUTIONS: tuple[Distribution, ...] = ("exponential", "normal")


def start_skew_us(
    ranks: int, skew_us: float, *, distribution: Distribution = "exponential", seed: int = 0
) -> npt.NDArray[np.float64]:
    """[ranks] microseconds after the earliest possible call; the same for the same arguments.

    Args:
        ranks: how many.
        skew_us: the mean of an exponential distribution, the standard deviation of a normal one.
        distribution: which of them. A normal one is counted from the rank that came first.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    if distribution == "exponential":
        return rng.exponential(skew_us, ranks)
    drawn = rng.normal(0.0, skew_us, ranks)
    return np.asarray(drawn - drawn.min(), np.float64)
