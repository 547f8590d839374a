"""Fills the page on memory layout from the modules that define the layouts, so that the two cannot differ.

In `memory-layout.md`, the line `<!-- layout: NAME -->` becomes what `xccl.layout.NAME` says of itself: its docstring,
then a diagram and a table for each of its records. `<!-- layout: others -->` stands for the modules that have records
and are not named on the page, so that a new module cannot be forgotten.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from types import ModuleType
from typing import TYPE_CHECKING, Any

import xccl.layout
from xccl.layout.record import Record

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page

PAGE = "memory-layout.md"
_PLACEHOLDER = re.compile(r"^<!-- layout: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Replace the placeholders of the one page that has any (called by MkDocs)."""
    return fill(markdown) if page.file.src_uri == PAGE else markdown


def fill(markdown: str) -> str:
    """The page with every placeholder replaced.

    Args:
        markdown: the page as it is written.

    Returns:
        The page as it is published.

    Raises:
        ValueError: a placeholder names no module with records, or a record would be missing from the page.
    """
    modules = modules_with_records()
    named = set(_PLACEHOLDER.findall(markdown)) - {"others"}
    if unknown := named - modules.keys():
        raise ValueError(f"{PAGE}: no module with records in xccl.layout: {', '.join(sorted(unknown))}")

    def replacement(match: re.Match[str]) -> str:
        names = [name for name in modules if name not in named] if match[1] == "others" else [match[1]]
        return "\n\n".join(module_section(modules[name]) for name in names)

    filled = _PLACEHOLDER.sub(replacement, markdown)
    if missing := [record.name for record in xccl.layout.ALL_RECORDS if record_heading(record) not in filled]:
        raise ValueError(f"{PAGE}: records without a place on the page: {', '.join(missing)}")
    return filled


def modules_with_records() -> dict[str, ModuleType]:
    """The modules of `xccl.layout` that define records, by short name, in the order of `ALL_RECORDS`."""
    modules = {}
    for info in pkgutil.iter_modules(xccl.layout.__path__):
        module = importlib.import_module(f"xccl.layout.{info.name}")
        if records_of(module):
            modules[info.name] = module
    order = {id(record): place for place, record in enumerate(xccl.layout.ALL_RECORDS)}
    return dict(sorted(modules.items(), key=lambda item: min(order[id(record)] for record in records_of(item[1]))))


def records_of(module: ModuleType) -> list[Record]:
    """The published records of a module, in the order in which it defines them."""
    published = {id(record) for record in xccl.layout.ALL_RECORDS}
    imported = {
        id(value)
        for other in vars(module).values()
        if inspect.ismodule(other)
        for value in vars(other).values()
        if isinstance(value, Record)
    }
    return [
        value
        for value in vars(module).values()
        if isinstance(value, Record) and id(value) in published and id(value) not in imported
    ]


def module_section(module: ModuleType) -> str:
    """A module as a section of the page."""
    short_name = module.__name__.rpartition(".")[2]
    parts = [
        f"## {short_name.replace('_', ' ').capitalize()}",
        _prose(inspect.getdoc(module) or ""),
        f"Source: `{module.__name__.replace('.', '/')}.py`",
    ]
    return "\n\n".join(parts + [record_section(record) for record in records_of(module)])


def record_heading(record: Record) -> str:
    """The heading under which a record is found."""
    return f"### {record.name[:1].upper()}{record.name[1:]}"


def record_section(record: Record) -> str:
    """A record as a section of the page: what it is, how it lies in memory, what each field means."""
    rows = [
        f"| {field.offset_bytes} | {field.size_bytes} | `{field.name}` | {_cell(field.doc)} |"
        for field in record.fields
    ]
    return "\n\n".join(
        [
            record_heading(record),
            _prose(record.doc),
            f"{record.size_bytes} bytes.",
            f"```text\n{record.diagram()}\n```",
            "\n".join(["| Offset | Bytes | Field | Meaning |", "| ---: | ---: | --- | --- |", *rows]),
        ]
    )


def _outside_code(text: str, escapes: dict[str, str]) -> str:
    """Escape what Markdown would take for its own, except between backticks."""
    pieces = text.split("`")
    for index in range(0, len(pieces), 2):
        for plain, escaped in escapes.items():
            pieces[index] = pieces[index].replace(plain, escaped)
    return "`".join(pieces)


def _prose(docstring: str) -> str:
    """A docstring as Markdown. Indented blocks (diagrams) are code already; `[a][b]` must not become a link."""
    lines = docstring.splitlines()
    return "\n".join(line if line.startswith("    ") else _outside_code(line, {"][": "]\\["}) for line in lines)


def _cell(text: str) -> str:
    """A text as a cell of a table."""
    return _outside_code(text, {"<": "&lt;", "|": "&#124;", "][": "]\\["}).replace("|", "\\|")
