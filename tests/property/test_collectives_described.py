"""What collectives trace is what is described; see `test_traced_is_described`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

import xccl
from tests.multirank.support import launch
from tests.property.test_traced_is_described import entries_of
from tests.unit.described import check
from xccl.protocol import collectives
from xccl.protocol.collective_cuts import FLOWS, TWO_STEP, Kind
from xccl.trace.record import Recorder

#: So that a few KiB take several steps.
HEAP_BYTES = 1 << 16
STAGE_BYTES = HEAP_BYTES // 4
KINDS: list[Kind] = [kind for kind in FLOWS if kind not in ("alltoallv", "agreement")]


def call(comm: xccl.Communicator, kind: Kind, n_bytes: int, root: int, algorithm: str, registered: bool) -> None:
    """A collective with parts of `n_bytes`; not in place."""
    flow = FLOWS[kind]
    shape = (comm.size, n_bytes) if flow.parts else (n_bytes,)
    x: Any = comm.empty(shape, np.uint8).local if registered else np.zeros(shape, np.uint8)
    options: dict[str, Any] = {"algorithm": algorithm}
    if flow.rooted:
        options["root"] = root
    if kind == "scatter" and comm.rank != root:
        x, options["out"] = None, np.zeros(n_bytes, np.uint8)
    getattr(comm, kind)(x, **options)


def assert_described(
    fabric: str, ranks: int, program: list[tuple[Kind, int, int, str]], *, registered: bool = False
) -> None:
    def main(comm: xccl.Communicator) -> tuple[Recorder, int]:
        with comm.trace() as recorder:
            for each in program:
                call(comm, *each, registered)
        return recorder, comm.core.fabric.reached

    results = launch(main, ranks, fabric, heap_bytes=HEAP_BYTES)
    options: Any = {"half_bytes": STAGE_BYTES, "registered": registered, "reach": results[0][1]}
    described = [
        collectives.describe(kind, ranks, n_bytes, root=root, algorithm=algorithm, **options)
        for kind, n_bytes, root, algorithm in program
    ]
    for description in described:
        check(description)
    for rank, (recorder, _) in enumerate(results):
        assert entries_of(recorder) == [(d.operation, d.entries(rank)) for d in described]
        for operation, description in zip(recorder.operations, described, strict=True):
            assert [stage.name for stage in operation.stages] == [stage.name for stage in description.stages]


@st.composite
def programs(draw: st.DrawFn) -> tuple[int, list[tuple[Kind, int, int, str]]]:
    ranks = draw(st.one_of(st.integers(1, 5), st.just(40)))
    program = []
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5)):
        n_bytes = draw(st.one_of(st.integers(0, 600), st.sampled_from([216, 217]), st.integers(0, 40_000 // ranks)))
        algorithm = draw(st.sampled_from(["auto", "mesh", "two-step"] if kind in TWO_STEP else ["auto", "mesh"]))
        program.append((kind, n_bytes, draw(st.integers(0, ranks - 1)), algorithm))
    return ranks, program


@settings(max_examples=50)
@example(case=(3, [(kind, 40_000, 1, "auto") for kind in KINDS]))
@example(case=(40, [(kind, 5000, 1, "auto") for kind in KINDS]))
@example(case=(40, [(kind, 8, 1, "auto") for kind in KINDS]))
@example(case=(4, [(kind, 40_000, 1, "two-step") for kind in sorted(TWO_STEP)]))
@given(case=programs())
def test_collectives(fabric: str, case: tuple[int, list[tuple[Kind, int, int, str]]]) -> None:
    """Inline, staged and read where they lie, one step and several, counted arrivals, both algorithms."""
    ranks, program = case
    if fabric == "shm" and ranks > 5:
        fabric = "local"
    assert_described(fabric, ranks, program)


@pytest.mark.parametrize("n_bytes", [8, 5000, 40_000])
@pytest.mark.parametrize("ranks", [1, 3, 34])
def test_registered_inputs(fabric: str, ranks: int, n_bytes: int) -> None:
    """Large ones are read where they lie, and a step more says that they were read."""
    program = [(kind, n_bytes, ranks - 1, "auto") for kind in KINDS]
    program += [(kind, n_bytes, 0, "two-step") for kind in sorted(TWO_STEP)]
    assert_described("local" if ranks > 3 else fabric, ranks, program, registered=True)


@settings(max_examples=20)
@given(
    ranks=st.one_of(st.integers(1, 5), st.just(40)),
    seed=st.integers(0, 1 << 30),
    most=st.sampled_from([0, 300, 9000, 20_000]),
)
def test_alltoallv(fabric: str, ranks: int, seed: int, most: int) -> None:
    """Pairs of any size, of none, inline, in several steps, and read where they lie by some ranks, at once."""
    fabric = "local" if ranks > 5 else fabric
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, most + 1, (ranks, ranks)) * (rng.random((ranks, ranks)) < 0.7)

    def main(comm: xccl.Communicator) -> tuple[Recorder, int]:
        with comm.trace() as recorder:
            comm.alltoallv(np.zeros(sizes[comm.rank].sum(), np.uint8), sizes[comm.rank])
        return recorder, comm.core.fabric.reached

    results = launch(main, ranks, fabric, heap_bytes=HEAP_BYTES)
    described = collectives.alltoallv(sizes, half_bytes=STAGE_BYTES, reach=results[0][1])
    check(described)
    for rank, (recorder, _) in enumerate(results):
        assert entries_of(recorder) == [("alltoallv", described.entries(rank))]


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_algorithm(kind: Kind) -> None:
    with pytest.raises(xccl.UsageError, match="algorithm"):
        collectives.describe(kind, 4, 100, algorithm="ring")
