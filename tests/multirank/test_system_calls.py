"""No system call on the uncontended path: where partners have done their part and nobody sleeps, an operation makes none.

A fork of a rank makes the operations under a seccomp filter, by which the operating system kills it for any call but write
and exit; that it got to the end, it writes to a pipe. A fork has the segments and the state of its rank, which does not
go on with what the fork has begun. (Strict mode, which needs no filter, takes away the processor's clock, too.)
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import select
import signal
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import pytest

import xccl
from tests.multirank.support import launch

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
#: write, exit, exit_group.
_ALLOWED = {"x86_64": (1, 60, 231), "aarch64": (64, 93, 94)}.get(platform.machine(), ())
_LIMIT_S: Final = 20.0

Act = Callable[[], object]


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def _forbid_system_calls() -> bool:
    """From here on, any but those allowed kill this process; False if that cannot be had."""
    jumps = [_Instruction(_JUMP_IF_EQUAL, len(_ALLOWED) - i, 0, number) for i, number in enumerate(_ALLOWED)]
    code = [
        _Instruction(_LOAD, 0, 0, 0),
        *jumps,
        _Instruction(_RETURN, 0, 0, _KILL),
        _Instruction(_RETURN, 0, 0, _ALLOW),
    ]
    program = _Program(len(code), (_Instruction * len(code))(*code))
    prctl = ctypes.CDLL(None).prctl
    zero = ctypes.c_ulong(0)
    if not _ALLOWED or prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) != 0:
        return False
    return bool(prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(program), zero, zero) == 0)


def makes_no_system_call(act: Act) -> bool:
    """Does a fork of this process get through `act`, once warm, without a system call?"""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        gc.disable()
        if _forbid_system_calls():
            act()
            os.write(into, b"0")
        else:
            os.write(into, b"x")
        os._exit(0)
    os.close(into)
    try:
        ready, _, _ = select.select([out], [], [], _LIMIT_S)
        if not ready:
            os.kill(child, signal.SIGKILL)
        said = os.read(out, 1) if ready else b"late"
    finally:
        os.close(out)
        os.waitpid(child, 0)
    if said == b"x":
        pytest.skip("no seccomp filter here; Linux on x86-64 or aarch64 with CONFIG_SECCOMP_FILTER would run this")
    assert said != b"late", f"not done in {_LIMIT_S} s"
    return said == b"0"


@pytest.fixture(scope="module", autouse=True)
def clock_without_system_calls() -> None:
    """Deadlines are read from a clock, which most machines map into each process."""
    if not makes_no_system_call(time.monotonic_ns):
        pytest.skip("this machine's clock is a system call; one with clock source tsc or kvm-clock would run this")


def test_a_system_call_is_seen() -> None:
    assert not makes_no_system_call(os.getppid)


def alone(comm: xccl.Communicator) -> dict[str, Act]:
    """What one rank can do without waiting for others."""
    a, s, x = comm.empty(512, np.float32), comm.signals(2), np.ones(512, np.float32)
    ep = xccl.ExpertParallel(
        comm, num_experts=4, hidden=64, top_k=2, max_tokens=8, dtype=np.float32, quant="none", protocol="direct"
    )
    tokens, weights = np.ones((8, 64), np.float32), np.ones((8, 2), np.float32)
    choices = np.tile(np.array([1, 3]), (8, 1))

    def round_trip() -> None:
        d = ep.dispatch(tokens, choices)
        ep.combine(d.tokens, d, weights)

    out = np.empty_like(x)
    return {
        "put": lambda: comm.put(a, x, peer=0),
        "get": lambda: comm.get(out, a, peer=0),
        "put_signal": lambda: comm.put_signal(a, x, peer=0, signals=s, index=0, value=1),
        "signal": lambda: comm.signal(s, 1, 1, peer=0),
        "wait_until": lambda: comm.wait_until(s, 0, "ge", 1),
        "fence and quiet": lambda: (comm.fence(), comm.quiet()),
        "barrier": comm.barrier,
        "allreduce": lambda: comm.allreduce(x, out=out),
        "dispatch and combine": round_trip,
    }


def test_one_rank_alone() -> None:
    def main(comm: xccl.Communicator) -> list[str]:
        acts = alone(comm)
        for act in list(acts.values()) * 3:
            act()
        return [name for name, act in acts.items() if not makes_no_system_call(act)]

    assert launch(main, 1, "shm") == [[]]


@pytest.mark.parametrize("what", ["put", "put_signal", "signal", "get", "isend"])
def test_to_a_peer_that_does_not_sleep(what: str) -> None:
    """Which is in no operation at all."""

    def main(comm: xccl.Communicator) -> bool:
        a, s, x = comm.empty(512, np.float32), comm.signals(1), np.ones(512, np.float32)
        acts: dict[str, Act] = {
            "put": lambda: comm.put(a, x, peer=1),
            "put_signal": lambda: comm.put_signal(a, x, peer=1, signals=s, index=0, value=1),
            "signal": lambda: comm.signal(s, 0, 1, peer=1),
            "get": lambda: comm.get(x, a, peer=1),
            "isend": lambda: comm.isend(x, dst=1, event_id=1),
        }
        for _ in range(3):
            comm.barrier()
            if comm.rank == 0:
                acts[what]()
            elif what == "isend":
                comm.recv(np.empty_like(x), src=0, event_id=1)
        comm.barrier()
        return in_fork(comm, acts[what])

    assert launch(main, 2, "shm")[0]


@pytest.mark.parametrize("what", ["recv", "irecv", "wait_until"])
def test_what_has_come_already(what: str) -> None:
    def main(comm: xccl.Communicator) -> bool:
        s, x = comm.signals(1), np.ones(512, np.float32)
        acts: dict[str, Act] = {
            "recv": lambda: comm.recv(x, src=1, event_id=1),
            "irecv": lambda: comm.irecv(x, src=1, event_id=1).wait(),
            "wait_until": lambda: comm.wait_until(s, 0, "ge", 1),
        }
        for turn in range(4):  # what comes in the last one is left for the fork
            if comm.rank == 1:
                comm.signal(s, 0, 1, peer=0)
                request = comm.isend(x, dst=0, event_id=1) if "recv" in what else None
                comm.barrier()
                if request and turn < 3:
                    request.wait()
            else:
                comm.barrier()
                if turn < 3:
                    acts[what]()
        return in_fork(comm, acts[what])

    assert launch(main, 2, "shm")[0]


def in_fork(comm: xccl.Communicator, act: Act) -> bool:
    """Does `act` of rank 0 make no system call, while the other rank sleeps in no operation?"""
    ready, done = comm.signals(1), comm.signals(1)
    if comm.rank != 0:
        comm.signal(ready, 0, 1, peer=0)
        while done.read(0) == 0:
            time.sleep(0.001)
        return True
    comm.wait_until(ready, 0, "eq", 1)
    found = makes_no_system_call(act)
    comm.signal(done, 0, 1, peer=1)
    return found
