"""What-ifs: a machine with other figures, as far as there can be such a machine.

A rate of nothing, or half a die, would not make the model fail: it would make it say something, and that would be
wrong. So a figure that is given by hand is checked by what its name says it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ModelError
from .machine import Machine

#: Things that are counted.
_COUNTS = ("topology.", "lane.count", "lane.buffer_bytes")
#: What something is divided by.
_RATES = ("_gbps", "_gelements", ".outstanding")
_EFFICIENCY = "efficiency"
#: Beyond these no machine is, and sums of times lose their digits.
_LEAST, _MOST = 1e-6, 1e9


def what_if(machine: Machine, settings: Sequence[str]) -> Machine:
    """The machine with other figures.

    Args:
        machine: to begin with.
        settings: NAME=NUMBER each; of the same name, the last one counts.

    Raises:
        ModelError: a setting is not one, there is no such figure, or no machine could have it.
    """
    values: dict[str, float] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        try:
            values[name] = float(text)
        except ValueError:
            raise ModelError(f"--set {setting}: must be NAME=NUMBER", machine=machine.name) from None
        if not equals:
            raise ModelError(f"--set {setting}: must be NAME=NUMBER", machine=machine.name)
    changed = machine.with_values(values)  # which knows the names
    for name, value in values.items():
        _require_possible(name, value, machine.name)
    return changed


def _require_possible(name: str, value: float, machine: str) -> None:
    if name.startswith(_COUNTS):
        if not (value == int(value) and 1 <= value <= _MOST):
            raise ModelError(f"{name} is {value:g}, must be a whole number from 1 to {_MOST:g}", machine=machine)
        return
    if name.endswith(_EFFICIENCY):
        low, high = _LEAST, 1.0
    elif name.endswith(_RATES):
        low, high = _LEAST, _MOST
    else:
        low, high = 0.0, _MOST
    if not low <= value <= high:
        raise ModelError(f"{name} is {value:g}, must be from {low:g} to {high:g}", machine=machine)
