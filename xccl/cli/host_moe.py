"""Dispatch and combine on this machine, for comparison with what its profile predicts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from xccl.cli.host_samples import Samples, Stopwatch, limit_s
from xccl.comm.moe import ExpertParallel
from xccl.protocol import moe
from xccl.protocol.counts import RoutingCounts
from xccl.protocol.routing import make_routing

if TYPE_CHECKING:
    from xccl.comm.communicator import Communicator
    from xccl.protocol.stage import Description

_RANKS = 2
#: Undisturbed iterations in a round.
_WANTED = 15


def describe(operation: str, hidden: int, quant: str, tokens: int, *, experts: int, top_k: int) -> Description:
    """What `HostMoe` times, described."""
    choices = [_choices(rank, tokens, experts, top_k) for rank in range(_RANKS)]
    routing = RoutingCounts.from_topk(choices, experts)
    if operation == "dispatch":
        is_int8 = quant == "int8"
        return moe.dispatch(routing, hidden=hidden, quant="int8" if is_int8 else "none", loopback=is_int8)
    return moe.combine(routing, hidden=hidden)


def _choices(rank: int, tokens: int, experts: int, top_k: int) -> np.ndarray:
    return make_routing("uniform", tokens=tokens, experts=experts, topk=top_k, seed=0, rank=rank, ranks=_RANKS)


class HostMoe:
    """One shape at one rank: bfloat16, by the pull protocol."""

    def __init__(self, comm: Communicator, hidden: int, quant: str, tokens: int, *, experts: int, top_k: int) -> None:
        rng = np.random.default_rng(comm.rank)
        self._watch = Stopwatch(comm, _WANTED)
        self._name = f"{quant} {tokens} {hidden}"
        self._ep = ExpertParallel(
            comm, num_experts=experts, hidden=hidden, top_k=top_k, max_tokens=tokens, dtype=ml_dtypes.bfloat16,
            quant=quant,
        )  # fmt: skip
        self._x = rng.standard_normal((tokens, hidden), np.float32).astype(ml_dtypes.bfloat16)
        self._idx = _choices(comm.rank, tokens, experts, top_k)
        self._weights = rng.random((tokens, top_k), np.float32)
        self._dispatched = self._ep.dispatch(self._x, self._idx)
        # Of zeros, all pages would be one.
        self._out = rng.standard_normal((len(self._dispatched.source), hidden), np.float32).astype(ml_dtypes.bfloat16)

    def round(self) -> Samples:
        """Samples of both operations, by "OPERATION QUANT TOKENS HIDDEN"."""
        steps = {
            "dispatch": lambda: self._ep.dispatch(self._x, self._idx),
            "combine": lambda: self._ep.combine(self._out, self._dispatched, self._weights),
        }
        for operation, step in steps.items():
            self._watch.collect([{f"{operation} {self._name}": step}], limit_s(self._out.nbytes))
        return self._watch.take()
