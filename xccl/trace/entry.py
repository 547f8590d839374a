"""The common currency of descriptions and traces: one fact about one rank in one stage of an operation."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """One fact about one rank in one stage.

    `protocol` says which entries an operation must have, `comm` records those that it had, and a test compares the two.

    Attributes:
        stage: name of the stage.
        kind: transfer, signal, wait or work.
        what: the payload, the signal, or the kind of work.
        peer: the other rank; the rank itself for work and local copies, -1 for whichever rank it may be.
        lane: -1 unless a lane is named.
        units: pieces moved, signals written or awaited, rows or tokens worked on.
        n_bytes: bytes moved or written (0 for waits); for work, see `Work` in `xccl.protocol.stage`.
    """

    stage: str
    kind: str
    what: str
    peer: int
    lane: int
    units: int
    n_bytes: int
