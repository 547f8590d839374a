"""KV-cache transfer: paged blocks from pool to pool, layer by layer (XDS §3.1 names the use).

Rules, as `xccl.kernels.kv` has them
- A request is a list of pages at the sender, and one of as many at the receiver. In each layer, block i goes from the
  sender's i-th page to the receiver's i-th page.
- Stages:
    announce: the receiver writes its page numbers into the sender's segment, and behind them the announcement;
    push: the sender waits for that, and moves each block straight into its page, by its DMA engine or its lanes;
    notify: behind the blocks of each layer it writes how many layers are there, a word at the receiver;
    await-layers: the receiver waits for layers; the last one is the completion, and nothing is written back.
- Pages are moved one by one, wherever they lie: the units of "push" are blocks.

"notify" and "await-layers" follow the blocks piece by piece: a layer that has arrived is used while later ones are on
their way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..layout.kv import ANNOUNCED_BYTES, PAGE_NUMBER_BYTES
from ..layout.ring import MAX_LANES
from .stage import Description, Engine, Signals, Stage, Transfers, Waits, ints, payload_between, rank_columns

_PROGRESS_BYTES = 8


def kv_transfer(
    ranks: int,
    source: npt.ArrayLike,
    destination: npt.ArrayLike,
    pages: npt.ArrayLike,
    *,
    layers: int,
    page_bytes: int,
    lanes: int = MAX_LANES,
    engine: Engine = "dma",
) -> Description:
    """Requests from `source` to `destination`, a row for each; all of them at once.

    Args:
        ranks: number of ranks.
        source: senders (prefill).
        destination: receivers (decode).
        pages: pages of each request.
        layers: of the pools, all of which are sent.
        page_bytes: bytes of a page in one layer.
        lanes: of each sender, with engine "mte".
        engine: what moves the blocks.

    Raises:
        UsageError: ranks or sizes are out of range.
    """
    if layers < 1 or page_bytes < 1:
        raise UsageError(f"{layers} layers of {page_bytes} bytes a page: both must be 1 or more", value=layers, bound=1)
    sender, receiver = rank_columns(ranks, source, destination)
    count = np.broadcast_to(ints(pages), sender.shape).copy()
    if count.size and count.min() < 0:
        raise UsageError(f"a request has 0 pages or more, got {count.min()}", value=int(count.min()), bound=0)
    one, each_layer = np.ones_like(count), np.full_like(count, layers)
    numbers = Transfers(
        receiver, sender, (count > 0).astype(np.int64), count * PAGE_NUMBER_BYTES, "source", "page numbers"
    )
    blocks = Transfers(
        sender, receiver, count * layers, count * layers * page_bytes, "source", "blocks", engine
    )  # fmt: skip
    announced = Signals(receiver, sender, one, ANNOUNCED_BYTES, "announcement")
    progress = Signals(sender, receiver, each_layer, _PROGRESS_BYTES, "layers")
    stages = (
        Stage("announce", transfers=(numbers,), signals=(announced,)),
        Stage("push", (Waits(sender, receiver, one, "announcement"),), transfers=(blocks,)),
        Stage("notify", signals=(progress,), streamed=True),
        Stage("await-layers", (Waits(receiver, sender, each_layer, "layers"),), streamed=True),
    )
    return Description("kv", "push", ranks, stages, lanes, payload_between(ranks, [blocks]))
