"""What a rank needs of memory for words that ranks exchange grows with the ranks that talk, not with all pairs."""

from __future__ import annotations

import numpy as np
import pytest

import xccl
from tests.multirank.support import launch
from xccl.layout.collectives import AGREE_MAX_VALUES, MESH_RANKS, RECORD_BYTES, block_bytes
from xccl.layout.segment import PAGE_BYTES, Geometry


def test_what_every_segment_needs_does_not_grow_with_ranks() -> None:
    assert Geometry(ranks=2).fixed_bytes == Geometry(ranks=768).fixed_bytes <= 2 * PAGE_BYTES


@pytest.mark.parametrize("ranks", [MESH_RANKS + 1, 768])
def test_blocks_where_arrivals_are_counted_do_not_grow_with_ranks(ranks: int) -> None:
    assert block_bytes(ranks) == block_bytes(MESH_RANKS + 1) < 2 * PAGE_BYTES


def test_blocks_of_a_mesh_have_two_records_a_rank() -> None:
    assert block_bytes(8) - block_bytes(4) == 4 * 2 * RECORD_BYTES


def test_agreement_of_many_ranks_says_who_differs() -> None:
    ranks = MESH_RANKS + 8

    def main(comm: xccl.Communicator) -> tuple[str, tuple[int, ...]]:
        with pytest.raises(xccl.UsageError) as caught:
            comm.empty(4 if comm.rank != 35 else 5, np.int64)
        comm.barrier()
        return str(caught.value), comm.empty((2,) * 10, np.int8).shape

    for said, shape in launch(main, ranks, "local"):
        assert "shape[0]" in said
        assert "5 at rank 35" in said
        assert shape == (2,) * 10


def test_an_agreement_travels_in_the_record() -> None:
    # A call, its state, and the arguments of the largest: see `Core.agree`.
    assert AGREE_MAX_VALUES >= 2 + 24
