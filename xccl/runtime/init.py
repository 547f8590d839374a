"""`init`: join a session from a process that something else has started."""

from __future__ import annotations

import atexit
import hashlib
import os
import sys
from types import TracebackType

from ..comm import Communicator
from ..comm.buffers import require_int
from ..comm.core import require_timeout
from ..errors import UsageError
from ..fabric import ShmFabric
from ..layout.segment import Geometry
from .cleanup import remove_stale
from .compiling import compile_kernels
from .launch import MAX_RANKS, make_geometry

#: Where rank and size are looked for, first match wins: xccl's own, torchrun's, Open MPI's, Slurm's.
_RANK_VARIABLES = ("XCCL_RANK", "RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_SIZE_VARIABLES = ("XCCL_SIZE", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")

#: Communicators of this process that may still be open. They are closed when it ends.
_OPEN: list[Communicator] = []
#: Holds one item once this process was told to do so.
_HOOKED: list[bool] = []

# The end of a forked child says nothing about this process.
os.register_at_fork(after_in_child=_OPEN.clear)


def init(
    rank: int | None = None,
    size: int | None = None,
    session: str | None = None,
    *,
    join_timeout_s: float = 60.0,
    op_timeout_s: float = 30.0,
    app_bytes: int = Geometry.app_bytes,
    heap_bytes: int = Geometry.heap_bytes,
    ring_slots: int = Geometry.ring_slots,
    slot_bytes: int = Geometry.slot_bytes,
) -> Communicator:
    """Join a session on fabric "shm" as one of its ranks; all ranks are processes of this user on this machine.

    Args:
        rank: this rank; from XCCL_RANK, RANK, OMPI_COMM_WORLD_RANK or SLURM_PROCID if None.
        size: number of ranks; from XCCL_SIZE, WORLD_SIZE, OMPI_COMM_WORLD_SIZE or SLURM_NTASKS if None.
        session: a secret string that all ranks share, different for each session; from XCCL_SESSION if None.
        join_timeout_s: how long to wait for the other ranks, in seconds.
        op_timeout_s: default deadline of each wait, in seconds.
        app_bytes: as for `launch`, the same at all ranks; so are the following.
        heap_bytes: as for `launch`.
        ring_slots: as for `launch`.
        slot_bytes: as for `launch`.

    Returns:
        The communicator. Use it as a context manager, or `close()` it when the work is done; an unhandled exception
        ends the session for all ranks.

    Raises:
        UsageError: rank, size or session is missing or out of range.
        WaitTimeout: other ranks did not join in time.
        SegmentError: another rank runs another version of xccl, or has other options.
    """
    size = _number(size, "size", _SIZE_VARIABLES, 1, MAX_RANKS)
    rank = _number(rank, "rank", _RANK_VARIABLES, 0, size - 1)
    session = session if session is not None else os.environ.get("XCCL_SESSION")
    if not session:
        raise UsageError(
            "init needs a session: set XCCL_SESSION to a secret string that all ranks share", value=session
        )
    session_id = hashlib.sha256(f"xccl session {session}".encode()).digest()[:16]
    geometry = make_geometry(size, app_bytes, heap_bytes, ring_slots, slot_bytes)
    op_timeout_s = require_timeout(op_timeout_s, "op_timeout_s")
    join_timeout_s = require_timeout(join_timeout_s, "join_timeout_s")
    compile_kernels()
    remove_stale()
    fabric = ShmFabric(session_id, rank, geometry, join_timeout_s=join_timeout_s)
    comm = Communicator(fabric, op_timeout_s=op_timeout_s)
    _end_with_process(comm)
    return comm


def _number(value: int | None, name: str, variables: tuple[str, ...], low: int, high: int) -> int:
    if value is not None:
        return require_int(value, name, low, high)
    for variable in variables:
        text = os.environ.get(variable)
        if text is not None:
            try:
                return require_int(int(text), variable, low, high)
            except ValueError as error:
                if isinstance(error, UsageError):
                    raise
                raise UsageError(f"{variable} must be an integer, got {text!r}", value=text) from None
    raise UsageError(f"init needs a {name}: pass it, or set {variables[0]}", value=None)


def _end_with_process(comm: Communicator) -> None:
    """Tell the other ranks how this process ends, if it does so without close()."""
    if not _HOOKED:
        _HOOKED.append(True)
        previous = sys.excepthook

        def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            for open_one in _OPEN:
                open_one.core.fail(error)
                open_one.close(failed=True)
            previous(kind, error, trace)

        sys.excepthook = excepthook
        atexit.register(_close_all)
    # Closed ones are let go, with their memory: a process may join many sessions, one after the other.
    _OPEN[:] = [*(other for other in _OPEN if not other.core.closed), comm]


def _close_all() -> None:
    for comm in _OPEN:
        comm.close()
