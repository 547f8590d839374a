"""Oracle of KV-cache transfers in plain NumPy; see `reference`, which offers it too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class PagedCopy(NamedTuple):
    """One request.

    Attributes:
        source: rank whose blocks are sent.
        destination: rank that receives them.
        source_pages: where they are.
        destination_pages: where they go, as many different pages.
    """

    source: int
    destination: int
    source_pages: Sequence[int]
    destination_pages: Sequence[int]


def kv_transfer(pools: Sequence[Array], requests: Sequence[PagedCopy]) -> list[Array]:
    """The pools after these requests, all of which read what the pools held before.

    Args:
        pools: [layers, pages, ...] of each rank.
        requests: no page is written by two of them.
    """
    after = [np.array(pool) for pool in pools]
    for source, destination, source_pages, destination_pages in requests:
        for here, there in zip(source_pages, destination_pages, strict=True):
            after[destination][:, there] = pools[source][:, here]
    return after
