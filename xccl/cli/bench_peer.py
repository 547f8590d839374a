"""`xccl bench OP --peer LIBRARY`: a row of the comparison with other libraries, `python -m bench.peers`.

That comparison is part of the sources, not of the package: it is run as a program of its own, and nothing here imports
it. See docs/peers.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xccl.cli.options import BenchOptions
from xccl.errors import UsageError

if TYPE_CHECKING:
    from xccl.cli.bench_ops import Benchmark

#: The libraries, and the operations that the comparison has for them.
PEERS: Final = ("openmpi", "mpich", "gloo", "multiprocessing")
OPERATIONS: Final = (
    "put", "put-signal", "sendrecv", "barrier", "moe", "allgather", "allreduce", "reduce-scatter", "alltoall",
    "alltoallv", "broadcast", "gather", "scatter",
)  # fmt: skip

_SOURCES: Final = Path(__file__).parents[2]
#: Options that the comparison has too, and what is no option; another one would be lost.
_NOT_LOST: Final = {
    "op", "ranks", "min_bytes", "max_bytes", "factor", "tokens", "hidden", "experts", "deployment", "traced",
}  # fmt: skip
_OPTION_OF: Final = {"check": "no-check", "timeout_s": "timeout"}
_MINUTES_A_SIZE: Final = 0.15
_MINUTES_OF_MOE: Final = 0.5
_FLOAT32_BYTES: Final = 4


def check_peer(args: argparse.Namespace) -> None:
    """Is the comparison there, and has it what is asked for?

    Raises:
        UsageError: no, and why.
    """
    if args.op not in OPERATIONS:
        raise UsageError(f"--peer: {args.op} has no counterpart in other libraries; one of {', '.join(OPERATIONS)}")
    defaults = vars(BenchOptions(op=args.op, ranks=0)) | {"csv": None}
    lost = [name for name in defaults.keys() - _NOT_LOST if getattr(args, name) not in (None, defaults[name])]
    if lost:
        options = ", ".join(sorted(f"--{_OPTION_OF.get(name, name.replace('_', '-'))}" for name in lost))
        raise UsageError(f"--peer does not go with {options}: see `python -m bench.peers --help`")
    if args.json == "-":
        raise UsageError("--peer prints a table: give --json a file")
    if not (_SOURCES / "bench" / "peers" / "__main__.py").is_file():
        raise UsageError(
            "--peer needs bench/peers of the source tree, which is not beside this installation: "
            "pip install --editable '.[peers]' in a checkout, or `make peers` there"
        )


def run_peer(args: argparse.Namespace, options: BenchOptions, benchmark: Benchmark) -> int:
    """Run the comparison; returns its exit status.

    Args:
        args: as parsed, and passed by `check_peer`.
        options: of the run.
        benchmark: the operation.
    """
    sizes = _sizes(options, benchmark)
    minutes = max(1, len(sizes)) * (_MINUTES_OF_MOE if options.op == "moe" else _MINUTES_A_SIZE)
    command = [
        sys.executable, "-m", "bench.peers", "--only", options.op, "--peer", args.peer, "--ranks", str(options.ranks),
        "--hidden", str(options.hidden), "--experts", str(options.experts), "--minutes", f"{minutes:.2f}",
    ]  # fmt: skip
    if sizes:
        command += ["--sizes", *map(str, sizes)]
    if args.json:
        command += ["--json", str(Path(args.json).absolute())]
    path = os.pathsep.join(filter(None, [str(_SOURCES), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal has told the other one too, which now ends the ranks
            process.wait()
            raise


def _sizes(options: BenchOptions, benchmark: Benchmark) -> list[int]:
    """Tokens, or the bytes of a message or of a part: where `xccl bench` gives the sum of the parts, divided."""
    if benchmark.sweep == "nothing":
        return []
    if benchmark.sweep == "tokens":
        return list(options.tokens)
    parts = options.ranks if benchmark.parted else 1
    sizes = (size // parts // _FLOAT32_BYTES * _FLOAT32_BYTES for size in options.sizes(1))
    return list(dict.fromkeys(max(size, _FLOAT32_BYTES) for size in sizes))
