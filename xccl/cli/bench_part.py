"""What a benchmark is, for a rank that runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xccl.cli.options import BenchOptions, Case

if TYPE_CHECKING:
    from xccl.comm.communicator import Communicator


@dataclass(frozen=True)
class Part:
    """One row of the table.

    Attributes:
        op: Name of the row.
        step: One iteration; this is what is timed.
        check: One iteration on fresh data into cleared outputs; returns the wrong elements at this rank. All ranks call
            it together, and may begin the next thing when it returns.
        payload_bytes: What this rank sends in a step.
        rows_received: MoE only: token copies that this rank receives in a step.
    """

    op: str
    step: Callable[[], object]
    check: Callable[[], int]
    payload_bytes: int
    rows_received: int | None = None


class Operation(ABC):
    """A benchmark at one rank. The constructor allocates for the largest case; the cases then follow in order."""

    def __init__(self, comm: Communicator, options: BenchOptions, cases: list[Case]) -> None:
        self.comm = comm
        self.options = options

    @abstractmethod
    def parts(self, case: Case) -> Iterator[Part]:
        """The rows of one case. Set-up of a row comes right before its `yield`: all ranks pass it together."""
