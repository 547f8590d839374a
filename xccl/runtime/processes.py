"""Ranks as processes: fork or spawn them from a parent with warm kernels, watch them, end them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import secrets
import signal
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_connections
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
    try:
        family.start()
        outcomes = family.collect(timeout_s, on_report)
    finally:
        family.end()
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
        context = multiprocessing.get_context(start_method)
        self._processes = []
        self._connections: dict[Connection, int] = {}
        self._theirs = []
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            self._connections[ours] = rank
            self._theirs.append(theirs)
            self._processes.append(
                context.Process(  # type: ignore[attr-defined]
                    target=_rank_main,
                    args=(theirs, session_id, rank, geometry, op_timeout_s, reporting, os.getpid(), main, args, kwargs),
                    name=f"xccl rank {rank}",
                    daemon=False,
                )
            )

    def start(self) -> None:
        """Start all processes."""
        with warnings.catch_warnings():
            # Python warns of fork in a process with threads. Ranks run only Python and kernels that hold no locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            for process, theirs in zip(self._processes, self._theirs, strict=True):
                process.start()
                theirs.close()

    def collect(self, timeout_s: float, on_report: Callable[[int, Any], None] | None) -> dict[int, Outcome]:
        """Wait for the outcome of each rank; after a failure, only as long as the others need to notice it."""
        outcomes: dict[int, Outcome] = {}
        deadline = time.monotonic() + timeout_s
        failed_at: float | None = None
        pending = dict(self._connections)
        while pending:
            now = time.monotonic()
            limit = deadline if failed_at is None else min(deadline, failed_at + _GRACE_S)
            if now >= limit:
                if failed_at is not None:
                    break
                missing = sorted(pending.values())
                raise WaitTimeout(
                    f"launch: no result within {timeout_s:g} s from rank{'s' * (len(missing) > 1)} "
                    f"{', '.join(map(str, missing[:16]))}",
                    operation="launch", peer=missing[0], timeout_s=timeout_s,
                )  # fmt: skip
            for connection in wait_connections(list(pending), min(limit - now, 1.0)):
                assert isinstance(connection, Connection)
                rank = pending[connection]
                message = self._receive(connection, rank)
                if isinstance(message, Outcome):
                    outcomes[rank] = message
                    del pending[connection]
                    if message.kind != "result" and failed_at is None:
                        failed_at = time.monotonic()
                elif on_report is not None:
                    on_report(rank, message)
        return outcomes

    def _receive(self, connection: Connection, rank: int) -> Any:
        try:
            kind, data = connection.recv()
        except (EOFError, OSError):
            return Outcome("exit", self._how_it_ended(rank))
        return pickle.loads(data) if kind == "outcome" else data

    def _how_it_ended(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(1.0)
        code = process.exitcode
        if code is None:
            return "closed its connection to the launcher"
        if code < 0:
            return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"exited with status {code} before its work was done"

    def end(self) -> None:
        """Make sure that no process is left: SIGTERM, a moment, SIGKILL."""
        started = [p for p in self._processes if p.pid is not None]
        if any(self._lingers(p) for p in started):
            for process in started:
                process.terminate()
            deadline = time.monotonic() + _TERMINATE_S
            for process in started:
                process.join(max(0.0, deadline - time.monotonic()))
        for process in started:
            if process.exitcode is None:
                process.kill()
            process.join()
            process.close()
        for connection in self._connections:
            connection.close()

    @staticmethod
    def _lingers(process: Any) -> bool:
        """Is the process still there, although it had a moment to exit by itself?"""
        process.join(0.05)
        return process.exitcode is None


def _terminated(_signum: int, _frame: Any) -> NoReturn:
    # Ends the rank's function by an exception, so that its `finally` clauses run.
    sys.exit(128 + signal.SIGTERM)


def _die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGTERM when the launcher ends, even by SIGKILL: no rank outlives it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:
        os._exit(1)


def _rank_main(
    connection: Connection,
    session_id: bytes,
    rank: int,
    geometry: Geometry,
    op_timeout_s: float,
    reporting: bool,
    parent_pid: int,
    main: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """The life of a rank's process."""
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _die_with_parent(parent_pid)
    comm: Communicator | None = None
    try:
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
    connection.send(("outcome", data))
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
