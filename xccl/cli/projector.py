"""`xccl bench --project`: the stages that a benchmark's ranks have traced, on a modelled machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from xccl.cli.described import describe_step
from xccl.cli.options import BenchOptions
from xccl.cli.project import as_json
from xccl.errors import ModelError, UsageError
from xccl.model.machine import Machine, load_machine
from xccl.model.project import project, together

if TYPE_CHECKING:
    from xccl.cli.results import Measurement
    from xccl.protocol.stage import Description, Entry

_TARGET: Final = re.compile(r"(?P<machine>.+?)(?:@(?P<ranks>[1-9]\d*))?")


class Projector:
    """Projects the rows of a run.

    Args:
        options: of the run.
        target: MACHINE or MACHINE@RANKS, the same work on so many ranks.

    Attributes:
        machine: the modelled machine.
        ranks: how many of its dies take part.

    Raises:
        UsageError: the target is malformed, or has no room for the run.
        ModelError: there is no such machine.
    """

    def __init__(self, options: BenchOptions, target: str) -> None:
        match = _TARGET.fullmatch(target)
        if match is None:
            raise UsageError(f"--project {target}: must be MACHINE or MACHINE@RANKS", value=target)
        self._options = options
        self.machine: Machine = load_machine(match["machine"])
        self.ranks = int(match["ranks"] or options.ranks)
        dies = 1
        for part in ("dies_per_chip", "chips_per_node", "nodes"):
            dies *= int(self.machine[f"topology.{part}"])
        if self.ranks > dies:
            raise UsageError(
                f"--project {target}: {self.machine.name} has {dies} dies, {self.ranks} are asked for",
                value=self.ranks, bound=dies,
            )  # fmt: skip

    def of(self, measurements: Sequence[Measurement]) -> dict[str, Any]:
        """What the model says for one row: the object "projected" of a result.

        Raises:
            ModelError: what ran is not what is described, so that the projection would be of something else.
        """
        first = measurements[0]
        described = self._described(first, self._options.ranks, _releasing(measurements))
        require_same(measurements, described)
        if self.ranks != self._options.ranks:
            described = self._described(first, self.ranks, None)
        parts = [project(part, self.machine) for part in described]
        whole = parts[0] if len(parts) == 1 else together(first.op, parts)
        return {**as_json(whole), "ranks": self.ranks}

    def _described(self, first: Measurement, ranks: int, releasing: int | None) -> list[Description]:
        return describe_step(self._options, first.case, first.op, ranks, releasing)


def require_same(measurements: Sequence[Measurement], described: Sequence[Description]) -> None:
    """Compare what each rank has traced with what is described.

    Raises:
        ModelError: they differ; says where.
    """
    for rank, measurement in enumerate(measurements):
        traced = sorted(entry for operation in measurement.traced or () for entry in operation.entries)
        expected = sorted(entry for part in described for entry in part.entries(rank))
        if traced != expected:
            seen = _first_difference(traced, expected)
            raise ModelError(f"{measurement.op} at rank {rank} did not run as it is described: {seen}; this is a bug")


def _first_difference(traced: list[Entry], expected: list[Entry]) -> str:
    for a, b in zip(traced, expected, strict=False):
        if a != b:
            return f"traced {a}, described {b}"
    return f"{len(traced)} entries traced, {len(expected)} described"


def _releasing(measurements: Sequence[Measurement]) -> int | None:
    """The rank that released a barrier, which is known only after it."""
    for rank, measurement in enumerate(measurements):
        for operation in measurement.traced or ():
            if any(entry.stage == "release" and entry.what == "release" for entry in operation.entries):
                return rank
    return None
