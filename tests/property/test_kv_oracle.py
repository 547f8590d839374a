"""KV-cache transfers against their oracle: any requests between any ranks, and the traces that they leave."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal, NamedTuple

import numpy as np
from hypothesis import given, settings, strategies as st

import xccl
from tests.multirank.support import Array, assert_same, launch
from tests.property.test_traced_is_described import CASES, sessions
from xccl import reference
from xccl.comm.reference import PagedCopy
from xccl.protocol import kv as protocol
from xccl.trace.entry import Entry
from xccl.trace.record import Recorder

#: Bytes of a page in one layer: odd ones, one vector, more than a step of the engine takes at once.
PAGE_BYTES = [1, 3, 64, 100, 4096, 70_001, 700_000]


class Case(NamedTuple):
    """Requests that are under way at once.

    Attributes:
        ranks: number of ranks.
        layers: of the pools.
        pages: of the pools.
        page_bytes: of a page in one layer.
        copies: the requests, whose number is their place.
        engines: of each.
        by_layer: whether each is sent layer by layer.
        seed: of the order in which they are posted and waited for.
    """

    ranks: int
    layers: int
    pages: int
    page_bytes: int
    copies: list[PagedCopy]
    engines: list[Literal["dma", "mte"]]
    by_layer: list[bool]
    seed: int


@st.composite
def cases(draw: st.DrawFn, ranks: int) -> Case:
    """Ragged and empty lists in any order; a page is read by many requests or written by one."""
    layers, pages = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    free = [draw(st.permutations(range(pages))) for _ in range(ranks)]
    sources = [order[: draw(st.integers(0, pages))] for order in free]
    targets = [order[len(source) :] for order, source in zip(free, sources, strict=True)]
    copies = []
    for _ in range(draw(st.integers(0, 6))):
        source, destination = draw(st.integers(0, ranks - 1)), draw(st.integers(0, ranks - 1))
        count = draw(st.integers(0, len(targets[destination]))) if sources[source] else 0
        taken, targets[destination] = targets[destination][:count], targets[destination][count:]
        here = draw(st.lists(st.sampled_from(sources[source]), min_size=count, max_size=count)) if count else []
        copies.append(PagedCopy(source, destination, here, taken))
    each = st.lists(st.sampled_from(["dma", "mte"]), min_size=len(copies), max_size=len(copies))
    layered = st.lists(st.booleans(), min_size=len(copies), max_size=len(copies))
    page_bytes, seed = draw(st.sampled_from(PAGE_BYTES)), draw(st.integers(0, 99))
    return Case(ranks, layers, pages, page_bytes, copies, draw(each), draw(layered), seed)


def filled(case: Case, rank: int) -> Array:
    """The pool of a rank before."""
    shape = (case.layers, case.pages, case.page_bytes)
    return np.random.default_rng((case.seed, rank)).integers(0, 256, shape, np.uint8)


def run_rank(comm: xccl.Communicator, case: Case, pool: xccl.SymmetricArray) -> Recorder:
    """Post this rank's sides of all requests, feed them layer by layer, and wait for them."""
    kv = xccl.KVTransfer(comm, pool)
    rng = np.random.default_rng((case.seed, comm.rank))
    sends: list[xccl.KVSend] = []
    requests: list[Any] = []
    comm.barrier()
    with comm.trace() as recorder:
        for number in rng.permutation(len(case.copies)).tolist():
            copy, engine, by_layer = case.copies[number], case.engines[number], case.by_layer[number]
            if copy.destination == comm.rank:
                requests.append(kv.irecv(copy.destination_pages, copy.source, number))
            if copy.source == comm.rank:
                request = kv.isend(copy.source_pages, copy.destination, number, by_layer=by_layer, engine=engine)
                requests.append(request)
                if by_layer:
                    sends.append(request)
        for layer in range(case.layers):
            for send in sends:
                send.ready(layer)
        for i in rng.permutation(len(requests)):
            requests[i].wait()
    kv.free()
    return recorder


@settings(max_examples=80 // CASES)
@given(session=sessions(4, cases))
def test_transfers_move_what_the_oracle_moves_and_trace_what_is_described(
    fabric: str, session: tuple[int, list[Case]]
) -> None:
    ranks, all_cases = session

    def run(comm: xccl.Communicator, case: Case) -> tuple[Array, Recorder]:
        pool = comm.empty((case.layers, case.pages, case.page_bytes), np.uint8)
        pool.local[...] = filled(case, comm.rank)
        recorder = run_rank(comm, case, pool)
        moved = pool.local.copy()
        pool.free()
        return moved, recorder

    found = launch(lambda comm: [run(comm, case) for case in all_cases], ranks, fabric)
    for number, case in enumerate(all_cases):
        check(case, [results[number] for results in found])


def check(case: Case, results: list[tuple[Array, Recorder]]) -> None:
    """Pools and traces of all ranks."""
    pools = [filled(case, rank) for rank in range(case.ranks)]
    for rank, want in enumerate(reference.kv_transfer(pools, case.copies)):
        assert_same(results[rank][0], want, f"pool of rank {rank}")
    for rank, (_, recorder) in enumerate(results):
        found: defaultdict[int | None, list[Entry]] = defaultdict(list)
        for operation in recorder.operations:
            assert operation.is_finished
            assert operation.name in ("kv_send", "kv_recv")
            assert {event.entry for event in operation.events} == set(operation.entries)
            found[operation.number] += operation.entries
        expected = {}
        for number, copy in enumerate(case.copies):
            described = protocol.kv_transfer(
                case.ranks, copy.source, copy.destination, len(copy.source_pages), layers=case.layers,
                page_bytes=case.page_bytes, engine=case.engines[number],
            )  # fmt: skip
            if entries := described.entries(rank):
                expected[number] = entries
        assert {number: sorted(entries) for number, entries in found.items()} == expected
