"""The operations: one-sided, send/receive, dispatch/combine; and their NumPy oracles in `reference`."""

from __future__ import annotations

from . import reference
from .a2e import Disaggregated
from .a2e_attention import A2EHandle
from .a2e_experts import ExpertBatch
from .communicator import Communicator
from .dispatched import Dispatched
from .expert_loop import ExpertLoop
from .kv import KVTransfer
from .kv_requests import KVReceive, KVSend
from .moe import ExpertParallel
from .request import Request
from .symmetric import Signals, SymmetricArray

__all__ = [
    "A2EHandle",
    "Communicator",
    "Disaggregated",
    "Dispatched",
    "ExpertBatch",
    "ExpertLoop",
    "ExpertParallel",
    "KVReceive",
    "KVSend",
    "KVTransfer",
    "Request",
    "Signals",
    "SymmetricArray",
    "reference",
]
