"""Benchmark of KV-cache transfers: the first half of the ranks (prefill) send to the second half (decode).

Rank r sends to rank r + ranks / 2, all pairs at the same time. An iteration is one request: the blocks of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from xccl.cli.bench_data import CHECKED, TIMED, Array, count_wrong, dtype_of, random_bits
from xccl.cli.bench_part import Operation, Part
from xccl.cli.options import BenchOptions, Case

if TYPE_CHECKING:
    from xccl.comm.communicator import Communicator

#: Starts of different blocks in a pool of random bits.
_PLACES: Final = 1 << 16


class KV(Operation):
    """One request of `--blocks` blocks in `--layers` layers, between pages in random order; a size is a block's."""

    def __init__(self, comm: Communicator, options: BenchOptions, cases: list[Case]) -> None:
        super().__init__(comm, options, cases)
        self.pairs = comm.size // 2
        self.pages = options.blocks + options.blocks // 8 + 1
        self.own_pages = self._page_list(comm.rank)
        self.request_id = 0

    def parts(self, case: Case) -> Iterator[Part]:
        """One row; both sides count the bytes of their pair."""
        from xccl.comm.kv import KVTransfer

        size_bytes = case.size_bytes or 0
        dtype = dtype_of(self.options)
        shape = (self.options.layers, self.pages, size_bytes // dtype.itemsize)
        pool = self.comm.empty(shape, dtype)
        kv = KVTransfer(self.comm, pool)
        self._fill(pool.local, TIMED)
        payload_bytes = self.options.blocks * self.options.layers * size_bytes
        yield Part(self.options.op, lambda: self._step(kv), lambda: self._check(kv), payload_bytes)
        kv.free()
        pool.free()

    def _step(self, kv: Any) -> None:
        rank, pairs = self.comm.rank, self.pairs
        self.request_id += 1
        if rank < pairs:
            kv.isend(self.own_pages, rank + pairs, self.request_id, engine=self.options.engine).wait()
        else:
            kv.irecv(self.own_pages, rank - pairs, self.request_id).wait()

    def _page_list(self, rank: int) -> Array:
        """The pages of a rank."""
        order = np.random.default_rng((self.options.seed, rank)).permutation(self.pages)
        found: Array = order[: self.options.blocks]
        return found

    def _blocks(self, count: int, rank: int, layer: int, data_round: int) -> Array:
        """[pages, count] elements: what a rank has in a layer."""
        dtype = dtype_of(self.options)
        bits = random_bits(_PLACES + count, dtype, self.options.seed, data_round)
        windows = np.lib.stride_tricks.sliding_window_view(bits, count)
        keys = np.arange(self.pages) * 7919 + layer * 104_729 + rank * 15_485_863
        found: Array = windows[keys % _PLACES]
        return found

    def _fill(self, pool: Array, data_round: int) -> None:
        for layer, pages in enumerate(pool):
            pages[:] = self._blocks(pages.shape[-1], self.comm.rank, layer, data_round)

    def _check(self, kv: Any) -> int:
        """A request of fresh data into pages that were cleared, and pages that are not named stay so."""
        rank, pool, wrong = self.comm.rank, kv.pool.local, 0
        is_sender = rank < self.pairs
        if is_sender:
            self._fill(pool, CHECKED)
        else:
            pool[...] = np.zeros((), pool.dtype)
        self.comm.barrier()
        self._step(kv)
        if not is_sender:
            here, there = self._page_list(rank - self.pairs), self.own_pages
            for layer, pages in enumerate(pool):
                want = np.zeros_like(pages)
                want[there] = self._blocks(pages.shape[-1], rank - self.pairs, layer, CHECKED)[here]
                wrong += count_wrong(pages, want)
        self.comm.barrier()
        return wrong
