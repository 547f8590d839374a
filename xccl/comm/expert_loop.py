"""The persistent loop of an expert die: receive, compute and send as three streams that overlap (XDS §3.3).

On the machine the streams are kernels that poll for ever, without going back to the CPU. Here two of them are threads,
and the experts compute in the thread that calls `run`:

    A2E in   --- at most `ahead` batches --->   experts   --- one output --->   E2A out

While the experts compute batch n, batch n + 1 is received (and forwarded, by a trampoline) and the outputs of n - 1 are
sent. The two directions share no state (see `xccl.comm.a2e_experts`), so they need no lock. Order is that of the A2Es
in each stream, so results are those of the plain loop, to the bit.

A stream that fails stops the others: waits for each other end at once, waits for peers at the end of their slice.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy.typing as npt

from ..errors import PeerDied, UsageError
from .a2e_experts import ExpertBatch, ExpertDie
from .buffers import require_int
from .core import LEFT

if TYPE_CHECKING:
    from .a2e import Disaggregated

Array = npt.NDArray[Any]
_Item = TypeVar("_Item")


class _Stopped(BaseException):
    """Ends a stream because another one has failed; never seen outside."""


class _Handover(Generic[_Item]):
    """A queue between two streams, with room for a few items; it ends well (`finish`) or badly (`stop`)."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._items: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._finished = False
        self._stopped = False

    def put(self, item: _Item) -> None:
        """Add an item when there is room for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._items) < self._room)
            self._require_running()
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> _Item | None:
        """Take the next item when there is one; None after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._finished or bool(self._items))
            self._require_running()
            if not self._items:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def finish(self) -> None:
        """There are no more items."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Whoever puts or gets ends with _Stopped."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _require_running(self) -> None:
        if self._stopped:
            raise _Stopped


class ExpertLoop:
    """Receives batches, lets the experts compute, and sends their outputs, all at the same time.

    Args:
        dis: of this expert die.
        experts: makes the outputs of a batch, [n, hidden] in the dtype of `dis`, in the order of its tokens. It is
            called in the thread that calls `run`, and makes no call of the communicator.
        ahead: batches that may be received before the experts take them, 1 or more.

    Raises:
        UsageError: this rank is no expert die, or ahead is out of range.
    """

    def __init__(self, dis: Disaggregated, experts: Callable[[ExpertBatch], Array], *, ahead: int = 1) -> None:
        die = dis.expert_die
        if die is None:
            raise UsageError("an ExpertLoop needs an expert die; this rank is none", value=dis.role)
        self._dis = dis
        self._die: ExpertDie = die
        self._experts = experts
        self._ahead = require_int(ahead, "ahead", 1, 1 << 10)

    def run(self, turns: int | None = None) -> int:
        """Serve; returns when all outputs are sent.

        Args:
            turns: of all domains, `domains * microbatches` batches each; None is until the attention dies have left the
                session.

        Returns:
            How many batches were served.

        Raises:
            Exception: what `a2e`, the experts or `e2a` raise, whichever was first. The Disaggregated object is unusable
                then.
        """
        shape = self._dis.shape
        if turns is not None:
            turns = require_int(turns, "turns", 0, 1 << 40)
        batches = None if turns is None else turns * shape.domains * shape.microbatches
        return _Run(self._dis, self._die, self._experts, self._ahead).run(batches)


class _Run:
    """One call of `ExpertLoop.run`."""

    def __init__(self, dis: Disaggregated, die: ExpertDie, experts: Callable[[ExpertBatch], Array], ahead: int) -> None:
        self._dis = dis
        self._die = die
        self._experts = experts
        self._received: _Handover[ExpertBatch] = _Handover(ahead)
        self._computed: _Handover[tuple[Array, ExpertBatch]] = _Handover(1)
        self._first_error: BaseException | None = None
        self._failing = threading.Lock()

    def run(self, batches: int | None) -> int:
        streams = [
            threading.Thread(target=self._guarded, args=(stream,), name=f"{threading.current_thread().name} {name}")
            for name, stream in (("A2E in", lambda: self._receive(batches)), ("E2A out", self._send))
        ]
        waiters = (self._die.waiter_in, self._die.waiter_out)
        for waiter in waiters:
            waiter.on_slice = self._check
        served = 0

        def compute() -> None:
            nonlocal served
            for stream in streams:
                stream.start()
            while (batch := self._received.get()) is not None:
                self._computed.put((self._experts(batch), batch))
                served += 1
            self._computed.finish()

        self._guarded(compute)
        for stream in streams:
            while stream.is_alive():  # a Ctrl-C while joining stops the streams, too, and they are joined then
                self._guarded(stream.join)
        for waiter in waiters:
            waiter.on_slice = None
        if self._first_error is not None:
            raise self._first_error
        return served

    def _receive(self, batches: int | None) -> None:
        numbers: Iterator[int] = itertools.count() if batches is None else iter(range(batches))
        for _ in numbers:
            try:
                batch = self._dis.a2e()
            except PeerDied as error:
                if batches is None and error.reason == LEFT and self._die.nothing_has_come():
                    break
                raise
            self._received.put(batch)
        self._received.finish()

    def _send(self) -> None:
        while (item := self._computed.get()) is not None:
            self._dis.e2a(*item)

    def _guarded(self, stream: Callable[[], None]) -> None:
        """Run a stream; its error, if it is the first, is that of the loop, and stops the others."""
        try:
            stream()
        except BaseException as error:  # noqa: BLE001 - raised again by `run`
            with self._failing:
                if self._first_error is None and not isinstance(error, _Stopped):
                    self._first_error = error
            self._received.stop()
            self._computed.stop()

    def _check(self) -> None:
        """A wait for peers looks up from time to time."""
        if self._first_error is not None:
            raise _Stopped
