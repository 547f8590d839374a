"""Import and start, measured in fresh interpreters.

They run a copy of the package with its .pyc files made beforehand, as an installed package has them: otherwise the
figure would depend on whether the working tree was imported before, and by whom.
"""

from __future__ import annotations

import compileall
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xccl

_IMPORT = """
import json, time
began = time.monotonic()
import numba
numba_at = time.monotonic()
import xccl
print(json.dumps([numba_at - began, time.monotonic() - numba_at]))
"""

_START = """
import json, sys, time
interpreter_at = time.monotonic()
import xccl
import_at = time.monotonic()

def main(comm):
    comm.barrier()
    return time.monotonic()

ends = max(xccl.launch(main, int(sys.argv[1])))
print(json.dumps([interpreter_at, import_at, ends]))
"""


@dataclass(frozen=True)
class Start:
    """Seconds from the start of the interpreter to the end of the ranks' first barrier, and two parts of it."""

    total_s: float
    import_s: float
    launch_s: float


class Interpreters:
    """Fresh interpreters with a compiled copy of the package, and a kernel cache of their own."""

    def __init__(self, folder: Path) -> None:
        package = Path(xccl.__file__).parent
        copy = folder / "site" / package.name
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc"))
        compileall.compile_dir(copy, quiet=2)
        self._folder = folder
        self._environment = {**os.environ, "PYTHONPATH": str(copy.parent), "XCCL_CACHE_DIR": str(folder / "cache")}

    def _run(self, script: str, *args: str) -> list[float]:
        command = [sys.executable, "-c", script, *args]
        done = subprocess.run(
            command, env=self._environment, cwd=self._folder, capture_output=True, text=True, check=False, timeout=300
        )
        if done.returncode:
            raise RuntimeError(f"a fresh interpreter failed:\n{done.stderr}")
        values: list[float] = json.loads(done.stdout)
        return values

    def import_s(self, repeat: int) -> tuple[float, float]:
        """Import time of numba, and what xccl adds to it: medians."""
        runs = [self._run(_IMPORT) for _ in range(repeat)]
        return statistics.median(run[0] for run in runs), statistics.median(run[1] for run in runs)

    def start(self, ranks: int) -> Start:
        """One start; the first one compiles the kernels."""
        began = time.monotonic()
        interpreter_at, import_at, ends = self._run(_START, str(ranks))
        return Start(ends - began, import_at - interpreter_at, ends - import_at)

    def starts(self, ranks: int, repeat: int) -> Start:
        """The median start."""
        runs = [self.start(ranks) for _ in range(repeat)]
        return sorted(runs, key=lambda run: run.total_s)[repeat // 2]


@contextmanager
def interpreters() -> Iterator[Interpreters]:
    """With an empty kernel cache, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="xccl-figures-") as folder:
        yield Interpreters(Path(folder))
