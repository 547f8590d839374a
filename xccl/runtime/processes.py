"""Ranks as processes: fork or spawn them from a parent with warm kernels, watch them, end them."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import secrets
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait as wait_connections
from typing import Any, NoReturn

from ..comm import Communicator
from ..errors import WaitTimeout
from ..fabric import ShmFabric
from ..kernels import warm
from ..layout.segment import Geometry
from .cleanup import remove_session
from .outcome import Outcome, raise_failure

#: After a failure the other ranks get this long to end with errors of their own.
_GRACE_S = 1.0
#: A rank that has sent its outcome, or that noticed the end of the session, gets this long to exit.
_EXIT_S = 0.05
#: After SIGTERM, until SIGKILL.
_TERMINATE_S = 0.3

_PR_SET_PDEATHSIG = 1


def run_processes(
    main: Callable[..., Any],
    ranks: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    geometry: Geometry,
    timeout_s: float,
    op_timeout_s: float,
    start_method: str,
    on_report: Callable[[int, Any], None] | None,
) -> list[Any]:
    """Run `main` in `ranks` processes; the results by rank. See `xccl.launch`."""
    session_id = secrets.token_bytes(16)
    family = _Family(main, ranks, args, kwargs, session_id, geometry, op_timeout_s, start_method, on_report is not None)
    patience_s = 0.0
    try:
        family.start()
        outcomes = family.collect(timeout_s, on_report)
        if all(outcome.kind == "result" for outcome in outcomes.values()):
            patience_s = _GRACE_S
    finally:
        with _interrupts_held():  # a second Ctrl-C must not leave the cleaning half done
            family.end(patience_s)
            remove_session(session_id, ranks)
    raise_failure(outcomes)
    return [outcomes[rank].value for rank in range(ranks)]


class _Family:
    """The processes of one launch."""

    def __init__(
        self,
        main: Callable[..., Any],
        ranks: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        session_id: bytes,
        geometry: Geometry,
        op_timeout_s: float,
        start_method: str,
        reporting: bool,
    ) -> None:
        self._context = multiprocessing.get_context(start_method)
        self._ranks = ranks
        self._arguments = (session_id, geometry, op_timeout_s, reporting, os.getpid(), main, args, kwargs)
        self._processes: list[Any] = []
        #: By rank: where its messages arrive.
        self._pipes: list[Connection] = []
        #: By rank: a descriptor that becomes readable when its process ends, reaped or not.
        self._endings: list[int] = []
        self._pidfds: list[int] = []

    def start(self) -> None:
        """Start all processes."""
        with warnings.catch_warnings():
            # Python warns of fork in a process with threads. Ranks run only Python and kernels that hold no locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            for rank in range(self._ranks):
                with _interrupts_held():  # a process that was started is a process that `end` knows
                    self._start(rank)

    def _start(self, rank: int) -> None:
        # The pipe is made just before its process: a rank that was forked with another one's end would keep it open.
        ours, theirs = self._context.Pipe(duplex=False)
        self._pipes.append(ours)
        process = self._context.Process(  # type: ignore[attr-defined]
            target=_rank_main, args=(theirs, rank, *self._arguments), name=f"xccl rank {rank}", daemon=False
        )
        self._processes.append(process)
        process.start()
        theirs.close()
        ending = process.sentinel
        with contextlib.suppress(ProcessLookupError):  # ended, and reaped by another thread that looks at its children
            ending = os.pidfd_open(process.pid)
            self._pidfds.append(ending)
        self._endings.append(ending)

    def collect(self, timeout_s: float, on_report: Callable[[int, Any], None] | None) -> dict[int, Outcome]:
        """Wait for the outcome of each rank; after a failure, only as long as the others need to notice it."""
        outcomes: dict[int, Outcome] = {}
        deadline = time.monotonic() + timeout_s
        failed_at: float | None = None
        while len(outcomes) < self._ranks:
            now = time.monotonic()
            limit = deadline if failed_at is None else min(deadline, failed_at + _GRACE_S)
            if now >= limit:
                if failed_at is not None:
                    break
                missing = sorted(set(range(self._ranks)) - set(outcomes))
                raise WaitTimeout(
                    f"launch: no result within {timeout_s:g} s from rank{'s' * (len(missing) > 1)} "
                    f"{', '.join(map(str, missing[:16]))}",
                    operation="launch", peer=missing[0], timeout_s=timeout_s,
                )  # fmt: skip
            for rank, message in self._messages(outcomes, min(limit - now, 1.0)):
                if isinstance(message, Outcome):
                    outcomes[rank] = message
                    if message.kind != "result" and failed_at is None:
                        failed_at = time.monotonic()
                elif on_report is not None:
                    on_report(rank, message)
        return outcomes

    def _messages(self, outcomes: dict[int, Outcome], timeout_s: float) -> Iterator[tuple[int, Any]]:
        """Wait for something from the ranks without outcome: reports, and outcomes."""
        pending = [rank for rank in range(self._ranks) if rank not in outcomes]
        pipes = {self._pipes[rank]: rank for rank in pending}
        endings = {self._endings[rank]: rank for rank in pending}
        ready = wait_connections([*pipes, *endings], timeout_s)
        for pipe in ready:
            if isinstance(pipe, Connection):
                yield pipes[pipe], self._receive(pipe, pipes[pipe])
        for ending in ready:
            if isinstance(ending, int):
                rank = endings[ending]
                # Its last words come first, if there are any: then this was not the last call. The end of its pipe may
                # never come, since a child of the rank may hold the other end.
                if rank not in outcomes and not self._pipes[rank].poll(0):
                    yield rank, Outcome("exit", self._how_it_ended(rank))

    def _receive(self, connection: Connection, rank: int) -> Any:
        try:
            kind, data = connection.recv()
        except (EOFError, OSError):
            return Outcome("exit", self._how_it_ended(rank))
        return pickle.loads(data) if kind == "outcome" else data

    def _how_it_ended(self, rank: int) -> str:
        self._await_end(rank, 1.0)
        code = self._processes[rank].exitcode
        if code is None:
            return "closed its connection to the launcher"
        if code < 0:
            name = signal.strsignal(-code) or "unknown"
            with contextlib.suppress(ValueError):  # real-time signals have no name
                name = signal.Signals(-code).name
            return f"was killed by signal {-code} ({name})"
        return f"exited with status {code} before its work was done"

    def end(self, patience_s: float) -> None:
        """Make sure that no process is left: time to exit in order, SIGTERM, a moment, SIGKILL."""
        started = [p for p in self._processes if p.pid is not None]
        self._await_ends(len(started), max(patience_s, _EXIT_S))
        if any(p.exitcode is None for p in started):
            for process in started:
                process.terminate()
            self._await_ends(len(started), _TERMINATE_S)
        for process in started:
            if process.exitcode is None:
                process.kill()
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        for pidfd in self._pidfds:
            os.close(pidfd)

    def _await_ends(self, ranks: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for rank in range(ranks):
            self._await_end(rank, max(0.0, deadline - time.monotonic()))

    def _await_end(self, rank: int, timeout_s: float) -> None:
        """Wait until the process has ended; `join` with a time would wait for the children of the rank, too."""
        if rank < len(self._endings):
            wait_connections([self._endings[rank]], timeout_s)
        else:
            self._processes[rank].join(timeout_s)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Put off Ctrl-C until the end of the block."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # Python calls handlers in the main thread only
        return
    held: list[Any] = []
    signal.signal(signal.SIGINT, lambda signum, frame: held.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(signal.SIGINT, held[0])


def _terminated(_signum: int, _frame: Any) -> NoReturn:
    # Ends the rank's function by an exception, so that its `finally` clauses run.
    sys.exit(128 + signal.SIGTERM)


def _die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGTERM when the launcher ends, even by SIGKILL: no rank outlives it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:
        os._exit(1)


def _rank_main(*arguments: Any) -> None:
    """The target of a rank's process: its life, and a quiet end if Ctrl-C strikes before or after it."""
    try:
        _live(*arguments)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _live(
    connection: Connection,
    rank: int,
    session_id: bytes,
    geometry: Geometry,
    op_timeout_s: float,
    reporting: bool,
    parent_pid: int,
    main: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """The life of a rank's process."""
    comm: Communicator | None = None
    try:
        signal.signal(signal.SIGTERM, _terminated)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _die_with_parent(parent_pid)
        warm()
        fabric = ShmFabric(session_id, rank, geometry)
        report = (lambda message: connection.send(("report", message))) if reporting else None
        comm = Communicator(fabric, op_timeout_s=op_timeout_s, report=report)
        data = Outcome("result", main(comm, *args, **kwargs)).to_bytes()
        comm.close()
    except BaseException as error:  # noqa: BLE001 - whatever ends a rank is reported
        if comm is not None:
            comm.core.fail(error)
            comm.close(failed=True)
        data = Outcome.of_error(error).to_bytes()
    if comm is not None and comm.core.is_forked:
        os._exit(0)  # a child of the rank, which has come back from the rank's function: it has no outcome of its own
    # Flushed before the outcome is sent: the launcher waits for a rank whose output is read slowly.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    with contextlib.suppress(BrokenPipeError):  # the launcher was killed
        connection.send(("outcome", data))
    connection.close()
