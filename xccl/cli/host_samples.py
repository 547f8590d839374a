"""Times that two ranks take side by side, on a machine that may be busy with something else, too.

A step is disturbed if the kernel counts a switch of either rank from before the barrier in front of it to its end. What
follows a disturbed step finds other caches than a protocol does. So the figure of a round is the median, over the
undisturbed samples whose predecessor was undisturbed, too, of the slower rank. Samples are taken until there are enough
of these, or time is up; ranks tell each other after each step, so that they go on, or stop, together.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from xccl.comm.communicator import Communicator

Floats = npt.NDArray[np.float64]

#: With fewer samples than this of a quality, those of the next one count, too.
_FEW: Final = 3
#: Qualities of a sample, in the order of preference, and what a rank adds for the other one when it wants to stop.
_GOOD, _AFTER_DISTURBANCE, _DISTURBED = 0, 1, 2
_OUT_OF_TIME: Final = 4

#: What one rank has seen in one round: by name, nanoseconds and quality.
Samples = dict[str, list[tuple[int, int]]]
#: Steps with their names, timed one after the other behind one barrier.
Steps = Mapping[str, Callable[[], object]]


class Stopwatch:
    """Times steps of one rank; both ranks of the session make it, and call it for the same steps.

    Args:
        comm: of this rank.
        wanted: undisturbed samples of each step in a round.
        limit_s: when to stop without them.
    """

    def __init__(self, comm: Communicator, wanted: int, limit_s: float) -> None:
        self._comm = comm
        self._wanted = wanted
        self._limit_ns = int(limit_s * 1e9)
        self._told = comm.empty((1,), np.int64)
        self._to_peer = self._told.peer(1 - comm.rank)
        self._samples: Samples = {}
        self._is_disturbed = True

    def collect(self, cycle: Sequence[Steps]) -> None:
        """Go through a cycle of steps until there are enough samples of each; the first cycle does not count."""
        until_ns = perf_counter_ns() + self._limit_ns
        for steps in cycle:
            self._measure(steps, until_ns)
        counts = [0] * len(cycle)
        is_late = False
        while min(counts) < self._wanted and not is_late:
            for i, steps in enumerate(cycle):
                times_ns, said = self._measure(steps, until_ns)
                quality = said % _OUT_OF_TIME
                for name, time_ns in zip(steps, times_ns, strict=True):
                    self._samples.setdefault(name, []).append((time_ns, quality))
                counts[i] += quality == _GOOD
                is_late |= said >= _OUT_OF_TIME

    def take(self) -> Samples:
        """The samples of a round; the next one begins with none."""
        taken, self._samples = self._samples, {}
        return taken

    def _measure(self, steps: Steps, until_ns: int) -> tuple[list[int], int]:
        """Times, and their quality as the rank says that was worse off."""
        switches = _switches()
        self._comm.barrier()
        times_ns = []
        for step in steps.values():
            start_ns = perf_counter_ns()
            step()
            times_ns.append(perf_counter_ns() - start_ns)
        is_after, self._is_disturbed = self._is_disturbed, _switches() != switches
        quality = _DISTURBED if self._is_disturbed else _AFTER_DISTURBANCE if is_after else _GOOD
        # The peer reads this after one barrier, and before the next.
        self._to_peer[0] = quality + _OUT_OF_TIME * (perf_counter_ns() > until_ns)
        self._comm.barrier()
        mine, theirs = int(self._to_peer[0]), int(self._told.local[0])
        return times_ns, max(mine % _OUT_OF_TIME, theirs % _OUT_OF_TIME) + (
            mine | theirs
        ) // _OUT_OF_TIME * _OUT_OF_TIME


def _switches() -> int:
    """How often this thread has lost or given away its core."""
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_nivcsw + usage.ru_nvcsw


@dataclass(frozen=True)
class Figure:
    """What rounds say of one step.

    Attributes:
        p50_us: median of a round, median of the rounds.
        mid_us: the same of the means of the middle half of a round: what one step adds to the time of many.
        spread: half of what the middle half of the rounds spans, over the median.
        undisturbed: share of the samples that were so.
    """

    p50_us: float
    mid_us: float
    spread: float
    undisturbed: float


def figures(rounds: Sequence[Sequence[Samples]]) -> dict[str, Figure]:
    """What all rounds say of each step.

    Args:
        rounds: by rank, what it has seen in each round; all have the same steps.
    """
    found = {}
    for name in rounds[0][0]:
        chosen, shares = [], []
        for of_ranks in zip(*rounds, strict=True):
            columns = np.array([samples[name] for samples in of_ranks])
            quality = columns[:, :, 1].max(axis=0)
            chosen.append(_best(columns[:, :, 0].max(axis=0) / 1e3, quality))
            shares.append(float((quality < _DISTURBED).mean()))
        low, middle, high = np.percentile([np.median(times_us) for times_us in chosen], (25, 50, 75)).tolist()
        mid_us = float(np.median([_middle_mean(times_us) for times_us in chosen]))
        found[name] = Figure(middle, mid_us, (high - low) / 2 / middle if middle else 0.0, float(np.mean(shares)))
    return found


def _best(times_us: Floats, quality: npt.NDArray[np.int64]) -> Floats:
    """The times of the best quality of which there are more than a few."""
    for worst in (_GOOD, _AFTER_DISTURBANCE):
        if np.count_nonzero(quality <= worst) >= _FEW:
            return times_us[quality <= worst]
    return times_us


def _middle_mean(times_us: Floats) -> float:
    """Mean of the middle half. The median of times that come in two kinds is one kind or the other, as it happens."""
    low, high = np.percentile(times_us, (25, 75))
    return float(times_us[(times_us >= low) & (times_us <= high)].mean())
