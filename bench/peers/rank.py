"""What each rank runs, whatever its library: connect to the driver, then do what it says until it hangs up.

    python -m bench.peers.rank LIBRARY RANKS ADDRESS [RANK]

With MPI the launcher starts this once for each rank, gloo's ranks are started with their number, and xccl and
multiprocessing start their own ranks from one process. A rank that waits for the driver sleeps in a read, so that
libraries whose turn it is not do not disturb the one whose turn it is.

Orders and answers are tuples; see `Session`, which is the other end.
"""

from __future__ import annotations

import gc
import os
import resource
import shutil
import socket
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

from bench.peers.names import COPY, XCCL
from bench.peers.work import Block, Cell, Library, NotComparableError, Prepared, Work, pin

_WARM_UP_OPERATIONS = 20


def serve(library: Library, address: str) -> None:
    """Do what the driver says."""
    has_own_core = pin(library.rank, library.size)
    with socket.socket(socket.AF_UNIX) as plain:
        plain.connect(address)
        connection = Connection(plain.detach())
    connection.send(("hello", library.rank, os.getpid(), library.version))
    prepared: dict[tuple[Cell, str], Work] = {}
    gc.disable()
    while True:
        try:
            order, *arguments = connection.recv()
        except EOFError:  # the driver is gone, and cannot clean up any more
            shutil.rmtree(Path(address).parent, ignore_errors=True)
            return
        if order == "exit":
            connection.send(("exit",))
            return
        try:
            answer = _obey(library, prepared, has_own_core, order, arguments)
        except NotComparableError as error:
            answer = ("not comparable", str(error))
        except Exception:  # noqa: BLE001 - whatever it is, the driver has to hear of it and end the other ranks
            answer = ("failed", traceback.format_exc())
        connection.send(answer)
        if order == "close":
            gc.collect()


def _obey(
    library: Library, prepared: dict[tuple[Cell, str], Work], has_own_core: bool, order: str, arguments: list[Any]
) -> tuple[Any, ...]:
    cell, variant, *numbers = arguments
    if order == "prepare":
        work = prepared[cell, variant] = library.work(cell, variant)
        library.barrier()
        wrong = work.check()
        library.barrier()
        return ("prepared", Prepared(wrong, work.per_operation, work.note))
    if order == "time":
        return ("times", _time(library, prepared[cell, variant], has_own_core, *numbers))
    assert order == "close"
    prepared.pop((cell, variant)).close()
    return ("closed",)


def _time(library: Library, work: Work, has_own_core: bool, operations: int, blocks: int) -> list[Block]:
    """[blocks]; ranks meet before each."""
    run, barrier, found = work.run, library.barrier, []
    run(min(operations, _WARM_UP_OPERATIONS))
    for _ in range(blocks):
        barrier()
        preempted = _preemptions()
        start = perf_counter()
        run(operations)
        taken_s = perf_counter() - start
        # Ranks that share a core take it from each other: nothing is known of other processes then.
        found.append(Block(taken_s / operations, has_own_core and _preemptions() != preempted))
    barrier()
    return found


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def main() -> None:
    """Start the library, and serve."""
    name, ranks, address, *rank = sys.argv[1:]
    if name == XCCL:
        import xccl
        from bench.peers.on_xccl import Xccl

        xccl.launch(lambda comm: serve(Xccl(comm), address), int(ranks), timeout_s=24 * 3600.0)
    elif name == "multiprocessing":
        from bench.peers.on_multiprocessing import Multiprocessing, start

        start(int(ranks), lambda shared, number: serve(Multiprocessing(shared, number), address))
    elif name == COPY:
        from bench.peers.floor import Memory, compile_copy
        from bench.peers.on_multiprocessing import start

        compile_copy()
        start(int(ranks), lambda shared, number: serve(Memory(shared, number), address))
    elif name == "gloo":
        from bench.peers.on_gloo import Gloo

        serve(Gloo(int(rank[0]), int(ranks), Path(address).parent), address)
    else:
        from bench.peers.on_mpi import Mpi

        serve(Mpi(name), address)


if __name__ == "__main__":
    main()
