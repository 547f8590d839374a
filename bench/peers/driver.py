"""Turns: in a cell, every library measures a little, then the next one, again and again.

Noise of a machine comes in bursts that last longer than a turn: so it hits all libraries alike, and a ratio of their
medians means something where the medians do not. A turn is some blocks of operations, its figure the median of the
blocks, a block's figure the mean of its operations at the slowest rank.

A cell has a budget of time. It is divided among those that take part; one whose single operations take longer than its
share gets few turns: at least three, or one if the whole cell takes far longer than its budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from bench.peers.session import NotThereError, Session, SessionError
from bench.peers.statistics import median
from bench.peers.table import Contestant, Operation
from bench.peers.work import Cell

_TURNS: Final = 20
_FEWEST_TURNS: Final = 3
#: A cell that has taken so many times its budget is over.
_MOST_OVERRUN: Final = 2.0
_BLOCK_S: Final = 2e-3
_MOST_BLOCKS: Final = 9
_PREPARE_TIMEOUT_S: Final = 60.0
_CLOSE_TIMEOUT_S: Final = 20.0
#: Above what a block should take: an operation that others hold up for so long is not worth waiting for.
_BLOCK_TIMEOUT_S: Final = 30.0


@dataclass
class Entry:
    """What one contestant did in a cell.

    Attributes:
        turns_us: the figure of each turn, in microseconds an operation.
        wrong: wrong elements of the checked operation, or None.
        note: what to know of the figure.
        reason: why there is no figure.
    """

    turns_us: list[float] = field(default_factory=list)
    wrong: int | None = None
    note: str = ""
    reason: str = ""

    @property
    def median_us(self) -> float | None:
        """The figure, if there is one."""
        return median(self.turns_us) if self.turns_us else None


@dataclass
class CellResult:
    """A cell, measured."""

    operation: Operation
    cell: Cell
    entries: dict[Contestant, Entry]


class Driver:
    """Sessions of one number of ranks; a library whose session breaks is started again for the next cell.

    Args:
        ranks: of each session.
        make: makes a session, for tests.
    """

    def __init__(self, ranks: int, make: Callable[[str, int], Session] = Session) -> None:
        self._ranks, self._make = ranks, make
        self._sessions: dict[str, Session] = {}
        self._not_there: dict[str, str] = {}
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        while self._sessions:
            session = self._sessions.popitem()[1]
            session.abort() if error else session.close()

    def measure(
        self, operation: Operation, cell: Cell, contestants: Iterable[Contestant], budget_s: float
    ) -> CellResult:
        """Measure a cell."""
        entries = {contestant: Entry() for contestant in contestants}
        plans = [plan for contestant, entry in entries.items() if (plan := self._prepare(cell, contestant, entry))]
        share_s = budget_s / max(len(plans), 1)
        end = time.monotonic() + _MOST_OVERRUN * budget_s
        for plan in plans:
            self._guarded(plan, partial(plan.estimate, share_s / _TURNS))
        for turn in range(_TURNS):
            for plan in plans:
                is_due = turn < _FEWEST_TURNS or plan.spent_s < share_s
                if is_due and (not turn or time.monotonic() < end):
                    self._guarded(plan, plan.take_turn)
        for plan in plans:
            self._guarded(plan, plan.close)
        return CellResult(operation, cell, entries)

    def _prepare(self, cell: Cell, contestant: Contestant, entry: Entry) -> _Plan | None:
        try:
            session = self._session(contestant.library)
            prepared = session.prepare(cell, contestant.variant, _PREPARE_TIMEOUT_S)
        except NotThereError as error:
            entry.reason = str(error)
        except SessionError as error:
            self._lost(contestant.library)
            entry.reason = f"failed: {error}"
        else:
            if isinstance(prepared, str):
                entry.reason = f"not comparable: {prepared}"
            else:
                entry.wrong, entry.note = prepared
                return _Plan(session, cell, contestant, entry)
        return None

    def _session(self, library: str) -> Session:
        if library in self._not_there:
            raise NotThereError(self._not_there[library])
        if library not in self._sessions:
            try:
                self._sessions[library] = self._make(library, self._ranks)
            except (NotThereError, SessionError) as error:
                self._not_there[library] = str(error)  # what does not start once will not for the next cell
                raise NotThereError(str(error)) from error
            self.versions[library] = self._sessions[library].version
        return self._sessions[library]

    def _guarded(self, plan: _Plan, step: Callable[[], None]) -> None:
        if plan.entry.reason:
            return
        try:
            step()
        except SessionError as error:
            plan.entry.reason = f"failed: {error}"
            plan.entry.turns_us.clear()
            self._lost(plan.contestant.library)

    def _lost(self, library: str) -> None:
        with suppress(KeyError):
            self._sessions.pop(library).close()


@dataclass
class _Plan:
    """How a contestant takes its turns in a cell."""

    session: Session
    cell: Cell
    contestant: Contestant
    entry: Entry
    operations: int = 1
    blocks: int = 1
    spent_s: float = 0.0

    def estimate(self, turn_s: float) -> None:
        """Find out how many operations make a block, and how many blocks a turn."""
        operation_s = self._time(1, 1)
        while operation_s * self.operations < _BLOCK_S and self.operations < 1 << 16:
            self.operations *= 4
            operation_s = self._time(self.operations, 1)
        self.operations = max(1, min(self.operations, round(_BLOCK_S / operation_s)))
        self.blocks = max(1, min(_MOST_BLOCKS, int(turn_s / (operation_s * self.operations))))

    def take_turn(self) -> None:
        """Measure one turn."""
        begin = time.monotonic()
        times_s = self.session.time(
            self.cell, self.contestant.variant, self.operations, self.blocks, _BLOCK_TIMEOUT_S * self.blocks
        )
        self.entry.turns_us.append(1e6 * median(times_s))
        self.spent_s += time.monotonic() - begin

    def close(self) -> None:
        """Give back what was prepared."""
        self.session.close_work(self.cell, self.contestant.variant, _CLOSE_TIMEOUT_S)

    def _time(self, operations: int, blocks: int) -> float:
        """Seconds from order to answer, for each operation: more than the operation, so estimates are safe."""
        begin = time.monotonic()
        self.session.time(self.cell, self.contestant.variant, operations, blocks, _BLOCK_TIMEOUT_S)
        return (time.monotonic() - begin) / operations / blocks
