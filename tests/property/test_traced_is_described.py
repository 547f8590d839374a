"""What was traced is what is described: for every operation, at every rank, the same stages, peers, units and bytes.

So a projection that costs a description is a statement about the code that ran. Descriptions are made from the inputs
of all ranks; traces come from what each rank's operations left behind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

import xccl
from tests.multirank.support import BF16, FLOATS, Round, Shape, launch
from xccl.layout.ring import MAX_LANES
from xccl.protocol import moe, moe_direct, moe_push, onesided, p2p
from xccl.protocol.counts import RoutingCounts
from xccl.protocol.stage import Description, Entry
from xccl.trace.record import Operation, Recorder

Case = TypeVar("Case")

#: Cases of one session: to start ranks takes longer than what they do then.
CASES = 4

SLOTS = {"ring_slots": 8, "slot_bytes": 1024}
ARRAY_BYTES = 1 << 16

sizes = st.one_of(st.integers(0, 2000), st.sampled_from([0, 512, 513, 1024, 8 * 1024, 1 << 16]))


class Message(NamedTuple):
    """One send and its receive."""

    source: int
    destination: int
    n_bytes: int
    lanes: int
    mode: Literal["auto", "ring", "zero_copy"]
    engine: Literal["mte", "dma"]

    def described(self, ranks: int, pushed: int) -> Description:
        """As it happened: of a zero-copy message, `pushed` pieces were written by its sender."""
        ends, how = (self.source, self.destination, self.n_bytes), {"lanes": self.lanes, "engine": self.engine}
        if p2p.is_zero_copy(self.n_bytes, self.mode):
            return p2p.zero_copy(ranks, *ends, **how, pushed=pushed)
        return p2p.send_recv(ranks, *ends, **how, **SLOTS)


class OneSided(NamedTuple):
    """One call of `rank`."""

    call: Literal["put", "iput", "get", "put_signal", "signal"]
    rank: int
    peer: int
    n_bytes: int
    op: Literal["set", "add"]

    def described(self, ranks: int) -> Description:
        if self.call in ("put", "iput"):
            return onesided.put(ranks, self.rank, self.peer, self.n_bytes)
        if self.call == "get":
            return onesided.get(ranks, self.peer, self.rank, self.n_bytes)
        if self.call == "put_signal":
            return onesided.put_signal(ranks, self.rank, self.peer, self.n_bytes, op=self.op)
        return onesided.signal(ranks, self.rank, self.peer, op=self.op)

    def run(self, comm: xccl.Communicator, array: Any, signals: Any) -> None:
        data = np.zeros(self.n_bytes, np.uint8)
        if self.call == "put":
            comm.put(array, data, self.peer)
        elif self.call == "iput":
            comm.iput(array, data, self.peer).wait()
        elif self.call == "get":
            comm.get(data, array, self.peer)
        elif self.call == "put_signal":
            comm.put_signal(array, data, self.peer, signals, 0, 1, op=self.op)
        else:
            comm.signal(signals, 0, 1, self.peer, op=self.op)


def messages(ranks: int) -> st.SearchStrategy[list[Message]]:
    """Any messages between any ranks, to oneself too."""
    rank = st.integers(0, ranks - 1)
    lanes = st.one_of(st.integers(1, 4), st.integers(1, MAX_LANES))
    mode, engine = st.sampled_from(["auto", "ring", "zero_copy"]), st.sampled_from(["mte", "mte", "dma"])
    return st.lists(st.builds(Message, rank, rank, sizes, lanes, mode, engine), max_size=8)


def calls(ranks: int) -> st.SearchStrategy[list[OneSided]]:
    """Any one-sided calls."""
    rank = st.integers(0, ranks - 1)
    kinds = st.sampled_from(["put", "iput", "get", "put_signal", "signal"])
    return st.lists(st.builds(OneSided, kinds, rank, rank, sizes, st.sampled_from(["set", "add"])), max_size=12)


def sessions(
    most_ranks: int, cases: Callable[[int], st.SearchStrategy[Case]]
) -> st.SearchStrategy[tuple[int, list[Case]]]:
    """Ranks, and cases for so many ranks, which they do one after the other."""
    return st.integers(1, most_ranks).flatmap(
        lambda ranks: st.tuples(st.just(ranks), st.lists(cases(ranks), min_size=CASES, max_size=CASES))
    )


def entries_of(recorder: Recorder) -> list[tuple[str, list[Entry]]]:
    """Name and entries of each operation, in order, all of them finished, with events in their times."""
    for operation in recorder.operations:
        assert operation.is_finished
        stages = {stage.name: stage for stage in operation.stages}
        assert len(stages) == len(operation.stages)
        for event in operation.events:
            stage = stages[event.stage]
            assert operation.begin_ns <= stage.begin_ns <= stage.end_ns <= operation.end_ns
            assert (event.begin_ns, event.end_ns, event.rank) == (stage.begin_ns, stage.end_ns, recorder.rank)
        assert [event.entry for event in operation.events] == operation.entries
    return [(operation.name, operation.entries) for operation in recorder.operations]


def each_recorded(
    run: Callable[[xccl.Communicator, Case], Recorder], fabric: str, ranks: int, cases: list[Case], **options: Any
) -> Iterator[tuple[int, Case, Recorder]]:
    """Run the cases in one session: rank, case and what the rank has recorded of it, for all of both."""
    found = launch(lambda comm: [run(comm, case) for case in cases], ranks, fabric, **options)
    for number, case in enumerate(cases):
        for rank in range(ranks):
            yield rank, case, found[rank][number]


@settings(max_examples=60 // CASES)
@given(session=sessions(5, calls))
def test_one_sided(fabric: str, session: tuple[int, list[list[OneSided]]]) -> None:
    """put, get, put_signal, signal, wait_until."""
    ranks, programs = session

    def run(comm: xccl.Communicator, program: list[OneSided]) -> Recorder:
        array, signals = comm.empty(ARRAY_BYTES, np.uint8), comm.signals(1)
        with comm.trace() as recorder:
            for call in program:
                if call.rank == comm.rank:
                    call.run(comm, array, signals)
            if any(call.peer == comm.rank and "signal" in call.call for call in program):
                comm.wait_until(signals, 0, "ge", 1)
        comm.barrier()
        return recorder

    for rank, program, recorder in each_recorded(run, fabric, ranks, programs):
        expected = [
            (call.call.removeprefix("i"), call.described(ranks).entries(rank)) for call in program if call.rank == rank
        ]
        if any(call.peer == rank and "signal" in call.call for call in program):
            expected.append(("wait_until", onesided.wait_until(ranks, rank).entries(rank)))
        assert entries_of(recorder) == expected


@settings(max_examples=10)
@given(ranks=st.integers(1, 6), barriers=st.integers(1, 5))
def test_barrier(fabric: str, ranks: int, barriers: int) -> None:
    """Whoever came last has released the others; the rest is the same at all ranks."""

    def main(comm: xccl.Communicator) -> Recorder:
        with comm.trace() as recorder:
            for _ in range(barriers):
                comm.barrier()
        return recorder

    recorders = launch(main, ranks, fabric)
    for number in range(barriers):
        found = [entries_of(recorder)[number][1] for recorder in recorders]
        last = [rank for rank, entries in enumerate(found) if any(entry.stage == "release" for entry in entries)]
        assert len(last) == 1
        described = onesided.barrier(ranks, last[0])
        assert found == [described.entries(rank) for rank in range(ranks)]


@settings(max_examples=60 // CASES)
@given(session=sessions(5, messages))
def test_send_and_receive(fabric: str, session: tuple[int, list[list[Message]]]) -> None:
    """All messages under way at once, in rings of a few slots; one to oneself is two operations of one rank."""
    ranks, programs = session

    def run(comm: xccl.Communicator, program: list[Message]) -> Recorder:
        with comm.trace() as recorder:
            requests = []
            for number, (source, destination, n_bytes, lanes, mode, engine) in enumerate(program):
                buffer = np.zeros(n_bytes, np.uint8)
                if source == comm.rank:
                    requests.append(comm.isend(buffer, destination, number, lanes, mode, engine))
                if destination == comm.rank:
                    requests.append(comm.irecv(buffer.copy(), source, number, lanes, engine))
            for request in requests:
                request.wait()
        return recorder

    recorded = list(each_recorded(run, fabric, ranks, programs, **SLOTS))
    pushed: defaultdict[tuple[int, int | None], int] = defaultdict(int)
    for i, (_, _, recorder) in enumerate(recorded):
        for operation in recorder.operations:
            if operation.name == "send":
                pushed[i // ranks, operation.number] = pieces_pushed(operation)
    for i, (rank, program, recorder) in enumerate(recorded):
        found: defaultdict[int | None, list[Entry]] = defaultdict(list)
        for operation in recorder.operations:
            found[operation.number] += operation.entries
        entries_of(recorder)
        expected = {
            n: message.described(ranks, pushed[i // ranks, n]).entries(rank) for n, message in enumerate(program)
        }
        assert {n: sorted(entries) for n, entries in found.items()} == {n: e for n, e in expected.items() if e}


def pieces_pushed(operation: Operation) -> int:
    """Pieces of a zero-copy message that its sender has written: that depends on who came when."""
    return sum(entry.units for entry in operation.entries if (entry.stage, entry.kind) == ("push", "transfer"))


@pytest.mark.parametrize("n_bytes", [0, 100, 3000, 100_000])
@pytest.mark.parametrize("mode", ["ring", "zero_copy"])
def test_blocking_send_and_receive(fabric: str, n_bytes: int, mode: Literal["ring", "zero_copy"]) -> None:
    def main(comm: xccl.Communicator) -> Recorder:
        buffer = np.zeros(n_bytes, np.uint8)
        with comm.trace() as recorder:
            if comm.rank == 0:
                comm.send(buffer, 1, event_id=5, lanes=3, mode=mode)
            else:
                comm.recv(buffer, 0, event_id=5, lanes=3)
        return recorder

    sender, receiver = launch(main, 2, fabric)
    if mode == "ring":
        described = p2p.send_recv(2, 0, 1, n_bytes, lanes=3)
    else:
        described = p2p.zero_copy(2, 0, 1, n_bytes, lanes=3, pushed=pieces_pushed(sender.operations[0]))
    assert entries_of(sender) == [("send", described.entries(0))]
    assert entries_of(receiver) == [("recv", described.entries(1))]


@dataclass(frozen=True)
class MoeCase:
    """An ExpertParallel object, and what is done with it.

    Attributes:
        shape: of the object.
        tokens: of each rank in each round.
        seed: of the data.
        hot: choose few experts only.
        calls: "dispatch", "repeat" (of the last dispatch), "combine" (of the last dispatch), or "lent" (a combine of
            outputs in memory that the object has lent), one after the other.
    """

    shape: Shape
    tokens: list[list[int]]
    seed: int
    hot: bool
    calls: list[str]


@st.composite
def moe_cases(draw: st.DrawFn, ranks: int) -> MoeCase:
    """Any shape, protocol, rows and calls."""
    shape = Shape(
        num_experts=draw(st.integers(1, 4 * ranks)),
        hidden=draw(st.integers(1, 70)),
        top_k=draw(st.integers(1, 6)),
        max_tokens=20,
        dtype=draw(st.sampled_from(FLOATS)),
        quant=draw(st.sampled_from(["int8", "none"])),
        protocol=draw(st.sampled_from(["pull", "push", "direct"])),
        rows=draw(st.sampled_from(["expanded", "dedup"])),
        shared=draw(st.booleans()),
    )
    tokens = st.lists(st.integers(0, shape.max_tokens), min_size=ranks, max_size=ranks)
    rounds = draw(st.lists(tokens, min_size=1, max_size=3))
    calls = draw(st.lists(st.sampled_from(["dispatch", "combine", "lent", "repeat"]), max_size=6))
    return MoeCase(shape, rounds, draw(st.integers(0, 1 << 30)), draw(st.booleans()), ["dispatch", *calls])


def described_calls(case: MoeCase, rounds: list[Round]) -> list[tuple[str, Description]]:
    """The descriptions of the calls. In turn are a dispatch after a combine, and a combine after a dispatch."""
    shape, found = case.shape, []
    quant: moe.Quant = "int8" if shape.quant == "int8" else "none"
    rows: moe.Rows = "dedup" if shape.rows == "dedup" else "expanded"
    common = {"hidden": shape.hidden, "item_bytes": shape.dtype.itemsize, "rows": rows}
    described: Any = {"pull": moe, "push": moe_push, "direct": moe_direct}[shape.protocol]
    number, before = -1, "combine"
    for call in case.calls:
        number += call == "dispatch"
        routing = RoutingCounts.from_topk(rounds[number % len(rounds)].topk_idxs, shape.num_experts)
        name = "combine" if call in ("combine", "lent") else "dispatch"
        options: dict[str, Any] = dict(common)
        if shape.protocol == "push":
            options["in_turn"] = name != before
        if name == "combine":
            if shape.protocol == "push":
                options["loopback"] = False
            else:
                options["in_place"] = call == "lent" or shape.rows == "dedup"  # partial sums are lent, too
            found.append((name, described.combine(routing, shared_expert=shape.shared, **options)))
        else:
            if shape.protocol != "direct":
                options["loopback"] = quant == "int8"
            found.append((name, described.dispatch(routing, quant=quant, cached=call == "repeat", **options)))
        before = name
    return found


@settings(max_examples=100 // CASES)
@example(
    session=(
        3,
        [
            MoeCase(Shape(num_experts=3, quant="int8"), [[0, 0, 0], [5, 0, 16]], 0, False, ["dispatch", "combine"] * 2),
            MoeCase(Shape(num_experts=3), [[0, 0, 0], [5, 0, 16]], 0, False, ["dispatch", "lent"] * 2),
            MoeCase(
                Shape(num_experts=5, protocol="direct", rows="dedup"), [[7, 0, 3]], 1, True, ["dispatch", "repeat"]
            ),
            MoeCase(Shape(num_experts=2, protocol="push"), [[7, 0, 3]], 1, True, ["dispatch"] * 2 + ["combine"] * 2),
        ],
    )
)
@example(session=(1, [MoeCase(Shape(num_experts=1, dtype=BF16), [[7]], 1, True, ["dispatch", "combine"])]))
@given(session=sessions(6, moe_cases))
def test_dispatch_and_combine(fabric: str, session: tuple[int, list[MoeCase]]) -> None:
    """Ragged tokens, slots and tokens without expert, experts without tokens, an expert named twice, any order."""
    ranks, cases = session
    rounds = {
        id(case): [
            case.shape.round(case.seed + i, each, no_expert=0.3, hot=case.hot) for i, each in enumerate(case.tokens)
        ]
        for case in cases
    }

    def run(comm: xccl.Communicator, case: MoeCase) -> Recorder:
        ep = case.shape.expert_parallel(comm)
        number = -1
        with comm.trace() as recorder:
            for call in case.calls:
                number += call == "dispatch"
                each = rounds[id(case)][number % len(case.tokens)]
                if call == "dispatch":
                    d = each.dispatch(comm.rank, ep)
                elif call == "repeat":
                    d = ep.dispatch(each.xs[comm.rank], handle=d)
                    each.check_dispatched(comm.rank, d)
                else:
                    each.combine(comm.rank, ep, d, lent=call == "lent")
        ep.free()
        return recorder

    for rank, case, recorder in each_recorded(run, fabric, ranks, cases):
        expected = described_calls(case, rounds[id(case)])
        assert entries_of(recorder) == [(name, described.entries(rank)) for name, described in expected]
        for operation, (_, described) in zip(recorder.operations, expected, strict=True):
            assert [stage.name for stage in operation.stages] == [stage.name for stage in described.stages]
