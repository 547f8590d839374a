"""Benchmarks of A2E and E2A.

An iteration is a turn of all domains: each attention die sends, or gets back, `microbatches` times `tokens` tokens, and
the expert dies take one domain after the other. The experts' work is not timed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from xccl.cli.bench_data import CHECKED, TIMED, Array, TokenPool, count_wrong, dtype_of, shared
from xccl.cli.bench_part import Operation, Part
from xccl.cli.deployment import Deployment
from xccl.cli.ledger import Ledger, oracle_rows
from xccl.cli.options import BenchOptions, Case
from xccl.comm import reference
from xccl.comm.a2e import Disaggregated
from xccl.comm.a2e_experts import ExpertBatch
from xccl.protocol.routing import make_routing

if TYPE_CHECKING:
    from xccl.comm.communicator import Communicator

_SCALE_BYTES: Final = 4
_ROUNDS: Final = 2
#: Deadlines of waits in a check are so many times longer.
_ORACLE_PATIENCE: Final = 20

Ints = npt.NDArray[np.int64]


class Data:
    """Inputs of any attention die in any round; what several ranks of a process need is made once for all of them."""

    def __init__(self, options: BenchOptions) -> None:
        assert options.deployment is not None
        self.options = options
        self.deployment: Deployment = options.deployment
        self.routed = options.experts - self.deployment.shared
        self.pool = TokenPool(options.hidden, dtype_of(options), options.seed)
        self._ledgers: dict[tuple[int, int, int], Ledger] = {}
        self._lock = threading.Lock()

    def routing(self, rank: int, tokens: int, data_round: int) -> Array:
        """int64 [tokens, top_k]: the experts that the tokens of an attention die choose."""
        o = self.options
        return make_routing(
            o.routing, tokens=tokens, experts=self.routed, topk=o.topk, seed=o.seed + data_round, rank=rank,
            ranks=self.deployment.attention_dies,
        )  # fmt: skip

    def inputs(self, rank: int, tokens: int, data_round: int) -> tuple[Array, Array, Array]:
        """Tokens, expert ids and gate weights of an attention die."""
        key = (self.options.seed, 2, rank, data_round)
        weights = np.random.default_rng(key).random((tokens, self.options.topk), np.float32)
        return self.pool.tokens(rank, data_round, tokens), self.routing(rank, tokens, data_round), weights

    def ledger(self, domain: int, tokens: int, data_round: int) -> Ledger:
        """What the attention dies of a domain send."""
        with self._lock:
            key = (domain, tokens, data_round)
            if key not in self._ledgers:
                self._ledgers[key] = self._make_ledger(*key)
            return self._ledgers[key]

    def _make_ledger(self, domain: int, tokens: int, data_round: int) -> Ledger:
        d = self.deployment
        ranks = np.arange(domain * d.attention, (domain + 1) * d.attention)
        chosen = np.stack(
            [
                reference.with_shared(self.routing(rank, tokens, data_round), rank, self.routed, d.shared)
                for rank in ranks.tolist()
            ]
        )
        places = np.stack([self.pool.places(rank, data_round, tokens) for rank in ranks.tolist()])
        return Ledger.of(ranks, chosen, places, self.options.experts)


class A2E(Operation):
    """Row "a2e" or "e2a", whichever was asked for."""

    def __init__(self, comm: Communicator, options: BenchOptions, cases: list[Case]) -> None:
        super().__init__(comm, options, cases)
        assert options.deployment is not None
        self.deployment: Deployment = options.deployment
        self.dtype = dtype_of(options)
        self.is_int8 = options.quant == "int8"
        self.data = shared(Data, options)
        self.factors = (1 + np.arange(options.experts) / options.experts).astype(np.float32)
        d = self.deployment
        self.dis = Disaggregated(
            comm,
            attention=d.attention,
            experts=comm.size - d.attention_dies,
            num_experts=self.data.routed,
            hidden=options.hidden,
            top_k=options.topk,
            max_tokens=max(max(case.tokens or 0 for case in cases), 1),
            dtype=self.dtype,
            quant=options.quant,
            shared=d.shared,
            route=d.route,
            trampolines=d.trampolines,
            domains=d.domains,
            microbatches=d.microbatches,
        )
        self._oracle_rows = oracle_rows(options.hidden)
        #: One buffer for the outputs of a die's experts: with hundreds of dies each more would count.
        self._outputs = np.zeros((0, options.hidden), self.dtype)

    def parts(self, case: Case) -> Iterator[Part]:
        """One row."""
        tokens = case.tokens or 0
        make = self._attention_part if self.dis.role == "attention" else self._expert_part
        part = make(self.options.op, tokens)
        yield replace(part, check=partial(self._patiently, part.check))

    def _patiently(self, check: Callable[[], int]) -> int:
        """Run a check: dies wait for the oracles of all others, which is no sign of trouble."""
        usual_s = self.comm.op_timeout_s
        self.comm.op_timeout_s = _ORACLE_PATIENCE * usual_s
        try:
            return check()
        finally:
            self.comm.op_timeout_s = usual_s

    # --- attention dies -----------------------------------------------------------------------------------------------

    def _attention_part(self, op: str, tokens: int) -> Part:
        inputs = [self.data.inputs(self.comm.rank, tokens, data_round) for data_round in self._rounds(TIMED)]
        handles = [(self.dis.a2e(x, idx), weights) for x, idx, weights in inputs]
        check = partial(self._check_attention, op, tokens)
        if op == "a2e":
            row_bytes = self.options.hidden * (1 if self.is_int8 else self.dtype.itemsize)
            row_bytes += _SCALE_BYTES if self.is_int8 else 0
            rows = sum(
                int(np.count_nonzero(idx >= 0)) + len(idx) * (self.deployment.shared > 0) for _, idx, _ in inputs
            )

            def send() -> None:
                for x, idx, _ in inputs:
                    self.dis.a2e(x, idx)

            return Part(op, send, check, rows * row_bytes)
        inputs.clear()

        def get_back() -> None:
            for handle, weights in handles:
                self.dis.e2a(handle, weights)

        return Part(op, get_back, check, 0)

    def _check_attention(self, op: str, tokens: int) -> int:
        inputs = [self.data.inputs(self.comm.rank, tokens, data_round) for data_round in self._rounds(CHECKED)]
        handles = [self.dis.a2e(x, idx) for x, idx, _ in inputs]
        wrong = 0
        if op == "e2a":
            for handle, (x, idx, weights) in zip(handles, inputs, strict=True):
                wrong += self._wrong_sums(self.dis.e2a(handle, weights), x, idx, weights)
        self.comm.barrier()
        return wrong

    def _wrong_sums(self, y: Array, x: Array, topk_idx: Array, weights: Array) -> int:
        """Wrong elements of an E2A: its result follows from the die's own tokens, as the experts' work is known."""
        d = self.deployment
        idx = reference.with_shared(topk_idx, self.comm.rank, self.data.routed, d.shared)
        if d.shared:
            weights = np.concatenate([weights, np.ones((len(weights), 1), np.float32)], axis=1)
        wrong = 0
        for start in range(0, len(x), self._oracle_rows):
            block = slice(start, start + self._oracle_rows)
            values = self._as_experts_see(x[block])
            rows = np.broadcast_to(values[:, None], (*idx[block].shape, self.options.hidden))
            outs = self._experts(rows, idx[block])
            wrong += count_wrong(y[block], reference.weighted_sum(outs, weights[block], idx[block]))
        return wrong

    def _as_experts_see(self, x: Array) -> Array:
        return reference.dequantise(*reference.quantise(x), self.dtype) if self.is_int8 else x

    # --- expert dies --------------------------------------------------------------------------------------------------

    def _expert_part(self, op: str, tokens: int) -> Part:
        turn = range(self.deployment.domains * self.deployment.microbatches)
        # How many rows come, and for E2A where they come from; what they are is of no further use.
        batches = [self._stripped(self.dis.a2e()) for _ in turn]
        if op == "a2e":

            def receive() -> None:
                for _ in turn:
                    self.dis.a2e()

            step, n_bytes = receive, 0
        else:
            outputs = [self._output_buffer(len(batch.source)) for batch in batches]

            def reply() -> None:
                for output, batch in zip(outputs, batches, strict=True):
                    self.dis.e2a(output, batch)

            step, n_bytes = reply, sum(output.nbytes for output in outputs)
        received = sum(len(batch.source) for batch in batches)
        return Part(op, step, partial(self._check_expert, op, tokens), n_bytes, received)

    def _stripped(self, batch: ExpertBatch) -> ExpertBatch:
        return replace(batch, tokens=batch.tokens[:0].copy(), scales=None)

    def _output_buffer(self, rows: int) -> Array:
        """Zeros at first, later any outputs."""
        if len(self._outputs) < rows:
            self._outputs = np.zeros((rows, self.options.hidden), self.dtype)
        return self._outputs[:rows]

    def _check_expert(self, op: str, tokens: int) -> int:
        wrong = 0
        for domain in range(self.deployment.domains):
            for data_round in self._rounds(CHECKED):
                batch = self.dis.a2e()
                if op == "a2e":
                    wrong += self._wrong_rows(batch, self.data.ledger(domain, tokens, data_round))
                else:
                    self.dis.e2a(self._expert_out(batch), batch)
                del batch  # before the next one comes: with hundreds of dies each more would count
        self.comm.barrier()
        return wrong

    def _wrong_rows(self, batch: ExpertBatch, ledger: Ledger) -> int:
        first = self.dis.first_expert or 0
        mine = range(first, first + self.dis.local_experts)
        return ledger.wrong_rows(mine, batch, self.data.pool, is_int8=self.is_int8)

    def _expert_out(self, batch: ExpertBatch) -> Array:
        """What this die's experts make of a batch."""
        out = self._output_buffer(len(batch.tokens))
        expert = (self.dis.first_expert or 0) + np.repeat(np.arange(self.dis.local_experts), batch.counts)
        for start in range(0, len(out), self._oracle_rows):
            block = slice(start, start + self._oracle_rows)
            values = batch.tokens[block]
            if batch.scales is not None:
                values = reference.dequantise(values, batch.scales[block], self.dtype)
            out[block] = self._experts(values, expert[block])
        return out

    # --- both ---------------------------------------------------------------------------------------------------------

    def _experts(self, values: Array, expert: Array) -> Array:
        """The experts' work: each row times a factor of its expert."""
        return reference.round_to(values.astype(np.float32) * self.factors[expert][..., None], self.dtype)

    def _rounds(self, kind: int) -> list[int]:
        """Rounds of data, one for each microbatch: those that are timed, or those that are checked."""
        return [kind + _ROUNDS * m for m in range(self.deployment.microbatches)]
