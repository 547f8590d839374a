"""What all operations share: bounded waits that end with a reason, and agreement between ranks on arguments."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from ..errors import CapacityError, FabricError, PeerDied, SessionAborted, UsageError, WaitTimeout, XcclError
from ..fabric import Fabric
from ..kernels import wait, words
from ..kernels.wait import OK
from ..layout.calls import CA_SLICE_NS
from ..layout.ring import DR_REQUESTS
from ..layout.segment import (
    ABORT_DIED,
    ABORT_EXCEPTION,
    ABORT_INTERRUPT,
    CTL_STATE,
    STATE_FAILED,
    STATE_LEFT,
)
from ..trace.record import Recorder
from . import callstate
from .callstate import CallState
from .status import ShownWait, StatusBoard

if TYPE_CHECKING:
    from .symmetric import SymmetricAllocator

#: A kernel waits at most this long before Python looks at signals, deadlines and the liveness of peers.
SLICE_NS = 50_000_000
#: With hundreds of ranks looking costs more: the slice grows with their number, up to this.
_LONGEST_SLICE_NS = 500_000_000
_SLICE_RANKS = 64
#: While requests are under way a wait comes back this often to drive them on.
PROGRESS_SLICE_NS = 200_000
#: `reason` of the PeerDied that a wait for a rank ends with whose work was done.
LEFT = "has finished and left the session"
_REQUESTS = DR_REQUESTS // 8
#: The longest deadline, about 31 years.
_MAX_TIMEOUT_S = 1e9

#: Collective calls by name; the number identifies the call in an agreement.
_CALLS = ("empty", "signals", "free", "ExpertParallel", "close", "Disaggregated", "group", "KVTransfer")

#: How a rank takes part in an agreement: willingly, without room for it, or with an argument that is impossible.
_FINE, _FULL, _REFUSED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a rank waits for, to be named when the wait fails.

    Attributes:
        operation: name of the call.
        event: event ID or epoch.
        peer: the rank waited for; None if any rank may end the wait.
        expected: value waited for.
        seen: value seen last.
        everyone: all ranks are needed, so one that has left is enough to give up.
        missing: finds all ranks that have not done their part, `peer` among them; None: there is no telling.
    """

    operation: str
    event: int | None = None
    peer: int | None = None
    expected: int | None = None
    seen: int | None = None
    everyone: bool = False
    missing: Callable[[], list[int]] | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        text = self.operation if self.event is None else f"{self.operation} (event {self.event})"
        if self.peer is not None:
            text += f", waiting for rank {self.peer}"
        if self.expected is not None:
            text += f": expected {self.expected}, seen {self.seen}"
        return text


class Core:
    """Waits and agreements of one rank.

    Attributes:
        fabric: global memory.
        rank: this rank.
        size: number of ranks.
        control: address of the own control area.
        op_timeout_s: default deadline of a wait, in seconds.
    """

    def __init__(self, fabric: Fabric, op_timeout_s: float) -> None:
        self.fabric = fabric
        self.rank = fabric.rank
        self.size = fabric.ranks
        self.control = fabric.control
        self.segments_address: int = fabric.segments.ctypes.data
        self.controls_address: int = fabric.controls.ctypes.data
        #: What direct calls look at.
        self.calls = CallState(fabric)
        #: What those of groups look at: when this rank has left the session, they may go on no more than its own.
        self.dependants: weakref.WeakSet[CallState] = weakref.WeakSet()
        #: Shows long waits. Nobody could look at those of threads: their segments are private memory.
        self.board = StatusBoard(fabric.control, range(fabric.ranks), is_shared=fabric.name != "local")
        self.slice_ns = min(SLICE_NS * max(1, fabric.ranks // _SLICE_RANKS), _LONGEST_SLICE_NS)
        self.op_timeout_s = require_timeout(op_timeout_s, "op_timeout_s")
        self._closed = False
        self._broken: str | None = None
        self._trace: Recorder | None = None
        self._pid = os.getpid()
        #: Blocks that the communicator has reserved, with their allocators, by offset.
        self.blocks: dict[int, SymmetricAllocator] = {}
        #: Of those in which results may lie, by offset: does anybody refer to one?
        self.lent: dict[int, Callable[[], bool]] = {}
        #: `Exchange.tell_all` and `Exchange.refuse` of the communicator, which sets them.
        self.exchange: Callable[[str, list[int]], np.ndarray] = no_exchange
        self.refuse_exchange: Callable[[UsageError], NoReturn] = no_refusal
        self._driver_words: memoryview | None = None
        self._drive: Callable[[], object] = no_requests
        self._cursor = np.zeros(1, np.int64)
        self._cursor_address: int = self._cursor.ctypes.data

    @property
    def op_timeout_s(self) -> float:
        """Default deadline of a wait, in seconds."""
        return self._op_timeout_s

    @op_timeout_s.setter
    def op_timeout_s(self, value: float) -> None:
        self._op_timeout_s = value
        self.calls.words[CA_SLICE_NS // 8] = min(self.slice_ns, int(value * 1e9))

    @property
    def closed(self) -> bool:
        """Has this rank left its session?"""
        return self._closed

    @closed.setter
    def closed(self, value: bool) -> None:
        self._closed = value
        self._end_direct_calls(callstate.CLOSED, value)

    @property
    def broken(self) -> str | None:
        """Why no operation is possible any more although the session is not closed."""
        return self._broken

    @broken.setter
    def broken(self, reason: str | None) -> None:
        self._broken = reason
        self._end_direct_calls(callstate.BROKEN, reason is not None)

    def _end_direct_calls(self, reason: int, on: bool) -> None:
        for calls in (self.calls, *self.dependants):
            calls.detour(reason, on)

    @property
    def trace(self) -> Recorder | None:
        """Records what operations do; None while nobody wants to know."""
        return self._trace

    @trace.setter
    def trace(self, recorder: Recorder | None) -> None:
        self._trace = recorder
        self.calls.detour(callstate.TRACED, recorder is not None)

    @property
    def progress(self) -> Callable[[], object] | None:
        """Drives requests that are under way; None while there are none."""
        return self._drive if self._driver_words is not None and self._driver_words[_REQUESTS] else None

    def set_driver(self, words: memoryview | None, drive: Callable[[], object]) -> None:
        """Whose record these words are has this rank's requests, and drives them by this function; None: nobody has."""
        self._driver_words, self._drive = words, drive

    def require_open(self) -> None:
        """Raise UsageError if this rank has left its session."""
        if self.closed:
            raise UsageError(
                f"rank {self.rank} has left its session: no operation is possible after close()", value="closed"
            )
        if self.broken is not None:
            raise FabricError(f"rank {self.rank}: the session is unusable: {self.broken}", rank=self.rank)

    @property
    def is_forked(self) -> bool:
        """Is this a child that the rank has forked? It speaks for nobody."""
        return os.getpid() != self._pid

    def fail(self, error: BaseException) -> None:
        """Tell all ranks that this one has failed, unless the session is over; they end with SessionAborted."""
        if self.closed or self.is_forked or self.fabric.abort_word() is not None:
            return
        interrupted = isinstance(error, KeyboardInterrupt)
        said = "was interrupted" if interrupted else f"raised {type(error).__name__}: {error}"
        words.store(self.control + CTL_STATE, STATE_FAILED)
        self.fabric.abort(ABORT_INTERRUPT if interrupted else ABORT_EXCEPTION, self.rank, said)

    def until_ns(self, deadline_ns: int) -> int:
        """When a kernel is to return to Python, with `deadline_ns` as the end of the whole wait."""
        slice_ns = self.slice_ns if self.progress is None else PROGRESS_SLICE_NS
        return min(deadline_ns, time.monotonic_ns() + slice_ns)

    def finish(
        self,
        status: int,
        step: Callable[[int], int],
        describe: Callable[[], Waiting],
        timeout_s: float,
        deadline_ns: int,
    ) -> int:
        """Go on with a wait whose first slice ended with `status`, until it succeeds or cannot.

        Args:
            status: what the kernel returned.
            step: makes the same call again, given the time at which it is to return, or 0 for at once.
            describe: says what is waited for.
            timeout_s: the deadline as the caller gave it, for the message.
            deadline_ns: the deadline, by `time.monotonic_ns`.

        Returns:
            The first status that is neither SLICE nor ABORTED.

        Raises:
            WaitTimeout: at the deadline.
            PeerDied: a rank has died, or the one waited for has left.
            SessionAborted: another rank failed first.
        """
        shown = self.board.wait(self.rank, deadline_ns, timeout_s)
        try:
            return self._finish(status, step, describe, timeout_s, deadline_ns, shown)
        finally:
            shown.end()

    def _finish(
        self,
        status: int,
        step: Callable[[int], int],
        describe: Callable[[], Waiting],
        timeout_s: float,
        deadline_ns: int,
        shown: ShownWait,
    ) -> int:
        while status in (wait.SLICE, wait.ABORTED):
            if status == wait.ABORTED and (last := step(0)) != wait.PENDING:
                return last  # it came true before the session ended
            self.check_session(describe)
            waiting = describe()
            now_ns = time.monotonic_ns()
            if now_ns >= deadline_ns:
                raise self.timed_out(waiting, timeout_s)
            if self.has_left(waiting):
                # It may have done its part before it left: look once more, without waiting.
                status = step(0)
                if status == wait.PENDING:
                    now_waiting = describe()
                    if now_waiting.peer == waiting.peer:
                        raise self.left(now_waiting)
                    status = wait.SLICE  # that peer had done its part; it is another one now
                continue
            shown.show(waiting, now_ns)
            if self.progress is not None:
                self.progress()
            status = step(self.until_ns(deadline_ns))
        return status

    def run(
        self,
        step: Callable[[int], int],
        describe: Callable[[], Waiting],
        timeout_s: float | None = None,
        began_ns: int = 0,
    ) -> int:
        """A wait from its start, which was at `began_ns` if that is not 0; see `finish`."""
        timeout_s = self.op_timeout_s if timeout_s is None else timeout_s
        deadline_ns = (began_ns or time.monotonic_ns()) + int(timeout_s * 1e9)
        status = step(self.until_ns(deadline_ns))
        return status if status == OK else self.finish(status, step, describe, timeout_s, deadline_ns)

    def timed_out(self, waiting: Waiting, timeout_s: float) -> WaitTimeout:
        """The error for a wait that reached its deadline."""
        culprit = "another rank" if waiting.peer is None else f"rank {waiting.peer}"
        return WaitTimeout(
            f"rank {self.rank}: no success within {timeout_s:g} s in {waiting}; either {culprit} has not made the "
            "matching call, or it needs a longer deadline (timeout_s of the call, op_timeout_s of the session)",
            operation=waiting.operation, event=waiting.event, rank=self.rank, peer=waiting.peer,
            expected=waiting.expected, seen=waiting.seen, timeout_s=timeout_s,
        )  # fmt: skip

    def check_session(self, describe: Callable[[], Waiting]) -> None:
        """Raise PeerDied or SessionAborted if the session is over."""
        word = self.fabric.abort_word()
        if word is None:
            self.fabric.check_peers()
            word = self.fabric.abort_word()
            if word is None:
                return
        kind, culprit = word
        if kind == ABORT_DIED:
            text = f"rank {culprit} died (its process has ended)"
            raise PeerDied(f"rank {self.rank}: {text}, during {describe()}", rank=self.rank, peer=culprit, reason=text)
        said = self.fabric.last_words(culprit) or ("was interrupted" if kind == ABORT_INTERRUPT else "failed")
        raise SessionAborted(
            f"rank {self.rank}: session aborted, since rank {culprit} {said}; during {describe()}",
            rank=self.rank, peer=culprit, reason=said,
        )  # fmt: skip

    def has_left(self, waiting: Waiting) -> bool:
        """Has the rank that is waited for left the session?"""
        if waiting.peer is not None:
            return waiting.peer != self.rank and self.fabric.state(waiting.peer) == STATE_LEFT
        if self.size == 1:
            return False
        gone = self.fabric.count_left()
        return gone > 0 if waiting.everyone else gone == self.size - 1

    def left(self, waiting: Waiting) -> PeerDied:
        """The error for a wait for a rank that has left."""
        left = [r for r in range(self.size) if r != self.rank and self.fabric.state(r) == STATE_LEFT]
        peer = waiting.peer if waiting.peer is not None else left[0]
        return PeerDied(
            f"rank {self.rank}: rank {peer} {LEFT}, during {waiting}", rank=self.rank, peer=peer, reason=LEFT
        )

    # -- agreement --------------------------------------------------------------------------------------------------

    def agree(self, call: str, arguments: dict[str, int], failure: XcclError | None = None) -> None:
        """Compare the arguments of a collective call among all ranks; also a barrier.

        Args:
            call: name of the call, one of `_CALLS`.
            arguments: what must be the same everywhere, by name; at most 24.
            failure: why this rank cannot do it although its arguments are fine.

        Raises:
            UsageError: ranks differ, in the call or in an argument, or one has refused; raised by all of them.
            XcclError: `failure` at the rank that has one, CapacityError at the others.
        """
        values = [_CALLS.index(call), _FULL if failure else _FINE, *arguments.values()]
        seen = self._tell_all(call, values)
        self._compare(call, arguments, seen)
        if failure is not None:
            raise failure
        failed = np.flatnonzero(seen[:, 1] == _FULL)
        if failed.size:
            raise CapacityError(f"{call}: rank {failed[0]} has no room for it, so no rank goes on", peer=int(failed[0]))

    def refuse(self, error: UsageError) -> NoReturn:
        """Raise `error` at once, and let the same call of the other ranks fail instead of waiting for this one."""
        self.refuse_exchange(error)

    def _tell_all(self, call: str, values: list[int]) -> np.ndarray:
        """What all ranks say in the next agreement, [size, len(values)]."""
        try:
            return self.exchange(call, values)
        except (UsageError, CapacityError):
            raise
        except BaseException as error:
            self.broken = f"the collective call {call}() was given up in the middle ({type(error).__name__})"
            raise

    def _compare(self, call: str, arguments: dict[str, int], seen: np.ndarray) -> None:
        if (seen[:, 0] != seen[0, 0]).any():
            calls = {r: _CALLS[int(c)] if 0 <= c < len(_CALLS) else f"call {c}" for r, c in enumerate(seen[:, 0])}
            raise UsageError(f"ranks disagree in the collective call they make: {grouped(calls)}", value=call)
        refused = np.flatnonzero(seen[:, 1] == _REFUSED).tolist()
        if refused:
            raise UsageError(f"{call}: rank {refused[0]} was given an impossible argument", value=call, peer=refused[0])
        for i, name in enumerate(arguments, start=2):
            if (seen[:, i] != seen[0, i]).any():
                by_rank = {r: int(v) for r, v in enumerate(seen[:, i])}
                raise UsageError(
                    f"{call}: ranks disagree in {name}: {grouped(by_rank)}; it must be the same at all ranks",
                    argument=name, value=arguments[name], by_rank=by_rank,
                )  # fmt: skip

    def wait_all(self, address: int, stride_bytes: int, target: int, operation: str) -> None:
        """Wait until the word of every rank, `stride_bytes` apart in the own segment, is at least `target`."""
        self._cursor[0] = 0
        deadline_ns = time.monotonic_ns() + int(self.op_timeout_s * 1e9)
        status = wait.wait_all.call(
            self.control, address, stride_bytes, self.size, target, self._cursor_address, self.until_ns(deadline_ns)
        )
        if status != OK:
            self._go_on_for_all(status, address, stride_bytes, target, operation, deadline_ns)

    def _go_on_for_all(
        self, status: int, address: int, stride_bytes: int, target: int, operation: str, deadline_ns: int
    ) -> None:
        """The rest of `wait_all`: a function of its own, since closures are made when a function is entered."""

        def step(until_ns: int) -> int:
            return int(
                wait.wait_all.call(
                    self.control, address, stride_bytes, self.size, target, self._cursor_address, until_ns
                )
            )

        def describe() -> Waiting:
            peer = int(self._cursor[0])
            # Deadlines and errors name the first rank that has not come; the value is read for the message only.
            seen = int(words.load(address + min(peer, self.size - 1) * stride_bytes))
            return Waiting(operation, target, peer, target, seen, missing=lambda: missing(peer))

        def missing(first: int) -> list[int]:
            return [r for r in range(first, self.size) if words.load(address + r * stride_bytes) < target]

        self.finish(status, step, describe, self.op_timeout_s, deadline_ns)


def no_requests() -> None:
    """What drives requests when there cannot be any."""


def no_exchange(call: str, values: list[int]) -> np.ndarray:
    """What `Core.exchange` is before the communicator has one, and after it was closed."""
    raise FabricError(f"{call}: this communicator has no collectives yet")


def no_refusal(error: UsageError) -> NoReturn:
    """What `Core.refuse_exchange` is before the communicator has one, and after it was closed."""
    raise error


def grouped(by_rank: Mapping[int, object]) -> str:
    """`{0: a, 1: a, 2: b}` as "a at ranks 0, 1; b at rank 2"."""
    groups: dict[object, list[int]] = {}
    for rank, value in by_rank.items():
        groups.setdefault(value, []).append(rank)
    parts = []
    for value, ranks in groups.items():
        shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
        parts.append(f"{value} at rank{'s' * (len(ranks) > 1)} {shown}")
    return "; ".join(parts)


def require_timeout(timeout_s: float, name: str = "timeout_s") -> float:
    """The deadline, if it is a positive, finite number of seconds.

    Raises:
        UsageError: it is not. No call may wait for ever.
    """
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float, np.integer, np.floating)):
        raise UsageError(f"{name} must be a number of seconds, got {timeout_s!r}", value=repr(timeout_s))
    value = float(timeout_s)
    if not (0 < value <= _MAX_TIMEOUT_S):
        raise UsageError(
            f"{name} must be more than 0 and at most {_MAX_TIMEOUT_S:g} s, got {timeout_s!r}",
            value=value, bound=_MAX_TIMEOUT_S,
        )  # fmt: skip
    return value
