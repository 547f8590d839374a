"""Benchmarks of dispatch and combine.

The expert's work is not timed: its output (the token scaled by a factor of the expert's own) is prepared once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from xccl.cli.bench_data import CHECKED, TIMED, Array, TokenPool, clear, count_wrong, dtype_of, shared
from xccl.cli.bench_part import Operation, Part
from xccl.cli.ledger import Ledger, oracle_rows
from xccl.cli.options import BenchOptions, Case
from xccl.comm import reference
from xccl.comm.dispatched import Dispatched
from xccl.comm.moe import ExpertParallel
from xccl.comm.moe_direct import Direct
from xccl.protocol.routing import make_routing

if TYPE_CHECKING:
    from xccl.comm.communicator import Communicator

_SCALE_BYTES: Final = 4
#: Tokens that the oracle sums at once: it holds top_k rows of each.
_ORACLE_TOKENS: Final = 4


def _stripped(d: Dispatched) -> Dispatched:
    """Enough of it for combine, without the rows."""
    return replace(d, tokens=d.tokens[:0].copy(), scales=None)


class Data:
    """Inputs of any rank in any round; what several ranks of a process need is made once for all of them."""

    def __init__(self, options: BenchOptions) -> None:
        self._options = options
        self.pool = TokenPool(options.hidden, dtype_of(options), options.seed)
        self._ledgers: dict[tuple[int, int], Ledger] = {}
        self._weights: dict[tuple[int, int], Array] = {}
        #: The rank of each expert; the last element is for -1, no expert.
        self.holders = np.full(options.experts + 1, -1)
        for rank in range(options.ranks):
            mine = reference.experts_of(rank, options.experts, options.ranks)
            self.holders[mine.start : mine.stop] = rank
        self._lock = threading.Lock()

    def routing(self, rank: int, tokens: int, data_round: int) -> Array:
        """int64 [tokens, top_k]: the experts that `rank` chooses in a round."""
        o = self._options
        return make_routing(
            o.routing, tokens=tokens, experts=o.experts, topk=o.topk, seed=o.seed + data_round, rank=rank, ranks=o.ranks
        )

    def weights(self, rank: int, tokens: int, data_round: int) -> Array:
        """float32 [tokens, top_k]: the gate weights of `rank` in a round."""
        rng = np.random.default_rng((self._options.seed, 2, rank, data_round))
        return rng.random((tokens, self._options.topk), np.float32)

    def all_weights(self, tokens: int, data_round: int) -> Array:
        """float32 [ranks, tokens, top_k]."""
        with self._lock:
            key = (tokens, data_round)
            if key not in self._weights:
                ranks = range(self._options.ranks)
                self._weights[key] = np.stack([self.weights(rank, tokens, data_round) for rank in ranks])
            return self._weights[key]

    def ledger(self, tokens: int, data_round: int) -> Ledger:
        """What all ranks send in a round."""
        with self._lock:
            key = (tokens, data_round)
            if key not in self._ledgers:
                ranks = range(self._options.ranks)
                chosen = np.stack([self.routing(rank, tokens, data_round) for rank in ranks])
                places = np.stack([self.pool.places(rank, data_round, tokens) for rank in ranks])
                self._ledgers[key] = Ledger.of(np.arange(len(ranks)), chosen, places, self._options.experts)
            return self._ledgers[key]


class Moe(Operation):
    """Rows "dispatch", "combine" and "moe" (both, one after the other), or the one of them that was asked for."""

    def __init__(self, comm: Communicator, options: BenchOptions, cases: list[Case]) -> None:
        super().__init__(comm, options, cases)
        self.dtype = dtype_of(options)
        self.quant: reference.Quant = "int8" if options.quant == "int8" else "none"
        self.data = shared(Data, options)
        self.pool = self.data.pool
        self.factors = (1 + np.arange(options.experts) / options.experts).astype(np.float32)
        self.is_dedup = options.rows == "dedup"
        self._outputs = np.zeros((0, options.hidden), self.dtype)
        self.ep = ExpertParallel(
            comm,
            num_experts=options.experts,
            hidden=options.hidden,
            top_k=options.topk,
            max_tokens=max(max(case.tokens or 0 for case in cases), 1),
            dtype=self.dtype,
            quant=options.quant,
            protocol=options.protocol,
            rows=options.rows,
        )

    def parts(self, case: Case) -> Iterator[Part]:
        """The rows asked for, each with a dispatch of its own."""
        tokens = case.tokens or 0
        x, topk_idx, weights = self.inputs(tokens, TIMED)
        hidden, itemsize = self.options.hidden, self.dtype.itemsize
        row_bytes = hidden + _SCALE_BYTES if self.quant == "int8" else hidden * itemsize
        # Which rows come from where is kept; what they are is of no further use, and of hundreds of ranks much.
        d = _stripped(self.dispatch(x, topk_idx, weights))
        received, sent = len(d.source), d.routing.sent
        dispatch_bytes, combine_bytes = sent * row_bytes, received * hidden * itemsize
        if self.ep.protocol == Direct.name:
            expert_out = self.ep.empty_outputs(d)
            expert_out[...] = 0
        else:  # one buffer for timed and for checked rounds: of hundreds of ranks, a second one is gigabytes
            expert_out = self.output_buffer(received)

        def round_trip() -> None:
            self.combine(expert_out, self.dispatch(x, topk_idx, weights), weights)

        def part(op: str, step: Callable[[], object], payload_bytes: int) -> Part:
            return Part(op, step, lambda: self.check(op, tokens), payload_bytes, received)

        if self.options.op in ("dispatch", "moe"):
            yield part("dispatch", lambda: self.dispatch(x, topk_idx, weights), dispatch_bytes)
        if self.options.op in ("combine", "moe"):
            yield part("combine", lambda: self.combine(expert_out, d, weights), combine_bytes)
        if self.options.op == "moe":
            yield part("moe", round_trip, dispatch_bytes + combine_bytes)

    def dispatch(self, x: Array, topk_idx: Array, weights: Array) -> Dispatched:
        """Deduplicated rows take the weights along."""
        return self.ep.dispatch(x, topk_idx, topk_weights=weights if self.is_dedup else None)

    def combine(self, rows: Array, d: Dispatched, weights: Array) -> Array:
        """Deduplicated rows come back weighted."""
        return self.ep.combine(rows, d, None if self.is_dedup else weights)

    def check(self, op: str, tokens: int) -> int:
        """A dispatch of fresh tokens, and a combine if the row has one, against the oracle."""
        stale = self.dispatch(*self.inputs(tokens, TIMED))
        clear(stale.tokens, stale.scales)
        del stale
        x, topk_idx, weights = self.inputs(tokens, CHECKED)
        d = self.dispatch(x, topk_idx, weights)
        wrong = self.wrong_rows(d, tokens) if op != "combine" else 0
        if op != "dispatch":
            returned = self.expert_out(d)
            if self.is_dedup:
                returned = self.ep.reduce_local(returned, d)
            y = self.combine(returned, _stripped(d), weights)
            wrong += count_wrong(y, self.combined(x, topk_idx, weights))
        self.comm.barrier()
        return wrong

    # --- inputs and what becomes of them ------------------------------------------------------------------------------

    def inputs(self, tokens: int, data_round: int) -> tuple[Array, Array, Array]:
        """Tokens, expert ids and gate weights of this rank in a round."""
        rank = self.comm.rank
        routing, weights = self.data.routing(rank, tokens, data_round), self.data.weights(rank, tokens, data_round)
        return self.pool.tokens(rank, data_round, tokens), routing, weights

    def output_buffer(self, rows: int) -> Array:
        """[rows, hidden], of any content: one buffer for all outputs of this rank's experts."""
        if len(self._outputs) < rows:
            self._outputs = np.zeros((rows, self.options.hidden), self.dtype)
        return self._outputs[:rows]

    def expert_out(self, d: Dispatched) -> Array:
        """What the experts of this rank make of rows, or of the entries of the index; in dtype, block by block."""
        rows = np.arange(len(d.tokens)) if d.index is None else d.index["row"]
        out = self.output_buffer(len(rows))
        expert = self.ep.first_expert + np.repeat(np.arange(self.ep.local_experts), d.counts)
        at_once = oracle_rows(self.options.hidden)
        for start in range(0, len(out), at_once):
            block = slice(start, start + at_once)
            values = d.tokens[rows[block]]
            if d.scales is not None:
                values = reference.dequantise(values, d.scales[rows[block]], self.dtype)
            out[block] = self.apply_experts(values, expert[block])
        return out

    def apply_experts(self, values: Array, expert: Array) -> Array:
        """The expert's work: each row times a factor of its expert."""
        return reference.round_to(values.astype(np.float32) * self.factors[expert][..., None], self.dtype)

    def wrong_rows(self, d: Dispatched, tokens: int) -> int:
        """Wrong elements of a dispatch of the checked round."""
        first = self.ep.first_expert
        ledger = self.data.ledger(tokens, CHECKED)
        mine = range(first, first + self.ep.local_experts)
        wrong = ledger.wrong_rows(mine, d, self.pool, is_int8=self.quant == "int8")
        if d.index is not None:
            weights = self.data.all_weights(tokens, CHECKED)
            source = d.source[d.index["row"]]
            wrong += count_wrong(d.weights, weights[source["rank"], source["token"], d.index["slot"]])
        return wrong

    def combined(self, x: Array, topk_idx: Array, weights: Array) -> Array:
        """What a combine must give, from this rank's own tokens: the experts' work is known."""
        values = reference.dequantise(*reference.quantise(x), self.dtype) if self.quant == "int8" else x
        blocks = [np.zeros((0, self.options.hidden), self.dtype)]
        for start in range(0, len(x), _ORACLE_TOKENS):
            block = slice(start, start + _ORACLE_TOKENS)
            idx = topk_idx[block]
            rows = np.broadcast_to(values[block, None], (*idx.shape, self.options.hidden))
            outs = self.apply_experts(rows, idx)
            sums = self.sum_by_rank if self.is_dedup else reference.weighted_sum
            blocks.append(sums(outs, weights[block], idx))
        return np.concatenate(blocks)

    def sum_by_rank(self, outs: Array, weights: Array, topk_idx: Array) -> Array:
        """Sums of partial sums, one for each rank of a token's experts, in the order of its first slot."""
        ranks = self.data.holders[topk_idx]
        partials, firsts = np.zeros_like(outs), np.full(topk_idx.shape, -1)
        for k in range(topk_idx.shape[1]):
            same = ranks == ranks[:, k, None]
            partials[:, k] = reference.weighted_sum(outs, weights, np.where(same, topk_idx, -1))
            firsts[:, k] = np.where((topk_idx[:, k] >= 0) & ~same[:, :k].any(axis=1), 0, -1)
        return reference.weighted_sum(partials, np.ones_like(weights), firsts)
