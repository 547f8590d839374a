"""Descriptions of send and receive."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.unit.described import check, total
from xccl.errors import UsageError
from xccl.kernels import ring
from xccl.layout.ring import MAX_LANES
from xccl.protocol import p2p
from xccl.trace.entry import Entry

SLOT = 32 << 10


def test_a_small_message_is_written_by_hand() -> None:
    """1300 bytes on two lanes: shares of 650 become chunks of 1024, one for each lane."""
    described = p2p.send_recv(2, 0, 1, 1300, lanes=2)
    check(described)
    assert described.entries(0) == [
        Entry("announce", "signal", "data field", 1, -1, 2, 64),
        Entry("await-acknowledgements", "wait", "acknowledgement field", 1, -1, 2, 0),
        Entry("write", "transfer", "chunks", 1, 0, 1, 1024),
        Entry("write", "transfer", "chunks", 1, 1, 1, 276),
    ]
    assert described.entries(1) == [
        Entry("acknowledge", "signal", "acknowledgement field", 0, -1, 2, 64),
        Entry("copy", "transfer", "chunks", 1, 0, 1, 1024),
        Entry("copy", "transfer", "chunks", 1, 1, 1, 276),
        Entry("copy", "wait", "data field", 0, -1, 2, 0),
    ]
    assert described.payload_bytes.tolist() == [1300, 0]
    assert [stage.streamed for stage in described.stages] == [False, True, True, True, False]


def test_an_empty_message_is_one_chunk() -> None:
    described = p2p.send_recv(2, 0, 1, 0, lanes=3)
    check(described)
    assert Entry("write", "transfer", "chunks", 1, 0, 1, 0) in described.entries(0)


@given(n_bytes=st.integers(0, 1 << 24), lanes=st.integers(1, MAX_LANES), slot=st.sampled_from([512, 4096, SLOT]))
def test_chunks_are_those_of_the_kernel(n_bytes: int, lanes: int, slot: int) -> None:
    chunks = p2p.cut(n_bytes, lanes, slot)
    chunk_bytes = int(ring._chunk_bytes.py_func(n_bytes, lanes, slot))
    assert chunks.n_bytes.tolist() == [chunk_bytes]
    assert chunks.number.tolist() == [max(1, -(-n_bytes // chunk_bytes))]


@given(
    sizes=st.lists(st.integers(0, 1 << 22), min_size=1, max_size=5),
    lanes=st.integers(1, MAX_LANES),
    slot=st.sampled_from([512, 4096, SLOT]),
)
def test_lanes_share_the_chunks_in_turn(sizes: list[int], lanes: int, slot: int) -> None:
    n = len(sizes)
    described = p2p.send_recv(2 * n, np.arange(n), n + np.arange(n), sizes, lanes=lanes, slot_bytes=slot)
    check(described)
    write, copy = described.stage("write").transfers[0], described.stage("copy").transfers[0]
    assert total(write, "source", 2 * n)[:n].tolist() == sizes
    assert total(copy, "destination", 2 * n)[n:].tolist() == sizes
    chunks = p2p.cut(sizes, lanes, slot)
    for i, n_bytes in enumerate(sizes):
        expected: dict[int, list[int]] = {}
        for c in range(int(chunks.number[i])):
            each = int(chunks.n_bytes[i])
            expected.setdefault(c % lanes, []).append(min(each, n_bytes - c * each))
        rows = zip(
            write.source.tolist(), write.lane.tolist(), write.units.tolist(), write.n_bytes.tolist(), strict=True
        )
        found = {lane: (units, size) for source, lane, units, size in rows if source == i}
        assert found == {lane: (len(parts), sum(parts)) for lane, parts in expected.items()}


def test_engine_window_and_lanes() -> None:
    described = p2p.send_recv(2, 0, 1, 9 << 20, lanes=48, engine="dma", ring_slots=64)
    assert described.window == 64
    assert described.lanes == 48
    assert {t.engine for stage in described.stages for t in stage.transfers} == {"dma"}


@pytest.mark.parametrize("lanes", [0, MAX_LANES + 1])
def test_lanes_out_of_range(lanes: int) -> None:
    with pytest.raises(UsageError):
        p2p.send_recv(2, 0, 1, 8, lanes=lanes)
