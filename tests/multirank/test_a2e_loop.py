"""The persistent loop of expert dies: three streams that overlap, in the order of the A2Es, and that end together."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

import xccl
from tests.multirank.a2e_support import Layout, Round
from tests.multirank.support import Array, error_of, launch
from xccl.errors import PeerDied, UsageError, WaitTimeout

ROUTES = pytest.mark.parametrize("route", ["direct", "trampoline"])


def rounds_of(layout: Layout, turns: int) -> list[list[list[Round]]]:
    """[turn][domain][microbatch]."""
    return [
        [[layout.round(d, 100 * t + 10 * d + m) for m in range(layout.microbatches)] for d in range(layout.domains)]
        for t in range(turns)
    ]


def attend(rank: int, dis: xccl.Disaggregated, turns: list[list[list[Round]]]) -> None:
    """What an attention die does: all microbatches out, then all back, checked."""
    for t, turn in enumerate(turns):
        assert dis.domain is not None
        sent = [(r, r.send(rank, dis)) for r in turn[dis.domain]]
        for r, handle in sent:
            r.sum(rank, dis, handle, f"turn {t}, ")


@ROUTES
@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("forever", [False, True])
def test_the_bits_of_the_plain_loop(fabric: str, route: str, ahead: int, forever: bool) -> None:
    layout = Layout(attention=2, experts=3, local_experts=2, route=route, domains=3, microbatches=2, shared=1)
    turns = rounds_of(layout, 4)

    def main(comm: xccl.Communicator) -> int:
        dis = layout.make(comm)
        if dis.role == "attention":
            attend(comm.rank, dis, turns)
            return 0

        def experts(batch: xccl.ExpertBatch) -> Array:
            r = turns[batch.turn][batch.domain][batch.microbatch]
            r.check(comm.rank, batch, f"turn {batch.turn}, ")
            return r.outs[layout.expert_ranks.index(comm.rank)]

        return xccl.ExpertLoop(dis, experts, ahead=ahead).run(None if forever else len(turns))

    assert launch(main, layout.ranks, fabric) == [0] * 6 + [4 * 6] * 3


@ROUTES
def test_streams_overlap(fabric: str, route: str) -> None:
    """The experts do not go on with batch n before batch n + 1 is there and the outputs of n - 1 are out."""
    layout = Layout(attention=2, experts=2, route=route, microbatches=3)
    turns = rounds_of(layout, 2)
    batches = 6

    def main(comm: xccl.Communicator) -> int:
        dis = layout.make(comm)
        if dis.role == "attention":
            # Everything that can be under way is.
            attend(comm.rank, dis, turns)
            return 0
        seen = threading.Condition()
        count = {"a2e": 0, "e2a": 0}
        last = "forward-announce" if dis.first_expert == 0 and route == "trampoline" else "announce"
        if route == "trampoline":
            last = "forward-announce"  # both expert dies are trampolines

        def on_step(operation: str, step: str) -> None:
            if step == ("forward-release" if route == "trampoline" else "release") or (operation, step) == (
                "e2a",
                last,
            ):
                with seen:
                    count[operation] += 1
                    seen.notify_all()

        dis.on_step = on_step

        def experts(batch: xccl.ExpertBatch) -> Array:
            n = batch.number
            # The next A2E of the same turn is certain to come; that of the next turn needs the outputs of this one.
            ahead = n + 1 if n % 3 else n
            with seen:
                assert seen.wait_for(lambda: count["a2e"] >= ahead and count["e2a"] >= n - 1, 10), (n, count)
            return turns[batch.turn][batch.domain][batch.microbatch].outs[layout.expert_ranks.index(comm.rank)]

        return xccl.ExpertLoop(dis, experts).run(2)

    assert launch(main, layout.ranks, fabric) == [0] * 2 + [batches] * 2


@ROUTES
def test_an_error_of_the_experts_ends_all_streams(fabric: str, route: str) -> None:
    layout = Layout(attention=1, experts=2, route=route)
    turns = rounds_of(layout, 3)

    def main(comm: xccl.Communicator) -> float:
        dis = layout.make(comm)
        if dis.role == "attention":
            attend(comm.rank, dis, turns)
            return 0.0

        def experts(batch: xccl.ExpertBatch) -> Array:
            if batch.number == 2:
                raise ZeroDivisionError("no such expert")
            return turns[batch.turn][0][0].outs[layout.expert_ranks.index(comm.rank)]

        before = threading.active_count()
        try:
            xccl.ExpertLoop(dis, experts).run()
        finally:
            assert threading.active_count() <= before or fabric == "local"
        raise AssertionError

    start = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="no such expert"):
        launch(main, layout.ranks, fabric)
    assert time.monotonic() - start < 8


def test_an_output_of_the_wrong_shape(fabric: str) -> None:
    """Raised by the stream that sends, and heard of by the caller of `run`."""
    layout = Layout(attention=1, experts=1)
    (turn,) = rounds_of(layout, 1)

    def main(comm: xccl.Communicator) -> BaseException | None:
        dis = layout.make(comm)
        if dis.role == "attention":
            turn[0][0].send(comm.rank, dis)
            comm.barrier()
            return None
        error = error_of(xccl.ExpertLoop(dis, lambda batch: batch.tokens).run, 5)
        comm.barrier()
        return error

    _, error = launch(main, 2, fabric)
    assert isinstance(error, UsageError)
    assert "expert_out must be bfloat16, got int8" in str(error)


def test_attention_dies_that_do_not_come(fabric: str) -> None:
    """The loop waits as long as any operation."""
    layout = Layout(attention=1, experts=2)

    def main(comm: xccl.Communicator) -> tuple[BaseException | None, float]:
        dis = layout.make(comm)
        start = time.monotonic()
        error = error_of(xccl.ExpertLoop(dis, lambda batch: batch.tokens).run) if dis.role == "expert" else None
        seconds = time.monotonic() - start
        comm.core.op_timeout_s = 20
        comm.barrier()
        return error, seconds

    results: list[Any] = launch(main, 3, fabric, op_timeout_s=0.4)
    for error, seconds in results[1:]:
        assert isinstance(error, WaitTimeout)
        assert 0.3 < seconds < 5


def test_an_attention_die_that_leaves_in_the_middle(fabric: str) -> None:
    """One of two has sent: its tokens would be lost, so that is no end but an error."""
    layout = Layout(attention=2, experts=1, route="direct")
    (turn,) = rounds_of(layout, 1)

    def main(comm: xccl.Communicator) -> BaseException | None:
        dis = layout.make(comm)
        if comm.rank == 0:
            turn[0][0].send(comm.rank, dis)
        if dis.role == "attention":
            return None
        return error_of(xccl.ExpertLoop(dis, lambda batch: batch.tokens).run)

    error = launch(main, 3, fabric)[2]
    assert isinstance(error, PeerDied)
    assert "rank 1 has finished and left" in str(error)


def test_arguments(fabric: str) -> None:
    layout = Layout(attention=1, experts=1)

    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        dis = layout.make(comm)

        def loop(**options: Any) -> xccl.ExpertLoop:
            return xccl.ExpertLoop(dis, lambda batch: batch.tokens, **options)

        if dis.role == "attention":
            return [error_of(loop)]
        assert loop().run(0) == 0
        return [error_of(loop, ahead=0), error_of(loop().run, -1)]

    attention, expert = launch(main, 2, fabric)
    assert "needs an expert die" in str(attention[0])
    assert "ahead is 0" in str(expert[0])
    assert "turns is -1" in str(expert[1])
    assert all(isinstance(error, UsageError) for error in attention + expert)
