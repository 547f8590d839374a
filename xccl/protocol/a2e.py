"""A2E and E2A: attention and experts on different dies (XDS §3.3), directly and by way of trampolines.

Ranks 0 to A-1 are attention dies, ranks A to A+E-1 expert dies. Both operations are pulls (see `xccl.protocol.moe`):
bytes lie in the own managed area, fields tell the peers, and the bulk is moved by the DMA engine, so that the compute
streams keep their transfer engines. A rank overwrites its area only after "pulled" of all who read it.

Direct
- A2E: await-pulled, write (attention; quantised if asked), announce (a field from each attention die to each expert
  die), await-fields, pull (expert dies), release.
- E2A: the same backwards; the attention die sums a token's rows as they land, while more are pulled.
- An attention die writes a field for each expert die, 288 of them: too many small writes for a core.

Trampolines: T expert dies, as many as there are attention dies if there are enough. Attention die a belongs to
trampoline A + a mod T.
- A2E: an attention die announces all it has to its trampoline, by one field; the trampoline pulls it as a whole into
  its own managed area, and then does what attention dies do in the direct protocol ("forward-" stages): a field to each
  other expert die, which pulls its rows from there. What is for the trampoline's own experts it copies.
- E2A: an expert die announces to each trampoline the rows for that one's attention dies; trampolines pull them, and
  announce all to each of their attention dies by one field; it pulls, and sums as rows land.

`copies` says what travels between an attention die and its trampoline. "row": a row for each expert of a token, as
attention has written them, nothing to be done at the trampoline. "token": each token once; the trampoline makes the
rows (A2E) or sums them (E2A, with the gate weights, which have come with the tokens). The papers do not say; "row" is
the simpler.

Units: a row where MTE moves it; with DMA, a run of rows that lie together at both ends, since the engine takes GBs at
once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from ..errors import UsageError
from ..layout.moe import EXPERT_FIELD_BYTES, SOURCE_DTYPE
from ..layout.ring import MAX_LANES
from .counts import RoutingCounts
from .moe import PULLED_BYTES, SCALE_BYTES, WEIGHT_BYTES, Quant
from .stage import Description, Engine, Ints, Signals, Stage, Transfers, Waits, Work, payload_between

Copies = Literal["row", "token"]

#: Rank, token and slot of a row: with trampolines in between a row does not come from the rank that it is pulled from.
SOURCE_BYTES = SOURCE_DTYPE.itemsize


def a2e(
    routing: RoutingCounts,
    *,
    hidden: int,
    item_bytes: int = 2,
    quant: Quant = "int8",
    lanes: int = MAX_LANES,
    engine: Engine = "dma",
    trampolines: int = 0,
    copies: Copies = "row",
    forward_engine: Engine | None = None,
) -> Description:
    """Each token from its attention die to its expert dies.

    Args:
        routing: rows from attention dies (sources) to expert dies (destinations).
        hidden: elements of a token.
        item_bytes: of an element before quantisation.
        quant: "int8", with a float32 scale a token, or "none".
        lanes: of each rank.
        engine: what pulls the bulk.
        trampolines: how many expert dies forward; 0 is direct. See `default_trampolines`.
        copies: see above.
        forward_engine: what pulls the many small runs between trampolines and expert dies; None is `engine`.
    """
    flow = _Flow(routing, trampolines, engine, forward_engine or engine)
    payload_bytes = hidden + SCALE_BYTES if quant == "int8" else hidden * item_bytes
    row_bytes = payload_bytes + SOURCE_BYTES
    once = trampolines > 0 and copies == "token"
    written = routing.sending if once else routing.sent
    tokens = routing.sending
    work: tuple[Work, ...] = ()
    if quant == "int8":
        work = (Work(flow.attention, "quantise", tokens, tokens * hidden * item_bytes, tokens * hidden),)
    area = Transfers(flow.attention, flow.attention, written, written * row_bytes, "source", "rows")
    write = Stage("write", transfers=(area,), work=work, lane_barrier=True)
    if not trampolines:
        stages = flow.pull(flow.to_experts(), write, flow.rows_from(flow.pair_attention, flow.pair_expert, row_bytes))
    else:
        bulk = Transfers(
            flow.attention, flow.own_trampoline, _units(engine, written, np.minimum(written, 1)), written * row_bytes,
            "destination", "rows", engine,
        )  # fmt: skip
        first = flow.pull((flow.attention, flow.own_trampoline), write, Stage("pull", transfers=(bulk,)))
        second = flow.forward(flow.to_experts(forwarded=True), flow.forwarded(row_bytes, scattered=once))
        # A trampoline's area is free when the forwarding before is over.
        stages = (second[0], *first, *second[1:])
    return _description("a2e", flow, stages, lanes, row_bytes, payload_bytes)


def e2a(
    routing: RoutingCounts,
    *,
    hidden: int,
    item_bytes: int = 2,
    lanes: int = MAX_LANES,
    engine: Engine = "dma",
    trampolines: int = 0,
    copies: Copies = "row",
    forward_engine: Engine | None = None,
) -> Description:
    """The outputs of a token's experts back to its attention die, and their weighted sum; arguments as for `a2e`."""
    flow = _Flow(routing, trampolines, engine, forward_engine or engine)
    row_bytes = hidden * item_bytes
    area = Transfers(flow.expert, flow.expert, routing.received, routing.received * row_bytes, "source", "rows")
    write = Stage("write", transfers=(area,), lane_barrier=True)
    once = trampolines > 0 and copies == "token"
    summed = (routing.sent + routing.tokens) * row_bytes + routing.sent * WEIGHT_BYTES
    at_attention = Work(flow.attention, "reduce", routing.tokens, summed, routing.sent * hidden)
    if not trampolines:
        pull = flow.rows_from(flow.pair_expert, flow.pair_attention, row_bytes)
        pull = replace(pull, work=(at_attention,))
        stages = flow.pull((flow.pair_expert, flow.pair_attention), write, pull)
    else:
        at = flow.by_trampoline
        at_trampoline = Work(flow.trampoline, "reduce", at(routing.tokens), at(summed), at(routing.sent) * hidden)
        gathered = replace(flow.gathered(row_bytes), work=(at_trampoline,) if once else ())
        to_trampolines = flow.to_experts(forwarded=True)[::-1]
        returned = routing.sending if once else routing.sent
        pieces = _units(engine, returned, np.minimum(returned, 1))
        bulk = Transfers(
            flow.own_trampoline, flow.attention, pieces, returned * row_bytes, "destination", "rows", engine
        )  # fmt: skip
        handed = Stage("forward-pull", transfers=(bulk,), work=() if once else (at_attention,))
        first = flow.pull(to_trampolines, write, gathered)
        second = flow.forward((flow.own_trampoline, flow.attention), handed)
        stages = (second[0], *first, *second[1:])
    return _description("e2a", flow, stages, lanes, row_bytes, row_bytes)


def default_trampolines(attention: int, experts: int) -> int:
    """As many as there are attention dies, if there are enough expert dies (XDS §3.3)."""
    return min(attention, experts)


class _Flow:
    """Who talks to whom, as columns of ranks."""

    def __init__(self, routing: RoutingCounts, trampolines: int, engine: Engine, forward_engine: Engine) -> None:
        a, e = routing.sources, routing.destinations
        if not 0 <= trampolines <= e:
            raise UsageError(f"trampolines is {trampolines}, allowed are 0 to {e}", value=trampolines, bound=(0, e))
        self.routing = routing
        self.engine: Engine = engine
        self.forward_engine: Engine = forward_engine
        self.ranks = a + e
        self.attention: Ints = np.arange(a, dtype=np.int64)
        self.expert: Ints = a + np.arange(e, dtype=np.int64)
        #: All pairs, attention-major: rows of `routing.rows.ravel()`.
        self.pair_attention: Ints = np.repeat(self.attention, e)
        self.pair_expert: Ints = np.tile(self.expert, a)
        self.trampolines = trampolines
        self.trampoline: Ints = self.expert[:trampolines]
        self.own_trampoline: Ints = a + self.attention % max(trampolines, 1)

    def to_experts(self, *, forwarded: bool = False) -> tuple[Ints, Ints]:
        """Writers and readers of fields: attention dies, or trampolines, and expert dies; none with itself."""
        if not forwarded:
            return self.pair_attention, self.pair_expert
        source = np.repeat(self.trampoline, len(self.expert))
        destination = np.tile(self.expert, self.trampolines)
        other = source != destination
        return source[other], destination[other]

    def by_trampoline(self, column: Ints) -> Ints:
        """[trampolines] sums over the attention dies of each."""
        total = np.zeros((self.trampolines, *column.shape[1:]), np.int64)
        np.add.at(total, self.own_trampoline - len(self.attention), column)
        return total

    def rows_from(self, source: Ints, destination: Ints, row_bytes: int) -> Stage:
        """Pull of the rows of all pairs of attention and expert dies."""
        rows, runs = self.routing.rows.ravel(), self.routing.runs.ravel()
        moved = Transfers(
            source, destination, _units(self.engine, rows, runs), rows * row_bytes, "destination", "rows", self.engine
        )
        return Stage("pull", transfers=(moved,))

    def forwarded(self, row_bytes: int, *, scattered: bool) -> Stage:
        """Pull of each expert die from the trampolines; scattered if the rows for it do not lie together there."""
        source, destination, units, n_bytes = self._through(row_bytes)
        if scattered:
            units = n_bytes // row_bytes
        moved = Transfers(source, destination, units, n_bytes, "destination", "rows", self.forward_engine)
        return Stage("forward-pull", transfers=(moved,))

    def gathered(self, row_bytes: int) -> Stage:
        """Pull of each trampoline from the expert dies."""
        destination, source, units, n_bytes = self._through(row_bytes)
        moved = Transfers(source, destination, units, n_bytes, "destination", "rows", self.forward_engine)
        return Stage("pull", transfers=(moved,))

    def _through(self, row_bytes: int) -> tuple[Ints, Ints, Ints, Ints]:
        """Trampoline, expert die, units and bytes; all pairs, a trampoline with itself included."""
        rows, runs = (self.by_trampoline(column).ravel() for column in (self.routing.rows, self.routing.runs))
        source = np.repeat(self.trampoline, len(self.expert))
        return source, np.tile(self.expert, self.trampolines), _units(self.forward_engine, rows, runs), rows * row_bytes

    def pull(self, pairs: tuple[Ints, Ints], write: Stage, pull: Stage) -> tuple[Stage, ...]:
        """The stages of a pull, with fields from the first of each pair to the second."""
        await_pulled, *rest = _handshake(pairs, "", pull)
        return (await_pulled, write, *rest)

    def forward(self, pairs: tuple[Ints, Ints], pull: Stage) -> tuple[Stage, ...]:
        """The same, for what lies in the area already."""
        return _handshake(pairs, "forward-", pull)


def _units(engine: Engine, rows: Ints, runs: Ints) -> Ints:
    """Pieces of a transfer of so many rows, in so many runs."""
    return runs if engine == "dma" else rows


def _handshake(pairs: tuple[Ints, Ints], prefix: str, pull: Stage) -> tuple[Stage, ...]:
    owner, reader = pairs
    ones = np.ones_like(owner)
    return (
        Stage(f"{prefix}await-pulled", (Waits(owner, reader, ones, f"{prefix}pulled"),)),
        Stage(f"{prefix}announce", signals=(Signals(owner, reader, ones, EXPERT_FIELD_BYTES, f"{prefix}field"),)),
        Stage(f"{prefix}await-fields", (Waits(reader, owner, ones, f"{prefix}field"),)),
        pull,
        Stage(f"{prefix}release", signals=(Signals(reader, owner, ones, PULLED_BYTES, f"{prefix}pulled"),)),
    )


def _description(
    operation: str, flow: _Flow, stages: tuple[Stage, ...], lanes: int, row_bytes: int, payload_bytes: int
) -> Description:
    moved = [t for stage in stages for t in stage.transfers]
    payload = payload_between(flow.ranks, moved) // row_bytes * payload_bytes
    protocol = "trampoline" if flow.trampolines else "direct"
    return Description(operation, protocol, flow.ranks, stages, lanes, payload)
