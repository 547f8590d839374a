"""The steps of one operation: told to whoever listens, and to the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from ..errors import FabricError, UsageError
from ..trace.entry import Entry
from ..trace.record import Operation
from .core import Core

#: Why the object of an operation cannot be used after its `free`.
FREED = "it was freed"

#: Called with (operation, step) before each step; for tests and tools.
StepHook = Callable[[str, str], None]


class Steps:
    """One operation of a rank; call it with the name of each step before the step.

    Attributes:
        begun: has it done anything that peers may see?
    """

    __slots__ = ("_core", "_hook", "_name", "_operation", "begun")

    def __init__(self, core: Core, hook: StepHook | None, name: str) -> None:
        self._core = core
        self._hook = hook
        self._name = name
        self._operation: Operation | None = None
        self.begun = False

    @property
    def is_watched(self) -> bool:
        """Does anybody listen to steps?"""
        return self._hook is not None or self._operation is not None

    def begin(self, number: int) -> None:
        """Arguments are checked, and the operation begins; `number` is its epoch."""
        self.begun = True
        if self._core.trace is not None:
            self._operation = self._core.trace.start(self._name, number)

    def __call__(self, step: str) -> None:
        """The step of that name begins."""
        if self._hook is not None:
            self._hook(self._name, step)
        if self._operation is not None:
            self._operation.begin_stage(step)

    def withdraw(self) -> None:
        """Nothing was done after all: an argument was found to be wrong while the operation began."""
        self.begun = False
        if self._core.trace is not None and self._operation is not None:
            self._core.trace.withdraw(self._operation)

    def finish(self, entries: Callable[..., Iterable[Entry]], *args: Any, **options: Any) -> None:
        """The operation is done; `entries`, called with the rest, says what it did, if somebody asks."""
        if self._operation is not None:
            self._operation.finish(partial(entries, *args, **options))


def unusable(core: Core, name: str, reason: str) -> UsageError | FabricError:
    """The error for a call of an object that cannot be used any more: the caller's if it was freed, else the system's.

    Args:
        core: of this rank.
        name: of the object's class.
        reason: FREED, or which operation was given up.
    """
    text = f"rank {core.rank}: this {name} object is unusable: {reason}"
    return UsageError(text, value=reason) if reason == FREED else FabricError(text)
