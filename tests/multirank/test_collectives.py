"""Collectives against their oracles: all shapes, dtypes, operators and algorithms, on both fabrics; several steps a call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

import xccl
from tests.multirank.support import Array, assert_same, launch
from xccl import reference
from xccl.layout.collectives import OPERATORS
from xccl.layout.dtypes import DTYPE_OF
from xccl.protocol.collective_cuts import FLOWS, TWO_STEP, Kind

DTYPES = list(DTYPE_OF.values())
#: A staging area of 4 KiB a half.
SMALL_HEAP = {"heap_bytes": 1 << 14}
KINDS: list[Kind] = [kind for kind in FLOWS if kind not in ("agreement", "alltoallv")]


def random_arrays(seed: int, ranks: int, shape: tuple[int, ...], dtype: np.dtype[Any], *, tame: bool) -> list[Array]:
    """Random bits, NaN, infinities, subnormal numbers and all; or numbers of which sums and products stay finite."""
    rng = np.random.default_rng(seed)
    if tame:
        return [(rng.standard_normal(shape) * 4).astype(dtype) for _ in range(ranks)]
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    return [rng.integers(0, 256, n_bytes, np.uint8).view(dtype).reshape(shape) for _ in range(ranks)]


def expected(kind: Kind, xs: list[Array], op: str, root: int) -> list[Array | None]:
    """What the oracle says."""
    oracle: Any = getattr(reference, kind)
    if FLOWS[kind].reduces:
        return oracle(xs, op)
    if kind == "scatter":
        return oracle(xs[root], len(xs))
    return oracle(xs, root) if FLOWS[kind].rooted else oracle(xs)


def run(
    comm: xccl.Communicator,
    kind: Kind,
    x: Array,
    op: str,
    root: int,
    algorithm: str,
    want: Array | None,
    given_out: bool,
) -> None:
    """One call at one rank, and the check of what it returns; the input stays as it is."""
    options: dict[str, Any] = {"algorithm": algorithm}
    flow = FLOWS[kind]
    if flow.rooted:
        options["root"] = root
    if flow.reduces:
        options["op"] = op
    if (given_out or (kind == "scatter" and comm.rank != root)) and kind != "broadcast" and want is not None:
        options["out"] = np.full(want.shape, 0x55, np.int64).astype(want.dtype)
    argument: Any = x.copy()
    if kind == "scatter" and comm.rank != root:
        argument = None
    result = getattr(comm, kind)(argument, **options)
    assert_same(result, want, f"{kind} of {x.shape} {x.dtype}, {op}, {algorithm}, at rank {comm.rank}")
    if "out" in options:
        assert result is options["out"]
    if kind == "broadcast":
        assert result is argument
    elif argument is not None:
        assert_same(argument, x, "input")


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, list[tuple[Any, ...]]]:
    ranks = draw(st.one_of(st.integers(1, 6), st.just(34)))
    calls = []
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6)):
        count = draw(st.one_of(st.integers(0, 40), st.sampled_from([54, 55, 216, 217]), st.integers(0, 6000 // ranks)))
        shape = draw(st.sampled_from([(count,), (2, count), (count, 1, 3)]))
        algorithm = draw(st.sampled_from(["auto", "mesh", "two-step"] if kind in TWO_STEP else ["auto", "mesh"]))
        calls.append(
            (
                kind, shape, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(OPERATORS)),
                draw(st.integers(0, ranks - 1)), algorithm, draw(st.integers(0, 1 << 30)), draw(st.booleans()),
            )
        )  # fmt: skip
    return ranks, calls


@settings(max_examples=60)
@example(case=(4, [(kind, (0,), np.dtype(np.float32), "sum", 3, "auto", 0, False) for kind in KINDS]))
@example(case=(1, [(kind, (5000,), np.dtype(np.float32), "sum", 0, "auto", 0, True) for kind in KINDS]))
@example(case=(3, [(kind, (5003,), DTYPE_OF[0], "max", 2, "auto", 0, True) for kind in KINDS]))
@example(case=(3, [(kind, (5003,), DTYPE_OF[1], "prod", 2, "two-step", 0, True) for kind in sorted(TWO_STEP)]))
@given(case=cases())
def test_any_calls(fabric: str, case: tuple[int, list[tuple[Any, ...]]]) -> None:
    """Several calls one after the other, of different kinds, so that what one leaves behind would show in the next."""
    ranks, calls = case
    programs = []
    for number, (kind, shape, dtype, op, root, algorithm, seed, given_out) in enumerate(calls):
        full = (ranks, *shape) if FLOWS[kind].parts else shape
        xs = random_arrays(seed, ranks, full, dtype, tame=number % 2 == 0)
        programs.append((kind, xs, op, root, algorithm, expected(kind, xs, op, root), given_out))

    def main(comm: xccl.Communicator) -> None:
        for kind, xs, op, root, algorithm, want, given_out in programs:
            run(comm, kind, xs[comm.rank], op, root, algorithm, want[comm.rank], given_out)

    options = {"heap_bytes": 1 << 16} if ranks > 6 else SMALL_HEAP
    launch(main, ranks, "local" if ranks > 6 else fabric, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_bits_do_not_depend_on_the_algorithm(dtype: np.dtype[Any], op: str) -> None:
    """Of any bits: mesh, two steps, reduce-scatter and allgather, and a size at which blocks and tails occur."""
    ranks, count = 5, 5 * 203
    xs = random_arrays(1, ranks, (count,), dtype, tame=False)
    want = reference.reduce(xs, op)  # type: ignore[arg-type]

    def main(comm: xccl.Communicator) -> None:
        x = xs[comm.rank]
        for algorithm in ("mesh", "two-step", "auto"):
            assert_same(comm.allreduce(x, op, algorithm=algorithm), want, algorithm)
        part = comm.reduce_scatter(x.reshape(ranks, -1), op)
        assert_same(comm.allgather(part).reshape(-1), want, "reduce-scatter and allgather")

    launch(main, ranks, "local", **SMALL_HEAP)


def test_in_place(fabric: str) -> None:
    """x is out (allreduce), or the rank's part of it (allgather, gather); where that can't be, x is copied first."""
    ranks, count = 3, 4001
    xs = random_arrays(2, ranks, (count,), np.dtype(np.float32), tame=True)
    parts = random_arrays(3, ranks, (ranks, count), np.dtype(np.float32), tame=True)

    def main(comm: xccl.Communicator) -> None:
        rank = comm.rank
        for algorithm in ("mesh", "two-step"):
            x = xs[rank].copy()
            assert comm.allreduce(x, out=x, algorithm=algorithm) is x
            assert_same(x, reference.reduce(xs), algorithm)
        out = np.zeros((ranks, count), np.float32)
        out[rank] = xs[rank]
        assert_same(comm.allgather(out[rank], out=out), np.stack(xs), "allgather")
        out[rank] = xs[rank]
        comm.gather(out[rank], 1, out=out if rank == 1 else None)
        if rank == 1:
            assert_same(out, np.stack(xs), "gather")
        x = parts[rank].copy()
        assert_same(comm.alltoall(x, out=x), reference.alltoall(parts)[rank], "alltoall")
        x = parts[rank].copy()
        overlapping = x.reshape(-1)[7 : 7 + count]
        assert_same(comm.reduce_scatter(x, out=overlapping), reference.reduce_scatter(parts)[rank], "reduce-scatter")

    launch(main, ranks, fabric, **SMALL_HEAP)


@pytest.mark.parametrize("ranks", [2, 5, 34])
@pytest.mark.parametrize("which", ["all", "some", "one"])
def test_registered_inputs(fabric: str, ranks: int, which: str) -> None:
    """Inputs in symmetric arrays, of all, some or one rank: read where they lie, and not after the call has ended."""
    count = 40_000 // ranks
    dtype = np.dtype(np.float32)
    parts = random_arrays(4, ranks, (ranks, count), dtype, tame=True)
    wants = {kind: expected(kind, [p if FLOWS[kind].parts else p[0] for p in parts], "sum", 1) for kind in KINDS}
    counts = np.random.default_rng(1).integers(0, 2 * count // ranks, (ranks, ranks))
    rows = [random_arrays(5 + r, 1, (int(counts[r].sum()),), dtype, tame=True)[0] for r in range(ranks)]
    want_rows = reference.alltoallv(rows, counts)

    def main(comm: xccl.Communicator) -> None:
        rank = comm.rank
        registers = which == "all" or (which == "some" and rank % 2 == 0) or (which == "one" and rank == 1)
        own = comm.empty((ranks, count), dtype), comm.empty(2 * count, dtype)
        for _ in range(2):
            for kind in KINDS:
                for algorithm in ["auto", *(["two-step"] if kind in TWO_STEP else [])]:
                    data = parts[rank] if FLOWS[kind].parts else parts[rank][0]
                    x: Any = own[0].local if FLOWS[kind].parts else own[0].local[0]
                    if not registers:
                        x = np.zeros_like(data)
                    x[...] = data
                    options: dict[str, Any] = {"algorithm": algorithm}
                    if FLOWS[kind].rooted:
                        options["root"] = 1
                    if kind == "scatter" and rank != 1:
                        x, options["out"] = None, np.zeros(count, dtype)
                    assert_same(getattr(comm, kind)(x, **options), wants[kind][rank], f"{kind}, {algorithm}")
                    if x is not None:
                        x[...] = np.nan  # nobody reads it any more
            x = own[1].local[: len(rows[rank])] if registers else np.zeros_like(rows[rank])
            x[...] = rows[rank]
            assert_same(comm.alltoallv(x, counts[rank])[0], want_rows[rank][0], "alltoallv")
            x[...] = np.nan

    launch(main, ranks, "local" if ranks > 5 else fabric, heap_bytes=1 << 17)


def test_strided_and_empty_shapes(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> None:
        grid = np.arange(60, dtype=np.int32).reshape(6, 10) + comm.rank
        assert_same(comm.allgather(grid[:, ::3]), np.stack([grid[:, ::3] - comm.rank + r for r in range(2)]))
        assert comm.allgather(np.zeros((0, 3))).shape == (2, 0, 3)
        assert comm.allreduce(np.full((), 2.5)).shape == ()
        assert comm.alltoall(np.zeros((2, 0, 5), np.int8)).shape == (2, 0, 5)

    launch(main, 2, fabric)


@st.composite
def ragged(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...], bool]:
    ranks = draw(st.one_of(st.integers(1, 5), st.just(34)))
    most = draw(st.sampled_from([1, 20, 2000 // ranks]))
    counts = np.random.default_rng(draw(st.integers(0, 1 << 30))).integers(0, most + 1, (ranks, ranks))
    counts[:, draw(st.integers(0, ranks - 1))] = 0
    return counts, draw(st.sampled_from([(), (3,), (2, 5)])), draw(st.booleans())


@settings(max_examples=30)
@given(case=ragged(), dtype=st.sampled_from(DTYPES))
def test_alltoallv(fabric: str, case: tuple[np.ndarray, tuple[int, ...], bool], dtype: np.dtype[Any]) -> None:
    """Ragged, with ranks that get nothing; numbers known to the receiver or not, room of its own or not."""
    counts, tail, known = case
    ranks = len(counts)
    xs = [random_arrays(r, 1, (int(counts[r].sum()), *tail), dtype, tame=False)[0] for r in range(ranks)]
    want = reference.alltoallv(xs, counts)

    def main(comm: xccl.Communicator) -> None:
        options: dict[str, Any] = {}
        if known:
            rows = int(counts[:, comm.rank].sum())
            options = {"recv_counts": counts[:, comm.rank].tolist(), "out": np.zeros((rows + 2, *tail), dtype)}
        for _ in range(2):
            got, numbers = comm.alltoallv(xs[comm.rank], counts[comm.rank], **options)
            assert_same(got, want[comm.rank][0], f"rows at rank {comm.rank}")
            assert_same(numbers, want[comm.rank][1], f"numbers at rank {comm.rank}")

    launch(main, ranks, "local" if ranks > 5 else fabric, heap_bytes=1 << 15)


def test_many_calls_with_delays(fabric: str) -> None:
    """Ranks that are late by turns, in calls of one step and of many, of small and large parts."""
    ranks, rounds = 4, 60

    def main(comm: xccl.Communicator) -> None:
        rng = np.random.default_rng(comm.rank)
        for number in range(rounds):
            count = (3, 700, 5000)[number % 3]
            xs = [np.arange(count, dtype=np.int64) * (r + 1) + number for r in range(ranks)]
            if rng.random() < 0.3:
                end = np.datetime64("now")  # some Python work, to be late
                for _ in range(rng.integers(1, 2000)):
                    end += np.timedelta64(0)
            assert_same(comm.allreduce(xs[comm.rank]), reference.reduce(xs))
            assert_same(comm.allgather(xs[comm.rank]), np.stack(xs))
            x = xs[number % ranks].copy() if comm.rank == number % ranks else np.zeros(count, np.int64)
            assert_same(comm.broadcast(x, number % ranks), xs[number % ranks])

    launch(main, ranks, fabric, **SMALL_HEAP)
