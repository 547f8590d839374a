"""Compiling on all cores: everything is done once, and what children cannot do is left to the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from xccl.kernels._together import compile_together

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2,
    reason="children are made on several cores; run it on a machine with more than one",
)


def functions(count: int) -> list[Callable[[], None]]:
    return [lambda: None for _ in range(count)]


def children() -> str:
    """The pids of this thread's children, zombies included."""
    return Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that other tests may have left do not matter to children that compile nothing."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)


@pytest.mark.usefixtures("alone")
def test_each_is_compiled_once_in_some_child(tmp_path: Path) -> None:
    def compile_one(i: int) -> None:
        with open(tmp_path / str(i), "x") as done:  # fails if it was there
            done.write(str(os.getpid()))

    before = children()
    compile_together(functions(40), compile_one, lambda: None)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == list(range(40))
    assert str(os.getpid()) not in {path.read_text() for path in tmp_path.iterdir()}
    assert children() == before


@pytest.mark.usefixtures("alone")
def test_a_child_that_fails_fails_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def compile_one(i: int) -> None:
        if i == 0:
            raise ValueError("this one not")
        (tmp_path / str(i)).touch()
        time.sleep(0.01)

    compile_together(functions(10), compile_one, lambda: None)
    assert len(list(tmp_path.iterdir())) == 9
    capfd.readouterr()


@pytest.mark.usefixtures("alone")
def test_an_interrupt_ends_the_children() -> None:
    def raise_if_interrupted() -> None:
        raise KeyboardInterrupt

    before, start = children(), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        compile_together(functions(10), lambda _: time.sleep(60), raise_if_interrupted)
    assert time.monotonic() - start < 30
    assert children() == before


def test_no_fork_beside_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    compile_together(functions(10), lambda _: None, lambda: None)


def test_a_cold_start_is_interrupted_and_leaves_no_child(tmp_path: Path) -> None:
    """Ctrl-C while kernels compile."""
    code = "import time; from xccl.kernels._jit import warm; import xccl.kernels.moe; print('go', flush=True); warm()"
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "XCCL_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "KeyboardInterrupt" in errors
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
