"""Which figure of a machine moves a result most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..protocol.stage import Description
from .analytic import estimate, is_regular
from .machine import Machine
from .simulate import simulate
from .topology import place

#: A figure is moved by this part, up and down.
_STEP = 0.1
#: Counts of things are no figures to be moved by a tenth.
_COUNTS = ("topology.", "lane.count", "lane.buffer_bytes")


@dataclass(frozen=True)
class Sensitivity:
    """How a result follows a parameter.

    Attributes:
        parameter: its name.
        value: its figure.
        elasticity: per cent of time for one per cent of the parameter; negative where more is faster.
    """

    parameter: str
    value: float
    elasticity: float


def sensitivities(
    descriptions: Sequence[Description], machine: Machine, placement: str = "packed"
) -> list[Sensitivity]:
    """All parameters that move the time of these descriptions, one after the other, the strongest first.

    Each is moved 10% up and down, by the fast path where that is exact, else by simulation.
    What takes no time has none.
    """
    runs = [
        (estimate if is_regular(each, place(machine, each.ranks, placement)) else simulate, each)
        for each in descriptions
    ]

    def total_us(moved: Machine) -> float:
        return sum(run(each, place(moved, each.ranks, placement)).total_us for run, each in runs)

    if total_us(machine) <= 0:
        return []
    found = []
    for name, parameter in machine.parameters.items():
        if name.startswith(_COUNTS) or parameter.value == 0:
            continue
        logs = []
        for factor in (1 + _STEP, 1 - _STEP):
            moved = machine.scaled(name, factor)
            logs.append(math.log(total_us(moved)))
        elasticity = (logs[0] - logs[1]) / (math.log(1 + _STEP) - math.log(1 - _STEP))
        if abs(elasticity) > 5e-4:
            found.append(Sensitivity(name, parameter.value, elasticity))
    return sorted(found, key=lambda item: (-abs(item.elasticity), item.parameter))
