"""The operations: one-sided, send/receive, dispatch/combine; and their NumPy oracles in `reference`."""

from __future__ import annotations

from . import reference
from .communicator import Communicator
from .dispatched import Dispatched
from .moe import ExpertParallel
from .p2p import Request
from .symmetric import Signals, SymmetricArray

__all__ = ["Communicator", "Dispatched", "ExpertParallel", "Request", "Signals", "SymmetricArray", "reference"]
