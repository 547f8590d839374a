"""`xccl bench --project`: the stages that a benchmark's ranks have traced, on a modelled machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from xccl.cli.described import describe_step, require_described
from xccl.cli.options import BenchOptions, Case
from xccl.cli.project import as_json
from xccl.errors import ModelError, UsageError
from xccl.model.machine import Machine, load_machine
from xccl.model.project import Projection, project, together, whole_experts

if TYPE_CHECKING:
    from xccl.cli.results import Measurement
    from xccl.protocol.stage import Description, Entry

_TARGET: Final = re.compile(r"(?P<machine>.+?)(?:@(?P<ranks>\d*))?")


class Projector:
    """Projects the rows of a run.

    Args:
        options: of the run.
        target: MACHINE or MACHINE@RANKS, the same work on so many ranks.
        option: where the target comes from, for errors.

    Attributes:
        machine: the modelled machine.
        ranks: how many of its dies take part.

    Raises:
        UsageError: the target is malformed, there is no such machine, it has no room for the run, or no description of
            it.
    """

    def __init__(self, options: BenchOptions, target: str, option: str = "--project") -> None:
        match = _TARGET.fullmatch(target)
        if match is None or (match["ranks"] is not None and int(match["ranks"] or 0) < 1):
            raise UsageError(f"{option} {target}: must be MACHINE or MACHINE@RANKS, of 1 rank or more", value=target)
        self._options = options
        self._target = target
        self._projected: dict[tuple[Case, str], Projection] = {}
        try:
            self.machine: Machine = load_machine(match["machine"])
        except ModelError as error:
            raise UsageError(f"{option} {target}: {error}", value=target) from error
        self.ranks = int(match["ranks"] or options.ranks)
        dies = 1
        for part in ("dies_per_chip", "chips_per_node", "nodes"):
            dies *= int(self.machine[f"topology.{part}"])
        if self.ranks > dies:
            raise UsageError(
                f"{option} {target}: {self.machine.name} has {dies} dies, {self.ranks} are asked for",
                value=self.ranks, bound=dies,
            )  # fmt: skip
        require_described(options, self.ranks)

    @property
    def title(self) -> str:
        """On what the work is projected, and what had to be changed for it."""
        experts = whole_experts(self._options.experts, self.ranks)
        if self._options.deployment is not None or experts == self._options.experts:
            return self._target
        return f"{self._target} with {experts} experts ({self._options.experts} are no multiple of {self.ranks} ranks)"

    def of(self, measurements: Sequence[Measurement]) -> dict[str, Any]:
        """What the model says for one row: the object "projected" of a result.

        Raises:
            ModelError: what ran is not what is described, so that the projection would be of something else.
        """
        first = measurements[0]
        described = describe_step(
            self._options, first.case, first.op, self._options.ranks, _releasing(measurements), _pushed(measurements),
            first.reach,
        )  # fmt: skip
        require_same(measurements, described)
        if self.ranks != self._options.ranks:
            described = describe_step(self._options, first.case, first.op, self.ranks, reach=first.reach)
        parts = [self._project(first.case, part) for part in described]
        whole = parts[0] if len(parts) == 1 else together(first.op, parts)
        scaled: dict[str, Any] = {"ranks": self.ranks}
        if first.case.tokens is not None and self._options.deployment is None:
            scaled["experts"] = whole_experts(self._options.experts, self.ranks)
        return {**as_json(whole), **scaled}

    def _project(self, case: Case, described: Description) -> Projection:
        """A round trip is made of what its halves are, which have rows of their own."""
        key = (case, described.operation)
        if key not in self._projected:
            self._projected[key] = project(described, self.machine)
        return self._projected[key]


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


def _pushed(measurements: Sequence[Measurement]) -> list[int]:
    """The pieces of zero-copy messages that each rank has pushed: that depends on who came when."""
    return [
        sum(
            entry.units
            for operation in measurement.traced or ()
            for entry in operation.entries
            if (entry.stage, entry.kind) == ("push", "transfer")
        )
        for measurement in measurements
    ]
