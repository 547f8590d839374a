"""A2E and E2A: attention and experts on different dies (XDS §3.3), directly and by way of trampolines.

Ranks 0 to D*A-1 are attention dies, domain after domain; ranks D*A to D*A+E-1 are expert dies. One operation is that of
one domain: those of the others have no part in it. Both operations are pulls (see `xccl.protocol.moe`): bytes lie in
the own managed area, fields tell the peers, and the bulk is moved by the DMA engine, so that the compute streams keep
their transfer engines. A rank overwrites its area only after "pulled" of all who read it: those of the operation
before, which in E2A may have been another domain's.

Direct
- A2E: await-pulled, write (attention; quantised if asked), announce (a field from each attention die to each expert
  die), await-fields, pull (expert dies), release.
- E2A: the same backwards; the attention die sums a token's rows as they land, while more are pulled.
- An attention die writes a field for each expert die, 288 of them: too many small writes for a core.

Trampolines: T expert dies, as many as there are attention dies if there are enough. Attention die a of a domain belongs
to trampoline a mod T.
- A2E: an attention die announces all it has to its trampoline, by one field; the trampoline pulls it as a whole into
  its own managed area, and then does what attention dies do in the direct protocol ("forward-" stages): a field to each
  other expert die, which pulls its rows from there. What is for the trampoline's own experts it copies.
- E2A: an expert die announces to each trampoline the rows for that one's attention dies; trampolines pull them, and
  announce all to each of their attention dies by one field; it pulls, and sums as rows land.

With the rows of A2E travel the scales, the places (token and slot of each row) and "firsts", the table of the first row
of each expert: whoever holds it finds the run for each expert, and knows its length.

`copies` says what travels between an attention die and its trampoline. "row": a row for each expert of a token, as
attention has written them, nothing to be done at the trampoline; this is what `xccl.comm.a2e` does. "token": each token
once; the trampoline makes the rows (A2E) or sums them (E2A, with the gate weights, which have come with the tokens).
The papers do not say; "row" is the simpler.

Units: a row where MTE moves it; with DMA, a run of rows that lie together at both ends, since the engine takes GBs at
once. In A2E the rows of a pair make a run for each expert; in E2A they lie in the order in which the origin has sent
them, all together. Tables are read by the cores, which need them first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from ..errors import UsageError
from ..layout.moe import EXPERT_FIELD_BYTES
from ..layout.ring import MAX_LANES
from .counts import RoutingCounts
from .moe import PLACE_BYTES, PULLED_BYTES, SCALE_BYTES, WEIGHT_BYTES, Quant
from .stage import Description, Engine, Ints, Mover, Signals, Stage, Transfers, Waits, Work, payload_between

Copies = Literal["row", "token"]

#: One entry of the table of first rows.
FIRST_BYTES = 4
#: What is payload, as opposed to what says where it belongs.
_PAYLOAD = ("rows", "scales")


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
    domains: int = 1,
    domain: int = 0,
) -> Description:
    """Each token from its attention die to its expert dies.

    Args:
        routing: rows from the domain's attention dies (sources) to expert dies (destinations).
        hidden: elements of a token.
        item_bytes: of an element before quantisation.
        quant: "int8", with a float32 scale a token, or "none".
        lanes: of each rank.
        engine: what pulls the bulk.
        trampolines: how many expert dies forward; 0 is direct. See `default_trampolines`.
        copies: see above.
        forward_engine: what pulls the many small runs between trampolines and expert dies; None is `engine`.
        domains: how many share the expert dies.
        domain: whose operation it is.
    """
    flow = _Flow(routing, trampolines, engine, forward_engine or engine, domains, domain)
    row = _Row(hidden if quant == "int8" else hidden * item_bytes, SCALE_BYTES if quant == "int8" else 0)
    once = trampolines > 0 and copies == "token"
    written, sent = routing.sending if once else routing.sent, routing.sent
    tokens = routing.sending
    work: tuple[Work, ...] = ()
    if quant == "int8":
        work = (Work(flow.attention, "quantise", tokens, tokens * hidden * item_bytes, tokens * hidden),)
    table = np.full_like(sent, FIRST_BYTES * (routing.experts + 1))
    at, one = flow.attention, np.ones_like(sent)
    firsts = Transfers(at, at, one, table, "source", "firsts")
    block = row.moved(at, at, written, sent, np.minimum(sent, 1), "source", "mte")
    write = Stage("write", transfers=(firsts, *block), work=work, lane_barrier=True)
    if not trampolines:
        source, destination = flow.pair_attention, flow.pair_expert
        rows, runs = routing.rows.ravel(), routing.runs.ravel()
        firsts = flow.tables(source, destination, np.ones_like(rows))
        block = row.moved(source, destination, rows, rows, runs, "destination", engine)
        pull = Stage("pull", transfers=(firsts, *block))
        stages = flow.pull((source, destination), write, pull)
    else:
        own = flow.own_trampoline
        firsts = Transfers(at, own, one, table, "destination", "firsts")
        block = row.moved(at, own, written, sent, np.minimum(sent, 1), "destination", engine)
        first = flow.pull((at, own), write, Stage("pull", transfers=(firsts, *block)))
        second = flow.forward(flow.to_experts(), flow.forwarded(row, scattered=once))
        # A trampoline's area is free when the forwarding before is over.
        stages = (second[0], *first, *second[1:])
    return _description("a2e", flow, stages, lanes)


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
    domains: int = 1,
    domain: int = 0,
    before: int | None = None,
) -> Description:
    """The outputs of a token's experts back to its attention die, and their weighted sum.

    Args:
        routing: that of the A2E.
        hidden: as for `a2e`, and so the others.
        item_bytes: of an element.
        lanes: of each rank.
        engine: what pulls the bulk.
        trampolines: how many expert dies hand outputs on.
        copies: see above.
        forward_engine: what pulls the many small runs.
        domains: how many share the expert dies.
        domain: whose operation it is.
        before: whose the one before was, which is awaited to have been pulled; None is the same domain.
    """
    flow = _Flow(routing, trampolines, engine, forward_engine or engine, domains, domain)
    readers = flow.attention + ((domain if before is None else before) - domain) * routing.sources
    row_bytes = hidden * item_bytes
    area = Transfers(flow.expert, flow.expert, routing.received, routing.received * row_bytes, "source", "rows")
    write = Stage("write", transfers=(area,), lane_barrier=True)
    once = trampolines > 0 and copies == "token"
    summed = (routing.sent + routing.tokens) * row_bytes + routing.sent * WEIGHT_BYTES
    at_attention = Work(flow.attention, "reduce", routing.tokens, summed, routing.sent * hidden)
    if not trampolines:
        rows = routing.rows.ravel()
        units = _units(engine, rows, np.minimum(rows, 1))
        source, destination = flow.pair_expert, flow.pair_attention
        moved = Transfers(source, destination, units, rows * row_bytes, "destination", "rows", engine)
        awaited = (source, np.repeat(readers, routing.destinations))
        stages = flow.pull(
            (source, destination), write, Stage("pull", transfers=(moved,), work=(at_attention,)), awaited
        )
    else:
        returned = routing.sending if once else routing.sent
        pieces = _units(engine, returned, np.minimum(returned, 1))
        own, at, by = flow.own_trampoline, flow.attention, flow.by_trampoline
        at_trampoline = Work(flow.trampoline, "reduce", by(routing.tokens), by(summed), by(routing.sent) * hidden)
        gathered = replace(flow.gathered(row_bytes), work=(at_trampoline,) if once else ())
        bulk = Transfers(own, at, pieces, returned * row_bytes, "destination", "rows", engine)
        handed = Stage("forward-pull", transfers=(bulk,), work=() if once else (at_attention,))
        first = flow.pull(flow.to_experts()[::-1], write, gathered)
        second = flow.forward((own, at), handed, (own, readers))
        stages = (second[0], *first, *second[1:])
    return _description("e2a", flow, stages, lanes)


def default_trampolines(attention: int, experts: int) -> int:
    """As many as there are attention dies in a domain, if there are enough expert dies (XDS §3.3)."""
    return min(attention, experts)


class _Row:
    """What a row of A2E is made of."""

    def __init__(self, payload_bytes: int, scale_bytes: int) -> None:
        self.payload_bytes = payload_bytes
        self.scale_bytes = scale_bytes

    def moved(
        self, source: Ints, destination: Ints, rows: Ints, places: Ints, runs: Ints, mover: Mover, engine: Engine
    ) -> tuple[Transfers, ...]:
        """Payloads of `rows`, `places`, and scales if there are any; the latter two in runs."""
        rest = [(places, PLACE_BYTES, "places")] + [(rows, self.scale_bytes, "scales")] * (self.scale_bytes > 0)
        units = _units(engine, rows, runs)
        return (
            Transfers(source, destination, units, rows * self.payload_bytes, mover, "rows", engine),
            *(Transfers(source, destination, runs, n * size, mover, what, engine) for n, size, what in rest),
        )


class _Flow:
    """Who talks to whom, as columns of ranks."""

    def __init__(
        self,
        routing: RoutingCounts,
        trampolines: int,
        engine: Engine,
        forward_engine: Engine,
        domains: int,
        domain: int,
    ) -> None:
        a, e = routing.sources, routing.destinations
        if not 0 <= trampolines <= e:
            raise UsageError(f"trampolines is {trampolines}, allowed are 0 to {e}", value=trampolines, bound=(0, e))
        if not 0 <= domain < domains:
            raise UsageError(f"domain is {domain}, allowed are 0 to {domains - 1}", value=domain, bound=domains - 1)
        self.routing = routing
        self.engine: Engine = engine
        self.forward_engine: Engine = forward_engine
        self.ranks = domains * a + e
        self.attention: Ints = domain * a + np.arange(a, dtype=np.int64)
        self.expert: Ints = domains * a + np.arange(e, dtype=np.int64)
        #: All pairs, attention-major: rows of `routing.rows.ravel()`.
        self.pair_attention: Ints = np.repeat(self.attention, e)
        self.pair_expert: Ints = np.tile(self.expert, a)
        self.trampolines = trampolines
        self.trampoline: Ints = self.expert[:trampolines]
        self._served_by: Ints = np.arange(a, dtype=np.int64) % max(trampolines, 1)
        self.own_trampoline: Ints = self.expert[self._served_by]

    def to_experts(self) -> tuple[Ints, Ints]:
        """Every trampoline and every expert die, but none with itself."""
        source = np.repeat(self.trampoline, len(self.expert))
        destination = np.tile(self.expert, self.trampolines)
        other = source != destination
        return source[other], destination[other]

    def by_trampoline(self, column: Ints) -> Ints:
        """[trampolines] sums over the attention dies of each."""
        total = np.zeros((self.trampolines, *column.shape[1:]), np.int64)
        np.add.at(total, self._served_by, column)
        return total

    def tables(self, source: Ints, destination: Ints, blocks: Ints) -> Transfers:
        """The entries for the experts of the destination, from the tables of `blocks` attention dies."""
        entries_bytes = FIRST_BYTES * (self.routing.local_experts + 1)
        return Transfers(source, destination, blocks, blocks * entries_bytes, "destination", "firsts")

    def forwarded(self, row: _Row, *, scattered: bool) -> Stage:
        """Pull of each expert die from the trampolines; scattered if the rows for it do not lie together there."""
        source, destination = self._through()
        rows, runs = (self.by_trampoline(column).ravel() for column in (self.routing.rows, self.routing.runs))
        blocks = np.repeat(self.by_trampoline(np.ones_like(self.attention)), len(self.expert))
        moved = row.moved(
            source, destination, rows, rows, rows if scattered else runs, "destination", self.forward_engine
        )
        return Stage("forward-pull", transfers=(self.tables(source, destination, blocks), *moved))

    def gathered(self, row_bytes: int) -> Stage:
        """Pull of each trampoline from the expert dies."""
        destination, source = self._through()
        rows = self.by_trampoline(self.routing.rows).ravel()
        blocks = self.by_trampoline(np.minimum(self.routing.rows, 1)).ravel()
        units = _units(self.forward_engine, rows, blocks)
        moved = Transfers(source, destination, units, rows * row_bytes, "destination", "rows", self.forward_engine)
        return Stage("pull", transfers=(moved,))

    def _through(self) -> tuple[Ints, Ints]:
        """Trampoline and expert die; all pairs, a trampoline with itself included."""
        return np.repeat(self.trampoline, len(self.expert)), np.tile(self.expert, self.trampolines)

    def pull(
        self, pairs: tuple[Ints, Ints], write: Stage, pull: Stage, before: tuple[Ints, Ints] | None = None
    ) -> tuple[Stage, ...]:
        """The stages of a pull, with fields from the first of each pair to the second.

        `before` are the pairs of the operation before, if they were others.
        """
        await_pulled, *rest = _handshake(pairs, "", pull, before or pairs)
        return (await_pulled, write, *rest)

    def forward(
        self, pairs: tuple[Ints, Ints], pull: Stage, before: tuple[Ints, Ints] | None = None
    ) -> tuple[Stage, ...]:
        """The same, for what lies in the area already."""
        return _handshake(pairs, "forward-", pull, before or pairs)


def _units(engine: Engine, rows: Ints, runs: Ints) -> Ints:
    """Pieces of a transfer of so many rows, in so many runs."""
    return runs if engine == "dma" else rows


def _handshake(pairs: tuple[Ints, Ints], prefix: str, pull: Stage, before: tuple[Ints, Ints]) -> tuple[Stage, ...]:
    owner, reader = pairs
    ones = np.ones_like(owner)
    return (
        Stage(f"{prefix}await-pulled", (Waits(*before, np.ones_like(before[0]), f"{prefix}pulled"),)),
        Stage(f"{prefix}announce", signals=(Signals(owner, reader, ones, EXPERT_FIELD_BYTES, f"{prefix}field"),)),
        Stage(f"{prefix}await-fields", (Waits(reader, owner, ones, f"{prefix}field"),)),
        pull,
        Stage(f"{prefix}release", signals=(Signals(reader, owner, ones, PULLED_BYTES, f"{prefix}pulled"),)),
    )


def _description(operation: str, flow: _Flow, stages: tuple[Stage, ...], lanes: int) -> Description:
    moved = [t for stage in stages for t in stage.transfers if t.what in _PAYLOAD]
    protocol = "trampoline" if flow.trampolines else "direct"
    return Description(operation, protocol, flow.ranks, stages, lanes, payload_between(flow.ranks, moved))
