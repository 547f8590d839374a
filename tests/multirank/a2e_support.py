"""What tests of A2E and E2A share: a deployment, rounds of inputs, and what the oracle says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import xccl
from tests.multirank.support import BF16, FP32, Array, assert_same, numbers
from xccl import reference


@dataclass(frozen=True)
class Layout:
    """Arguments of a Disaggregated object; attention dies are ranks 0 on, domain after domain, then come expert dies."""

    attention: int = 2
    experts: int = 3
    local_experts: int = 1
    hidden: int = 64
    top_k: int = 2
    max_tokens: int = 16
    dtype: np.dtype[Any] = BF16
    quant: Any = "int8"
    shared: int = 0
    route: str = "trampoline"
    trampolines: int | None = None
    domains: int = 1
    microbatches: int = 1
    #: Ranks of the dies, if they are not those above.
    places: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def routed(self) -> int:
        """Routed experts."""
        return self.experts * self.local_experts - self.shared

    @property
    def ranks(self) -> int:
        """Dies of both kinds."""
        return self.attention * self.domains + self.experts

    @property
    def attention_ranks(self) -> tuple[int, ...]:
        """Ranks of the attention dies of all domains."""
        return self.places[0] if self.places else tuple(range(self.attention * self.domains))

    @property
    def expert_ranks(self) -> tuple[int, ...]:
        """Ranks of the expert dies."""
        return self.places[1] if self.places else tuple(range(self.attention * self.domains, self.ranks))

    def make(self, comm: xccl.Communicator) -> xccl.Disaggregated:
        """Make the object; collective."""
        return xccl.Disaggregated(
            comm, attention=self.places[0] if self.places else self.attention,
            experts=self.places[1] if self.places else self.experts, num_experts=self.routed, hidden=self.hidden,
            top_k=self.top_k, max_tokens=self.max_tokens, dtype=self.dtype, quant=self.quant, shared=self.shared,
            route=self.route, trampolines=self.trampolines, domains=self.domains, microbatches=self.microbatches,
        )  # fmt: skip

    def round(
        self,
        domain: int,
        seed: int,
        tokens: list[int] | None = None,
        kind: str = "normal",
        *,
        no_expert: float = 0.1,
        hot: bool = False,
    ) -> Round:
        """Random inputs of one domain for one A2E and E2A; tokens of each of its attention dies, or any number."""
        rng = np.random.default_rng(seed)
        choices = min(self.routed, 2) if hot else self.routed
        if tokens is None:
            tokens = rng.integers(0, self.max_tokens + 1, self.attention).tolist()
        xs, idxs, weights = [], [], []
        for n in tokens:
            xs.append(numbers(rng, (n, self.hidden), self.dtype, kind))
            idx = rng.integers(0, choices, (n, self.top_k))
            idx[rng.random(idx.shape) < no_expert] = -1
            idxs.append(idx)
            weights.append(numbers(rng, (n, self.top_k), FP32, kind))
        first = domain * self.attention
        ranks = self.attention_ranks[first : first + self.attention]
        with np.errstate(invalid="ignore"):  # signalling NaNs
            received = reference.a2e(
                xs, idxs, self.routed, self.experts, self.quant, shared=self.shared, first=first, ranks=ranks
            )
        outs = [numbers(rng, (len(r.source), self.hidden), self.dtype, kind) for r in received]
        ys = [
            reference.e2a_one(first + i, outs, received, w, idx, shared=self.shared, rank=ranks[i])
            for i, (w, idx) in enumerate(zip(weights, idxs, strict=True))
        ]
        return Round(self, domain, xs, idxs, weights, received, outs, ys)


@dataclass(frozen=True)
class Round:
    """One A2E and one E2A of a domain: inputs, and what the oracle says of them; lists by die."""

    layout: Layout
    domain: int
    xs: list[Array]
    topk_idxs: list[Array]
    weights: list[Array]
    received: list[reference.DispatchResult]
    outs: list[Array]
    ys: list[Array]

    def place(self, rank: int) -> int | None:
        """Number of an attention die within the domain; None for another domain's."""
        domain, place = divmod(self.layout.attention_ranks.index(rank), self.layout.attention)
        return place if domain == self.domain else None

    def send(self, rank: int, dis: xccl.Disaggregated) -> xccl.A2EHandle:
        """A2E at an attention die."""
        place = self.place(rank)
        assert place is not None
        return dis.a2e(self.xs[place], self.topk_idxs[place])

    def sum(self, rank: int, dis: xccl.Disaggregated, handle: xccl.A2EHandle, what: str = "") -> None:
        """E2A at an attention die, checked."""
        place = self.place(rank)
        assert place is not None
        assert_same(dis.e2a(handle, self.weights[place]), self.ys[place], f"{what} y of rank {rank}")

    def receive(self, rank: int, dis: xccl.Disaggregated, what: str = "") -> xccl.ExpertBatch:
        """A2E at an expert die, checked."""
        batch = dis.a2e()
        self.check(rank, batch, what)
        return batch

    def check(self, rank: int, batch: xccl.ExpertBatch, what: str = "") -> None:
        """All that an expert die gets, bit for bit."""
        expected = self.received[self.layout.expert_ranks.index(rank)]
        assert batch.domain == self.domain, what
        assert_same(batch.counts, expected.counts, f"{what} counts of rank {rank}")
        assert_same(batch.source, expected.source, f"{what} source of rank {rank}")
        assert_same(batch.scales, expected.scales, f"{what} scales of rank {rank}")
        assert_same(batch.tokens, expected.tokens, f"{what} tokens of rank {rank}")

    def reply(self, rank: int, dis: xccl.Disaggregated, batch: xccl.ExpertBatch) -> None:
        """E2A at an expert die."""
        dis.e2a(self.outs[self.layout.expert_ranks.index(rank)], batch)


def run_turns(
    rank: int, dis: xccl.Disaggregated, turns: list[list[list[Round]]], what: str = "", *, done: int = 0
) -> None:
    """Rounds as a deployment does them: [turn][domain][microbatch]; `done` turns came before."""
    if dis.role == "attention":
        assert dis.domain is not None
        for t, turn in enumerate(turns):
            sent = [(r, r.send(rank, dis)) for r in turn[dis.domain]]
            for m, (r, handle) in enumerate(sent):
                r.sum(rank, dis, handle, f"{what}turn {t}, microbatch {m}, ")
    elif dis.role == "expert":
        for t, turn in enumerate(turns):
            for d, domain in enumerate(turn):
                for m, r in enumerate(domain):
                    at = f"{what}turn {t}, domain {d}, microbatch {m}, "
                    batch = r.receive(rank, dis, at)
                    assert (batch.turn, batch.domain, batch.microbatch) == (done + t, d, m), at
                    r.reply(rank, dis, batch)
