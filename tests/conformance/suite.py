"""What every suite needs of a fabric: run a function on its ranks, and let a rank die."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn


class Suite(ABC):
    """Base of the suites. A fabric's test file derives one class from each suite, and says how its ranks live and die."""

    @abstractmethod
    def run(self, main: Callable[..., Any], ranks: int = 2, **options: Any) -> list[Any]:
        """Run `main(comm)` on the ranks of a new session of this fabric; the results by rank.

        Args:
            main: the function of a rank, any callable.
            ranks: number of ranks.
            options: those of `xccl.launch`.
        """

    @abstractmethod
    def die(self) -> NoReturn:
        """End the rank that calls this without a word to the others, as far as this fabric's ranks can."""
