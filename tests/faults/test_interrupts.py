"""Ctrl-C, kill and kill -9 of the launcher: the ranks end with it, promptly and quietly."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.support import (
    PATIENCE_S,
    ROOT,
    Script,
    at_most,
    children,
    each_ends,
    environment,
    no_new_names,
    runs,
    segment_names,
    wait_for,
)
from xccl.runtime.cleanup import find_segments, remove_stale

RANKS = 5
#: Issue 2: Ctrl-C ends everything within this time.
CTRL_C_S = 1.0
#: Ends of a process that was interrupted: by the signal itself, which is Python's way, or with status 128 + SIGINT.
INTERRUPTED = (-signal.SIGINT, 128 + signal.SIGINT)

LAUNCHER = """
def main(comm, operation):
    comm.report(os.getpid())
    run_for_ever(comm, operation)

xccl.launch(main, 5, args=(sys.argv[1],), fabric=sys.argv[2], timeout_s=60.0, on_report=lambda rank, pid: say(pid))
"""


def started(script: Script) -> list[int]:
    """The processes of the ranks, once all of them run; the launcher's own for each rank that is a thread."""
    pids = [script.hear()[0] for _ in range(RANKS)]
    time.sleep(0.02)
    return pids


def assert_nothing_stays(pids: list[int], before: set[str]) -> None:
    each_ends(pids, 1.0)
    no_new_names(before)


@pytest.mark.parametrize("operation", ["barrier", "sendrecv", "dispatch"])
def test_ctrl_c_at_a_terminal(fabric: str, operation: str) -> None:
    """The whole process group gets SIGINT."""
    before = segment_names()
    with Script(LAUNCHER, operation, fabric) as script:
        pids = started(script)
        with at_most(CTRL_C_S):
            os.killpg(script.pid, signal.SIGINT)
            status, _, err = script.finish()
        assert status in INTERRUPTED
        assert err.rstrip().endswith("KeyboardInterrupt") or "KeyboardInterrupt: rank" in err
        assert "Process xccl rank" not in err  # no traceback of a rank beside the launcher's
        assert_nothing_stays(pids, before)


def test_sigint_of_the_launcher_alone(fabric: str) -> None:
    before = segment_names()
    with Script(LAUNCHER, "barrier", fabric) as script:
        pids = started(script)
        with at_most(CTRL_C_S):
            os.kill(script.pid, signal.SIGINT)
            status, _, err = script.finish()
        assert status in INTERRUPTED
        assert "Process xccl rank" not in err
        assert_nothing_stays(pids, before)


@pytest.mark.parametrize("seed", range(3))
def test_impatient_ctrl_c(seed: int) -> None:
    """Several times, some of them while the launcher cleans up: the cleaning is not left half done."""
    rng = random.Random(seed)
    before = segment_names()
    with Script(LAUNCHER, "barrier", "shm") as script:
        pids = started(script)
        with at_most(CTRL_C_S):
            for _ in range(4):
                os.killpg(script.pid, signal.SIGINT)
                time.sleep(rng.uniform(0.0, 0.03))
            status, _, _ = script.finish()
        assert status in INTERRUPTED
        assert_nothing_stays(pids, before)


@pytest.mark.parametrize("seed", range(3))
def test_ctrl_c_while_ranks_start(seed: int) -> None:
    rng = random.Random(seed)
    code = """
say("launching")
try:
    xccl.launch(run_for_ever, 24, timeout_s=60.0)
except KeyboardInterrupt:
    say("interrupted", children(os.getpid()))
"""
    before = segment_names()
    with Script("xccl.launch(rank_number, 1)" + code) as script:
        script.hear()
        time.sleep(rng.uniform(0.0, 0.06))
        pids = children(script.pid)
        with at_most(CTRL_C_S):
            os.killpg(script.pid, signal.SIGINT)
            status, said, err = script.finish()
        assert (status, said) == (0, [["interrupted", []]])
        assert err == ""  # nor a traceback of a rank that was just being made
        assert_nothing_stays(pids, before)


def test_the_caller_may_go_on_after_ctrl_c(fabric: str) -> None:
    code = """
def main(comm):
    comm.report(os.getpid())
    run_for_ever(comm)
try:
    xccl.launch(main, 5, fabric=sys.argv[1], timeout_s=60.0, on_report=lambda rank, pid: say(pid))
except KeyboardInterrupt:
    say("caught", children(os.getpid()), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
say(xccl.launch(rank_number, 3, fabric=sys.argv[1], timeout_s=60.0))
"""
    with Script(code, fabric) as script:
        started(script)
        os.killpg(script.pid, signal.SIGINT)
        status, said, err = script.finish()
    assert (status, err) == (0, "")
    assert said == [["caught", [], True], [[0, 1, 2]]]


@pytest.mark.parametrize(
    ("operation", "number"),
    [
        ("barrier", signal.SIGKILL),
        ("sendrecv", signal.SIGKILL),
        ("combine", signal.SIGKILL),
        ("barrier", signal.SIGTERM),
        ("sendrecv", signal.SIGHUP),
    ],
)
def test_ranks_do_not_outlive_their_launcher(operation: str, number: signal.Signals) -> None:
    before = segment_names()
    with Script(LAUNCHER, operation, "shm") as script:
        pids = started(script)
        os.kill(script.pid, number)
        each_ends(pids, 2.0)
        status, _, err = script.finish()
        assert status == -number
        assert err == ""  # the ranks go quietly, although nobody hears their last words
        assert_nothing_stays(pids, before)


def test_ranks_run_their_finally_clauses_when_the_launcher_is_killed() -> None:
    code = """
def main(comm):
    comm.report(os.getpid())
    try:
        time.sleep(60.0)
    finally:
        os.write(2, b"x")

xccl.launch(main, 5, timeout_s=60.0, on_report=lambda rank, pid: say(pid))
"""
    with Script(code) as script:
        pids = started(script)
        os.kill(script.pid, signal.SIGKILL)
        each_ends(pids, 2.0)
        assert script.finish()[2] == "x" * RANKS


@pytest.mark.parametrize("ranks_too", [False, True])
def test_kill_the_launcher_while_ranks_start(ranks_too: bool) -> None:
    """Ranks that live take their names with them; names of ranks that were killed too go with the next launch."""
    code = """
from xccl.fabric.shm import ShmFabric
original = ShmFabric._await_attached
def slow(self, *args):
    os.write(1, b'["attached"]\\n')
    time.sleep(60.0 if self.rank == 1 else 0.0)
    original(self, *args)
ShmFabric._await_attached = slow
xccl.launch(run_for_ever, 5, timeout_s=60.0)
"""
    before = segment_names()
    with Script(code) as script:
        for _ in range(RANKS):
            script.hear()
        pids = children(script.pid)
        assert len(pids) == RANKS
        names = segment_names() - before
        assert names  # rank 1 still has one
        os.kill(script.pid, signal.SIGKILL)
        if not ranks_too:
            each_ends(pids, 2.0)
            assert not segment_names() & names
            return
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        each_ends(pids, 2.0)
        left = segment_names() & names
        found = {segment.name: segment for segment in find_segments()}
        for name in left:
            assert found[name].owner_pid in pids
            assert not found[name].alive
        removed = remove_stale()
        assert left <= {segment.name for segment in removed} or not segment_names() & left
        assert not segment_names() & left


@pytest.mark.parametrize("moment", ["start", "middle"])
def test_ctrl_c_of_the_benchmark(fabric: str, moment: str) -> None:
    program = "import sys; from xccl.cli.main import main; sys.exit(main())"
    options = "bench moe --ranks 8 --tokens 128 --hidden 7168 --experts 256 --topk 8 -n 100000"
    before = segment_names()
    process = subprocess.Popen(
        [sys.executable, "-c", program, *options.split(), "--fabric", fabric],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, cwd=ROOT, env=environment(), preexec_fn=_default_sigint,
    )  # fmt: skip
    try:
        if fabric == "shm":
            wait_for(lambda: len(children(process.pid)) == 8, "ranks")
        else:
            wait_for(lambda: len(threads(process.pid)) >= 8, "ranks")
        if moment == "middle":
            time.sleep(1.0)
        pids = children(process.pid)
        with at_most(CTRL_C_S):
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, err) == (130, "")
        assert_nothing_stays(pids, before)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert not any(map(runs, pids))


def threads(pid: int) -> list[Path]:
    """All threads of a process: ranks, and helpers of libraries."""
    return list(Path(f"/proc/{pid}/task").iterdir())


def _default_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
