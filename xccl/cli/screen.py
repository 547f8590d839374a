"""Where the output of a benchmark goes: a progress bar and a table on a terminal, lines as they come in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from xccl.cli import report
from xccl.cli.options import BenchOptions
from xccl.cli.results import Row


class Screen(Protocol):
    """Somewhere to show rows."""

    def row(self, row: Row) -> None:
        """A row is complete."""

    def finish(self, rows: Sequence[Row]) -> None:
        """All rows are complete."""


class Silent:
    """Shows nothing: standard output belongs to a JSON or CSV document."""

    def row(self, row: Row) -> None:
        """Show nothing."""

    def finish(self, rows: Sequence[Row]) -> None:
        """Show nothing."""


class Plain:
    """Aligned text, each row when it is there; everything else is a comment that starts with #."""

    def __init__(self, options: BenchOptions, version: str, *, moe: bool, projected: str | None) -> None:
        self._columns = report.columns_of(moe=moe, projected=projected is not None)
        comments = report.headlines(options, version, moe=moe, projected=projected)
        self._header = [*(f"# {comment}" for comment in comments), *report.plain_header(self._columns)]

    def row(self, row: Row) -> None:
        """Print it; before the first one the header, which a run that fails at once should not print."""
        print(*self._header, report.plain_row(row, self._columns), sep="\n", flush=True)
        self._header = []

    def finish(self, rows: Sequence[Row]) -> None:
        """Print the summaries."""
        for line in report.summaries(rows):
            print(f"# {line}")


class Terminal:
    """A rich table, at the end."""

    def __init__(self, options: BenchOptions, version: str, *, moe: bool, projected: str | None) -> None:
        self._columns = report.columns_of(moe=moe, projected=projected is not None)
        self._headlines = report.headlines(options, version, moe=moe, projected=projected)

    def row(self, row: Row) -> None:
        """Nothing yet: widths depend on all rows."""

    def finish(self, rows: Sequence[Row]) -> None:
        """Print the table and the summaries."""
        from rich.console import Console

        console = Console()
        console.print(*self._headlines, sep="\n", markup=False, highlight=False, soft_wrap=True)
        console.print(report.rich_table(rows, self._columns, console))
        for line in report.summaries(rows):
            console.print(line, highlight=False, soft_wrap=True)


def make_screen(options: BenchOptions, version: str, *, moe: bool, quiet: bool, projected: str | None = None) -> Screen:
    """The screen that fits where standard output goes; `projected` says on what rows are projected, if they are."""
    if quiet:
        return Silent()
    return (Terminal if sys.stdout.isatty() else Plain)(options, version, moe=moe, projected=projected)


class ProgressBar(Protocol):
    """Something that counts rows."""

    def advance(self, row: Row) -> None:
        """One more is done."""


class _NoBar:
    def advance(self, row: Row) -> None:
        """Show nothing."""


@contextmanager
def progress_bar(total_rows: int, title: str) -> Iterator[ProgressBar]:
    """A progress bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield _NoBar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Few refreshes: drawing takes time from the ranks, which have all cores in use.
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as progress:
        task = progress.add_task(f"{title}: starting", total=total_rows)

        class Bar:
            def advance(self, row: Row) -> None:
                size = f"{row.tokens} tokens" if row.tokens is not None else f"{row.bytes} bytes"
                progress.update(task, advance=1, description=f"{title}: {row.op} {size}")

        yield Bar()
