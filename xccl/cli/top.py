"""`xccl top`: what the ranks of all living sessions of this machine are doing, and who waits for whom."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Final

from xccl._version import __version__
from xccl.cli.options import check_writable
from xccl.cli.parsing import parse_seconds
from xccl.errors import UsageError

#: Ranks of a session that a printed snapshot shows.
_MOST_ROWS: Final = 32
_SESSION: Final = re.compile(r"[0-9a-f]{1,32}")


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.description = (
        "Show the live sessions of this machine: who waits for whom, in which operation, since when; who died; "
        "counters and memory. It only reads. Ranks on fabric local, which are threads of one process, are not seen."
    )
    parser.epilog = "On a terminal it shows a live view: q or Ctrl-C ends it."
    parser.add_argument("--once", action="store_true", help="print one snapshot, as is done where there is no terminal")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write one snapshot to a file, or to standard output"
    )
    parser.add_argument("--session", default="", metavar="PREFIX", help="only sessions whose number starts so")
    parser.add_argument(
        "--interval", type=parse_seconds, default=1.0, metavar="S", help="seconds between two looks (default: 1)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from xccl.cli import top_report
    from xccl.runtime.sessions import take_snapshot

    prefix = args.session.lower()
    if prefix and not _SESSION.fullmatch(prefix):
        raise UsageError(
            f"--session is {args.session!r}: the number of a session is 32 hexadecimal digits", value=prefix
        )
    if args.json:
        if args.json != "-":
            check_writable(args.json)
        text = top_report.to_json(take_snapshot(prefix), args.command, __version__)
        if args.json == "-":
            print(text, end="")
        else:
            Path(args.json).write_text(text, encoding="utf-8")
    elif args.once or not sys.stdout.isatty():
        print(*top_report.plain(take_snapshot(prefix), __version__, _MOST_ROWS), sep="\n")
    else:
        from xccl.cli.top_live import watch

        watch(prefix, args.interval, __version__)
    return 0
