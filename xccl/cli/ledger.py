"""Who sends what to which expert: what the check of a rank looks up, instead of running the oracle of all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from xccl.cli.bench_data import Array, TokenPool, count_wrong
from xccl.comm import reference
from xccl.layout.moe import SOURCE_DTYPE

#: Elements that the oracle looks at at once: they fit a cache.
_ORACLE_ELEMENTS: Final = 1 << 15

Ints = npt.NDArray[np.int64]


def oracle_rows(hidden: int) -> int:
    """Rows of so many elements that the oracle looks at at once."""
    return max(1, _ORACLE_ELEMENTS // hidden)


@dataclass(frozen=True)
class Ledger:
    """The rows of one dispatch by expert.

    Attributes:
        bounds: [experts + 1] where the rows of each expert begin.
        source: `SOURCE_DTYPE` [rows], by expert, then (rank, token, slot).
        places: [rows] where each row's token is in the pool.
    """

    bounds: Ints
    source: npt.NDArray[np.void]
    places: Ints

    @classmethod
    def of(cls, ranks: Array, chosen: Array, places: Array, experts: int) -> Self:
        """From the choices of all sources.

        Args:
            ranks: [sources] their ranks.
            chosen: [sources, tokens, top_k] experts, -1 for none.
            places: [sources, tokens] where the tokens are in the pool.
            experts: experts in all.
        """
        place, token, slot = np.nonzero(chosen >= 0)
        expert = chosen[place, token, slot]
        order = np.argsort(expert, kind="stable")
        source = np.empty(len(order), SOURCE_DTYPE)
        source["rank"], source["token"], source["slot"] = ranks[place[order]], token[order], slot[order]
        counts = np.bincount(expert, minlength=experts)
        bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(bounds, source, places[place[order], token[order]])

    def wrong_rows(self, experts: range, batch: Any, pool: TokenPool, *, is_int8: bool) -> int:
        """Wrong elements of what a rank with these experts got, block by block: no second copy of it all.

        Args:
            experts: of the rank.
            batch: with tokens, scales, counts and source, and an index if rows are deduplicated.
            pool: of the tokens.
            is_int8: tokens were quantised.
        """
        bounds = self.bounds[experts.start : experts.stop + 1]
        mine = slice(int(bounds[0]), int(bounds[-1]))
        source, index = batch.source, getattr(batch, "index", None)
        rows: Any = np.arange(len(source))
        wrong = count_wrong(batch.counts, np.diff(bounds))
        if index is not None:
            origins = np.sort(self.source[mine], order=("rank", "token", "slot"))
            wrong += count_wrong(source, origins[np.unique(origins[["rank", "token"]], return_index=True)[1]])
            rows, source = index["row"], source[index["row"]]
            source["slot"] = index["slot"]
        wrong += count_wrong(source, self.source[mine])
        places = self.places[mine]
        if len(rows) != len(places) or len(batch.tokens) != len(batch.source):
            return wrong + max(int(batch.tokens.size), 1)
        at_once = oracle_rows(batch.tokens.shape[1])
        for start in range(0, len(places), at_once):
            block = slice(start, start + at_once)
            tokens = pool.at(places[block])
            scales = None
            if is_int8:
                tokens, scales = reference.quantise(tokens)
            wrong += count_wrong(batch.tokens[rows[block]], tokens)
            wrong += count_wrong(None if batch.scales is None else batch.scales[rows[block]], scales)
        return wrong
