"""`python -m bench.figures`: the figures that the project states of itself, beside those of its peers.

All are emulated times, measured on this machine: nothing here says anything about UB links. A figure is the median of
blocks of operations, in the best of three passes. A ratio is xccl's cost over the peer's (time, or the inverse of
bandwidth): below 1 xccl is faster. The peers' figures come from another machine of the same kind (see
`bench.peers.published`); the rows "copy in one process" and "Python spin" tell how much this one differs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table as RichTable

import xccl
from bench import figures_ranks as ranks_code
from bench.figures_start import interpreters
from bench.peers import published as peers
from xccl.cli.environment import environment

_HERE: Final = "here"
_REFERENCE: Final = "reference"
_RATIO: Final = "ratio"

_LATENCY_BYTES: Final = {"8 B": 8, "1 KiB": 1 << 10, "64 KiB": 64 << 10}
_STREAM_BYTES: Final = {"64 KiB": 64 << 10, "1 MiB": 1 << 20, "4 MiB": 4 << 20, "16 MiB": 16 << 20}
_RANKS: Final = (2, 4, 8)
_TOKENS: Final = (8, 64, 128)
_MIB: Final = 1 << 20
_PASSES: Final = 3


@dataclass(frozen=True)
class Row:
    """One implementation. `passes` are the medians of all passes, the best of which are the values."""

    name: str
    source: str
    values: peers.Values
    passes: list[peers.Values] | None = None


@dataclass
class Table:
    """Figures of one kind: columns are sizes, rows are implementations."""

    title: str
    unit: str
    columns: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    higher_is_better: bool = False

    def measure(self, plan: dict[str, list[Callable[[], float]]]) -> None:
        """Add rows, each with a function for each column.

        Everything is measured in passes over the whole table, and the best pass counts: other work on the machine comes
        in bursts, and would hit one cell and not its neighbour.
        """
        passes = [{name: tuple(cell() for cell in cells) for name, cells in plan.items()} for _ in range(_PASSES)]
        best = max if self.higher_is_better else min
        for name in plan:
            of_row: list[peers.Values] = [values[name] for values in passes]
            self.rows.append(Row(name, _HERE, tuple(map(best, *of_row)), of_row))

    def reference(self, figures: dict[str, peers.Values]) -> None:
        """Add the rows of peers."""
        self.rows += [Row(name, _REFERENCE, values) for name, values in figures.items()]

    def ratio(self, name: str, peer: str) -> None:
        """Add a row: the cost of one implementation over that of another."""
        ours, theirs = (next(row for row in self.rows if row.name == wanted).values for wanted in (name, peer))
        values: list[float | None] = []
        for mine, other in zip(ours, theirs, strict=True):
            if mine is None or other is None:
                values.append(None)
            else:
                values.append(other / mine if self.higher_is_better else mine / other)
        self.rows.append(Row(f"{name} / {peer}", _RATIO, tuple(values)))

    def render(self) -> RichTable:
        """For the terminal."""
        table = RichTable(title=f"{self.title}, {self.unit}", title_justify="left", title_style="bold")
        table.add_column("", overflow="fold")
        table.add_column("source")
        for column in self.columns:
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            style = {_HERE: "bold", _REFERENCE: "dim", _RATIO: "cyan"}[row.source]
            table.add_row(row.name, row.source, *map(_figure, row.values), style=style)
        return table


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _launch(main: Callable[..., Any], ranks: int, *args: object) -> list[Any]:
    return xccl.launch(main, ranks, args=args, timeout_s=120.0)


# -- the tables -------------------------------------------------------------------------------------------------------


def start() -> Table:
    """Import, and start of 8 ranks."""
    table = Table("Import, and start of 8 ranks to the end of their first barrier", "ms", ("total", "import", "launch"))
    with interpreters() as fresh:
        cold = fresh.start(8)
        warm = fresh.starts(8, 5)
        numba_s, xccl_s = fresh.import_s(7)
        table.rows.append(Row("import numba (for scale)", _HERE, (1e3 * numba_s, 1e3 * numba_s, None)))
        table.rows.append(Row("import xccl, beyond numba's own", _HERE, (1e3 * xccl_s, 1e3 * xccl_s, None)))
        for name, run in (("cold start (empty XCCL_CACHE_DIR)", cold), ("warm start", warm)):
            table.rows.append(Row(name, _HERE, (1e3 * run.total_s, 1e3 * run.import_s, 1e3 * run.launch_s)))
    return table


def latency() -> Table:
    """Half round trips between 2 ranks."""
    table = Table("Half round trip from Python, 2 ranks", "us", list(_LATENCY_BYTES))
    mains = {
        "xccl put_signal + wait_until": ranks_code.put_signal_latency,
        "xccl send/recv": ranks_code.send_recv_latency,
        "Python spin on symmetric memory": ranks_code.python_spin_latency,
    }

    def cell(main: Callable[..., Any], n_bytes: int) -> float:
        return ranks_code.median_us(_launch(main, 2, n_bytes)[:1])

    table.measure({name: [partial(cell, main, n) for n in _LATENCY_BYTES.values()] for name, main in mains.items()})
    table.reference(peers.LATENCY_US)
    table.ratio("xccl put_signal + wait_until", "mpi4py put + flush + flag, Open MPI")
    table.ratio("xccl put_signal + wait_until", "MPI window, NumPy copy + flag, Python spin")
    table.ratio("xccl send/recv", "mpi4py send/recv, Open MPI")
    table.ratio("Python spin on symmetric memory", "MPI window, NumPy copy + flag, Python spin")
    return table


def bandwidth() -> Table:
    """Streams from one rank to another."""
    table = Table("Streaming bandwidth, 2 ranks", "GB/s", list(_STREAM_BYTES), higher_is_better=True)
    mains = {
        "xccl put": (ranks_code.put_stream, 2),
        "xccl isend stream": (ranks_code.isend_stream, 2),
        "xccl copy in one process": (ranks_code.one_copy, 1),
    }

    def cell(main: Callable[..., Any], ranks: int, n_bytes: int) -> float:
        return n_bytes / ranks_code.median_us(_launch(main, ranks, n_bytes)[:1]) / 1e3

    table.measure({name: [partial(cell, *main, n) for n in _STREAM_BYTES.values()] for name, main in mains.items()})
    table.reference(peers.BANDWIDTH_GBPS)
    table.ratio("xccl put", "mpi4py put, Open MPI")
    table.ratio("xccl isend stream", "mpi4py isend stream, Open MPI")
    table.ratio("xccl copy in one process", "one copy in one process")
    return table


def barrier() -> Table:
    """Barriers back to back."""
    table = Table("Barrier", "us", [f"{ranks} ranks" for ranks in _RANKS])

    def cell(ranks: int) -> float:
        return ranks_code.median_us(_launch(ranks_code.barriers, ranks))

    table.measure({"xccl": [partial(cell, ranks) for ranks in _RANKS]})
    table.reference(peers.BARRIER_US)
    table.ratio("xccl", "mpi4py, Open MPI")
    return table


def moe() -> Table:
    """Dispatch and combine back to back."""
    shapes = [(ranks, tokens) for ranks in _RANKS for tokens in _TOKENS]
    columns = [f"{ranks}, {tokens}" for ranks, tokens in shapes]
    table = Table("Dispatch + combine back to back, by (ranks, tokens a rank)", "us", columns)

    def cell(shape: ranks_code.MoeShape) -> float:
        return ranks_code.median_us([result.times_us for result in _launch(ranks_code.moe, shape.ranks, shape)])

    table.measure(
        {
            f"xccl, {experts} experts, {quant}": [
                partial(cell, ranks_code.MoeShape(ranks, tokens, experts, quant)) for ranks, tokens in shapes
            ]
            for experts in (32, 256)
            for quant in ("none", "int8")
        }
    )
    table.reference(peers.MOE_US)
    table.ratio("xccl, 32 experts, none", "Open MPI + numba")
    table.ratio("xccl, 32 experts, none", "Open MPI + numba, dedup")
    return table


def memory() -> Table:
    """Memory of each of 8 ranks."""
    columns = ("resident", "private", "proportional", "of it segments")
    table = Table("Memory of a rank, mean of 8 ranks", "MiB", columns)
    shape = ranks_code.MoeShape(ranks=8, tokens=128, experts=256, quant="int8")
    after_moe = [result.memory for result in _launch(ranks_code.moe, 8, shape)]
    for name, memories in (
        ("after the first barrier", _launch(ranks_code.memory_at_start, 8)),
        ("after moe: 128 tokens, 256 experts, int8", after_moe),
    ):
        sums = [sum(values) for values in zip(*(asdict(m).values() for m in memories), strict=True)]
        table.rows.append(Row(name, _HERE, tuple(total / len(memories) / _MIB for total in sums)))
    return table


_TABLES: Final[dict[str, Callable[[], Table]]] = {
    "start": start,
    "latency": latency,
    "bandwidth": bandwidth,
    "barrier": barrier,
    "moe": moe,
    "memory": memory,
}


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__.split("\n\n", 1)[1])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures, with those of all passes")
    parser.add_argument("--only", nargs="+", choices=tuple(_TABLES), default=tuple(_TABLES), help="some of the tables")
    args = parser.parse_args()
    console = Console(width=None if os.isatty(1) else 140)
    machine = environment()
    load_before = os.getloadavg()[0]
    console.print(
        f"xccl {xccl.__version__} on {machine['cpu']}, {machine['usable_cores']} cores, load {load_before:.1f}. "
        f"here: emulated, measured on this machine; reference: {peers.SOURCE}; ratio: cost here / cost there.",
        highlight=False,
    )
    if load_before > 0.5:
        console.print("This machine is busy: expect figures to be too high.", style="yellow")
    tables = {}
    began = time.monotonic()
    for name in args.only:
        tables[name] = _TABLES[name]()
        console.print(tables[name].render())
    seconds = time.monotonic() - began
    console.print(f"{seconds:.0f} s, load afterwards {os.getloadavg()[0]:.1f}", highlight=False)
    if args.json:
        report = {
            "schema": 1, "version": xccl.__version__, "environment": machine, "seconds": seconds,
            "load": [load_before, os.getloadavg()[0]], "reference": peers.SOURCE,
            "tables": {name: asdict(table) for name, table in tables.items()},
        }  # fmt: skip
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
