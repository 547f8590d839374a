"""What a dispatch leaves with the caller: the rows, and where each of them came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..layout import moe as layout
from ..layout.moe import ROUTING
from .buffers import address_of

if TYPE_CHECKING:
    from .moe import ExpertParallel


class Routing:
    """Where each row of one dispatch went and came from: what combine needs to find it again."""

    def __init__(self, tokens: int, top_k: int, experts: int, local_experts: int, ranks: int) -> None:
        sizes = (tokens * top_k, experts + 1, ranks * local_experts, ranks * local_experts)
        words = ROUTING.size_bytes // 8
        self._memory = np.zeros(words + sum(sizes), np.int64)
        self.address: int = address_of(self._memory)
        at = words
        parts = (layout.RT_ROW_OF, layout.RT_SENT_FIRST, layout.RT_GOT_COUNTS, layout.RT_GOT_FIRST)
        for offset, size in zip(parts, sizes, strict=True):
            self._memory[offset // 8] = self.address + 8 * at
            at += size
        self._memory[layout.RT_TOKENS // 8] = tokens
        self.tokens = tokens

    @property
    def epoch(self) -> int:
        """Epoch of the dispatch."""
        return int(self._memory[layout.RT_EPOCH // 8])

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._memory[layout.RT_EPOCH // 8] = value

    def part(self, offset: int, size: int) -> npt.NDArray[np.int64]:
        """The first `size` words of the array whose address the record has at `offset`."""
        start = (int(self._memory[offset // 8]) - self.address) // 8
        return self._memory[start : start + size]


@dataclass(frozen=True, slots=True, eq=False)
class Dispatched:
    """What a rank got from a dispatch, grouped by local expert, within an expert by (source rank, token, slot).

    Attributes:
        tokens: [n, hidden], int8 or the dtype of the ExpertParallel object.
        scales: float32 [n], or None without quantisation; a token's values are `tokens * scales[:, None]`.
        counts: int64 [local experts], rows of each.
        source: structured [n] with fields rank, token, slot: where each row comes from.
        routing: for combine.
        owner: the ExpertParallel object it belongs to.
    """

    tokens: npt.NDArray[Any]
    scales: npt.NDArray[np.float32] | None
    counts: npt.NDArray[np.int64]
    source: npt.NDArray[np.void]
    routing: Routing
    owner: ExpertParallel
