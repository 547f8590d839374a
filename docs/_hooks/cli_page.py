"""Puts what `xccl COMMAND --help` prints into the page on the command line.

In `cli.md`, the line `<!-- help: COMMAND -->` becomes that text. An unknown command fails the build.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page

PAGE = "cli.md"
_PLACEHOLDER = re.compile(r"^<!-- help: ([\w-]+) -->$", re.MULTILINE)
_PROGRAM = "import sys; from xccl.cli.main import main; sys.argv[0] = 'xccl'; sys.exit(main())"


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Replace the placeholders of the one page that has any (called by MkDocs)."""
    if page.file.src_uri != PAGE:
        return markdown
    return _PLACEHOLDER.sub(lambda match: f"```text\n{help_text(match[1])}\n```", markdown)


def help_text(command: str) -> str:
    """What `xccl COMMAND --help` prints, 100 columns wide and without colours."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, command, "--help"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode != 0:
        raise ValueError(f"{PAGE}: xccl {command} --help ended with status {done.returncode}:\n{done.stderr}")
    return done.stdout.strip("\n")
