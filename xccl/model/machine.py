"""Machine profiles: what a machine's links, engines and cores can do, every figure with its source.

A profile is a TOML file. A parameter is named by its table, `link.bandwidth_gbps`; its unit is in the name. Free
parameters carry the range that is physically possible, and calibration stays within it.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError

#: The machine that `xccl calibrate host` has measured.
HOST = "host"
_PROFILES = resources.files(__package__) / "profiles"


#: What a profile may leave out, and what holds then: another parameter's figure, or this one. Machines whose cores
#: read, write and sum alike, with one kernel for an operation and engines beside the vector unit, need none of them.
_SAME_AS: Mapping[str, str | float] = {
    "lane.pull_rate_gbps": "lane.rate_gbps",
    "lane.fused_rate_gbps": "lane.pull_rate_gbps",
    "lane.local_pull_rate_gbps": "lane.local_rate_gbps",
    "lane.local_repeat_rate_gbps": "lane.local_rate_gbps",
    "lane.fused_local_rate_gbps": "lane.local_pull_rate_gbps",
    "kernel.record_us": 0.0,
    "kernel.stage_us": 0.0,
    "vector.overlaps": 1.0,
    "vector.sums_apart": 1.0,
}


@dataclass(frozen=True)
class Parameter:
    """One figure of a machine.

    Attributes:
        name: table and key, with the unit.
        value: the figure.
        source: where it comes from.
        low: smallest value that is physically possible; None if the parameter is not free.
        high: largest one.
        curve: how a rate or a time depends on the bytes that a rank works on at a time, (bytes, figure) in growing
            order, where caches matter; `value` holds where there is none.
    """

    name: str
    value: float
    source: str
    low: float | None = None
    high: float | None = None
    curve: tuple[tuple[float, float], ...] = ()

    @property
    def is_free(self) -> bool:
        """May calibration change it?"""
        return self.low is not None


@dataclass(frozen=True)
class Machine:
    """A machine: its parameters by name, and what calibration left behind.

    Attributes:
        name: of the profile.
        title: in words.
        parameters: by name.
        calibration: how the free parameters were found: residuals and leave-one-out errors; empty if they were not
            fitted.
    """

    name: str
    title: str
    parameters: Mapping[str, Parameter]
    calibration: Mapping[str, Any]

    def __getitem__(self, name: str) -> float:
        if name not in self.parameters and name in _SAME_AS:
            default = _SAME_AS[name]
            return self[default] if isinstance(default, str) else default
        return self.parameters[name].value

    def at(self, name: str, n_bytes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """A figure for each working set: on its curve, where times grow in straight lines from point to point."""
        if name not in self.parameters and not isinstance(_SAME_AS.get(name), float):
            return self.at(str(_SAME_AS[name]), n_bytes)
        curve = self.parameters[name].curve if name in self.parameters else ()
        if not curve:
            return np.full(np.shape(n_bytes), self[name])
        sizes, figures = np.array(curve).T
        within = np.clip(n_bytes, sizes[0], sizes[-1])
        if name.endswith("_gbps"):
            return np.asarray(within / np.interp(within, sizes, sizes / figures), np.float64)
        return np.asarray(np.interp(within, sizes, figures), np.float64)

    @property
    def free(self) -> list[Parameter]:
        """The parameters that calibration fits."""
        return [p for p in self.parameters.values() if p.is_free]

    def scaled(self, name: str, factor: float) -> Machine:
        """The same machine with one figure, and its curve if it has one, times a factor."""
        old = self.parameters[name]
        curve = tuple((n_bytes, factor * rate) for n_bytes, rate in old.curve)
        new = replace(old, value=factor * old.value, curve=curve)
        return replace(self, parameters={**self.parameters, name: new})

    def with_values(self, values: Mapping[str, float]) -> Machine:
        """The same machine with other figures.

        Raises:
            ModelError: there is no such parameter, or the value is not a number of at least 0.
        """
        parameters = dict(self.parameters)
        for name, value in values.items():
            if name not in parameters:
                near = ", ".join(n for n in parameters if n.split(".")[0] == name.split(".")[0]) or ", ".join(
                    parameters
                )
                raise ModelError(f"machine {self.name} has no parameter {name}; there are {near}", machine=self.name)
            if not 0 <= value < float("inf"):
                raise ModelError(f"{name} must be a number of at least 0, got {value}", machine=self.name)
            parameters[name] = replace(parameters[name], value=float(value), curve=())
        return replace(self, parameters=parameters)


def host_path() -> Path:
    """Where `xccl calibrate host` leaves the profile of this machine: in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xccl" / "host.toml"


def profile_text(machine: Machine) -> str:
    """A machine as a profile: what `parse_machine` reads."""
    lines = [f"name = {json.dumps(machine.name)}", f"title = {json.dumps(machine.title)}"]
    for parameter in machine.parameters.values():
        lines += ["", f"[{parameter.name}]", f"value = {float(parameter.value)!r}"]
        if parameter.low is not None and parameter.high is not None:
            lines += [f"low = {parameter.low:g}", f"high = {parameter.high:g}"]
        if parameter.curve:
            points = ", ".join(f"[{n_bytes!r}, {value!r}]" for n_bytes, value in parameter.curve)
            lines.append(f"curve = [{points}]")
        lines.append(f"source = {json.dumps(parameter.source, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def profile_names() -> list[str]:
    """The profiles that come with xccl."""
    return sorted(entry.name.removesuffix(".toml") for entry in _PROFILES.iterdir() if entry.name.endswith(".toml"))


def load_machine(name: str) -> Machine:
    """A profile by name, or a TOML file by path.

    Raises:
        ModelError: there is no such profile, or the file is not one.
    """
    if name == HOST:
        if not host_path().is_file():
            raise ModelError(f"{host_path()} is not there: run `xccl calibrate host` first", machine=name)
        text = host_path().read_text(encoding="utf-8")
    elif name in profile_names():
        text = (_PROFILES / f"{name}.toml").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        names = ", ".join([*profile_names(), HOST])
        raise ModelError(f"there is no machine {name!r}: use one of {names}, or the path of a profile", machine=name)
    return parse_machine(text, name)


def parse_machine(text: str, origin: str) -> Machine:
    """A machine from the text of a profile.

    Raises:
        ModelError: the text is not a profile.
    """
    try:
        data = tomllib.loads(text)
        calibration = data.pop("calibration", {})
        name, title = str(data.pop("name")), str(data.pop("title"))
        parameters = {}
        for table, entries in data.items():
            for key, entry in entries.items():
                full = f"{table}.{key}"
                bounds = (entry["low"], entry["high"]) if "low" in entry or "high" in entry else (None, None)
                curve = tuple((float(n_bytes), float(value)) for n_bytes, value in entry.get("curve", ()))
                parameters[full] = Parameter(
                    full, float(entry["value"]), str(entry["source"]), low=bounds[0], high=bounds[1], curve=curve
                )
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(f"{origin} is not a machine profile: {error!r}", machine=origin) from error
    _check(parameters, origin)
    return Machine(name, title, parameters, calibration)


def _check(parameters: Mapping[str, Parameter], origin: str) -> None:
    """Raise ModelError for a figure that cannot be, or that the model would miss."""
    for parameter in parameters.values():
        low, high = (parameter.low, parameter.high) if parameter.low is not None else (0.0, float("inf"))
        sizes = [n_bytes for n_bytes, _ in parameter.curve]
        if sizes != sorted(set(sizes)) or any(not (n > 0 and 0 < f < float("inf")) for n, f in parameter.curve):
            raise ModelError(
                f"{origin}: the curve of {parameter.name} must have growing sizes and figures above 0", machine=origin
            )
        if not (0 <= parameter.value < float("inf") and low <= parameter.value <= (high or low)):
            raise ModelError(
                f"{origin}: {parameter.name} is {parameter.value}, allowed is {low} to {high}", machine=origin
            )
    missing = sorted(_required() - set(parameters))
    if missing:
        raise ModelError(f"{origin} is not a machine profile: it has no {', '.join(missing)}", machine=origin)


@cache
def _required() -> frozenset[str]:
    """What the model asks of every machine: the parameters of its first one."""
    data = tomllib.loads((_PROFILES / "cm384.toml").read_text(encoding="utf-8"))
    tables = {table: entries for table, entries in data.items() if isinstance(entries, dict) and table != "calibration"}
    return frozenset(f"{table}.{key}" for table, entries in tables.items() for key in entries)
