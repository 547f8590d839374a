"""xccl: an emulation of XCCL, the communication library of Huawei's CloudMatrix384, on one machine.

The layers, top down; a module imports from lower ones only:

    cli            the command line
    runtime        launch ranks, join a session, clean up
    comm           the operations, and their NumPy oracles (`reference`)
    model          what they would cost on UB links
    fabric         global memory: POSIX shared memory between processes, anonymous memory between threads
    kernels        compiled loops: atomics, waits, copies, quantisation, rings, dispatch and combine
    protocol       descriptions without memory: the stages of every operation, and routings
    layout         what bytes mean: segments, fields, slots, blocks
    trace          what happened: a recorder for each rank, export to Chrome trace JSON
    errors         the exception tree

Ranks stand for NPU dies. Each has a segment of memory that all can address, and waits only on words in its own.
"""

from __future__ import annotations

from ._version import __version__
from .comm import (
    A2EHandle,
    Communicator,
    Disaggregated,
    Dispatched,
    ExpertBatch,
    ExpertLoop,
    ExpertParallel,
    KVReceive,
    KVSend,
    KVTransfer,
    Request,
    Signals,
    SymmetricArray,
    reference,
)
from .errors import (
    CapacityError,
    EventMismatch,
    FabricError,
    ModelError,
    PeerDied,
    SegmentError,
    SessionAborted,
    UsageError,
    WaitTimeout,
    XcclError,
)
from .protocol import placement
from .protocol.moe_push import BufferSize, buffer_size_hint
from .protocol.placement import ExpertMap
from .runtime import init, launch

__all__ = [
    "A2EHandle",
    "BufferSize",
    "CapacityError",
    "Communicator",
    "Disaggregated",
    "Dispatched",
    "EventMismatch",
    "ExpertBatch",
    "ExpertLoop",
    "ExpertMap",
    "ExpertParallel",
    "FabricError",
    "KVReceive",
    "KVSend",
    "KVTransfer",
    "ModelError",
    "PeerDied",
    "Request",
    "SegmentError",
    "SessionAborted",
    "Signals",
    "SymmetricArray",
    "UsageError",
    "WaitTimeout",
    "XcclError",
    "__version__",
    "buffer_size_hint",
    "init",
    "launch",
    "placement",
    "reference",
]
