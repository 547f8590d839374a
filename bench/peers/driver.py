"""Rounds: in a cell, every library measures a little, then the next one, again and again.

Noise of a machine comes in bursts that last longer than a turn: so it hits all libraries alike, and a ratio of their
medians means something where the medians do not. A turn is some blocks of operations, a block's figure the mean of its
operations at the slowest rank, a turn's the median of its blocks.

Where each rank has a core, the kernel tells whether another process took it away during a block. Such a block measured
the other process. If a turn has others, it does not count; if not, the turn says so.

A cell has a budget of time, for as many rounds as it allows; at least three, or one if that takes several times as
long. Figures of a round belong together. Peers that no target is for take part in every fourth round only: they are
often the slowest, and would take most of the time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from bench.peers.session import NotThereError, Session, SessionError
from bench.peers.statistics import median
from bench.peers.table import Contestant, Operation
from bench.peers.work import Block, Cell

#: A turn is made so short that the budget is enough for so many.
_ROUNDS: Final = 20
_MOST_ROUNDS: Final = 60
_FEWEST_ROUNDS: Final = 3
_ROUNDS_PER_EXTRA_TURN: Final = 4
#: A cell that has taken so many times its budget is over.
_MOST_OVERRUN: Final = 3.0
_BLOCK_S: Final = 5e-4
_MOST_BLOCKS: Final = 16
_MOST_OPERATIONS: Final = 1 << 14
_PREPARE_TIMEOUT_S: Final = 60.0
_CLOSE_TIMEOUT_S: Final = 20.0
#: Above what a block should take: an operation that others hold up for so long is not worth waiting for.
_BLOCK_TIMEOUT_S: Final = 30.0


@dataclass
class Entry:
    """What one contestant did in a cell.

    Attributes:
        turns_us: the figure of each round, in microseconds an operation; NaN where it took no part.
        disturbed: turns in which no block was undisturbed.
        wrong: wrong elements of the checked operation, or None.
        note: what to know of the figure.
        reason: why there is no figure.
    """

    turns_us: list[float] = field(default_factory=list)
    disturbed: int = 0
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
        for library in dict.fromkeys(contestant.library for contestant in entries):
            with suppress(NotThereError):  # its entries will say so
                self._session(library)
        begin = time.monotonic()
        plans = [plan for contestant, entry in entries.items() if (plan := self._prepare(cell, contestant, entry))]
        for plan in plans:
            plan.is_extra = operation.is_extra(plan.contestant)
        turns = sum(1 / _ROUNDS_PER_EXTRA_TURN if plan.is_extra else 1 for plan in plans) * _ROUNDS
        turn_s = budget_s / max(turns, 1)
        for plan in plans:
            self._guarded(plan, partial(plan.estimate, turn_s))
        for done in range(_MOST_ROUNDS):
            spent_s = time.monotonic() - begin
            if spent_s > (budget_s if done >= _FEWEST_ROUNDS else _MOST_OVERRUN * budget_s) and done:
                break
            for plan in plans:
                if plan.is_extra and done % _ROUNDS_PER_EXTRA_TURN:
                    plan.entry.turns_us.append(math.nan)
                else:
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
                entry.wrong, entry.note = prepared.wrong, prepared.note
                return _Plan(session, cell, contestant, entry, prepared.per_operation)
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
    per_operation: float
    operations: int = 1
    blocks: int = 1
    is_extra: bool = False

    def estimate(self, turn_s: float) -> None:
        """Find out how many operations make a block, and how many blocks a turn."""
        block_s = self._fastest_block_s()
        while block_s < _BLOCK_S / 2 and self.operations < _MOST_OPERATIONS:
            self.operations *= min(8, max(2, round(_BLOCK_S / block_s)))
            block_s = self._fastest_block_s()
        self.blocks = max(1, min(_MOST_BLOCKS, int(turn_s / block_s)))

    def take_turn(self) -> None:
        """Measure one turn."""
        blocks = self._time(self.blocks)
        undisturbed = [block.operation_s for block in blocks if not block.is_disturbed]
        self.entry.disturbed += not undisturbed
        operation_s = median(undisturbed or [block.operation_s for block in blocks])
        self.entry.turns_us.append(1e6 * operation_s * self.per_operation)

    def close(self) -> None:
        """Give back what was prepared."""
        self.session.close_work(self.cell, self.contestant.variant, _CLOSE_TIMEOUT_S)

    def _fastest_block_s(self) -> float:
        return max(min(block.operation_s for block in self._time(3)) * self.operations, 1e-7)

    def _time(self, blocks: int) -> list[Block]:
        variant, timeout_s = self.contestant.variant, _BLOCK_TIMEOUT_S * blocks
        return self.session.time(self.cell, variant, self.operations, blocks, timeout_s)
