"""The shape of a disaggregated deployment: which dies run attention, which hold experts, and what travels."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..layout.a2e import Area, Fields, area
from ..protocol.a2e import default_trampolines
from .buffers import require_int
from .moe_input import require_choice, require_float
from .row_sizes import RowSizes

#: Ranks, or how many of them.
Dies = int | Sequence[int]


@dataclass(frozen=True)
class Deployment(RowSizes):
    """What all dies of one Disaggregated object have agreed on.

    Attributes:
        attention: ranks of the attention dies, domain after domain, ascending.
        experts: ranks of the expert dies, ascending; the first `trampolines` of them forward.
        domains: data-parallel domains of attention dies.
        microbatches: A2Es of a domain before the next domain has its turn.
        routed: routed experts.
        shared: replicas of the shared expert, numbered after the routed ones.
        hidden: elements of a token.
        top_k: routed experts of a token.
        max_tokens: the most tokens of one A2E of an attention die.
        dtype: of tokens and outputs.
        code: of the dtype, for kernels.
        is_int8: are tokens sent as INT8?
        trampolines: 0 if rows go directly.
    """

    attention: tuple[int, ...]
    experts: tuple[int, ...]
    domains: int
    microbatches: int
    routed: int
    shared: int
    hidden: int
    top_k: int
    max_tokens: int
    dtype: np.dtype[Any]
    code: int
    is_int8: bool
    trampolines: int

    @property
    def domain_size(self) -> int:
        """Attention dies of a domain."""
        return len(self.attention) // self.domains

    @property
    def num_experts(self) -> int:
        """Experts in all, replicas of the shared one included."""
        return self.routed + self.shared

    @property
    def local_experts(self) -> int:
        """Experts of a die."""
        return self.num_experts // len(self.experts)

    @property
    def slots(self) -> int:
        """Experts of a token, the shared one included."""
        return self.top_k + (self.shared > 0)

    @property
    def holders(self) -> int:
        """Dies at which the rows for an expert die lie."""
        return self.trampolines or self.domain_size

    @property
    def blocks(self) -> int:
        """Attention dies of a domain that a trampoline serves at most; 1 without trampolines."""
        return -(-self.domain_size // self.trampolines) if self.trampolines else 1

    @property
    def fields(self) -> Fields:
        """Where fields lie."""
        return Fields(len(self.attention), len(self.experts), self.trampolines)

    @property
    def area(self) -> Area:
        """Where the parts of the managed block lie."""
        return area(
            attention=self.domain_size, blocks=self.blocks, experts=self.num_experts,
            rows=self.max_tokens * self.slots, row_bytes=self.row_bytes, return_bytes=self.return_bytes,
        )  # fmt: skip

    def domain_ranks(self, domain: int) -> tuple[int, ...]:
        """The attention dies of one domain."""
        size = self.domain_size
        return self.attention[domain * size : (domain + 1) * size]

    def served(self, trampoline: int) -> range:
        """Numbers, within any domain, of the attention dies that a trampoline serves."""
        return range(trampoline, self.domain_size, self.trampolines)

    def as_arguments(self) -> dict[str, int]:
        """What all ranks must agree on, by name."""
        roles = repr((self.attention, self.experts)).encode()
        return {
            "attention": self.domain_size,
            "experts": len(self.experts),
            "roles (checksum of their ranks)": zlib.crc32(roles),
            "num_experts": self.routed,
            "hidden": self.hidden,
            "top_k": self.top_k,
            "max_tokens": self.max_tokens,
            "dtype": self.code,
            "quant": int(self.is_int8),
            "shared": self.shared,
            "trampolines": self.trampolines,
            "domains": self.domains,
            "microbatches": self.microbatches,
        }


def make_deployment(
    ranks: int,
    *,
    attention: Dies,
    experts: Dies,
    num_experts: int,
    hidden: int,
    top_k: int,
    max_tokens: int,
    dtype: npt.DTypeLike,
    quant: str | None,
    shared: int,
    route: str,
    trampolines: int | None,
    domains: int,
    microbatches: int,
) -> Deployment:
    """Check the arguments of `xccl.Disaggregated`, and keep them.

    Raises:
        UsageError: one is out of range.
    """
    domains = require_int(domains, "domains", 1, ranks)
    attention_ranks, expert_ranks = _roles(ranks, attention, experts, domains)
    code_dtype, code = require_float(dtype)
    routed = require_int(num_experts, "num_experts", 1, 1 << 20)
    shared = require_int(shared, "shared", 0, 1 << 20)
    if (routed + shared) % len(expert_ranks):
        raise UsageError(
            f"num_experts and shared must add up to a multiple of the {len(expert_ranks)} expert dies, got "
            f"{routed} + {shared}",
            value=routed + shared, bound=len(expert_ranks),
        )  # fmt: skip
    size = len(attention_ranks) // domains
    is_direct = require_choice(route, "route", ("trampoline", "direct")) == "direct"
    if trampolines is None:
        trampolines = 0 if is_direct else default_trampolines(size, len(expert_ranks))
    else:
        if is_direct:
            raise UsageError(f"trampolines is {trampolines}, but route is direct: leave one of them out", value=route)
        # More than attention dies would have nothing to do.
        trampolines = require_int(trampolines, "trampolines", 1, default_trampolines(size, len(expert_ranks)))
    deployment = Deployment(
        attention=attention_ranks,
        experts=expert_ranks,
        domains=domains,
        microbatches=require_int(microbatches, "microbatches", 1, MAX_MICROBATCHES),
        routed=routed,
        shared=shared,
        hidden=require_int(hidden, "hidden", 1, 1 << 20),
        top_k=require_int(top_k, "top_k", 1, 1 << 10),
        max_tokens=require_int(max_tokens, "max_tokens", 0, 1 << 20),
        dtype=code_dtype,
        code=code,
        is_int8=require_choice(quant if quant is not None else "none", "quant", ("int8", "none")) == "int8",
        trampolines=trampolines,
    )
    rows = deployment.blocks * deployment.max_tokens * deployment.slots
    if rows >= 1 << 31:
        raise UsageError(
            f"max_tokens is {max_tokens}: with {deployment.slots} slots and {deployment.blocks} attention dies to a "
            f"trampoline that makes {rows} rows, more than the {(1 << 31) - 1} that a table can count",
            value=rows, bound=(1 << 31) - 1,
        )  # fmt: skip
    return deployment


#: With single areas more A2Es of a domain could not be under way before its first E2A; see `xccl.comm.a2e`.
MAX_MICROBATCHES = 3


def _roles(ranks: int, attention: Dies, experts: Dies, domains: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ranks of attention dies and of expert dies. A number takes the lowest ranks that are free, attention first."""
    taken = [_listed(dies, name, ranks) for dies, name in ((attention, "attention"), (experts, "experts"))]
    both = set(taken[0] or ()) & set(taken[1] or ())
    if both:
        raise UsageError(f"rank {min(both)} is listed both in attention and in experts", value=min(both))
    for i, (dies, name, times) in enumerate(((attention, "attention", domains), (experts, "experts", 1))):
        if taken[i] is not None:
            continue
        other = set(taken[1 - i] or ())
        free = [rank for rank in range(ranks) if rank not in other]
        count = require_int(dies, name, 1, ranks) * times
        if count > len(free):
            of_domains = f" for each of {domains} domains" if times > 1 else ""
            raise UsageError(
                f"{name} is {dies}{of_domains}, but only {len(free)} of the {ranks} ranks are free",
                value=count, bound=len(free),
            )  # fmt: skip
        taken[i] = tuple(free[:count])
    attention_ranks, expert_ranks = taken[0] or (), taken[1] or ()
    if len(attention_ranks) % domains:
        raise UsageError(
            f"attention lists {len(attention_ranks)} ranks, which {domains} domains do not divide",
            value=len(attention_ranks), bound=domains,
        )  # fmt: skip
    return attention_ranks, expert_ranks


def _listed(dies: Dies, name: str, ranks: int) -> tuple[int, ...] | None:
    """Ranks that are listed one by one, checked; None for a number."""
    if isinstance(dies, (int, np.integer, str)) or not hasattr(dies, "__iter__"):
        return None
    listed = tuple(require_int(rank, f"{name}[{i}]", 0, ranks - 1) for i, rank in enumerate(dies))
    if not listed or list(listed) != sorted(set(listed)):
        raise UsageError(
            f"{name} must list at least one rank, each once, in ascending order, got {listed[:16]}", value=listed
        )
    return listed
