"""Ranks that wait for long are seen from outside: for whom, in which operation, and since when.

One rank is late. It looks at its own session as `xccl top` does, until it sees the others wait for it, and then does its
part: so each operation ends well, and only because the waits were seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pytest

import xccl
from tests.multirank.a2e_support import Layout
from tests.multirank.support import FP32, Shape, launch
from xccl.cli.top_waits import Analysis, analyse
from xccl.runtime.sessions import ObservedSession, take_snapshot

RANKS: Final = 4
LATE: Final = 1
#: A wait is shown after a slice or two, of 50 ms each; here others use the machine, too.
PATIENCE_S: Final = 15.0

Act = Callable[[], object]


def own_session() -> ObservedSession:
    """The session of this process, as others see it."""
    return next(s for s in take_snapshot().sessions if any(rank.pid == os.getpid() for rank in s.ranks))


def eventually(condition: Callable[[Analysis], bool]) -> Analysis:
    """What is seen when the condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        seen = analyse(own_session())
        if condition(seen):
            return seen
        assert time.monotonic() < deadline, f"this is all that was seen: {seen}"
        time.sleep(0.005)


@dataclass(frozen=True)
class Case:
    """An operation that hangs.

    Attributes:
        make: makes what is needed, at all ranks; the operation of this rank.
        shown: the beginning of the text that is shown.
        waiters: ranks that must wait for the late one.
        event: that is shown, if it is the same everywhere.
    """

    name: str
    make: Callable[[xccl.Communicator], Act]
    shown: str
    waiters: Sequence[int] = (0, 2, 3)
    event: int | None = None


def nothing() -> None:
    """What a rank does that has no part in an operation."""


def group_barrier(comm: xccl.Communicator) -> Act:
    """Ranks of the group are numbered in another way than those of the session."""
    if comm.rank == 3:
        return nothing
    return comm.group([2, LATE, 0]).barrier


def blocking(n_bytes: int, *, late_receives: bool) -> Callable[[xccl.Communicator], Act]:
    """A send or a receive of rank 0."""

    def make(comm: xccl.Communicator) -> Act:
        data = np.zeros(n_bytes, np.uint8)
        sends = (comm.rank == 0) == late_receives
        if comm.rank not in (0, LATE):
            return nothing
        call = comm.send if sends else comm.recv
        return lambda: call(data, LATE - comm.rank, event_id=77)

    return make


def requests(comm: xccl.Communicator) -> Act:
    """A request of each kind, awaited with and without a deadline of its own."""
    out, into = np.zeros(5000, np.uint8), np.zeros(5000, np.uint8)
    right, left = (comm.rank + 1) % RANKS, (comm.rank - 1) % RANKS

    def act() -> None:
        sent, received = comm.isend(out, right, event_id=8), comm.irecv(into, left, event_id=8)
        sent.wait()
        received.wait(timeout_s=20.0)

    return act


def signal(comm: xccl.Communicator) -> Act:
    s = comm.signals(1)
    if comm.rank != LATE:
        return lambda: comm.wait_until(s, 0, "ge", 5)
    return lambda: [comm.signal(s, 0, 5, peer=peer) for peer in range(RANKS)]


def dispatch(protocol: str) -> Callable[[xccl.Communicator], Act]:
    def make(comm: xccl.Communicator) -> Act:
        shape = Shape(num_experts=RANKS, hidden=16, top_k=2, max_tokens=2, dtype=FP32, protocol=protocol)
        ep, made = shape.expert_parallel(comm), shape.round(0, [2] * RANKS, no_expert=0)
        return lambda: made.dispatch(comm.rank, ep)

    return make


def combine(protocol: str) -> Callable[[xccl.Communicator], Act]:
    def make(comm: xccl.Communicator) -> Act:
        shape = Shape(num_experts=RANKS, hidden=16, top_k=RANKS, max_tokens=2, dtype=FP32, protocol=protocol)
        ep = shape.expert_parallel(comm)
        # Each token has an expert at each rank, so that all need the late one.
        x, idx = np.ones((2, 16), np.float32), np.tile(np.arange(RANKS), (2, 1))
        d = ep.dispatch(x, idx)
        out = np.array(d.tokens)
        return lambda: ep.combine(out, d, np.ones((2, RANKS), np.float32))

    return make


def a2e(route: str) -> Callable[[xccl.Communicator], Act]:
    """Rank 1 is an attention die, ranks 2 and 3 are experts."""

    def make(comm: xccl.Communicator) -> Act:
        layout = Layout(attention=2, experts=2, hidden=32, top_k=2, max_tokens=4, route=route)
        dis, made = layout.make(comm), layout.round(0, 0, [3, 3], no_expert=0)

        def act() -> None:
            if dis.role == "attention":
                handle = dis.a2e(made.xs[comm.rank], made.topk_idxs[comm.rank])
                dis.e2a(handle, made.weights[comm.rank])
            else:
                batch = dis.a2e()
                dis.e2a(np.zeros((len(batch.tokens), 32), layout.dtype), batch)

        return act

    return make


def expert_loop(comm: xccl.Communicator) -> Act:
    """Streams of an expert die are threads."""
    layout = Layout(attention=2, experts=2, hidden=32, top_k=2, max_tokens=4)
    dis, made = layout.make(comm), layout.round(0, 0, [3, 3], no_expert=0)

    def act() -> None:
        if dis.role == "attention":
            dis.e2a(dis.a2e(made.xs[comm.rank], made.topk_idxs[comm.rank]), made.weights[comm.rank])
        else:
            xccl.ExpertLoop(dis, lambda batch: np.zeros((len(batch.tokens), 32), layout.dtype)).run(1)

    return act


def e2a(comm: xccl.Communicator) -> Act:
    """The late rank is an expert die here."""
    layout = Layout(
        attention=2, experts=2, hidden=32, top_k=2, max_tokens=4, places=((0, 2), (LATE, 3)), route="direct"
    )
    dis, made = layout.make(comm), layout.round(0, 0, [3, 3], no_expert=0)
    if dis.role == "attention":
        die = comm.rank // 2
        handle = dis.a2e(made.xs[die], made.topk_idxs[die])
        return lambda: dis.e2a(handle, made.weights[die])
    batch = dis.a2e()
    return lambda: dis.e2a(np.zeros((len(batch.tokens), 32), layout.dtype), batch)


def kv(engine: Any, *, late_sends: bool, layer: bool = False) -> Callable[[xccl.Communicator], Act]:
    """Between ranks 0 and 1."""

    def make(comm: xccl.Communicator) -> Act:
        transfer = xccl.KVTransfer(comm, comm.empty((2, 8, 16), np.float32))

        def act() -> None:
            if comm.rank > LATE:
                return
            peer = LATE - comm.rank
            if (comm.rank == LATE) == late_sends:
                request: Any = transfer.isend([1, 2], peer, 9, engine=engine)
            else:
                request = transfer.irecv([3, 4], peer, 9)
            if layer and comm.rank == 0:
                request.wait_layer(1)
            request.wait()

        return act

    return make


def collective(name: str, *arguments: Any, **options: Any) -> Case:
    def make(comm: xccl.Communicator) -> Act:
        x = np.ones((RANKS, 64), np.float32)
        if name == "broadcast":
            return lambda: comm.broadcast(x, root=LATE)
        if name == "alltoallv":
            return lambda: comm.alltoallv(x, [1] * RANKS)
        return lambda: getattr(comm, name)(x, *arguments, **options)

    return Case(f"{name} {options.get('algorithm', '')}".strip(), make, name)


CASES: Final = [
    Case("barrier", lambda comm: comm.barrier, "barrier"),
    Case("barrier of a group", group_barrier, "barrier", (0, 2)),
    Case("send", blocking(100, late_receives=True), "send", (0,), 77),
    Case("send of many chunks", blocking(8 << 20, late_receives=True), "send", (0,), 77),
    Case("recv", blocking(100, late_receives=False), "recv", (0,), 77),
    Case("recv of many chunks", blocking(8 << 20, late_receives=False), "recv", (0,), 77),
    Case("requests", requests, "", (0, 2), 8),
    Case("dispatch, pull", dispatch("pull"), "dispatch"),
    Case("dispatch, push", dispatch("push"), "dispatch"),
    Case("dispatch, direct", dispatch("direct"), "dispatch"),
    Case("combine, pull", combine("pull"), "combine"),
    Case("combine, push", combine("push"), "combine"),
    Case("combine, direct", combine("direct"), "combine"),
    Case("a2e, direct", a2e("direct"), "a2e", (2, 3)),
    Case("a2e, trampoline", a2e("trampoline"), "a2e", (3,)),  # rank 1 is served by the second trampoline
    Case("expert loop", expert_loop, "a2e", (3,)),
    Case("e2a", e2a, "e2a", (0, 2)),
    collective("allgather"),
    collective("allreduce"),
    collective("allreduce", algorithm="two-step"),
    collective("reduce_scatter"),
    collective("alltoall"),
    collective("alltoallv"),
    collective("broadcast"),
    Case("agreement", lambda comm: lambda: comm.empty(4, np.float32), "empty"),
    Case("group", lambda comm: lambda: comm.group(range(RANKS)), "group"),
    Case("kv_recv", kv("dma", late_sends=True), "kv_recv", (0,), 9),
    Case("kv_recv, a layer", kv("dma", late_sends=True, layer=True), "kv_recv", (0,), 9),
    Case("kv_send", kv("dma", late_sends=False), "kv_send", (0,), 9),
    Case("kv_send, mte", kv("mte", late_sends=False), "kv_send", (0,), 9),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_late_rank_is_named(case: Case) -> None:
    def main(comm: xccl.Communicator) -> None:
        act = case.make(comm)
        comm.barrier()
        if comm.rank != LATE:
            began_ns = time.monotonic_ns()
            act()
            assert time.monotonic_ns() - began_ns < PATIENCE_S * 1e9
            comm.barrier()
            return
        start_ns = time.monotonic_ns()

        def waits_for_me(seen: Analysis, rank: int) -> bool:
            return any(
                wait.operation.startswith(case.shown)
                and wait.who == "all"
                and LATE in wait.ranks
                and rank not in wait.ranks
                and case.event in (None, wait.event)
                # Since the barrier, but for a rank that has left it before this one.
                and start_ns - 5e8 < wait.since_ns < wait.until_ns
                for wait in seen.waits[rank]
            )

        seen = eventually(lambda seen: all(waits_for_me(seen, rank) for rank in case.waiters))
        assert LATE in [root.rank for root in seen.roots]
        assert not seen.waits[LATE]
        act()
        comm.barrier()

    launch(main, RANKS, "shm")


def test_all_ranks_that_are_late_are_named() -> None:
    """Also those behind the first, which is where the waiting rank has come to."""

    def main(comm: xccl.Communicator) -> None:
        act = dispatch("pull")(comm)
        comm.barrier()
        if comm.rank == 1:
            eventually(lambda seen: [w.ranks for w in seen.waits[3]] == [(1, 2)] == [w.ranks for w in seen.waits[0]])
            comm.send(np.zeros(1), dst=2, event_id=1)
        elif comm.rank == 2:
            comm.recv(np.zeros(1), src=1, event_id=1)
        act()
        comm.barrier()

    launch(main, RANKS, "shm")


def test_who_may_end_a_wait_for_a_signal_is_anybody() -> None:
    def main(comm: xccl.Communicator) -> None:
        act = signal(comm)
        comm.barrier()
        if comm.rank == LATE:

            def all_wait(seen: Analysis) -> bool:
                return all([w.who for w in seen.waits[rank]] == ["any"] for rank in (0, 2, 3))

            (blocked,) = eventually(all_wait).blocked
            assert blocked.ranks == (0, 2, 3)
            assert blocked.wait.operation == "wait_until signal 0 ge 5"
            assert (blocked.wait.expected, blocked.wait.seen) == (5, 0)
        act()
        comm.barrier()

    launch(main, RANKS, "shm")


def test_a_chain_leads_to_its_root() -> None:
    """Rank 3 waits for 2, 2 for 1, 1 for 0, which waits for nobody."""

    def main(comm: xccl.Communicator) -> None:
        token = np.zeros(1)
        comm.barrier()
        if comm.rank > 0:
            comm.recv(token, src=comm.rank - 1, event_id=comm.rank)
        else:
            seen = eventually(lambda seen: len(seen.blocked) == 3)
            assert {blocked.ranks: blocked.wait.ranks for blocked in seen.blocked} == {
                (1,): (0,),
                (2,): (1,),
                (3,): (2,),
            }
            (root,) = seen.roots
            assert root.rank == 0
            assert root.why.startswith("waits for nobody: its process computes")
            assert not seen.cycle
        if comm.rank + 1 < comm.size:
            comm.send(token, dst=comm.rank + 1, event_id=comm.rank + 1)
        comm.barrier()

    launch(main, RANKS, "shm")


def test_ranks_that_wait_for_each_other_are_a_cycle() -> None:
    def main(comm: xccl.Communicator) -> None:
        if comm.rank == 3:
            seen = eventually(lambda seen: bool(seen.cycle))
            assert seen.cycle == (0, 1, 2)
            assert not seen.roots
        else:
            with pytest.raises(xccl.WaitTimeout):
                comm.recv(np.zeros(1), src=(comm.rank + 1) % 3, event_id=1, timeout_s=3.0)
        comm.barrier()

    launch(main, RANKS, "shm")


def test_waits_end_and_counters_count() -> None:
    """Nothing is left of a wait, however it ends, and what was counted is what was done."""

    def main(comm: xccl.Communicator) -> None:
        s = comm.signals(1)
        for _ in range(6):  # more than there are records
            with pytest.raises(xccl.WaitTimeout):
                comm.wait_until(s, 0, "ge", 1, timeout_s=0.15)
        if comm.rank == 0:
            for i in range(3):
                comm.send(np.zeros(1), dst=2, event_id=i, lanes=1)
        elif comm.rank == 2:
            for i in range(3):
                comm.recv(np.zeros(1), src=0, event_id=i, lanes=1)
        for _ in range(5):
            comm.barrier()
        if comm.rank == 3:
            seen = own_session()
            assert [rank.rank for rank in seen.ranks] == [0, 1, 2, 3]
            assert not any(rank.waits for rank in seen.ranks if rank.state != "left")
            assert [rank.barriers for rank in seen.ranks] == [5] * 4
            assert [rank.chunks_received for rank in seen.ranks] == [0, 0, 3, 0]
            assert [rank.chunks_acknowledged for rank in seen.ranks] == [3, 0, 0, 0]
            assert all(rank.memory_bytes >= 8192 for rank in seen.ranks)
            assert len({rank.pid for rank in seen.ranks}) == 4
        comm.barrier()

    launch(main, RANKS, "shm")


def test_the_command_shows_it_to_another_process() -> None:
    """As an engineer does it, in another terminal."""

    def main(comm: xccl.Communicator) -> tuple[str, dict[str, Any]] | None:
        comm.barrier()
        found = None
        if comm.rank == LATE:
            eventually(lambda seen: len(seen.waits[0]) == len(seen.waits[2]) == len(seen.waits[3]) == 1)
            prefix = own_session().session_id[:12]
            found = top("--once", "--session", prefix), json.loads(top("--json", "--session", prefix))
        comm.barrier()
        return found

    text, document = launch(main, RANKS, "shm")[LATE]
    assert "ranks 0, 2-3 wait for rank 1 in barrier (event 2) since " in text
    assert "rank 1 waits for nobody: its process " in text
    assert document["schema"] == 1
    (session,) = document["results"]
    assert session["ranks"] == RANKS
    (blocked,) = session["blocked"]
    assert (blocked["ranks"], blocked["awaited"], blocked["operation"]) == ([0, 2, 3], [1], "barrier")
    assert blocked["since_s"] > 0.03
    assert [member["rank"] for member in session["members"]] == [0, 1, 2, 3]


def top(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "xccl.cli.main", "top", *words],
        capture_output=True, text=True, timeout=60.0, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout
