"""Descriptions of A2E and E2A, direct and with trampolines."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.unit.described import check, matrix, the_signals, the_transfers, total, written_by
from xccl.errors import UsageError
from xccl.protocol.a2e import FIRST_BYTES, a2e, default_trampolines, e2a
from xccl.protocol.counts import RoutingCounts

HIDDEN = 16
#: Two attention dies, three expert dies with one expert each.
SMALL = RoutingCounts.from_topk([np.array([[0, 1], [2, -1]]), np.array([[0, 2]])], 3, destinations=3)
#: XDS §3.3: 256 routed and 32 shared experts, batch 96, top 8 and the shared one.
PUBLISHED = RoutingCounts.uniform(160, experts=256, tokens=96, top_k=8, shared=32, destinations=288)


def routings() -> st.SearchStrategy[RoutingCounts]:
    """Any numbers of attention and expert dies."""

    def make(attention: int, dies: int, local: int, top_k: int, seed: int) -> RoutingCounts:
        rng = np.random.default_rng(seed)
        idxs = []
        for _ in range(attention):
            idx = rng.integers(0, dies * local, (rng.integers(0, 7), top_k))
            idx[rng.random(idx.shape) < 0.2] = -1
            idxs.append(idx)
        return RoutingCounts.from_topk(idxs, dies * local, destinations=dies)

    return st.builds(
        make, st.integers(1, 7), st.integers(1, 7), st.integers(1, 2), st.integers(1, 4), st.integers(0, 1 << 32)
    )


def test_direct_by_hand() -> None:
    row = HIDDEN
    described = a2e(SMALL, hidden=HIDDEN)
    check(described)
    assert described.ranks == 5
    pulled = the_transfers(described, "pull", "rows")
    assert pulled.engine == "dma"
    assert matrix(pulled, 5)[:2].tolist() == [[0, 0, row, row, row], [0, 0, row, 0, row]]
    assert described.payload_bytes.tolist() == [3 * (HIDDEN + 4), 2 * (HIDDEN + 4), 0, 0, 0]
    assert described.stage("write").work[0].units.tolist() == [2, 1]
    places, scales = (the_transfers(described, "pull", what) for what in ("places", "scales"))
    assert matrix(places, 5)[:2].tolist() == [[0, 0, 8, 8, 8], [0, 0, 8, 0, 8]]
    assert matrix(scales, 5)[:2].tolist() == [[0, 0, 4, 4, 4], [0, 0, 4, 0, 4]]
    # Each expert die reads the first rows of its expert and of the next one, also where there are no rows for it.
    assert matrix(the_transfers(described, "pull", "firsts"), 5)[:2, 2:].tolist() == [[2 * FIRST_BYTES] * 3] * 2


def test_trampolines_by_hand() -> None:
    """Attention dies 0 and 1 have the trampolines 2 and 3; expert die 4 is none."""
    row = HIDDEN
    described = a2e(SMALL, hidden=HIDDEN, trampolines=2)
    check(described)
    assert matrix(the_transfers(described, "pull", "rows"), 5)[:2].tolist() == [
        [0, 0, 3 * row, 0, 0],
        [0, 0, 0, 2 * row, 0],
    ]
    forwarded = matrix(the_transfers(described, "forward-pull", "rows"), 5)
    assert forwarded[2:4].tolist() == [[0, 0, row, row, row], [0, 0, row, 0, row]]
    assert matrix(the_transfers(described, "pull", "firsts"), 5).sum() == 2 * 4 * FIRST_BYTES
    once = a2e(SMALL, hidden=HIDDEN, trampolines=2, copies="token")
    check(once)
    assert matrix(the_transfers(once, "pull", "rows"), 5)[:2].tolist() == [[0, 0, 2 * row, 0, 0], [0, 0, 0, row, 0]]
    assert (matrix(the_transfers(once, "forward-pull", "rows"), 5) == forwarded).all()


def test_small_writes_of_an_attention_die() -> None:
    """One for each expert die, or, with trampolines, one; that is what trampolines are for."""
    ranks = 160 + 288
    direct = a2e(PUBLISHED, hidden=7168)
    assert written_by(the_signals(direct, "announce", "field"), ranks)[:160].tolist() == [288] * 160
    trampolines = default_trampolines(160, 288)
    assert trampolines == 160
    bounced = a2e(PUBLISHED, hidden=7168, trampolines=trampolines)
    assert written_by(the_signals(bounced, "announce", "field"), ranks)[:160].tolist() == [1] * 160
    forwarded = written_by(the_signals(bounced, "forward-announce", "forward-field"), ranks)
    assert forwarded.tolist() == [0] * 160 + [287] * 160 + [0] * 128
    back = e2a(PUBLISHED, hidden=7168, trampolines=trampolines)
    assert written_by(the_signals(back, "announce", "field"), ranks)[160:].tolist() == [159] * 160 + [160] * 128
    handed = written_by(the_signals(back, "forward-announce", "forward-field"), ranks)
    assert handed.tolist() == [0] * 160 + [1] * 160 + [0] * 128


@given(
    routing=routings(),
    trampolines=st.integers(0, 7),
    copies=st.sampled_from(["row", "token"]),
    engine=st.sampled_from(["mte", "dma"]),
    quant=st.sampled_from(["int8", "none"]),
)
def test_every_row_gets_there_and_back(
    routing: RoutingCounts, trampolines: int, copies: Any, engine: Any, quant: Any
) -> None:
    trampolines = min(trampolines, routing.destinations)
    a, ranks = routing.sources, routing.sources + routing.destinations
    row = 8 if quant == "int8" else 16
    there = a2e(routing, hidden=8, quant=quant, trampolines=trampolines, copies=copies, engine=engine)
    back = e2a(routing, hidden=8, trampolines=trampolines, copies=copies, engine=engine)
    check(there)
    check(back)
    arrives = the_transfers(there, "forward-pull" if trampolines else "pull", "rows")
    assert total(arrives, "destination", ranks)[a:].tolist() == (row * routing.received).tolist()
    leaves = the_transfers(back, "pull", "rows")
    assert total(leaves, "source", ranks)[a:].tolist() == (16 * routing.received).tolist()
    once = trampolines > 0 and copies == "token"
    to_attention = routing.sending if once else routing.sent
    comes_home = the_transfers(back, "forward-pull" if trampolines else "pull", "rows")
    assert total(comes_home, "destination", ranks)[:a].tolist() == (16 * to_attention).tolist()
    for described in (there, back):
        for stage in described.stages:
            for transfers in stage.transfers:
                if transfers.mover == "destination" and transfers.what != "firsts":
                    assert transfers.engine == engine
                    assert (transfers.units <= np.maximum(transfers.n_bytes, 1)).all()
    (work,) = back.stage("pull" if once or not trampolines else "forward-pull").work
    assert work.elements.sum() == 8 * routing.sent.sum()
    assert (work.rank >= a).all() == once or not work.rank.size


def test_the_small_runs_may_have_another_engine() -> None:
    for make, bulk, small in ((a2e, "pull", "forward-pull"), (e2a, "forward-pull", "pull")):
        described = make(PUBLISHED, hidden=8, trampolines=160, forward_engine="mte")
        by_dma, by_mte = the_transfers(described, bulk, "rows"), the_transfers(described, small, "rows")
        assert (by_dma.engine, by_mte.engine) == ("dma", "mte")
        assert by_dma.units.tolist() == [1] * 160
        assert by_mte.units.sum() == PUBLISHED.sent.sum()


def test_direct_is_all_that_copies_can_be() -> None:
    for make in (a2e, e2a):
        rows, tokens = (make(SMALL, hidden=8, copies=copies) for copies in ("row", "token"))
        assert [rows.entries(r) for r in range(5)] == [tokens.entries(r) for r in range(5)]
        assert rows.protocol == "direct"


@pytest.mark.parametrize("trampolines", [0, 2])
def test_domains_that_share_the_experts(trampolines: int) -> None:
    """Ranks 0 and 1 are domain 0, ranks 2 and 3 domain 1, whose operation it is; the expert dies are 4 to 6."""
    there = a2e(SMALL, hidden=8, trampolines=trampolines, domains=2, domain=1)
    back = e2a(SMALL, hidden=8, trampolines=trampolines, domains=2, domain=1, before=0)
    check(there)
    alone = a2e(SMALL, hidden=8, trampolines=trampolines)
    for described in (there, back):
        assert described.ranks == 7
        transferred = [t for stage in described.stages for t in stage.transfers]
        assert not {0, 1} & {rank for t in transferred for rank in (*t.source.tolist(), *t.destination.tolist())}
        assert not described.entries(0)
    for rank in range(5):  # the same as alone, two ranks further
        entries = alone.entries(rank)
        assert there.entries(rank + 2) == sorted(e._replace(peer=e.peer + 2) for e in entries)
    # Outputs are written, or handed on, when the domain before has pulled its own.
    awaited = "forward-await-pulled" if trampolines else "await-pulled"
    (waits,) = back.stage(awaited).waits
    assert set(waits.peer.tolist()) == {0, 1}


@pytest.mark.parametrize("domain", [-1, 2])
def test_a_domain_that_is_not_there(domain: int) -> None:
    with pytest.raises(UsageError):
        e2a(SMALL, hidden=8, domains=2, domain=domain)


def test_too_many_trampolines() -> None:
    with pytest.raises(UsageError):
        a2e(SMALL, hidden=8, trampolines=4)


@pytest.mark.parametrize("trampolines", [0, 160])
def test_448_dies_in_less_than_a_second(trampolines: int) -> None:
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        a2e(PUBLISHED, hidden=7168, trampolines=trampolines)
        e2a(PUBLISHED, hidden=7168, trampolines=trampolines)
        best = min(best, time.perf_counter() - start)
    assert best < 1.0
