"""Descriptions of dispatch and combine, pull and push."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.unit.described import check, matrix, the_signals, the_transfers, total, written_by
from xccl.errors import UsageError
from xccl.protocol import moe, moe_direct, moe_push
from xccl.protocol.counts import RoutingCounts
from xccl.protocol.stage import Description
from xccl.trace.entry import Entry

HIDDEN = 16
#: Two ranks with two experts each. Rank 0: token 0 to experts 0 and 3, token 1 to none. Rank 1: token 0 to 2 twice.
SMALL = RoutingCounts.from_topk([np.array([[0, 3], [-1, -1]]), np.array([[2, 2]])], 4)
MAKERS = [make for protocol in (moe, moe_push, moe_direct) for make in (protocol.dispatch, protocol.combine)]


def routings() -> st.SearchStrategy[RoutingCounts]:
    """Ragged ones, with tokens that go nowhere and experts that get nothing."""

    def make(ranks: int, local: int, top_k: int, seed: int) -> RoutingCounts:
        rng = np.random.default_rng(seed)
        experts = ranks * local
        idxs = []
        for _ in range(ranks):
            idx = rng.integers(0, rng.integers(1, experts + 1), (rng.integers(0, 9), top_k))
            idx[rng.random(idx.shape) < 0.2] = -1
            idxs.append(idx)
        return RoutingCounts.from_topk(idxs, experts)

    return st.builds(make, st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 1 << 32))


def test_pull_dispatch_by_hand() -> None:
    described = moe.dispatch(SMALL, hidden=HIDDEN, lanes=4)
    check(described)
    assert described.entries(0) == sorted(
        [
            Entry("await-pulled", "wait", "pulled", 0, -1, 1, 0),
            Entry("await-pulled", "wait", "pulled", 1, -1, 1, 0),
            Entry("write", "work", "quantise", 0, -1, 1, 2 * HIDDEN),
            Entry("write", "transfer", "rows", 0, -1, 2, 2 * HIDDEN),
            Entry("write", "transfer", "scales", 0, -1, 1, 8),
            Entry("write", "transfer", "places", 0, -1, 1, 16),
            Entry("write", "transfer", "counts", 0, -1, 1, 16),
            Entry("announce", "signal", "field", 0, -1, 1, 32),
            Entry("announce", "signal", "field", 1, -1, 1, 32),
            Entry("await-fields", "wait", "field", 0, -1, 1, 0),
            Entry("await-fields", "wait", "field", 1, -1, 1, 0),
            Entry("pull", "transfer", "counts", 0, -1, 1, 8),
            Entry("pull", "transfer", "counts", 1, -1, 1, 8),
            Entry("pull", "transfer", "rows", 0, -1, 1, HIDDEN),
            Entry("pull", "transfer", "scales", 0, -1, 1, 4),
            Entry("pull", "transfer", "places", 0, -1, 1, 8),
            Entry("release", "signal", "pulled", 0, -1, 1, 8),
            Entry("release", "signal", "pulled", 1, -1, 1, 8),
        ]
    )
    assert [e for e in described.entries(1) if e.stage == "pull" and e.what == "scales"] == [
        Entry("pull", "transfer", "scales", 0, -1, 1, 4),
        Entry("pull", "transfer", "scales", 1, -1, 1, 8),
    ]
    assert described.payload_bytes.tolist() == [HIDDEN + 4, 0]
    assert described.lanes == 4


def test_pull_combine_by_hand() -> None:
    described = moe.combine(SMALL, hidden=HIDDEN)
    check(described)
    steps = ("write", "pull")
    assert [e for e in described.entries(0) if e.stage in steps] == [
        Entry("pull", "transfer", "rows", 0, -1, 1, 2 * HIDDEN),
        Entry("pull", "transfer", "rows", 1, -1, 1, 2 * HIDDEN),
        Entry("pull", "work", "reduce", 0, -1, 2, 2 * 2 * HIDDEN + 2 * 4),
        Entry("write", "transfer", "rows", 0, -1, 1, 2 * HIDDEN),
    ]
    assert described.payload_bytes.tolist() == [0, 2 * HIDDEN]
    assert described.stage("pull").work[0].elements.tolist() == [2 * HIDDEN, 2 * HIDDEN]


def test_without_quantisation_rows_are_wide_and_have_no_scales() -> None:
    described = moe.dispatch(SMALL, hidden=HIDDEN, item_bytes=4, quant="none")
    check(described)
    assert not described.stage("write").work
    assert {t.what for t in described.stage("pull").transfers} == {"counts", "rows", "places"}
    assert the_transfers(described, "pull", "rows").n_bytes.tolist() == [4 * HIDDEN * n for n in [1, 1, 0, 2]]


@given(routing=routings(), quant=st.sampled_from(["int8", "none"]))
def test_pull_moves_what_was_written(routing: RoutingCounts, quant: Any) -> None:
    """Bytes in the managed areas are the bytes that are pulled from them; combine returns every row to where it came from."""
    ranks = routing.sources
    dispatched, combined = moe.dispatch(routing, hidden=8, quant=quant), moe.combine(routing, hidden=8)
    for described in (dispatched, combined):
        check(described)
        for written in described.stage("write").transfers:
            if written.what != "counts":
                pulled = the_transfers(described, "pull", written.what)
                assert total(pulled, "source", ranks).tolist() == total(written, "source", ranks).tolist()
    counts = the_transfers(dispatched, "pull", "counts")
    assert total(counts, "source", ranks).tolist() == [4 * routing.experts] * ranks
    there, back = the_transfers(dispatched, "pull", "rows"), the_transfers(combined, "pull", "rows")
    assert (matrix(there, ranks, "units") == matrix(back, ranks, "units").T).all()
    assert total(back, "source", ranks, away=True).tolist() == combined.payload_bytes.tolist()


def test_push_dispatch_by_hand() -> None:
    packet = 896  # 320 + HIDDEN + 512, up to a cache line
    described = moe_push.dispatch(SMALL, hidden=HIDDEN)
    check(described)
    assert described.entries(0) == sorted(
        [
            Entry("send", "work", "quantise", 0, -1, 1, 2 * HIDDEN),
            Entry("send", "transfer", "packets", 0, -1, 1, packet),
            Entry("send", "transfer", "packets", 1, -1, 1, packet),
            Entry("notify", "signal", "counts", 0, -1, 1, 32),
            Entry("notify", "signal", "counts", 1, -1, 1, 32),
            Entry("notify", "signal", "flag", 0, -1, 1, 32),
            Entry("notify", "signal", "flag", 1, -1, 1, 32),
            Entry("await-flags", "wait", "flag", 0, -1, 1, 0),
            Entry("await-flags", "wait", "flag", 1, -1, 1, 0),
            Entry("assemble", "work", "scan", 0, -1, 1, 4 * 4),
            Entry("assemble", "transfer", "rows", 0, -1, 1, HIDDEN),
            Entry("assemble", "transfer", "scales", 0, -1, 1, 4),
            Entry("assemble", "transfer", "places", 0, -1, 1, 8),
            Entry("assemble", "transfer", "counts", 0, -1, 1, 8),
        ]
    )
    assert described.stage("send").lane_barrier
    assert described.payload_bytes.tolist() == [HIDDEN + 4, 0]


def test_push_combine_by_hand() -> None:
    described = moe_push.combine(SMALL, hidden=HIDDEN)
    check(described)
    assert described.entries(1) == sorted(
        [
            Entry("send", "transfer", "packets", 0, -1, 1, 832),  # 768 + 2 * HIDDEN, up to a cache line
            Entry("send", "transfer", "packets", 1, -1, 2, 2 * 832),
            Entry("flag", "signal", "flag", 0, -1, 1, 8),
            Entry("flag", "signal", "flag", 1, -1, 2, 16),
            Entry("await-flags", "wait", "flag", 1, -1, 2, 0),
            Entry("reduce", "work", "reduce", 1, -1, 1, 3 * 2 * HIDDEN + 2 * 4),
        ]
    )
    assert described.stage("flag").signals[0].atomic
    shared = moe_push.combine(SMALL, hidden=HIDDEN, shared_expert=True).stage("reduce").work[0]
    assert shared.elements.tolist() == [4 * HIDDEN, 3 * HIDDEN]


@given(routing=routings(), quant=st.sampled_from(["int8", "none"]), flags_per=st.sampled_from(["peer", "expert"]))
def test_push_carries_every_row_once(routing: RoutingCounts, quant: Any, flags_per: Any) -> None:
    ranks = routing.sources
    dispatched = moe_push.dispatch(routing, hidden=8, quant=quant, flags_per=flags_per)
    combined = moe_push.combine(routing, hidden=8)
    check(dispatched)
    check(combined)
    sent, returned = the_transfers(dispatched, "send", "packets"), the_transfers(combined, "send", "packets")
    assert matrix(sent, ranks, "units").tolist() == routing.rows.tolist()
    assert matrix(returned, ranks, "units").tolist() == routing.rows.T.tolist()
    assert the_transfers(dispatched, "assemble", "rows").units.tolist() == routing.received.tolist()
    flags = written_by(the_signals(combined, "flag", "flag"), ranks)
    assert flags.tolist() == routing.received.tolist()
    expected = routing.experts if flags_per == "expert" else ranks
    assert written_by(the_signals(dispatched, "notify", "flag"), ranks).tolist() == [expected] * ranks


def test_direct_dispatch_by_hand() -> None:
    described = moe_direct.dispatch(SMALL, hidden=HIDDEN)
    check(described)
    assert described.entries(1) == sorted(
        [
            Entry("count", "transfer", "counts", 1, -1, 1, 16),
            *(Entry("announce", "signal", "field", peer, -1, 1, 32) for peer in (0, 1)),
            *(Entry("await-counts", "wait", "field", peer, -1, 1, 0) for peer in (0, 1)),
            *(Entry("plan", "transfer", "counts", peer, -1, 1, 16) for peer in (0, 1)),
            Entry("plan", "work", "scan", 1, -1, 1, 0),
            Entry("write", "work", "quantise", 1, -1, 1, 2 * HIDDEN),
            Entry("write", "transfer", "rows", 1, -1, 2, 2 * HIDDEN),
            Entry("write", "transfer", "scales", 1, -1, 2, 8),
            Entry("write", "transfer", "sources", 1, -1, 2, 24),
            *(Entry("notify", "signal", "written", peer, -1, 1, 8) for peer in (0, 1)),
            *(Entry("await-rows", "wait", "written", peer, -1, 1, 0) for peer in (0, 1)),
        ]
    )
    assert described.stage("write").lane_barrier
    assert described.payload_bytes.tolist() == [HIDDEN + 4, 0]
    (entries,) = [e for e in moe_direct.dispatch(SMALL, hidden=HIDDEN, rows="dedup").entries(1) if e.what == "entries"]
    assert entries == Entry("write", "transfer", "entries", 1, -1, 2, 2 * 16)


def test_direct_combine_by_hand() -> None:
    described = moe_direct.combine(SMALL, hidden=HIDDEN)
    check(described)
    assert [e for e in described.entries(0) if e.kind in ("transfer", "work")] == [
        Entry("reduce", "transfer", "rows", 0, -1, 1, 2 * HIDDEN),
        Entry("reduce", "transfer", "rows", 1, -1, 1, 2 * HIDDEN),
        Entry("reduce", "work", "reduce", 0, -1, 2, 2 * 2 * HIDDEN + 2 * 4),
        Entry("return", "transfer", "rows", 0, -1, 1, 2 * HIDDEN),
    ]
    in_place = moe_direct.combine(SMALL, hidden=HIDDEN, in_place=True)
    check(in_place)
    assert in_place.entries(0) == [e for e in described.entries(0) if e.stage != "return"]
    assert described.payload_bytes.tolist() == [0, 2 * HIDDEN]


@given(routing=routings(), quant=st.sampled_from(["int8", "none"]), rows=st.sampled_from(["expanded", "dedup"]))
def test_direct_writes_and_reads_every_row_once(routing: RoutingCounts, quant: Any, rows: Any) -> None:
    ranks = routing.sources
    dispatched = moe_direct.dispatch(routing, hidden=8, quant=quant, rows=rows)
    combined = moe_direct.combine(routing, hidden=8, rows=rows)
    check(dispatched)
    check(combined)
    there, back = the_transfers(dispatched, "write", "rows"), the_transfers(combined, "reduce", "rows")
    moved = routing.rows if rows == "expanded" else routing.deduplicated
    assert moved is not None
    assert matrix(there, ranks, "units").tolist() == moved.tolist()
    assert matrix(back, ranks, "units").tolist() == moved.T.tolist()
    assert the_transfers(combined, "return", "rows").units.tolist() == moved.sum(axis=0).tolist()


@pytest.mark.parametrize("ep", [8, 32, 256])
def test_messages_are_those_of_cm384_table_6(ep: int) -> None:
    """Batch 128, top 8: latency times bandwidth of the table, within its rounding and the spread of its rows."""
    table = {8: (116 * 71, 118 * 131), 32: (133 * 62, 146 * 105), 256: (152 * 54, 149 * 103)}
    routing = RoutingCounts.uniform(ep, experts=256, tokens=128, top_k=8)
    for make, published_kb in zip((moe_push.dispatch, moe_push.combine), table[ep], strict=True):
        packets = the_transfers(make(routing, hidden=7168), "send", "packets")
        assert total(packets, "source", ep).mean() == pytest.approx(1000 * published_kb, rel=0.01)


def test_buffers_at_320_dies() -> None:
    size = moe_push.buffer_size_hint(ranks=320, local_batch=96, top_k=8, experts_per_die=1, hidden=7168)
    assert (size.dispatch_bytes, size.combine_bytes, size.total_bytes) == (225 << 20, 420 << 20, 645 << 20)
    more = moe_push.buffer_size_hint(ranks=8, local_batch=4, top_k=8, experts_per_die=32, hidden=10, quant="none")
    assert more.dispatch_bytes == more.combine_bytes == 8 * 4 * 8 * 20


@pytest.mark.parametrize("make", MAKERS)
def test_tokens_and_experts_are_at_the_same_ranks(make: Callable[..., Description]) -> None:
    routing = RoutingCounts.uniform(2, experts=4, tokens=1, top_k=1, destinations=4)
    with pytest.raises(UsageError):
        make(routing, hidden=8)


@pytest.mark.parametrize("make", MAKERS)
def test_all_pairs_of_768_dies_in_less_than_a_second(make: Callable[..., Description]) -> None:
    """590,000 pairs, from the routing arrays to the columns and one rank's entries: about 30 ms on an idle core."""
    idxs = np.random.default_rng(0).integers(0, 768, (768, 128, 8))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        described = make(RoutingCounts.from_topk(idxs, 768), hidden=7168)
        entries = described.entries(767)
        best = min(best, time.perf_counter() - start)
    assert best < 1.0
    assert len(entries) > 768
    assert described.payload_bytes.sum() > 768 * 1000 * 7168
