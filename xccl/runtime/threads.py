"""Ranks as threads of this process, on fabric `local`."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from ..comm import Communicator
from ..errors import WaitTimeout
from ..fabric import LocalFabric, LocalWorld
from ..layout.segment import ABORT_DIED, ABORT_INTERRUPT, Geometry
from .outcome import Outcome, raise_failure

#: After a failure the other ranks get this long to end; a thread that computes can't be stopped.
_GRACE_S = 1.0
#: A rank that returns from a kernel must not wait 5 ms for the interpreter's lock. But each thread that waits for it
#: wakes once in an interval to ask for it, so with hundreds of ranks a short one costs more than it saves: they get the
#: lock in time anyway, since a rank gives it up with every kernel that it calls.
_SWITCH_INTERVAL_S = 0.0005
_MANY_RANKS = 16
_LONGEST_SWITCH_INTERVAL_S = 0.1
#: From so many ranks on, all share one core (docs/adr/0033): a rank that comes out of a short kernel takes the lock
#: again at once there. With several cores a rank on another one has it by then, and each kernel costs two switches.
_ONE_CORE_RANKS = 64


def run_threads(
    main: Callable[..., Any],
    ranks: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    geometry: Geometry,
    timeout_s: float,
    op_timeout_s: float,
    on_report: Callable[[int, Any], None] | None,
) -> list[Any]:
    """Run `main` in `ranks` threads; the results by rank. See `xccl.launch`."""
    world = LocalWorld(geometry)
    messages: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

    core = _shared_core(ranks)

    def rank_main(rank: int) -> None:
        comm: Communicator | None = None
        try:
            if core is not None:
                os.sched_setaffinity(0, {core})  # of this thread, and of those that it starts
            report = (lambda message: messages.put((rank, message))) if on_report is not None else None
            comm = Communicator(fabrics[rank], op_timeout_s=op_timeout_s, report=report)
            outcome = Outcome("result", main(comm, *args, **kwargs))
            comm.close()
        except BaseException as error:  # noqa: BLE001 - whatever ends a rank is reported
            outcome = Outcome.of_error(error)
            if isinstance(error, SystemExit):
                world.mark_dead(rank, str(outcome.value))
                fabrics[rank].abort(ABORT_DIED, rank)
            elif comm is not None:
                comm.core.fail(error)
                comm.close(failed=True)
        messages.put((rank, outcome))

    fabrics = [LocalFabric(world, rank) for rank in range(ranks)]
    threads = [
        threading.Thread(target=rank_main, args=(rank,), name=f"xccl rank {rank}", daemon=True) for rank in range(ranks)
    ]
    saved_interval_s = sys.getswitchinterval()
    sys.setswitchinterval(_switch_interval_s(ranks))
    try:
        for thread in threads:
            thread.start()
        outcomes = _collect(messages, ranks, timeout_s, on_report)
    except BaseException:
        fabrics[0].abort(ABORT_INTERRUPT, 0, "was interrupted together with its launcher")
        deadline = time.monotonic() + _GRACE_S / 2
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        raise
    finally:
        sys.setswitchinterval(saved_interval_s)
    raise_failure(outcomes)
    for thread in threads:
        thread.join()
    return [outcomes[rank].value for rank in range(ranks)]


def _shared_core(ranks: int) -> int | None:
    """The core that all ranks are to share, another one for the next process; None if they may use all."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[os.getpid() % len(cores)] if ranks >= _ONE_CORE_RANKS else None


def _switch_interval_s(ranks: int) -> float:
    if ranks <= _MANY_RANKS:
        return _SWITCH_INTERVAL_S
    return min(_SWITCH_INTERVAL_S * ranks, _LONGEST_SWITCH_INTERVAL_S)


def _collect(
    messages: queue.SimpleQueue[tuple[int, Any]],
    ranks: int,
    timeout_s: float,
    on_report: Callable[[int, Any], None] | None,
) -> dict[int, Outcome]:
    outcomes: dict[int, Outcome] = {}
    limit = deadline = time.monotonic() + timeout_s
    while len(outcomes) < ranks:
        try:
            # In slices, so that Ctrl-C reaches the main thread on every platform.
            rank, message = messages.get(timeout=max(0.0, min(0.5, limit - time.monotonic())))
        except queue.Empty:
            if time.monotonic() < limit:
                continue
            if limit < deadline:
                break
            missing = sorted(set(range(ranks)) - set(outcomes))
            raise WaitTimeout(
                f"launch: no result within {timeout_s:g} s from rank{'s' * (len(missing) > 1)} "
                f"{', '.join(map(str, missing[:16]))}",
                operation="launch", peer=missing[0], timeout_s=timeout_s,
            ) from None  # fmt: skip
        if isinstance(message, Outcome):
            outcomes[rank] = message
            if message.kind != "result":
                limit = min(limit, time.monotonic() + _GRACE_S)
        elif on_report is not None:
            on_report(rank, message)
    return outcomes
