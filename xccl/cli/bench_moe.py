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
        self._lock = threading.Lock()

    def routing(self, rank: int, tokens: int, data_round: int) -> Array:
        """int64 [tokens, top_k]: the experts that `rank` chooses in a round."""
        o = self._options
        return make_routing(
            o.routing, tokens=tokens, experts=o.experts, topk=o.topk, seed=o.seed + data_round, rank=rank, ranks=o.ranks
        )

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
        self.local_experts = options.experts // comm.size
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
        )

    def parts(self, case: Case) -> Iterator[Part]:
        """The rows asked for, each with a dispatch of its own."""
        tokens = case.tokens or 0
        x, topk_idx, weights = self.inputs(tokens, TIMED)
        sent = int(np.count_nonzero(topk_idx >= 0))
        hidden, itemsize = self.options.hidden, self.dtype.itemsize
        row_bytes = hidden + _SCALE_BYTES if self.quant == "int8" else hidden * itemsize
        # Which rows come from where is kept; what they are is of no further use, and of hundreds of ranks much.
        d = _stripped(self.ep.dispatch(x, topk_idx))
        received = len(d.source)
        dispatch_bytes, combine_bytes = sent * row_bytes, received * hidden * itemsize
        expert_out = self.output_buffer(received)

        def round_trip() -> None:
            self.ep.combine(expert_out, self.ep.dispatch(x, topk_idx), weights)

        def part(op: str, step: Callable[[], object], payload_bytes: int) -> Part:
            return Part(op, step, lambda: self.check(op, tokens), payload_bytes, received)

        if self.options.op in ("dispatch", "moe"):
            yield part("dispatch", lambda: self.ep.dispatch(x, topk_idx), dispatch_bytes)
        if self.options.op in ("combine", "moe"):
            yield part("combine", lambda: self.ep.combine(expert_out, d, weights), combine_bytes)
        if self.options.op == "moe":
            yield part("moe", round_trip, dispatch_bytes + combine_bytes)

    def check(self, op: str, tokens: int) -> int:
        """A dispatch of fresh tokens, and a combine if the row has one, against the oracle."""
        x, topk_idx, _ = self.inputs(tokens, TIMED)
        stale = self.ep.dispatch(x, topk_idx)
        clear(stale.tokens, stale.scales)
        del stale
        x, topk_idx, weights = self.inputs(tokens, CHECKED)
        d = self.ep.dispatch(x, topk_idx)
        wrong = self.wrong_rows(d, tokens) if op != "combine" else 0
        if op != "dispatch":
            expert_out = self.expert_out(d)
            y = self.ep.combine(expert_out, _stripped(d), weights)
            wrong += count_wrong(y, self.combined(x, topk_idx, weights))
        self.comm.barrier()
        return wrong

    # --- inputs and what becomes of them ------------------------------------------------------------------------------

    def inputs(self, tokens: int, data_round: int) -> tuple[Array, Array, Array]:
        """Tokens, expert ids and gate weights of this rank in a round."""
        rank = self.comm.rank
        weights = np.random.default_rng((self.options.seed, 2, rank, data_round)).random(
            (tokens, self.options.topk), np.float32
        )
        return self.pool.tokens(rank, data_round, tokens), self.data.routing(rank, tokens, data_round), weights

    def output_buffer(self, rows: int) -> Array:
        """[rows, hidden], of any content: one buffer for all outputs of this rank's experts."""
        if len(self._outputs) < rows:
            self._outputs = np.zeros((rows, self.options.hidden), self.dtype)
        return self._outputs[:rows]

    def expert_out(self, d: Dispatched) -> Array:
        """What the experts of this rank make of dispatched rows: [n, hidden] in dtype; block by block."""
        out = self.output_buffer(len(d.tokens))
        expert = self.comm.rank * self.local_experts + np.repeat(np.arange(self.local_experts), d.counts)
        at_once = oracle_rows(self.options.hidden)
        for start in range(0, len(out), at_once):
            block = slice(start, start + at_once)
            values = d.tokens[block]
            if d.scales is not None:
                values = reference.dequantise(values, d.scales[block], self.dtype)
            out[block] = self.apply_experts(values, expert[block])
        return out

    def apply_experts(self, values: Array, expert: Array) -> Array:
        """The expert's work: each row times a factor of its expert."""
        return reference.round_to(values.astype(np.float32) * self.factors[expert][..., None], self.dtype)

    def wrong_rows(self, d: Dispatched, tokens: int) -> int:
        """Wrong elements of a dispatch of the checked round."""
        first = self.comm.rank * self.local_experts
        ledger = self.data.ledger(tokens, CHECKED)
        return ledger.wrong_rows(range(first, first + self.local_experts), d, self.pool, is_int8=self.quant == "int8")

    def combined(self, x: Array, topk_idx: Array, weights: Array) -> Array:
        """What a combine must give, from this rank's own tokens: the experts' work is known."""
        values = reference.dequantise(*reference.quantise(x), self.dtype) if self.quant == "int8" else x
        blocks = [np.zeros((0, self.options.hidden), self.dtype)]
        for start in range(0, len(x), _ORACLE_TOKENS):
            block = slice(start, start + _ORACLE_TOKENS)
            idx = topk_idx[block]
            rows = np.broadcast_to(values[block, None], (*idx.shape, self.options.hidden))
            blocks.append(reference.weighted_sum(self.apply_experts(rows, idx), weights[block], idx))
        return np.concatenate(blocks)
