"""The shape of an ExpertParallel object: its arguments, checked, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..layout import moe as layout
from ..layout.moe import STATE, first_expert, scratch_words
from .buffers import address_of, require_int
from .core import Core
from .moe_input import require_choice, require_float
from .row_sizes import RowSizes

#: How dispatched rows may be laid out; the position stands for the name among ranks.
ROWS = ("expanded", "dedup")
QUANTS = ("none", "int8")


@dataclass(frozen=True)
class MoeShape(RowSizes):
    """What dispatch and combine are about.

    Attributes:
        rank: this rank.
        ranks: how many there are.
        num_experts: experts in all.
        hidden: elements of a token.
        top_k: slots of a token.
        max_tokens: the most tokens of a rank at once.
        dtype: of tokens.
        code: of that dtype, for kernels.
        is_int8: are tokens quantised?
        is_dedup: are rows deduplicated?
    """

    rank: int
    ranks: int
    num_experts: int
    hidden: int
    top_k: int
    max_tokens: int
    dtype: np.dtype[Any]
    code: int
    is_int8: bool
    is_dedup: bool

    @cached_property
    def first_expert(self) -> int:
        """The first expert of this rank."""
        return first_expert(self.rank, self.num_experts, self.ranks)

    @cached_property
    def local_experts(self) -> int:
        """Experts of this rank."""
        return first_expert(self.rank + 1, self.num_experts, self.ranks) - self.first_expert

    @cached_property
    def most_local(self) -> int:
        """The largest number of experts at a rank."""
        return -(-self.num_experts // self.ranks)

    def as_arguments(self) -> dict[str, int]:
        """What must be the same at all ranks."""
        return {
            "num_experts": self.num_experts,
            "hidden": self.hidden,
            "top_k": self.top_k,
            "max_tokens": self.max_tokens,
            "dtype": self.code,
            "quant": int(self.is_int8),
            "rows": int(self.is_dedup),
        }


def make_shape(
    core: Core,
    *,
    num_experts: int,
    hidden: int,
    top_k: int,
    max_tokens: int,
    dtype: npt.DTypeLike,
    quant: str | None,
    rows: str,
) -> MoeShape:
    """Check the arguments of an ExpertParallel object.

    Raises:
        UsageError: one of them is out of range.
    """
    num_experts = require_int(num_experts, "num_experts", 1, 1 << 20)
    hidden = require_int(hidden, "hidden", 1, 1 << 20)
    top_k = require_int(top_k, "top_k", 1, 1 << 10)
    max_tokens = require_int(max_tokens, "max_tokens", 0, 1 << 20)
    element, code = require_float(dtype)
    quant = require_choice(quant if quant is not None else "none", "quant", QUANTS)
    rows = require_choice(rows, "rows", ROWS)
    return MoeShape(
        core.rank, core.size, num_experts, hidden, top_k, max_tokens, element, code, quant == "int8", rows == "dedup"
    )


class KernelState:
    """What kernels need to know of an ExpertParallel object, in memory of its own.

    Args:
        core: of this rank.
        shape: of the object.

    Attributes:
        address: of that memory.
    """

    def __init__(self, core: Core, shape: MoeShape) -> None:
        words = scratch_words(experts=shape.num_experts, ranks=shape.ranks, top_k=shape.top_k)
        self._scratch = np.zeros(words, np.int64)
        self._state = np.zeros(STATE.size_bytes // 8, np.int64)
        self.address: int = address_of(self._state)
        self.fill(
            {
                layout.EP_CONTROL: core.control,
                layout.EP_SEGMENTS: core.segments_address,
                layout.EP_RANK: core.rank,
                layout.EP_RANKS: core.size,
                layout.EP_EXPERTS: shape.num_experts,
                layout.EP_HIDDEN: shape.hidden,
                layout.EP_TOP_K: shape.top_k,
                layout.EP_DTYPE: shape.code,
                layout.EP_QUANT: int(shape.is_int8),
                layout.EP_ROW_BYTES: shape.row_bytes,
                layout.EP_RETURN_BYTES: shape.return_bytes,
                layout.EP_SCRATCH: address_of(self._scratch),
            }
        )

    def fill(self, words: Mapping[int, int]) -> None:
        """Set words, by offset."""
        for offset, value in words.items():
            self._state[offset // 8] = value
