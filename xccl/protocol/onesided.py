"""Put, get, signal, wait and barrier.

Rules
- A put is driven by the rank whose data it is, a get by the rank that wants the data. Neither needs the peer.
- A signal is a write, or an atomic addition, to one 8-byte word in the peer's segment. It never overtakes what the same
  rank put before.
- A rank waits on words in its own segment. Any rank may have written there, so `wait_until` names none: its peer is -1.
- A barrier is a count in the memory of rank 0: each rank adds 1 to it, and sees by the value that comes back whether it
  is the last one. The last, whoever it is, writes the barrier's number to the release word of every rank, its own too;
  each rank waits for its own.

The barrier is what is executed here, where an atomic addition takes nanoseconds and ranks are more than cores. On dies,
all ranks' additions would queue at one memory controller, and the last rank's release would be one write for each rank:
the time grows with their number. A die would rather flag ever more distant peers in ceil(log2(ranks)) rounds
(dissemination barrier, Hensgen, Finkel and Manber, 1988).

Each function takes columns: many puts at once are one description with a row for each. One rank may drive several.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from ..layout.ring import MAX_LANES
from .stage import Description, Engine, Ints, Signals, Stage, Transfers, Waits, ints, payload_between, rank_columns

SIGNAL_BYTES = 8


def put(
    ranks: int,
    source: npt.ArrayLike,
    destination: npt.ArrayLike,
    n_bytes: npt.ArrayLike,
    *,
    lanes: int = 1,
    engine: Engine = "mte",
) -> Description:
    """Stage "put": `n_bytes` go from `source`, which drives them, to `destination`.

    Args:
        ranks: number of ranks.
        source: ranks that put.
        destination: whose memory they write.
        n_bytes: of each.
        lanes: of each rank; a put is one piece, whatever their number.
        engine: what moves the bytes.
    """
    data = _data(ranks, source, destination, n_bytes, "source", engine)
    return _description("put", ranks, lanes, Stage("put", transfers=(data,)))


def get(
    ranks: int,
    source: npt.ArrayLike,
    destination: npt.ArrayLike,
    n_bytes: npt.ArrayLike,
    *,
    lanes: int = 1,
    engine: Engine = "mte",
) -> Description:
    """Stage "get": as `put`, but `destination` drives the transfer: it reads from `source`."""
    data = _data(ranks, source, destination, n_bytes, "destination", engine)
    return _description("get", ranks, lanes, Stage("get", transfers=(data,)))


def put_signal(
    ranks: int,
    source: npt.ArrayLike,
    destination: npt.ArrayLike,
    n_bytes: npt.ArrayLike,
    *,
    op: Literal["set", "add"] = "set",
    lanes: int = 1,
    engine: Engine = "mte",
) -> Description:
    """Stage "put-signal": a put, and behind it one signal to the same rank."""
    data = _data(ranks, source, destination, n_bytes, "source", engine)
    signals = _signals(data.source, data.destination, op)
    return _description("put_signal", ranks, lanes, Stage("put-signal", transfers=(data,), signals=(signals,)))


def signal(
    ranks: int, source: npt.ArrayLike, destination: npt.ArrayLike, *, op: Literal["set", "add"] = "set"
) -> Description:
    """Stage "signal": one word from `source` to `destination`."""
    sources, destinations = rank_columns(ranks, source, destination)
    return _description("signal", ranks, 1, Stage("signal", signals=(_signals(sources, destinations, op),)))


def wait_until(ranks: int, rank: npt.ArrayLike) -> Description:
    """Stage "wait": each `rank` waits for a signal, whoever may send it."""
    (waiting,) = rank_columns(ranks, rank)
    waits = Waits(waiting, np.full_like(waiting, -1), np.ones_like(waiting), "signal")
    return _description("wait_until", ranks, 1, Stage("wait", waits=(waits,)))


def barrier(ranks: int, last: int | None = None) -> Description:
    """Stages "arrive", "release" (of the last rank only) and "await-release".

    Args:
        ranks: number of ranks.
        last: the rank that arrives last, and releases the others; the highest one if None.
    """
    every = np.arange(ranks, dtype=np.int64)
    ones = np.ones_like(every)
    (releasing,) = rank_columns(ranks, ranks - 1 if last is None else last)
    arrive = Signals(every, 0 * every, ones, SIGNAL_BYTES, "arrival", atomic=True, fetches=True)
    release = Signals(releasing + 0 * every, every, ones, SIGNAL_BYTES, "release")
    await_release = Waits(every, -ones, ones, "release")
    return _description(
        "barrier",
        ranks,
        MAX_LANES,
        Stage("arrive", signals=(arrive,)),
        Stage("release", signals=(release,)),
        Stage("await-release", waits=(await_release,)),
    )


def _data(
    ranks: int,
    source: npt.ArrayLike,
    destination: npt.ArrayLike,
    n_bytes: npt.ArrayLike,
    mover: Literal["source", "destination"],
    engine: Engine,
) -> Transfers:
    sources, destinations = rank_columns(ranks, source, destination)
    sizes = np.broadcast_to(ints(n_bytes), sources.shape).copy()
    return Transfers(sources, destinations, np.ones_like(sources), sizes, mover, "data", engine)


def _signals(source: Ints, destination: Ints, op: Literal["set", "add"]) -> Signals:
    return Signals(source, destination, np.ones_like(source), SIGNAL_BYTES, "signal", atomic=op == "add")


def _description(operation: str, ranks: int, lanes: int, *stages: Stage) -> Description:
    transfers = [t for stage in stages for t in stage.transfers]
    return Description(operation, "direct", ranks, stages, lanes, payload_between(ranks, transfers))
