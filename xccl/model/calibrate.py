"""Calibration: free parameters from published figures, and how far the model is from each of them.

The free parameters are those with bounds in the profile. They are physical (a start-up, a rate, a barrier, a small
write), the same for every operation and number of ranks. They are found by least squares on the relative errors, with a
weak pull towards where the search begins. Published rows have evenly loaded experts, so the fast path does for the
search; what is compared in the end is simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .analytic import estimate
from .machine import Machine
from .project import describe_moe
from .published import PublishedRow, published_rows
from .simulate import Timeline, simulate
from .topology import place

#: By profile: the implementation whose rows it is calibrated on, and its protocol.
IMPLEMENTATION_OF = {"cm384": "CANN fused push", "h800-rdma": "DeepEP on H800"}
_PROTOCOL_OF = {"CANN fused push": "push", "DeepEP on H800": "deepep"}
_PULL = 0.2

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """One published figure beside the model's.

    Attributes:
        row: the figure.
        model_us: what the model says.
    """

    row: PublishedRow
    model_us: float

    @property
    def error(self) -> float:
        """Relative error of the model."""
        return self.model_us / self.row.latency_us - 1


def model_us(machine: Machine, row: PublishedRow, run: Callable[..., Timeline] = simulate) -> float:
    """The model's time for a published row, by simulation or by the fast path."""
    description = describe_moe(
        row.operation, ranks=row.ep, tokens=row.tokens, hidden=row.hidden, top_k=row.top_k,
        protocol=_PROTOCOL_OF[row.implementation], machine=machine,
    )  # fmt: skip
    return run(description, place(machine, row.ep)).total_us


def compare(machine: Machine) -> list[Comparison]:
    """Every published row of the machine's implementation, beside the model."""
    return [Comparison(row, model_us(machine, row)) for row in published_rows(IMPLEMENTATION_OF[machine.name])]


def fit(machine: Machine, rows: Sequence[PublishedRow], max_evaluations: int = 20) -> dict[str, float]:
    """The free parameters that fit these rows best, by name. Needs SciPy."""
    from scipy.optimize import least_squares

    free = machine.free
    low = np.array([p.low for p in free], np.float64)
    span = np.log(np.array([p.high for p in free], np.float64) / low)
    begin = np.log(np.array([p.value for p in free]) / low) / span
    published = np.array([row.latency_us for row in rows])

    def values(place_of: Floats) -> dict[str, float]:
        return {p.name: float(v) for p, v in zip(free, low * np.exp(place_of * span), strict=True)}

    def residuals(place_of: Floats) -> Floats:
        candidate = machine.with_values(values(place_of))
        times = np.array([model_us(candidate, row, estimate) for row in rows])
        return np.concatenate([100 * (times / published - 1), _PULL * (place_of - begin)])

    found = least_squares(residuals, begin, bounds=(0, 1), diff_step=0.03, max_nfev=max_evaluations)
    return values(found.x)


def leave_one_out(machine: Machine) -> list[Comparison]:
    """Each row, predicted from a fit on all the others. Needs SciPy."""
    rows = published_rows(IMPLEMENTATION_OF[machine.name])
    found = []
    for row in rows:
        others = [other for other in rows if other is not row]
        found.append(Comparison(row, model_us(machine.with_values(fit(machine, others)), row)))
    return found
