"""What became of a rank, and which of several failures to show."""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import CapacityError, FabricError, PeerDied, SessionAborted, UsageError, XcclError


class RankTraceback(Exception):
    """The traceback of an exception in a rank, as text: the cause of the exception that `launch` raises."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(rank, text)
        self.rank = rank
        self.text = text

    def __str__(self) -> str:
        return f"\n\nTraceback of rank {self.rank}:\n{self.text}"


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        kind: "result", "error" (an exception) or "exit" (SystemExit, or the process ended without a word).
        value: the result; or the exception; or how it ended, in words.
        trace: the traceback of an exception, as text.
    """

    kind: Literal["result", "error", "exit"]
    value: Any
    trace: str = ""

    @classmethod
    def of_error(cls, error: BaseException) -> Outcome:
        """The outcome of a rank whose function raised."""
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, SystemExit):
            code = 0 if error.code is None else error.code
            return cls("exit", f"exited with status {code} before its work was done", trace)
        return cls("error", error, trace)

    def to_bytes(self) -> bytes:
        """Pickle; what cannot be pickled becomes an error that says so."""
        try:
            data = pickle.dumps(self)
            pickle.loads(data)  # an exception class may pickle and yet not come back
        except Exception as problem:  # noqa: BLE001 - pickling runs foreign code
            if isinstance(self.value, XcclError):
                details = {name: _plain(value) for name, value in self.value.details.items()}
                return pickle.dumps(Outcome("error", type(self.value)(str(self.value), **details), self.trace))
            if self.kind == "error":
                error: XcclError = XcclError(f"{type(self.value).__name__}: {self.value}")
                return pickle.dumps(Outcome("error", error, self.trace))
            text = f"the result of type {type(self.value).__name__} cannot be sent to the launcher: {problem}"
            return pickle.dumps(Outcome("error", FabricError(text), ""))
        return data


def _plain(value: object) -> object:
    """The value if it pickles, else its text."""
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:  # noqa: BLE001 - pickling runs foreign code
        return repr(value)
    return value


def raise_failure(outcomes: dict[int, Outcome]) -> None:
    """Raise the failure that explains the others, if any rank failed.

    A rank's own exception explains more than a death, a death more than what a rank was told of another one's error,
    and that more than PeerDied and SessionAborted, which are consequences. `outcomes` is in the order in which ranks
    ended.
    """
    failures = {rank: outcome for rank, outcome in outcomes.items() if outcome.kind != "result"}
    if not failures:
        return
    rank, outcome = min(failures.items(), key=lambda item: _consequence(item[1]))
    if outcome.kind == "exit":
        raise PeerDied(f"rank {rank} {outcome.value}", peer=rank, reason=outcome.value)
    error = outcome.value
    if isinstance(error, KeyboardInterrupt):
        error = KeyboardInterrupt(f"rank {rank} was interrupted")
    elif hasattr(error, "add_note"):
        error.add_note(f"raised by rank {rank}")
    raise error from RankTraceback(rank, outcome.trace)


def _consequence(outcome: Outcome) -> int:
    if outcome.kind == "exit":
        return 1
    error = outcome.value
    if isinstance(error, (PeerDied, SessionAborted)):
        return 3
    # One that names a peer is what the others are told when a rank has no room, or was given an impossible argument:
    # that rank's own error has the numbers.
    told = isinstance(error, (CapacityError, UsageError)) and "peer" in error.details
    return 2 if told else 0
