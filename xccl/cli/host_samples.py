"""Times that two ranks take side by side, on a machine that may be busy with something else, too.

A step is disturbed if the kernel counts a switch of either rank from before the barrier in front of it to its end. What
follows a disturbed step finds other caches than a protocol does. So the figure of a round is the median, over the
undisturbed samples whose predecessor was undisturbed, too, of the slower rank. Samples are taken until there are enough
of these, or time is up; ranks tell each other after each step, so that they go on, or stop, together.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from xccl.comm.communicator import Communicator

Floats = npt.NDArray[np.float64]

#: With fewer samples than this of a quality in a round, it does not count; if that is so in all, they count together;
#: if there are fewer than this in all, those of the next quality count, too.
_FEW: Final = 3
_LIMIT_S: Final = 0.4
_LARGE_BYTES: Final = 4 << 20
#: Qualities of a sample, in the order of preference.
_GOOD, _AFTER_DISTURBANCE, _DISTURBED = 0, 1, 2

#: What one rank has seen in one round: by name, nanoseconds and quality.
Samples = dict[str, list[tuple[int, int]]]
#: Steps with their names, timed one after the other behind one barrier.
Steps = Mapping[str, Callable[[], object]]


class Stopwatch:
    """Times steps of one rank; both ranks of the session make it, and call it for the same steps.

    Args:
        comm: of this rank.
        wanted: undisturbed samples of each step in a round.
    """

    def __init__(self, comm: Communicator, wanted: int) -> None:
        self._comm = comm
        self._wanted = wanted
        self._told = comm.empty((2,), np.int64)
        self._to_peer = self._told.peer(1 - comm.rank)
        self._samples: Samples = {}
        self._is_disturbed = True

    def collect(self, cycle: Sequence[Steps], limit_s: float) -> None:
        """Go through a cycle of steps until there are enough samples of each, or time is up; the first does not count.

        Args:
            cycle: all ranks pass the same steps.
            limit_s: may differ; a busy machine needs more time the longer the steps are.
        """
        with _uninterrupted():
            self._collect(cycle, perf_counter_ns() + int(limit_s * 1e9))

    def take(self) -> Samples:
        """The samples of a round; the next one begins with none."""
        taken, self._samples = self._samples, {}
        return taken

    def _collect(self, cycle: Sequence[Steps], until_ns: int) -> None:
        for steps in cycle:
            self._measure(steps, until_ns)
        counts = [0] * len(cycle)
        is_late = False
        while min(counts) < self._wanted and not is_late:
            for i, steps in enumerate(cycle):
                times_ns, quality, is_over = self._measure(steps, until_ns)
                for name, time_ns in zip(steps, times_ns, strict=True):
                    self._samples.setdefault(name, []).append((time_ns, quality))
                counts[i] += quality == _GOOD
                is_late |= is_over

    def _measure(self, steps: Steps, until_ns: int) -> tuple[list[int], int, bool]:
        """Times, their quality at the rank that was worse off, and whether time is up for either rank."""
        switches = _switches()
        self._comm.barrier()
        times_ns = []
        for step in steps.values():
            start_ns = perf_counter_ns()
            step()
            times_ns.append(perf_counter_ns() - start_ns)
        is_after, self._is_disturbed = self._is_disturbed, _switches() != switches
        quality = _DISTURBED if self._is_disturbed else _AFTER_DISTURBANCE if is_after else _GOOD
        is_over = perf_counter_ns() > until_ns
        # The peer reads this after one barrier, and before the next.
        self._to_peer[:] = quality, is_over
        self._comm.barrier()
        theirs, they_are_over = self._told.local.tolist()
        return times_ns, max(quality, theirs), is_over or bool(they_are_over)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """The core is this thread's alone, if the system lets it: with real-time priority, for some tens of milliseconds.

    Without that privilege, samples are disturbed as often as others want the core.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(os.sched_get_priority_min(os.SCHED_FIFO)))
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def limit_s(n_bytes: int) -> float:
    """How long to try for steps of so many bytes; it takes a tenth of that where nobody else wants the core."""
    return _LIMIT_S * (1 + n_bytes / _LARGE_BYTES)


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
        times_us, quality = [], []
        for of_ranks in zip(*rounds, strict=True):
            columns = np.array([samples[name] for samples in of_ranks])
            times_us.append(columns[:, :, 0].max(axis=0) / 1e3)
            quality.append(columns[:, :, 1].max(axis=0))
        chosen = _best(times_us, quality)
        low, middle, high = np.percentile([np.median(of_round) for of_round in chosen], (25, 50, 75)).tolist()
        mid_us = float(np.median([_middle_mean(of_round) for of_round in chosen]))
        undisturbed = float(np.mean(np.concatenate(quality) < _DISTURBED))
        found[name] = Figure(middle, mid_us, (high - low) / 2 / middle if middle else 0.0, undisturbed)
    return found


def _best(times_us: Sequence[Floats], quality: Sequence[npt.NDArray[np.int64]]) -> Sequence[Floats]:
    """The times, by round, of the best quality of which there are more than a few: in rounds, or in all together."""
    for worst in (_GOOD, _AFTER_DISTURBANCE):
        by_round = [times[of_round <= worst] for times, of_round in zip(times_us, quality, strict=True)]
        if enough := [times for times in by_round if len(times) >= _FEW]:
            return enough
        if sum(map(len, by_round)) >= _FEW:
            return [np.concatenate(by_round)]
    return times_us


def _middle_mean(times_us: Floats) -> float:
    """Mean of the middle half. The median of times that come in two kinds is one kind or the other, as it happens."""
    low, high = np.percentile(times_us, (25, 75))
    return float(times_us[(times_us >= low) & (times_us <= high)].mean())
