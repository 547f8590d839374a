"""Lists the decision records on their index page: `<!-- adr: list -->` becomes a link for each `adr/NNNN-*.md`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page

PAGE = "adr/index.md"
PLACEHOLDER = "<!-- adr: list -->"


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Replace the placeholder of the one page that has it (called by MkDocs)."""
    return markdown.replace(PLACEHOLDER, listing()) if page.file.src_uri == PAGE else markdown


def listing() -> str:
    """One line for each record, by number: the title is the first heading of its file."""
    folder = Path(__file__).parents[1] / "adr"
    lines = []
    for path in sorted(folder.glob("[0-9]*.md")):
        title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join(lines) or "There is none yet."
