"""Large inputs in private memory: read where they lie if all ranks may, staged if not, and what happens when one is gone."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pytest

import xccl
from tests.multirank.support import Array, assert_same, error_of, launch
from tests.multirank.test_collectives import KINDS, expected, random_arrays
from xccl import reference
from xccl.fabric import shm
from xccl.fabric.shm import ShmFabric
from xccl.layout.collectives import CS_PROCESSES
from xccl.layout.ring import REACH_DIRECT, REACH_KERNEL, REACH_NONE, REACH_SLOWLY
from xccl.protocol.collective_cuts import FLOWS, TWO_STEP

FP32 = np.dtype(np.float32)
#: Above all thresholds, and not a multiple of anything.
COUNT = 33_003


def run_all(comm: xccl.Communicator, parts: list[Array], rows: list[Array], counts: Array, wants: Any) -> int:
    """Every collective, twice, with inputs that are overwritten as soon as a call ends; how others reach this rank."""
    rank = comm.rank
    for _ in range(2):
        for kind in KINDS:
            for algorithm in ["auto", *(["two-step"] if kind in TWO_STEP else [])]:
                x: Any = (parts[rank] if FLOWS[kind].parts else parts[rank][0]).copy()
                options: dict[str, Any] = {"algorithm": algorithm}
                if FLOWS[kind].rooted:
                    options["root"] = 1
                if kind == "scatter" and rank != 1:
                    x, options["out"] = None, np.zeros(x.shape[1:], x.dtype)
                assert_same(getattr(comm, kind)(x, **options), wants[kind][rank], f"{kind}, {algorithm}")
                if x is not None:
                    x[...] = np.nan  # nobody reads it any more
        x = rows[rank].copy()
        assert_same(comm.alltoallv(x, counts[rank])[0], wants["alltoallv"][rank][0], "alltoallv")
        x[...] = np.nan
    return comm.core.fabric.reached


def inputs(ranks: int) -> tuple[list[Array], list[Array], Array, dict[str, Any]]:
    """Parts of all ranks, rows and their numbers for alltoallv, and what the oracles say."""
    parts = random_arrays(7, ranks, (ranks, COUNT), FP32, tame=True)
    wants: dict[str, Any] = {
        kind: expected(kind, [p if FLOWS[kind].parts else p[0] for p in parts], "sum", 1) for kind in KINDS
    }
    counts = np.random.default_rng(2).integers(0, COUNT, (ranks, ranks))
    counts[0] = 5  # small ones, in the records, beside those of others that are read where they lie
    rows = [random_arrays(8 + r, 1, (int(counts[r].sum()),), FP32, tame=True)[0] for r in range(ranks)]
    wants["alltoallv"] = reference.alltoallv(rows, counts)
    return parts, rows, counts, wants


@pytest.fixture(autouse=True)
def fast_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever machine this is, inputs are read in place from the smaller sizes on; ranks are forked with it."""
    monkeypatch.setattr(shm, "reads_slowly", lambda: False)


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("kept_secret", [(), (1,), (0, 1, 2, 3, 4)], ids=["all", "some", "none"])
@pytest.mark.parametrize("slowly", [False, True], ids=["fast", "slowly"])
def test_with_and_without_permission(
    fabric: str, ranks: int, kept_secret: tuple[int, ...], slowly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of some ranks may not be read: these stage, and the others need not."""
    monkeypatch.setattr(shm, "reads_slowly", lambda: slowly)
    may_read = ShmFabric._may_read

    def forbid(self: ShmFabric, peer: int) -> bool:
        return peer not in kept_secret and may_read(self, peer)

    monkeypatch.setattr(ShmFabric, "_may_read", forbid)  # the ranks are forked with it
    reached = launch(run_all, ranks, fabric, args=inputs(ranks))
    open_to_all = REACH_DIRECT if fabric == "local" else REACH_SLOWLY if slowly else REACH_KERNEL
    secret = REACH_DIRECT if fabric == "local" else REACH_NONE
    assert reached == [secret if rank in kept_secret else open_to_all for rank in range(ranks)]


def test_in_a_group(fabric: str) -> None:
    """Ranks of a group have other numbers than those of the session."""

    def main(comm: xccl.Communicator, *args: Any) -> None:
        group = comm.split(color=0 if comm.rank else None, key=-comm.rank)
        if group is not None:
            run_all(group, *args)

    launch(main, 4, fabric, args=inputs(3))


@pytest.mark.parametrize("memory", ["symmetric", "private"])
def test_reduced_in_place(fabric: str, memory: str) -> None:
    """The result is not written over an input that others still read."""
    ranks, count = 2, 200_000
    xs = random_arrays(3, ranks, (count,), FP32, tame=True)
    want = reference.allreduce(xs)[0]

    def main(comm: xccl.Communicator) -> None:
        x = comm.empty(count, FP32).local if memory == "symmetric" else np.empty(count, FP32)
        for i in range(30):
            algorithm = ("mesh", "two-step")[i % 2]
            x[...] = xs[comm.rank]
            assert_same(comm.allreduce(x, out=x, algorithm=algorithm), want, f"{algorithm}, call {i}")

    launch(main, ranks, fabric)


@pytest.mark.parametrize("kind", ["alltoall", "allgather", "alltoallv"])
def test_an_owner_that_has_given_up(fabric: str, kind: str) -> None:
    """A rank comes so late that the other has given up, and its input is gone: an error, and no data."""
    n_bytes = 8 << 20

    def call(comm: xccl.Communicator, timeout_s: float) -> BaseException | None:
        x = np.ones((2, n_bytes), np.uint8)
        if kind == "alltoallv":
            return error_of(comm.alltoallv, x[0], [n_bytes // 2, n_bytes // 2], timeout_s=timeout_s)
        return error_of(getattr(comm, kind), x, timeout_s=timeout_s)

    def main(comm: xccl.Communicator) -> tuple[BaseException | None, BaseException | None]:
        comm.barrier()
        if comm.rank == 1:
            time.sleep(0.6)
        error = call(comm, 0.2 if comm.rank == 0 else 1.0)
        after = error_of(comm.allreduce, np.ones(3), timeout_s=0.2)
        comm.barrier()
        return error, after

    (first, after_first), (second, after_second) = launch(main, 2, fabric)
    assert isinstance(first, xccl.WaitTimeout)
    assert isinstance(second, (xccl.WaitTimeout, xccl.FabricError))
    if not isinstance(second, xccl.WaitTimeout):
        assert "the input of rank 0 cannot be read any more" in str(second)
        assert second.peer == 0
    assert all(isinstance(after, xccl.FabricError) for after in (after_first, after_second))


def test_memory_that_cannot_be_read_any_more() -> None:
    """The other process is not there, although nobody has seen it die."""

    def main(comm: xccl.Communicator) -> BaseException | None:
        x = np.ones((2, COUNT), np.float32)
        comm.alltoall(x)
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        if comm.rank == 1:
            processes = comm.core.fabric.processes
            assert processes.ctypes.data == comm._exchange.state[CS_PROCESSES // 8]
            processes[0] = child
        error = error_of(comm.alltoall, x, timeout_s=1.0)
        comm.barrier()
        return error

    of_owner, of_reader = launch(main, 2, "shm")
    assert isinstance(of_owner, xccl.WaitTimeout)
    assert type(of_reader) is xccl.FabricError
    assert (of_reader.rank, of_reader.peer) == (1, 0)


def test_what_is_copied(fabric: str) -> None:
    """Once, and nothing to the staging area."""

    def main(comm: xccl.Communicator) -> dict[tuple[str, str], int]:
        x, out = np.ones((2, 1 << 16), np.uint8), np.empty((2, 1 << 16), np.uint8)
        comm.alltoall(x, out=out)
        with comm.trace() as recorder:
            comm.alltoall(x, out=out)
        entries = recorder.operations[0].entries
        return {(e.stage, e.what): e.n_bytes for e in entries if e.kind == "transfer"}

    for moved in launch(main, 2, fabric):
        assert moved == {("read", "parts"): 1 << 16, ("read", "own part"): 1 << 16}
