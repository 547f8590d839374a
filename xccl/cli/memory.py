"""Is there memory for what a benchmark is to move? Better told at once than by a kernel that kills ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from xccl.cli.bench_data import dtype_of
from xccl.cli.deployment import Deployment
from xccl.cli.options import BenchOptions
from xccl.errors import UsageError

_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")

#: Beside data: the interpreter and compiled kernels, once for threads, and what each further rank takes.
_PROGRAM_BYTES: Final = 200 << 20
_THREAD_BYTES: Final = 1 << 20
_PROCESS_BYTES: Final = 40 << 20

#: A token is in the inputs, in the result and with the oracle; a message at both ends.
_COPIES_OF_TOKEN: Final = 3
_BUFFERS_OF_MESSAGE: Final = 2


Sweep = Literal["bytes", "tokens", "nothing"]


def needed_bytes(options: BenchOptions, sweep: Sweep) -> int:
    """About how much memory a run over `sweep` takes at its peak, all ranks together, at the least."""
    each = _PROCESS_BYTES if options.fabric == "shm" else _THREAD_BYTES
    program = _PROGRAM_BYTES + options.ranks * each
    if sweep == "nothing":
        return program
    itemsize = dtype_of(options).itemsize
    if sweep == "bytes":
        return program + _BUFFERS_OF_MESSAGE * options.ranks * max(options.sizes(itemsize))
    tokens = options.batches * max(options.tokens)
    token_bytes = options.hidden * itemsize
    sent_bytes = options.hidden if options.quant == "int8" else token_bytes
    # A row of either kind is at its sender, and at its receiver, which has those of one domain at a time.
    apart = options.deployment or Deployment()
    rows = tokens * (options.topk + (apart.shared > 0))
    rows_bytes = (rows + rows // apart.domains) * (sent_bytes + token_bytes)
    return program + rows_bytes + _COPIES_OF_TOKEN * tokens * token_bytes


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """What this process may still take, by the system and by its control group; None if neither says."""
    found = []
    try:
        lines = meminfo.read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    try:
        limit, used = (cgroup / name for name in ("memory.max", "memory.current"))
        if (text := limit.read_text().strip()) != "max":
            found.append(max(int(text) - int(used.read_text()), 0))
    except OSError:
        pass
    return min(found, default=None)


def require_memory(options: BenchOptions, sweep: Sweep, available: int | None) -> None:
    """Check that a run fits into so many bytes; None for unknown.

    Raises:
        UsageError: it does not.
    """
    needed = needed_bytes(options, sweep)
    if available is not None and needed > available:
        what = {"tokens": "--tokens, --hidden or ", "bytes": "--max-bytes or "}.get(sweep, "")
        raise UsageError(
            f"{options.op} on {options.ranks} ranks takes about {_gb(needed)} at the least, {_gb(available)} is "
            f"available: ask for less (lower {what}--ranks), or try it with --no-memory-check",
            value=needed, bound=available,
        )  # fmt: skip


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
