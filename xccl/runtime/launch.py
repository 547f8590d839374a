"""`launch`: run one function on every rank of a new session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..comm.buffers import require_int
from ..comm.core import require_timeout
from ..errors import UsageError
from ..fabric.reading import reads_slowly
from ..layout.segment import Geometry
from .cleanup import remove_stale
from .compiling import compile_kernels
from .processes import run_processes
from .threads import run_threads

_FABRICS = ("shm", "local")
_START_METHODS = ("fork", "spawn")
#: The most ranks of a session.
MAX_RANKS = 1024


def launch(
    main: Callable[..., Any],
    ranks: int,
    args: tuple[Any, ...] | list[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    fabric: str = "shm",
    timeout_s: float = 600.0,
    op_timeout_s: float = 30.0,
    start_method: str = "fork",
    app_bytes: int = Geometry.app_bytes,
    heap_bytes: int = Geometry.heap_bytes,
    ring_slots: int = Geometry.ring_slots,
    slot_bytes: int = Geometry.slot_bytes,
    on_report: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """Run `main(comm, *args, **kwargs)` on every rank of a new session, and return the results by rank.

    Args:
        main: the function of a rank. On fabric "shm" with start_method "fork" it may be any callable; with "spawn" it
            must be picklable. Results and exceptions come back pickled.
        ranks: number of ranks, 1 to 1024.
        args: further positional arguments, a tuple or a list.
        kwargs: further keyword arguments, by name.
        fabric: "shm" (a process a rank) or "local" (a thread a rank).
        timeout_s: deadline of the whole run, in seconds.
        op_timeout_s: default deadline of each wait in a rank, in seconds.
        start_method: "fork" (fast, ranks start with compiled kernels) or "spawn" (for parents that must not be forked);
            fabric "shm" only.
        app_bytes: address space of the app data area of each rank; memory is taken by what is allocated.
        heap_bytes: address space for expert parallelism in each rank's managed area.
        ring_slots: slots in the ring of each pair that talks.
        slot_bytes: payload bytes of a slot, a multiple of 64.
        on_report: called in this process as `on_report(rank, message)` for each `comm.report(message)`.

    Returns:
        What `main` returned at each rank.

    Raises:
        UsageError: an argument is out of range.
        PeerDied: a rank exited or was killed; `peer` and `reason` say which and how.
        WaitTimeout: ranks did not finish by the deadline.
        KeyboardInterrupt: Ctrl-C, here or in a rank.
        Exception: a rank's exception, with that rank's traceback as its cause.

    However it ends, all ranks have ended and nothing is left in /dev/shm. (Threads that compute can't be stopped: on
    fabric "local" they are left behind, and end at their next operation.)
    """
    if not callable(main):
        raise UsageError(f"main must be callable, got {type(main).__name__}", value=type(main).__name__)
    if not isinstance(args, (tuple, list)):
        raise UsageError(
            f"args must be a tuple of further arguments of main, got {type(args).__name__}; one alone is (x,)",
            value=type(args).__name__,
        )
    if not isinstance(kwargs, (Mapping, type(None))):
        raise UsageError(
            f"kwargs must be a dict of arguments of main by name, got {type(kwargs).__name__}",
            value=type(kwargs).__name__,
        )
    ranks = require_int(ranks, "ranks", 1, MAX_RANKS)
    if fabric not in _FABRICS:
        raise UsageError(f"fabric must be one of {', '.join(_FABRICS)}, got {fabric!r}", value=fabric, bound=_FABRICS)
    if start_method not in _START_METHODS:
        raise UsageError(f"start_method must be fork or spawn, got {start_method!r}", value=start_method)
    timeout_s, op_timeout_s = require_timeout(timeout_s), require_timeout(op_timeout_s, "op_timeout_s")
    geometry = make_geometry(ranks, app_bytes, heap_bytes, ring_slots, slot_bytes)
    compile_kernels()
    arguments = (main, ranks, tuple(args), dict(kwargs or {}))
    if fabric == "local":
        return run_threads(
            *arguments, geometry=geometry, timeout_s=timeout_s, op_timeout_s=op_timeout_s, on_report=on_report
        )
    remove_stale()
    reads_slowly()  # asked here, so that all ranks have one answer
    return run_processes(
        *arguments, geometry=geometry, timeout_s=timeout_s, op_timeout_s=op_timeout_s,
        start_method=start_method, on_report=on_report,
    )  # fmt: skip


def make_geometry(ranks: int, app_bytes: int, heap_bytes: int, ring_slots: int, slot_bytes: int) -> Geometry:
    """The geometry of a session, after checks.

    Raises:
        UsageError: a size is out of range.
    """
    slot_bytes = require_int(slot_bytes, "slot_bytes", 64, 1 << 30)
    if slot_bytes % 64:
        raise UsageError(f"slot_bytes must be a multiple of 64, got {slot_bytes}", value=slot_bytes, bound=64)
    return Geometry(
        ranks=ranks,
        app_bytes=require_int(app_bytes, "app_bytes", 4096, 1 << 40),
        heap_bytes=require_int(heap_bytes, "heap_bytes", 4096, 1 << 40),
        ring_slots=require_int(ring_slots, "ring_slots", 1, 1 << 16),
        slot_bytes=slot_bytes,
    )
