"""Puts parameters, validation and pictures of the model into its page, as they are when the page is built.

In `model.md`, `<!-- parameters: MACHINE -->` becomes the table of a profile, `<!-- validate -->` what `xccl validate`
prints. The pictures `images/validation.svg`, `images/pull.svg` and `images/send.svg` are drawn.
"""

from __future__ import annotations

import contextlib
import io
import re
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

PAGE = "model.md"
_PARAMETERS = re.compile(r"^<!-- parameters: ([\w-]+) -->$", re.MULTILINE)
_VALIDATE = "<!-- validate -->"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pictures (called by MkDocs)."""
    for name, draw in {"validation": validation, "pull": pull, "send": send}.items():
        files.append(File.generated(config, f"images/{name}.svg", content=draw()))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Replace the placeholders (called by MkDocs)."""
    if page.file.src_uri != PAGE:
        return markdown
    markdown = _PARAMETERS.sub(lambda match: parameters(match[1]), markdown)
    return markdown.replace(_VALIDATE, f"```text\n{validated()}```")


def parameters(name: str) -> str:
    """The figures of a machine, with their sources."""
    from xccl.model.machine import load_machine

    lines = ["| Parameter | Value | Source |", "| --- | --- | --- |"]
    for parameter in load_machine(name).parameters.values():
        bounds = f" ({parameter.low:g} to {parameter.high:g})" if parameter.is_free else ""
        lines.append(f"| `{parameter.name}` | {parameter.value:g}{bounds} | {parameter.source} |")
    return "\n".join(lines)


def validated() -> str:
    """What `xccl validate` prints."""
    from xccl.cli.main import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main(["validate"])
    if status != 0:
        raise RuntimeError("the model is outside its bounds: see xccl validate")
    return out.getvalue()


def validation() -> str:
    """Published figures beside the model's."""
    from xccl.model.calibrate import IMPLEMENTATION_OF, compare
    from xccl.model.machine import load_machine

    figure, axes = _figure("projected and published, us")
    rows = [row for name in IMPLEMENTATION_OF for row in compare(load_machine(name))]
    labels = [f"{row.row.implementation}\n{row.row.operation} EP{row.row.ep}" for row in rows]
    axes.barh(labels, [row.model_us for row in rows], color="tab:blue", alpha=0.6, label="projected")
    axes.plot([row.row.latency_us for row in rows], labels, "k|", markersize=14, label="published")
    axes.set_xlabel("us")
    axes.set_ylabel("")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize="x-small")
    axes.legend(frameon=False)
    return _svg(figure)


def pull() -> str:
    """XCCL's pull dispatch and combine over the batch, with the range of the published plot."""
    from xccl.model.machine import load_machine
    from xccl.model.project import describe_moe, project

    machine = load_machine("cm384")
    figure, axes = _figure("projected, us")
    batches = (4, 8, 16, 32, 64, 80, 96, 128)
    for operation in ("dispatch", "combine"):
        descriptions = [describe_moe(operation, ranks=128, tokens=tokens, protocol="pull") for tokens in batches]
        axes.plot(batches, [project(d, machine).time_us for d in descriptions], "o-", label=f"{operation}, EP128")
    axes.axhspan(15, 160, color="tab:gray", alpha=0.15, label="range of the published plot (XDS §3.2)")
    axes.set_xlabel("batch of a die")
    axes.set_ylim(0)
    axes.legend(frameon=False)
    return _svg(figure)


def send() -> str:
    """Send/receive over the size, by lanes."""
    from xccl.model.machine import load_machine
    from xccl.model.project import describe_send, project

    machine = load_machine("cm384")
    figure, axes = _figure("projected, us")
    sizes = [36 << k for k in range(9)]
    for lanes in (2, 4, 8, 24, 48):
        times = [project(describe_send(machine, n_bytes=k << 10, lanes=lanes), machine).time_us for k in sizes]
        axes.loglog(sizes, times, "o-", base=2, label=f"{lanes} lanes")
    axes.set_xlabel("KiB")
    axes.legend(frameon=False)
    return _svg(figure)


def _figure(y_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
