"""The recorder, without ranks; and how operations use it."""

from __future__ import annotations

import pickle
import time
from typing import Any

import numpy as np
import pytest

import xccl
from tests.multirank.support import Shape, launch
from xccl.errors import UsageError, WaitTimeout
from xccl.trace.entry import Entry
from xccl.trace.record import Operation, Recorder

ONE = Entry("write", "transfer", "rows", 1, -1, 2, 30)
OTHER = Entry("announce", "signal", "field", 1, -1, 1, 32)


def test_stages_follow_one_another() -> None:
    recorder = Recorder(3)
    operation = recorder.start("dispatch", 7)
    for name in ("write", "announce"):
        operation.begin_stage(name)
        time.sleep(0.001)
    assert not operation.is_finished
    assert operation.stages[1].end_ns == -1
    assert operation.entries == []
    operation.finish(lambda: [ONE, OTHER])
    write, announce = operation.stages
    assert (
        operation.begin_ns <= write.begin_ns < write.end_ns == announce.begin_ns < announce.end_ns == operation.end_ns
    )
    assert operation.entries == [OTHER, ONE]
    assert [(e.rank, e.lane, e.stage, e.begin_ns) for e in recorder.events] == [
        (3, -1, "announce", announce.begin_ns),
        (3, -1, "write", write.begin_ns),
    ]
    assert recorder.named("dispatch") == [operation]
    assert recorder.named("combine") == []
    assert (repr(recorder), repr(operation)) == (
        "Recorder(rank 3, 1 operations)",
        "Operation(dispatch 7 at rank 3, 2 stages)",
    )


def test_a_modelled_operation_has_times_of_its_own() -> None:
    operation = Operation(0, "send", begin_ns=0)
    operation.add_stage("write", 0, 10)
    operation.add_stage("announce", 2, 12)
    operation.finish(lambda: [ONE, OTHER], end_ns=20)
    assert [(event.stage, event.begin_ns, event.end_ns) for event in operation.events] == [
        ("announce", 2, 12),
        ("write", 0, 10),
    ]
    assert repr(operation) == "Operation(send at rank 0, 2 stages)"


def test_what_is_pickled_are_the_entries() -> None:
    recorder = Recorder(0)
    asked = []
    recorder.start("put", stage="write").finish(lambda: asked.append(1) or [ONE])  # type: ignore[func-returns-value]
    assert asked == []
    copy = pickle.loads(pickle.dumps(recorder))
    assert copy.operations[0].entries == recorder.operations[0].entries == [ONE]
    assert asked == [1]


def test_only_the_block_is_traced(fabric: str) -> None:
    """And a request that was started in it is traced to its end."""

    def main(comm: xccl.Communicator) -> tuple[list[str], list[str]]:
        a = comm.empty(4, np.int64)
        data = np.zeros(4, np.int64)
        comm.put(a, data, 0)
        with comm.trace() as first:
            comm.put(a, data, 0)
            request = comm.isend(data, 0, 1) if comm.rank else comm.irecv(data, 1, 1)
            with pytest.raises(UsageError, match="already"), comm.trace():
                pass
        request.wait()
        comm.get(data, a, 0)
        with pytest.raises(ZeroDivisionError), comm.trace() as second:
            comm.get(data, a, 0)
            1 / 0  # noqa: B018
        comm.barrier()
        assert all(operation.is_finished for operation in first.operations)
        return [o.name for o in first.operations], [o.name for o in second.operations]

    assert launch(main, 2, fabric) == [(["put", "recv"], ["get"]), (["put", "send"], ["get"])]


def test_what_was_given_up_has_no_end(fabric: str) -> None:
    """A barrier that timed out is gone on with by the next call, which does not arrive again."""

    def main(comm: xccl.Communicator) -> Recorder | None:
        if comm.rank:
            comm.signals(1)
            time.sleep(0.2)
            comm.barrier()
            return None
        signals = comm.signals(1)
        with comm.trace() as recorder:
            with pytest.raises(WaitTimeout):
                comm.wait_until(signals, 0, "eq", 1, timeout_s=0.01)
            with pytest.raises(WaitTimeout):
                comm.barrier(timeout_s=0.01)
            comm.barrier()
        return recorder

    recorder, _ = launch(main, 2, fabric)
    waited, given_up, done = recorder.operations
    assert [o.is_finished for o in recorder.operations] == [False, False, True]
    assert [stage.name for stage in waited.stages] == ["wait"]
    assert given_up.entries == []
    assert (given_up.number, done.number) == (1, 1)
    assert done.entries == [Entry("await-release", "wait", "release", -1, -1, 1, 0)]


def test_tracing_costs_nothing_when_it_is_off() -> None:
    """An operation looks once whether it is traced; a dispatch too, however many stages it has."""

    class Looks:
        """Counts looks at `trace` of a rank's core."""

        def __init__(self) -> None:
            self.count = 0

        def __get__(self, instance: Any, owner: Any) -> None:
            self.count += 1

        def __set__(self, instance: Any, value: Any) -> None:
            pass

    shape = Shape(num_experts=1)
    inputs = shape.round(0, [3])

    def main(comm: xccl.Communicator) -> list[int]:
        a, s = comm.empty(4, np.int64), comm.signals(1)
        ep = shape.expert_parallel(comm)
        data = np.zeros(4, np.int64)
        looks = Looks()
        comm.core.__class__ = type("Core", (type(comm.core),), {"trace": looks})
        counts = []

        def count(call: Any, *args: Any, **kwargs: Any) -> Any:
            before = looks.count
            result = call(*args, **kwargs)
            counts.append(looks.count - before)
            return result

        count(comm.put, a, data, 0)
        count(comm.get, data, a, 0)
        count(comm.put_signal, a, data, 0, s, 0, 1)
        count(comm.signal, s, 0, 1, 0)
        count(comm.wait_until, s, 0, "ge", 1)
        count(comm.barrier)
        d = count(ep.dispatch, inputs.xs[0], inputs.topk_idxs[0])
        count(ep.combine, inputs.outs[0], d, inputs.weights[0])
        send = count(comm.isend, data, 0, 1)
        receive = count(comm.irecv, data.copy(), 0, 1)
        send.wait()
        receive.wait()
        return counts

    (counts,) = launch(main, 1, "local")
    # Calls that go straight into a kernel do not look at all: tracing sends them the long way.
    assert counts == [0] * 6 + [1] * 4
