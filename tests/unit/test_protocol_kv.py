"""Descriptions of KV-cache transfers, their oracle, and the layout of their words."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.described import check
from xccl import reference
from xccl.errors import UsageError
from xccl.layout.kv import ANNOUNCEMENT, Area
from xccl.model.machine import load_machine
from xccl.model.project import project
from xccl.protocol.kv import kv_transfer
from xccl.trace.entry import Entry


def test_what_each_side_does() -> None:
    described = kv_transfer(4, 0, 3, 10, layers=5, page_bytes=100)
    check(described)
    assert described.entries(0) == sorted(
        [
            Entry("push", "wait", "announcement", 3, -1, 1, 0),
            Entry("push", "transfer", "blocks", 3, -1, 50, 5000),
            Entry("notify", "signal", "layers", 3, -1, 5, 40),
        ]
    )
    assert described.entries(3) == sorted(
        [
            Entry("announce", "transfer", "page numbers", 0, -1, 1, 40),
            Entry("announce", "signal", "announcement", 0, -1, 1, 24),
            Entry("await-layers", "wait", "layers", 0, -1, 5, 0),
        ]
    )
    assert described.entries(1) == []
    assert described.payload_bytes.tolist() == [5000, 0, 0, 0]


def test_many_pairs_ragged_and_empty() -> None:
    source = np.arange(384)
    described = kv_transfer(768, source, source + 384, source % 7, layers=61, page_bytes=1 << 16)
    check(described)
    assert described.payload_bytes[:384].tolist() == ((source % 7) * 61 << 16).tolist()


@pytest.mark.parametrize(("pages", "layers", "page_bytes"), [(-1, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_sizes_out_of_range(pages: int, layers: int, page_bytes: int) -> None:
    with pytest.raises(UsageError):
        kv_transfer(2, 0, 1, pages, layers=layers, page_bytes=page_bytes)


def test_projected_time_grows_with_the_bytes_and_is_above_that_of_the_link() -> None:
    machine = load_machine("cm384")
    times = {}
    for pages in (10, 100, 1000):
        described = kv_transfer(32, 0, 16, pages, layers=4, page_bytes=1 << 16)
        times[pages] = project(described, machine).time_us
    assert times[10] < times[100] < times[1000]
    assert times[1000] > 1000 * 4 * (1 << 16) / 196e3  # a die's links, in bytes a microsecond


def test_the_oracle_reads_what_was_there_before() -> None:
    pools = [np.arange(6).reshape(2, 3), np.arange(10, 16).reshape(2, 3)]
    copies = [reference.PagedCopy(0, 1, [0, 2], [1, 0]), reference.PagedCopy(1, 0, [1], [1])]
    after = reference.kv_transfer(pools, copies)
    assert after[0].tolist() == [[0, 11, 2], [3, 14, 5]]
    assert after[1].tolist() == [[2, 0, 12], [5, 3, 15]]
    assert pools[1].tolist() == [[10, 11, 12], [13, 14, 15]]


def test_parts_of_the_area_do_not_overlap() -> None:
    area = Area(ranks=3, requests=5, max_pages=1000)
    assert area.slot_bytes >= ANNOUNCEMENT.size_bytes + 4000
    starts = [area.announcements(r) for r in range(3)] + [area.arrivals(r) for r in range(3)] + [area.total_bytes]
    lengths = [area.announcements_bytes] * 3 + [area.arrivals_bytes] * 3
    assert all(
        start + length == following for start, length, following in zip(starts, lengths, starts[1:], strict=False)
    )
    assert area.announcements_bytes >= 5 * area.slot_bytes
