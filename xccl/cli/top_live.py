"""The live view of `xccl top`: the terminal is redrawn until a key ends it."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal

from xccl.cli import top_report
from xccl.cli.top_report import COLUMNS, RankRow
from xccl.cli.top_waits import analyse
from xccl.runtime.sessions import Snapshot, take_snapshot

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

_STYLE_OF: Final = {"ended": "bold red", "root": "bold yellow", "waits": "", "": "dim"}
#: Columns that a narrow terminal lacks, the first one first.
_DROPPED: Final = ("acked", "chunks in", "wake-ups", "barriers", "ends in", "pid")
#: Lines of a session besides its ranks: its name, and header and edges of the table.
_LINES_OF_TABLE: Final = 4
_FEWEST_ROWS: Final = 3


def watch(prefix: str, interval_s: float, version: str) -> None:
    """Show sessions whose number starts with `prefix`, and look again every `interval_s`, until q or Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with (
        contextlib.suppress(KeyboardInterrupt),
        _single_keys() as has_keys,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            live.update(view(take_snapshot(prefix), version, console), refresh=True)
            if _is_told_to_quit(interval_s, has_keys=has_keys):
                return


@contextlib.contextmanager
def _single_keys() -> Iterator[bool]:
    """Let keys be read one by one, without echo; False if standard input is no terminal."""
    if not sys.stdin.isatty():
        yield False
        return
    saved = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield True
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, saved)


def _is_told_to_quit(timeout_s: float, *, has_keys: bool) -> bool:
    """Wait until it is time to look again; was q pressed before?"""
    deadline = time.monotonic() + timeout_s
    while (left_s := deadline - time.monotonic()) > 0:
        keys = [sys.stdin.fileno()] if has_keys else []
        if select.select(keys, [], [], left_s)[0]:
            pressed = os.read(keys[0], 64)
            if not pressed or b"q" in pressed.lower():  # nothing: the terminal has gone
                return True
    return False


def view(snapshot: Snapshot, version: str, console: Console) -> Group:
    """A snapshot for a terminal of that size."""
    from rich.console import Group
    from rich.text import Text

    heading = f"{top_report.title(snapshot, version)}  (q ends)"
    parts: list[Text | Table] = [Text(heading, style="bold", no_wrap=True, overflow="ellipsis")]
    left = console.height - 1
    for i, session in enumerate(snapshot.sessions):
        analysis = analyse(session)
        findings = top_report.findings(session, analysis, snapshot.now_ns)
        parts.append(Text(top_report.headline(session), style="bold cyan", no_wrap=True, overflow="ellipsis"))
        parts += [Text(f"  {line}", no_wrap=True, overflow="ellipsis") for line in findings]
        left -= len(findings) + _LINES_OF_TABLE
        if not session.ranks or not session.is_readable:
            continue
        room = max(_FEWEST_ROWS, left // (len(snapshot.sessions) - i))
        rows, left_out = top_report.rows(session, analysis, snapshot.now_ns, room)
        parts.append(_table(rows, console.width))
        if left_out:
            parts.append(Text(f"  and {left_out} more ranks", style="dim"))
        left -= len(rows) + (left_out > 0)
    return Group(*parts)


def _table(rows: Sequence[RankRow], width: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    titles = [f"{name} ({unit})" if unit else name for name, unit, _ in COLUMNS]
    widths = [max(len(texts[i]) for texts in (titles, *(row.cells for row in rows))) for i in range(len(COLUMNS))]
    shown = list(range(len(COLUMNS)))
    for name in _DROPPED:
        if sum(widths[i] + 1 for i in shown) > width:
            shown = [i for i in shown if COLUMNS[i][0] != name]
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for i in shown:
        justify: Literal["left", "right"] = "left" if COLUMNS[i][2] else "right"
        table.add_column(Text(titles[i]), justify=justify, no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(Text(row.cells[i]) for i in shown), style=_STYLE_OF[row.kind])
    return table
