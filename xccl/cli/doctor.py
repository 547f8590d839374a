"""`xccl doctor`: is this machine fit to run ranks, and has an earlier run left anything behind?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Final

from xccl._version import __version__
from xccl.cli.doctor_checks import Check, Status, checks, stale_segments

_STYLE_OF: Final = {Status.OK: "green", Status.WARNING: "yellow", Status.BROKEN: "bold red"}


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.description = (
        "Check this machine: shared memory, kernel cache, cores, limits, versions; and list stale segments, those "
        "whose owners are dead. Exit status: 1 if something is broken."
    )
    parser.add_argument("--clean", action="store_true", help="remove stale segments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    results = [*checks(), stale_segments(clean=args.clean)]
    if sys.stdout.isatty():
        _print_rich(results)
    else:
        _print_plain(results)
    return 1 if any(check.status is Status.BROKEN for check in results) else 0


def _print_plain(results: Sequence[Check]) -> None:
    width = max(len(check.name) for check in results)
    for check in results:
        print(f"{check.status.value:7s}  {check.name:{width}s}  {check.found}")
        for line in check.notes:
            print(f"{'':7s}  {'':{width}s}  {line}")


def _print_rich(results: Sequence[Check]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"xccl {__version__} doctor", title_justify="left", box=box.ROUNDED, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for check in results:
        status = f"[{_STYLE_OF[check.status]}]{check.status.value}[/]"
        notes = "".join(f"\n[dim]{escape(line)}[/dim]" for line in check.notes)
        table.add_row(status, check.name, escape(check.found) + notes)
    Console().print(table)
