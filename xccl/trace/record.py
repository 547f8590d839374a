"""A recorder for each rank, and what it records: operations, their stages, and in the end their entries.

Recording is cheap, so that it does not show in what is recorded: a stage costs a look at the clock, and what an
operation moved is kept as it is, in the arrays of the operation, until somebody asks for its entries. A modelled run
fills the same records, with times of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .entry import Entry

#: End of what has not ended.
_OPEN = -1


class Stage(NamedTuple):
    """When a rank was in a stage.

    Attributes:
        name: of the stage.
        begin_ns: by CLOCK_MONOTONIC, the same for all ranks of a machine; in a modelled run, from its start.
        end_ns: the same; -1 if the stage has not ended.
    """

    name: str
    begin_ns: int
    end_ns: int


class Event(NamedTuple):
    """One entry, with the time in which it happened.

    Attributes:
        rank: who did it.
        lane: which lane, -1 if none is named.
        stage: in which stage.
        entry: what.
        begin_ns: when the stage began.
        end_ns: when it ended.
    """

    rank: int
    lane: int
    stage: str
    entry: Entry
    begin_ns: int
    end_ns: int


class Operation:
    """One operation of one rank.

    Attributes:
        rank: who did it.
        name: put, send, dispatch, ...
        number: event ID or epoch; None if it has none.
        begin_ns: when it was called.
        end_ns: when it was done; -1 if it is under way, or was given up.
    """

    def __init__(self, rank: int, name: str, number: int | None = None, begin_ns: int | None = None) -> None:
        self.rank = rank
        self.name = name
        self.number = number
        self.begin_ns = time.monotonic_ns() if begin_ns is None else begin_ns
        self.end_ns = _OPEN
        self._stages: list[Stage] = []
        self._entries: Callable[[], Iterable[Entry]] | None = None
        self._found: list[Entry] = []

    def begin_stage(self, name: str) -> None:
        """A stage begins, and the one before ends."""
        now_ns = time.monotonic_ns()
        self._close(now_ns)
        self._stages.append(Stage(name, now_ns, _OPEN))

    def add_stage(self, name: str, begin_ns: int, end_ns: int) -> None:
        """A stage with times of its own: stages may overlap."""
        self._stages.append(Stage(name, begin_ns, end_ns))

    def finish(self, entries: Callable[[], Iterable[Entry]], end_ns: int | None = None) -> None:
        """The operation is done.

        Args:
            entries: says what it did, when it is asked; it must not look at anything that changes later.
            end_ns: when; now if None.
        """
        self.end_ns = time.monotonic_ns() if end_ns is None else end_ns
        self._close(self.end_ns)
        self._entries = entries

    def overlap(self, *names: str) -> None:
        """These stages were a pipeline: all of them took from the beginning to now."""
        now_ns = time.monotonic_ns()
        self._stages += [Stage(name, self.begin_ns, now_ns) for name in names]

    @property
    def is_finished(self) -> bool:
        """Has it ended well?"""
        return self.end_ns != _OPEN

    @property
    def stages(self) -> list[Stage]:
        """The stages that were begun, in order; the last one of an operation that was given up has no end."""
        return list(self._stages)

    @property
    def entries(self) -> list[Entry]:
        """What it did, sorted, as `xccl.protocol.stage.Description.entries` has it; nothing before it is finished."""
        if self._entries is not None:
            self._found = sorted(self._entries())
            self._entries = None
        return self._found

    @property
    def events(self) -> list[Event]:
        """Entries with the times of their stages."""
        times = {stage.name: stage for stage in self._stages}
        return [
            Event(self.rank, entry.lane, entry.stage, entry, times[entry.stage].begin_ns, times[entry.stage].end_ns)
            for entry in self.entries
        ]

    def _close(self, now_ns: int) -> None:
        if self._stages and self._stages[-1].end_ns == _OPEN:
            self._stages[-1] = self._stages[-1]._replace(end_ns=now_ns)

    def __getstate__(self) -> dict[str, Any]:
        """Ranks send what they recorded to others: the entries themselves go, and not what says them."""
        self.entries  # noqa: B018
        return self.__dict__

    def __repr__(self) -> str:
        number = "" if self.number is None else f" {self.number}"
        return f"Operation({self.name}{number} at rank {self.rank}, {len(self._stages)} stages)"


class Recorder:
    """What one rank did, in the order in which it began. Used by one thread.

    Attributes:
        rank: the rank.
        operations: in order.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.operations: list[Operation] = []

    def start(self, name: str, number: int | None = None, *, stage: str | None = None) -> Operation:
        """An operation begins, and a stage with it if one is named."""
        operation = Operation(self.rank, name, number)
        if stage is not None:
            operation.add_stage(stage, operation.begin_ns, _OPEN)
        self.operations.append(operation)
        return operation

    def withdraw(self, operation: Operation) -> None:
        """An operation has not begun after all."""
        self.operations.remove(operation)

    def named(self, name: str) -> list[Operation]:
        """The operations of that name."""
        return [operation for operation in self.operations if operation.name == name]

    @property
    def events(self) -> list[Event]:
        """Those of all operations."""
        return [event for operation in self.operations for event in operation.events]

    def __repr__(self) -> str:
        return f"Recorder(rank {self.rank}, {len(self.operations)} operations)"
