"""What the fault tests share: work for ranks to be killed in, scripts in sessions of their own, looks into /proc."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import xccl

ROOT = Path(__file__).resolve().parents[2]
SHM_DIR = Path("/dev/shm")
#: Deadline of anything that should take a fraction of it, on a machine that others use too.
PATIENCE_S = 30.0
#: Issue 2: after a death all other ranks have raised within this time.
NOTICE_S = 2.0

SESSION_OVER = (xccl.PeerDied, xccl.SessionAborted)

# -- work for ranks to be interrupted in -------------------------------------------------------------------------------


def barrier_loop(comm: xccl.Communicator) -> Callable[[], object]:
    return comm.barrier


def sendrecv_loop(comm: xccl.Communicator) -> Callable[[], object]:
    """A ring of messages larger than a pair's ring of slots, so that ranks wait for data and for acknowledgements."""
    out = np.full(3 << 18, comm.rank, np.float64)
    into = np.zeros_like(out)
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size

    def step() -> None:
        request = comm.isend(out, right, event_id=1, lanes=3)
        comm.recv(into, left, event_id=1, lanes=3)
        request.wait()

    return step


def _expert_parallel(comm: xccl.Communicator, protocol: str = "pull") -> tuple[xccl.ExpertParallel, Any, Any, Any]:
    tokens, hidden, top_k, experts = 32, 512, 4, 4 * comm.size
    rng = np.random.default_rng(comm.rank)
    ep = xccl.ExpertParallel(
        comm, num_experts=experts, hidden=hidden, top_k=top_k, max_tokens=tokens, dtype=ml_dtypes.bfloat16,
        protocol=protocol,
    )  # fmt: skip
    x = rng.standard_normal((tokens, hidden), np.float32).astype(ml_dtypes.bfloat16)
    idx = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
    return ep, x, idx, rng.random((tokens, top_k), np.float32)


def dispatch_loop(comm: xccl.Communicator) -> Callable[[], object]:
    ep, x, idx, _ = _expert_parallel(comm)
    return lambda: ep.dispatch(x, idx)


def combine_loop(comm: xccl.Communicator) -> Callable[[], object]:
    ep, x, idx, weights = _expert_parallel(comm)
    dispatched = ep.dispatch(x, idx)
    out = dispatched.tokens.astype(ml_dtypes.bfloat16)
    return lambda: ep.combine(out, dispatched, weights)


def disaggregated_loop(comm: xccl.Communicator) -> Callable[[], object]:
    """Two attention dies, one of them behind each of two trampolines; expert dies work in persistent loops."""
    tokens, hidden, top_k = 16, 512, 2
    dis = xccl.Disaggregated(
        comm, attention=2, experts=comm.size - 2, num_experts=comm.size - 2, hidden=hidden, top_k=top_k,
        max_tokens=tokens, dtype=np.float32, quant="none", microbatches=2,
    )  # fmt: skip
    if dis.role == "expert":
        return xccl.ExpertLoop(dis, lambda batch: batch.tokens).run
    x = np.ones((tokens, hidden), np.float32)
    idx = np.arange(tokens * top_k).reshape(tokens, top_k) % (comm.size - 2)
    weights = np.ones((tokens, top_k), np.float32)

    def step() -> None:
        for handle in [dis.a2e(x, idx) for _ in range(2)]:
            dis.e2a(handle, weights)

    return step


def direct_loop(comm: xccl.Communicator) -> Callable[[], object]:
    """Dispatch and combine in turn, and a repetition whose rows go to another slot."""
    ep, x, idx, weights = _expert_parallel(comm, "direct")
    dispatched = ep.dispatch(x, idx)
    out = dispatched.tokens.astype(ml_dtypes.bfloat16)

    def step() -> None:
        ep.combine(out, ep.dispatch(x, idx), weights)
        ep.combine(out, ep.dispatch(x, handle=dispatched), weights)

    return step


def push_loop(comm: xccl.Communicator) -> Callable[[], object]:
    """Dispatch and combine in turn, and then one of each out of turn."""
    ep, x, idx, weights = _expert_parallel(comm, "push")
    dispatched = ep.dispatch(x, idx)
    out = dispatched.tokens.astype(ml_dtypes.bfloat16)

    def step() -> None:
        ep.combine(out, ep.dispatch(x, idx), weights)
        ep.combine(out, ep.dispatch(x, handle=dispatched), weights)
        ep.combine(out, dispatched, weights)
        ep.dispatch(x, idx)
        ep.dispatch(x, idx)

    return step


def kv_loop(comm: xccl.Communicator) -> Callable[[], object]:
    """A ring of requests, layer by layer, by DMA engines and by the ranks themselves in turn."""
    layers, pages = 3, 32
    kv = xccl.KVTransfer(comm, comm.empty((layers, pages, 1 << 12), np.uint8))
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    numbers = itertools.count()

    def step() -> None:
        number = next(numbers)
        receive = kv.irecv(range(pages // 2), left, number)
        send = kv.isend(range(pages // 2, pages), right, number, by_layer=True, engine=("dma", "mte")[number % 2])
        for layer in range(layers):
            send.ready(layer)
        receive.wait_layer(0)
        receive.wait()
        send.wait()

    return step


def collectives_loop(comm: xccl.Communicator) -> Callable[[], object]:
    """Of private inputs large enough that the others read them where they lie."""
    parts = np.full((comm.size, 1 << 16), comm.rank, np.float64)
    counts = np.full(comm.size, 1 << 16)

    def step() -> None:
        comm.alltoall(parts)
        comm.alltoallv(parts.reshape(-1), counts)
        comm.scatter(parts if comm.rank == 0 else None, 0, out=parts[0] if comm.rank else None)

    return step


LOOPS = {
    "barrier": barrier_loop,
    "sendrecv": sendrecv_loop,
    "dispatch": dispatch_loop,
    "combine": combine_loop,
    "disaggregated": disaggregated_loop,
    "push": push_loop,
    "kv": kv_loop,
    "direct": direct_loop,
    "collectives": collectives_loop,
}


def run_for_ever(comm: xccl.Communicator, operation: str = "barrier") -> None:
    """Work until the session ends."""
    step = LOOPS[operation](comm)
    while True:
        step()


def rank_number(comm: xccl.Communicator, plus: int = 0) -> int:
    """For start method spawn: picklable by name."""
    comm.barrier()
    return comm.rank + plus


# -- processes ---------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Its children, zombies too, whichever of its threads forked them."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in path.read_text().split()]
    return found


def children_left() -> list[int]:
    """Children of this process, but for the helper that Python itself keeps once it has spawned."""
    found = []
    for pid in children(os.getpid()):
        with contextlib.suppress(OSError):
            if b"multiprocessing.resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def state_of(pid: int) -> str:
    """Letter of /proc/PID/stat: R, S, Z, ...; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def runs(pid: int) -> bool:
    """Is the process alive, not even a zombie?"""
    return state_of(pid) not in ("", "Z", "X")


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Poll until the condition holds; fail at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.002)


def segment_names() -> set[str]:
    return {path.name for path in SHM_DIR.glob("xccl-*")}


def no_new_names(before: set[str]) -> None:
    """Names of sessions that other programs start just now go by themselves."""
    wait_for(lambda: segment_names() <= before, "end of the names in /dev/shm", 2.0)


def environment(**variables: str) -> dict[str, str]:
    """This environment, without what would tell a process its rank, and with this source tree first."""
    ranks = ("XCCL_", "OMPI_", "SLURM_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ranks) and k not in ("RANK", "WORLD_SIZE")}
    if "XCCL_CACHE_DIR" in os.environ:
        kept["XCCL_CACHE_DIR"] = os.environ["XCCL_CACHE_DIR"]
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))} | variables


#: Whatever started pytest may ignore SIGINT (a shell's background job does), and children inherit that.
_PRELUDE = """
import signal, sys, os, time, json
signal.signal(signal.SIGINT, signal.default_int_handler)
import numpy as np, xccl
from tests.faults.support import *
def say(*words): print(json.dumps(words), flush=True)
"""


class Script:
    """A Python script in a process group of its own, which is gone at the end of the `with` block."""

    def __init__(
        self, code: str, *args: str, wrapper: tuple[str, ...] = (), stdin: int = subprocess.DEVNULL, **variables: str
    ) -> None:
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-c", _PRELUDE + code, *args],
            stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, cwd=ROOT, env=environment(**variables),
        )  # fmt: skip
        self.pid = self.process.pid

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        # The group lives as long as any process in it, and its number is not given to another one until then.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.communicate(timeout=PATIENCE_S)

    def tell(self, word: object) -> None:
        """Send it a line, which it reads if its `stdin` is a pipe."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(word) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        """The next thing that the script says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            _, err = self.process.communicate(timeout=PATIENCE_S)
            raise AssertionError(f"the script ended early, status {self.process.returncode}:\n{err}")
        return json.loads(line)

    def finish(self, timeout_s: float = PATIENCE_S) -> tuple[int, list[Any], str]:
        """Status, all that it still said, and its standard error."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, [json.loads(line) for line in out.splitlines()], err


def each_ends(pids: list[int], timeout_s: float) -> None:
    wait_for(lambda: not any(map(runs, pids)), f"end of processes {pids}", timeout_s)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    taken = time.monotonic() - start
    assert taken < seconds, f"took {taken:.2f} s, allowed are {seconds} s"
