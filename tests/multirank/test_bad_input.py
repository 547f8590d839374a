"""Calls that are wrong: each is a UsageError or CapacityError that shows the value and its bound, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import xccl
from tests.multirank.support import BF16, FP32, error_of, launch
from xccl.errors import CapacityError, UsageError

RANKS = 2
TOKENS, HIDDEN, TOP_K, EXPERTS = 4, 8, 2, 6


class Bench:
    """What bad calls are tried on; one for each rank."""

    def __init__(self, comm: xccl.Communicator) -> None:
        self.comm = comm
        self.a = comm.empty((4, 5), np.float32)
        self.a.local[:] = 1
        self.s = comm.signals(3)
        self.ep = xccl.ExpertParallel(
            comm, num_experts=EXPERTS, hidden=HIDDEN, top_k=TOP_K, max_tokens=TOKENS, dtype=BF16, quant="none"
        )
        self.x = np.zeros((TOKENS, HIDDEN), BF16)
        self.idx = np.zeros((TOKENS, TOP_K), np.int64)
        self.weights = np.zeros((TOKENS, TOP_K), np.float32)
        self.d = self.ep.dispatch(self.x, self.idx)
        self.out = np.zeros(self.d.tokens.shape, BF16)
        self.data = np.zeros(20, np.float32)

    def empty(self, shape: Any, dtype: Any = np.float32) -> Any:
        return self.comm.empty(shape, dtype)

    def put(self, source: Any, peer: Any = 1, offset: Any = 0, target: Any = None) -> None:
        self.comm.put(self.a if target is None else target, source, peer, offset)

    def get(self, destination: Any, peer: Any = 1, offset: Any = 0, source: Any = None) -> None:
        self.comm.get(destination, self.a if source is None else source, peer, offset)

    def put_signal(self, source: Any = None, peer: Any = 1, index: Any = 0, value: Any = 1, op: Any = "set",
                   offset: Any = 0) -> None:  # fmt: skip
        source = self.data if source is None else source
        self.comm.put_signal(self.a, source, peer, self.s, index, value, op, offset)

    def signal(self, index: Any = 0, value: Any = 1, peer: Any = 1, op: Any = "set") -> None:
        self.comm.signal(self.s, index, value, peer, op)

    def wait(self, index: Any = 0, comparison: Any = "ge", value: Any = 0, timeout_s: Any = 1.0) -> int:
        return self.comm.wait_until(self.s, index, comparison, value, timeout_s)

    def expert_parallel(self, **changes: Any) -> None:
        arguments: dict[str, Any] = {
            "num_experts": EXPERTS, "hidden": HIDDEN, "top_k": TOP_K, "max_tokens": TOKENS, "dtype": BF16,
            "quant": "none",
        }  # fmt: skip
        xccl.ExpertParallel(self.comm, **(arguments | changes))

    def dispatch(self, x: Any = None, idx: Any = None) -> None:
        self.ep.dispatch(self.x if x is None else x, self.idx if idx is None else idx)

    def combine(self, out: Any = None, weights: Any = None) -> None:
        out = self.out if out is None else out
        self.ep.combine(out, self.d, self.weights if weights is None else weights)


def ids(*values: int) -> Any:
    """Expert IDs with these values first."""
    idx = np.zeros((TOKENS, TOP_K), np.int64)
    idx.reshape(-1)[: len(values)] = values
    return idx


BIG = 1 << 62

#: What is tried, and what the message must show.
CASES: dict[str, tuple[Callable[[Bench], Any], list[str]]] = {
    # -- shapes and dtypes of symmetric memory
    "empty: negative": (lambda b: b.empty(-1), ["-1", "0"]),
    "empty: negative dimension": (lambda b: b.empty((3, -2)), ["shape[1]", "-2", "0"]),
    "empty: not an integer": (lambda b: b.empty((3, 2.5)), ["shape[1]", "2.5"]),
    "empty: a float": (lambda b: b.empty(2.5), ["2.5"]),
    "empty: a bool": (lambda b: b.empty(True), ["True"]),
    "empty: None": (lambda b: b.empty(None), ["None"]),
    "empty: too many dimensions": (lambda b: b.empty((1,) * 11), ["11", "10"]),
    "empty: too large": (lambda b: b.empty((1 << 40, 1 << 40)), [str(1 << 40)]),
    "empty: one dimension too large": (lambda b: b.empty(BIG), [str(BIG), str(1 << 48)]),
    "empty: objects": (lambda b: b.empty(3, object), ["object"]),
    "empty: no size": (lambda b: b.empty(3, "U0"), ["U0"]),
    "empty: no dtype": (lambda b: b.empty(3, "no such dtype"), ["no such dtype"]),
    "empty: subarray dtype": (lambda b: b.empty(3, "(2,)f4"), ["(2,)"]),
    "empty: objects within": (lambda b: b.empty(3, [("a", "i4"), ("b", "O")]), ["O"]),
    "signals: none": (lambda b: b.comm.signals(0), ["0", "1"]),
    "signals: negative": (lambda b: b.comm.signals(-5), ["-5", "1"]),
    "signals: too many": (lambda b: b.comm.signals(1 << 40), [str(1 << 40), str(1 << 20)]),
    "signals: not an integer": (lambda b: b.comm.signals("3"), ["'3'"]),
    "peer: too large": (lambda b: b.a.peer(2), ["2", "1"]),
    "peer: negative": (lambda b: b.a.peer(-1), ["-1", "0"]),
    # -- put and get
    "put: dtype": (lambda b: b.put(np.zeros(3)), ["float64", "float32"]),
    "put: byte order": (lambda b: b.put(np.zeros(3, ">f4")), [">f4", "float32"]),
    "put: a list": (lambda b: b.put([1.0, 2.0]), ["list"]),
    "put: a scalar": (lambda b: b.put(np.float32(1)), ["float32"]),
    "put: peer too large": (lambda b: b.put(b.data, peer=2), ["peer", "2", "1"]),
    "put: peer negative": (lambda b: b.put(b.data, peer=-1), ["peer", "-1", "0"]),
    "put: peer no integer": (lambda b: b.put(b.data, peer=0.0), ["peer", "0.0"]),
    "put: peer None": (lambda b: b.put(b.data, peer=None), ["peer", "None"]),
    "put: peer bool": (lambda b: b.put(b.data, peer=True), ["peer", "True"]),
    "put: offset negative": (lambda b: b.put(b.data[:1], offset=-1), ["offset", "-1", "0"]),
    "put: offset too large": (lambda b: b.put(b.data[:0], offset=21), ["offset", "21", "20"]),
    "put: offset huge": (lambda b: b.put(b.data[:1], offset=BIG), ["offset", str(BIG), "20"]),
    "put: past the end": (lambda b: b.put(b.data, offset=1), ["21", "20"]),
    "put: not symmetric": (lambda b: b.put(b.data, target=b.data), ["ndarray"]),
    "get: dtype": (lambda b: b.get(np.zeros(3, np.int32)), ["int32", "float32"]),
    "get: strided": (lambda b: b.get(b.data[::2]), ["contiguous", "8"]),
    "get: peer": (lambda b: b.get(b.data, peer=7), ["peer", "7", "1"]),
    "get: past the end": (lambda b: b.get(np.zeros(21, np.float32)), ["21", "20"]),
    # -- signals
    "put_signal: dtype": (lambda b: b.put_signal(np.zeros(2, np.int8)), ["int8", "float32"]),
    "put_signal: op": (lambda b: b.put_signal(op="xor"), ["'xor'", "set", "add"]),
    "put_signal: index": (lambda b: b.put_signal(index=3), ["index", "3", "2"]),
    "put_signal: value": (lambda b: b.put_signal(value=1 << 63), ["value", str(1 << 63), str((1 << 63) - 1)]),
    "put_signal: past the end": (lambda b: b.put_signal(offset=1), ["21", "20"]),
    "signal: index too large": (lambda b: b.signal(index=3), ["index", "3", "2"]),
    "signal: index negative": (lambda b: b.signal(index=-1), ["index", "-1", "0"]),
    "signal: value too large": (lambda b: b.signal(value=1 << 63), [str(1 << 63), str((1 << 63) - 1)]),
    "signal: value too small": (lambda b: b.signal(value=-(1 << 63) - 1), [str(-(1 << 63) - 1), str(-(1 << 63))]),
    "signal: value a float": (lambda b: b.signal(value=1.5), ["1.5"]),
    "signal: peer": (lambda b: b.signal(peer=2), ["peer", "2", "1"]),
    "signal: op": (lambda b: b.signal(op=None), ["None", "set", "add"]),
    "signal: op unhashable": (lambda b: b.signal(op=["set"]), ["['set']", "set", "add"]),
    "signal: no signals": (lambda b: b.comm.signal(b.a, 0, 1, 1), ["SymmetricArray"]),
    "wait_until: comparison": (lambda b: b.wait(comparison=">="), ["'>='", "ge"]),
    "wait_until: index": (lambda b: b.wait(index=3), ["index", "3", "2"]),
    "wait_until: value": (lambda b: b.wait(value=1 << 64), [str(1 << 64), str((1 << 63) - 1)]),
    "wait_until: zero timeout": (lambda b: b.wait(timeout_s=0), ["0"]),
    "wait_until: negative timeout": (lambda b: b.wait(timeout_s=-1), ["-1"]),
    "wait_until: endless timeout": (lambda b: b.wait(timeout_s=float("inf")), ["inf"]),
    "wait_until: no timeout": (lambda b: b.wait(timeout_s=float("nan")), ["nan"]),
    "wait_until: timeout as text": (lambda b: b.wait(timeout_s="soon"), ["soon"]),
    "barrier: timeout": (lambda b: b.comm.barrier(timeout_s=-2), ["-2"]),
    # -- send and receive
    "send: a list": (lambda b: b.comm.send([1], dst=1, event_id=0), ["list"]),
    "send: objects": (lambda b: b.comm.send(np.array([None]), dst=1, event_id=0), ["object"]),
    "send: dst": (lambda b: b.comm.send(b.data, dst=2, event_id=0), ["dst", "2", "1"]),
    "send: dst negative": (lambda b: b.comm.send(b.data, dst=-1, event_id=0), ["dst", "-1", "0"]),
    "isend: dst": (lambda b: b.comm.isend(b.data, dst=2, event_id=0), ["dst", "2", "1"]),
    "send: event negative": (lambda b: b.comm.isend(b.data, dst=1, event_id=-1), ["event_id", "-1", "0"]),
    "send: event too large": (
        lambda b: b.comm.isend(b.data, dst=1, event_id=1 << 63), ["event_id", str(1 << 63), str((1 << 63) - 1)],
    ),
    "send: event as text": (lambda b: b.comm.isend(b.data, dst=1, event_id="7"), ["event_id", "'7'"]),
    "send: no lanes": (lambda b: b.comm.isend(b.data, dst=1, event_id=0, lanes=0), ["lanes", "0", "1"]),
    "send: too many lanes": (lambda b: b.comm.isend(b.data, dst=1, event_id=0, lanes=49), ["lanes", "49", "48"]),
    "send: timeout": (lambda b: b.comm.send(b.data, dst=1, event_id=0, timeout_s=0), ["0"]),
    "recv: src": (lambda b: b.comm.recv(b.data, src=2, event_id=0), ["src", "2", "1"]),
    "recv: event": (lambda b: b.comm.irecv(b.data, src=1, event_id=-1), ["event_id", "-1", "0"]),
    "recv: lanes": (lambda b: b.comm.irecv(b.data, src=1, event_id=0, lanes=1 << 70), ["lanes", str(1 << 70), "48"]),
    "recv: objects": (lambda b: b.comm.irecv(np.array([None]), src=1, event_id=0), ["object"]),
    "recv: timeout": (lambda b: b.comm.recv(b.data, src=1, event_id=0, timeout_s=float("nan")), ["nan"]),
    # -- expert parallelism
    "ep: no experts": (lambda b: b.expert_parallel(num_experts=0), ["num_experts", "0", "1"]),
    "ep: too many experts": (lambda b: b.expert_parallel(num_experts=1 << 30), [str(1 << 30), str(1 << 20)]),
    "ep: hidden": (lambda b: b.expert_parallel(hidden=0), ["hidden", "0", "1"]),
    "ep: hidden negative": (lambda b: b.expert_parallel(hidden=-7168), ["hidden", "-7168", "1"]),
    "ep: hidden too large": (lambda b: b.expert_parallel(hidden=1 << 30), ["hidden", str(1 << 30), str(1 << 20)]),
    "ep: hidden a float": (lambda b: b.expert_parallel(hidden=8.0), ["hidden", "8.0"]),
    "ep: top_k": (lambda b: b.expert_parallel(top_k=0), ["top_k", "0", "1"]),
    "ep: max_tokens": (lambda b: b.expert_parallel(max_tokens=-1), ["max_tokens", "-1", "0"]),
    "ep: dtype": (lambda b: b.expert_parallel(dtype=np.float64), ["float64", "bf16", "fp16", "fp32"]),
    "ep: dtype int8": (lambda b: b.expert_parallel(dtype=np.int8), ["int8", "bf16", "fp16", "fp32"]),
    "ep: dtype of 8 bits": (lambda b: b.expert_parallel(dtype=ml_dtypes.float8_e5m2), ["float8_e5m2", "bf16"]),
    "ep: dtype byte order": (lambda b: b.expert_parallel(dtype=">f4"), [">f4", "fp32"]),
    "ep: no dtype": (lambda b: b.expert_parallel(dtype="bf17"), ["bf17"]),
    "ep: quant": (lambda b: b.expert_parallel(quant="int4"), ["'int4'", "int8", "none"]),
    "ep: protocol": (lambda b: b.expert_parallel(protocol="shove"), ["'shove'", "pull"]),
    "dispatch: dtype": (lambda b: b.dispatch(x=b.x.astype(FP32)), ["float32", "bfloat16"]),
    "dispatch: no array": (lambda b: b.dispatch(x=[[0.0] * HIDDEN]), ["list"]),
    "dispatch: hidden": (lambda b: b.dispatch(x=b.x[:, 1:].copy()), ["7", "8"]),
    "dispatch: one dimension": (lambda b: b.dispatch(x=b.x.reshape(-1)), ["32", "8"]),
    "dispatch: ids float": (lambda b: b.dispatch(idx=b.idx.astype(np.float32)), ["float32"]),
    "dispatch: ids bool": (lambda b: b.dispatch(idx=b.idx.astype(bool)), ["bool"]),
    "dispatch: ids of other tokens": (lambda b: b.dispatch(idx=b.idx[1:]), ["(3, 2)", "(4, 2)"]),
    "dispatch: ids of other top_k": (lambda b: b.dispatch(idx=b.idx[:, :1]), ["(4, 1)", "(4, 2)"]),
    "dispatch: ids flat": (lambda b: b.dispatch(idx=b.idx.reshape(-1)), ["(8,)", "(4, 2)"]),
    "dispatch: expert too large": (lambda b: b.dispatch(idx=ids(0, 5, 1, 6)), ["[1, 1]", "6", "5"]),
    "dispatch: expert too small": (lambda b: b.dispatch(idx=ids(-1, -2)), ["[0, 1]", "-2", "-1"]),
    "dispatch: expert huge": (lambda b: b.dispatch(idx=ids(BIG)), ["[0, 0]", str(BIG), "5"]),
    "dispatch: expert beyond int64": (
        lambda b: b.dispatch(idx=ids(0).astype(np.uint64) + np.uint64((1 << 64) - 1)), [str((1 << 64) - 1), "5"],
    ),
    "dispatch: int8 that wraps": (lambda b: b.dispatch(idx=ids(200).astype(np.uint8)), ["200", "5"]),
    "combine: dtype": (lambda b: b.combine(out=b.out.astype(FP32)), ["float32", "bfloat16"]),
    "combine: rows": (
        lambda b: b.combine(out=np.zeros((len(b.out) + 1, HIDDEN), BF16)), ["(17, 8)" , "(16, 8)"],
    ),
    "combine: hidden": (lambda b: b.combine(out=np.zeros((len(b.out), 9), BF16)), ["(16, 9)", "(16, 8)"]),
    "combine: weights of other tokens": (lambda b: b.combine(weights=b.weights[1:]), ["(3, 2)", "(4, 2)"]),
    "combine: weights of other top_k": (lambda b: b.combine(weights=np.zeros((4, 3), np.float32)), ["(4, 3)", "(4, 2)"]),
    "combine: weights integer": (lambda b: b.combine(weights=b.idx), ["int64"]),
    "combine: weights complex": (lambda b: b.combine(weights=b.weights.astype(np.complex64)), ["complex64"]),
    "combine: weights a list": (lambda b: b.combine(weights=b.weights.tolist()), ["list"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def errors(fabric: str) -> list[dict[str, BaseException | None]]:
    """What each case raises, by rank: all are tried in one session, which must work afterwards."""

    def main(comm: xccl.Communicator) -> dict[str, BaseException | None]:
        bench = Bench(comm)
        comm.barrier()
        found = {name: error_of(call, bench) for name, (call, _) in CASES.items()}
        comm.barrier()
        # Nothing has happened: memory, signals, channels and the ExpertParallel object are as they were.
        assert (bench.a.local == 1).all()
        assert [bench.s.read(i) for i in range(3)] == [0, 0, 0]
        comm.empty(10, np.int8)
        request = comm.isend(bench.data + comm.rank, dst=1 - comm.rank, event_id=0)
        comm.recv(out := np.zeros(20, np.float32), src=1 - comm.rank, event_id=0)
        request.wait()
        assert (out == 1 - comm.rank).all()
        bench.combine()
        bench.dispatch()
        return found

    return launch(main, RANKS, fabric, op_timeout_s=5.0)


@pytest.mark.parametrize("name", CASES)
def test_a_bad_argument(errors: list[dict[str, BaseException | None]], name: str) -> None:
    # `out` of rank 1 has no rows, so its message shows other numbers: rank 0 is looked at.
    shown = CASES[name][1]
    for rank, found in enumerate(errors):
        error = found[name]
        assert isinstance(error, UsageError), f"rank {rank}: {error!r}"
        assert isinstance(error, ValueError)
        if rank == 0:
            for text in shown:
                assert text in str(error)


def test_too_many_tokens(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> BaseException | None:
        bench = Bench(comm)
        return error_of(bench.dispatch, np.zeros((5, HIDDEN), BF16), np.zeros((5, TOP_K), np.int64))

    for error in launch(main, RANKS, fabric):
        assert isinstance(error, CapacityError)
        assert "5 tokens" in str(error)
        assert "max_tokens is 4" in str(error)
        assert error.needed_bytes is not None
        assert error.available_bytes is not None
        assert error.needed_bytes / error.available_bytes == 5 / 4


def test_an_error_of_one_rank_is_the_one_that_launch_raises(fabric: str) -> None:
    """Not what the others are told of it, which has no numbers."""

    def main(comm: xccl.Communicator) -> None:
        comm.allreduce(np.ones(2), "avg" if comm.rank == 2 else "sum")

    with pytest.raises(UsageError, match="op must be one of sum, prod, max, min, got 'avg'") as caught:
        launch(main, 3, fabric)
    assert caught.value.__notes__ == ["raised by rank 2"]


def test_a_full_area_says_what_makes_it_larger(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        experts = {"num_experts": 2, "hidden": 1 << 16, "top_k": 1, "max_tokens": 64, "dtype": FP32}
        return [
            error_of(comm.empty, 1 << 21, np.int8),
            error_of(xccl.ExpertParallel, comm, **experts, protocol="push"),
        ]

    for app, heap in launch(main, RANKS, fabric, app_bytes=1 << 20, heap_bytes=1 << 20):
        assert isinstance(app, CapacityError)
        assert isinstance(heap, CapacityError)
        assert "launch and init take app_bytes" in str(app)
        assert "launch and init take heap_bytes" in str(heap)


def test_use_after_free(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> list[BaseException | None]:
        bench = Bench(comm)
        assert f"protocol='pull', rows='expanded', rank={comm.rank} of 2" in repr(bench.ep)
        bench.ep.free()
        return [error_of(call) for call in (bench.ep.free, bench.dispatch, bench.combine)]

    for found in launch(main, RANKS, fabric):
        for error in found:
            assert isinstance(error, UsageError)
            assert "it was freed" in str(error)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), "soon", True])
def test_a_bad_deadline_of_a_request(fabric: str, timeout_s: Any) -> None:
    def main(comm: xccl.Communicator) -> BaseException | None:
        request = comm.isend(np.zeros(3), dst=comm.rank, event_id=0)
        error = error_of(request.wait, timeout_s)
        comm.recv(np.zeros(3), src=comm.rank, event_id=0)
        request.wait()
        return error

    (error,) = launch(main, 1, fabric)
    assert isinstance(error, UsageError)
    assert str(timeout_s) in str(error)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"ranks": 0}, ["ranks", "0", "1"]),
        ({"ranks": -1}, ["ranks", "-1", "1"]),
        ({"ranks": 1025}, ["ranks", "1025", "1024"]),
        ({"ranks": 2.0}, ["ranks", "2.0"]),
        ({"ranks": "2"}, ["ranks", "'2'"]),
        ({"fabric": "mpi"}, ["'mpi'", "shm", "local"]),
        ({"fabric": None}, ["None", "shm", "local"]),
        ({"start_method": "thread"}, ["'thread'", "fork", "spawn"]),
        ({"timeout_s": 0}, ["timeout_s must be more than 0"]),
        ({"timeout_s": float("inf")}, ["inf"]),
        ({"op_timeout_s": -3}, ["op_timeout_s must be more than 0", "-3"]),
        ({"op_timeout_s": None}, ["op_timeout_s must be a number", "None"]),
        ({"app_bytes": 0}, ["app_bytes", "0", "4096"]),
        ({"app_bytes": 1 << 41}, ["app_bytes", str(1 << 41), str(1 << 40)]),
        ({"heap_bytes": -1}, ["heap_bytes", "-1", "4096"]),
        ({"ring_slots": 0}, ["ring_slots", "0", "1"]),
        ({"ring_slots": 1 << 20}, ["ring_slots", str(1 << 20), str(1 << 16)]),
        ({"slot_bytes": 32}, ["slot_bytes", "32", "64"]),
        ({"slot_bytes": 100}, ["slot_bytes", "100", "64"]),
        ({"main": "main"}, ["main", "str"]),
        ({"args": 5}, ["args", "tuple", "int", "(x,)"]),
        ({"args": "text"}, ["args", "tuple", "str", "(x,)"]),
        ({"kwargs": ["tokens"]}, ["kwargs", "dict", "list"]),
    ],
    ids=str,
)
def test_a_bad_launch(options: dict[str, Any], shown: list[str]) -> None:
    arguments: dict[str, Any] = {"main": lambda comm: None, "ranks": 1} | options
    with pytest.raises(UsageError) as caught:
        xccl.launch(**arguments)
    for text in shown:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "arguments", "shown"),
    [
        ({}, {"rank": 0, "size": 1}, ["XCCL_SESSION"]),
        ({"XCCL_SESSION": "s"}, {"size": 2}, ["rank", "XCCL_RANK"]),
        ({"XCCL_SESSION": "s"}, {"rank": 0}, ["size", "XCCL_SIZE"]),
        ({"XCCL_SESSION": "s", "XCCL_RANK": "two"}, {"size": 4}, ["XCCL_RANK", "'two'"]),
        ({"XCCL_SESSION": "s", "XCCL_RANK": "4"}, {"size": 4}, ["XCCL_RANK", "4", "3"]),
        ({"XCCL_SESSION": "s", "XCCL_SIZE": "0"}, {"rank": 0}, ["XCCL_SIZE", "0", "1"]),
        ({"XCCL_SESSION": "s"}, {"rank": 9, "size": 4}, ["rank", "9", "3"]),
        ({"XCCL_SESSION": "s"}, {"rank": -1, "size": 4}, ["rank", "-1", "0"]),
        ({"XCCL_SESSION": "s"}, {"rank": 0, "size": 1, "slot_bytes": 65}, ["slot_bytes", "65", "64"]),
    ],
)
def test_a_bad_init(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], arguments: dict[str, Any], shown: list[str]
) -> None:
    for variable in ("XCCL_RANK", "RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "XCCL_SIZE", "WORLD_SIZE",
                     "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS", "XCCL_SESSION"):  # fmt: skip
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError) as caught:
        xccl.init(**arguments)
    for text in shown:
        assert text in str(caught.value)
