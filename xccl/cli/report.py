"""Rows as a table on a terminal, as aligned text in a pipe, and as JSON and CSV files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from xccl.cli.environment import environment, usable_cores
from xccl.cli.options import BenchOptions
from xccl.cli.results import Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCHEMA: Final = 1


@dataclass(frozen=True)
class Column:
    """A column of the printed tables; a narrow terminal goes without the optional ones, which stand elsewhere too."""

    title: str
    unit: str
    text: Callable[[Row], str]
    width: int
    optional: bool = False


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _bandwidth(row: Row, value: float) -> str:
    return _number(value, 2) if row.bytes else "-"


_NAMES: Final = (
    Column("op", "", lambda row: row.op, 10),
    Column("ranks", "", lambda row: str(row.ranks), 5, optional=True),
)
_MOE: Final = (Column("tokens", "", lambda row: str(row.tokens), 6),)
_FIGURES: Final = (
    Column("bytes", "", lambda row: str(row.bytes), 10),
    Column("dtype", "", lambda row: row.dtype or "-", 5, optional=True),
    Column("p50", "us", lambda row: _number(row.time_us.p50, 1), 9),
    Column("p99", "us", lambda row: _number(row.time_us.p99, 1), 9),
    Column("max", "us", lambda row: _number(row.time_us.max, 1), 9),
    Column("algbw", "GB/s", lambda row: _bandwidth(row, row.algbw_gbps), 8),
    Column("busbw", "GB/s", lambda row: _bandwidth(row, row.busbw_gbps), 8),
)
_MOE_FIGURES: Final = (
    Column("tokens/s", "", lambda row: _number(row.tokens_per_s, 0), 9, optional=True),
    Column("imbal", "max/mean", lambda row: _number(row.load_imbalance, 2), 10, optional=True),
)
_PROJECTED: Final = Column(
    "projected", "us", lambda row: _number(row.projected["time_us"] if row.projected else None, 1), 9
)
#: Those of the object "projected" that have a column in CSV.
_PROJECTED_FIELDS: Final = ("machine", "ranks", "time_us", "low_us", "high_us", "bottleneck", "bottleneck_share")
_WRONG: Final = Column("wrong", "", lambda row: "-" if row.wrong is None else str(row.wrong), 6)


def columns_of(*, moe: bool, projected: bool = False) -> tuple[Column, ...]:
    """The columns of a MoE benchmark, or of any other; what a model says has one of its own."""
    last = (_PROJECTED, _WRONG) if projected else (_WRONG,)
    return (*_NAMES, *_MOE, *_FIGURES, *_MOE_FIGURES, *last) if moe else (*_NAMES, *_FIGURES, *last)


def headlines(options: BenchOptions, version: str, *, moe: bool, projected: str | None = None) -> list[str]:
    """Lines that say what ran, that its times are emulated, and what is projected."""
    kind = "process" if options.fabric == "shm" else "thread"
    kind = f"a {kind}" if options.ranks == 1 else f"{kind}es" if kind == "process" else f"{kind}s"
    timing = "mean of a loop without barriers" if options.back_to_back else "slowest rank of each iteration"
    deployment = options.deployment
    protocol = options.protocol if deployment is None else deployment.text(options.ranks - deployment.attention_dies)
    rows = "deduplicated rows, " if options.rows == "dedup" else ""
    shape = (
        f"hidden {options.hidden}, {options.experts} experts, top-{options.topk}, {options.dtype}, "
        f"quant {options.quant}, {protocol}, {rows}routing {options.routing}"
    )
    ranks, cores = _counted(options.ranks, "rank"), _counted(usable_cores(), "core")
    return [
        f"xccl {version} bench {options.op}: {ranks} as {kind} on {cores}",
        f"emulated times, measured on this machine: {timing}",
        *([shape] if moe else []),
        *([f"projected: what the model says of the same work on {projected}"] if projected else []),
    ]


def summaries(rows: Sequence[Row]) -> list[str]:
    """One line for each round trip: what a reader of a MoE benchmark wants to know."""
    lines = []
    for at, row in enumerate(rows):
        if row.op == "moe" and at >= 2:
            dispatch, combine = rows[at - 2], rows[at - 1]
            lines.append(
                f"tokens {row.tokens}: dispatch {dispatch.time_us.p50:.1f} us, combine {combine.time_us.p50:.1f} us, "
                f"round trip {row.time_us.p50:.1f} us, {row.tokens_per_s or 0:.0f} tokens/s, "
                f"load imbalance {row.load_imbalance or 1:.2f}"
            )
    return lines


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")


def plain_header(columns: Sequence[Column]) -> list[str]:
    """Two comment lines, titles and units, aligned with `plain_row`."""
    titles = "  ".join(column.title.rjust(column.width) for column in columns)
    units = "  ".join(
        f"({column.unit})".rjust(column.width) if column.unit else " " * column.width for column in columns
    )
    return ["#" + titles[1:], ("#" + units[1:]).rstrip()]


def plain_row(row: Row, columns: Sequence[Column]) -> str:
    """One row, aligned."""
    return "  ".join(column.text(row).rjust(column.width) for column in columns)


def rich_table(rows: Sequence[Row], columns: Sequence[Column], console: Console) -> Table:
    """The rows for a terminal: framed, or without the frame, or without optional columns, whatever fits into it."""
    for framed in (True, False):
        table = _table(rows, columns, framed=framed)
        if console.measure(table, options=console.options.update(width=1000)).maximum <= console.width:
            return table
    return _table(rows, [column for column in columns if not column.optional], framed=False)


def _table(rows: Sequence[Row], columns: Sequence[Column], *, framed: bool) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.ROUNDED if framed else box.SIMPLE_HEAD, padding=(0, 1) if framed else 0)
    for column in columns:
        header = f"{column.title}\n[dim]{column.unit}[/dim]" if column.unit else column.title
        style = {"op": "bold", "p50": "bold cyan"}.get(column.title)
        table.add_column(header, justify="left" if column.title == "op" else "right", style=style, no_wrap=True)
    for row in rows:
        cells = [column.text(row) for column in columns]
        if row.wrong is not None:
            cells[-1] = f"[green]{row.wrong}[/green]" if row.wrong == 0 else f"[bold red]{row.wrong}[/bold red]"
        table.add_row(*cells, end_section=row.op == "moe")
    return table


def to_json(rows: Sequence[Row], command: Sequence[str], version: str) -> str:
    """The document of interface.md."""
    document = {
        "schema": SCHEMA,
        "version": version,
        "command": list(command),
        "environment": environment(),
        "results": [row.as_json() for row in rows],
    }
    return json.dumps(document, indent=2) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """The fields of the JSON results, flat; times as min_us, p50_us and so on."""
    out = io.StringIO()
    flat = [_flat(row) for row in rows]
    writer = csv.DictWriter(out, flat[0].keys() if flat else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in row.as_json().items():
        if name == "time_us":
            fields |= {f"{statistic}_us": figure for statistic, figure in value.items()}
        elif name == "projected":
            fields |= {f"projected_{key}": value and value[key] for key in _PROJECTED_FIELDS}
        else:
            fields[name] = value
    return fields
