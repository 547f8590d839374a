"""The documentation says what is true: its examples run, its commands work, and every public name has its place.

A fenced block marked `python` is a complete script. It runs in a process of its own, like a reader's. If a text block
follows it, that is what it must print. Lines of `shell` blocks that start with `xccl` run too, but for
those that look at the machine.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import xccl
import xccl.layout
from xccl.cli.main import main
from xccl.kernels import _jit, warm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TIMEOUT_S = 100
_FENCE = re.compile(r"^```(?P<language>\w+)?[^\n]*\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_BETWEEN = re.compile(r"\s*")


@dataclass(frozen=True)
class Block:
    """A fenced block, and the text block right after it."""

    page: Path
    line: int
    language: str
    body: str
    output: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fences = list(_FENCE.finditer(text))
    found = []
    for fence, following in itertools.zip_longest(fences, fences[1:]):
        output = None
        if following and following["language"] == "text" and _BETWEEN.fullmatch(text, fence.end(), following.start()):
            output = following["body"]
        line = text.count("\n", 0, fence.start("body")) + 1
        found.append(Block(page, line, fence["language"] or "", fence["body"], output))
    return found


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
SCRIPTS = [block for block in ALL_BLOCKS if block.language == "python"]
COMMANDS = [
    pytest.param(command, id=f"{block.page.name}:{block.line + number}")
    for block in ALL_BLOCKS
    if block.language == "shell"
    for number, command in enumerate(block.body.splitlines())
    if command.startswith(("xccl bench", "xccl project", "xccl trace", "xccl validate"))
]


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_example_runs_and_prints_what_the_page_says(script: Block, tmp_path: Path) -> None:
    path = tmp_path / script.page.with_suffix(".py").name
    path.write_text("\n" * (script.line - 1) + script.body)  # so that a traceback shows the line of the page
    done = subprocess.run(
        [sys.executable, path],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    if script.output is not None:
        assert done.stdout == script.output


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder, to work in. Kernels are warm, for what comes after this test, too."""
    warm()
    monkeypatch.setattr(_jit, "_LEFT_OUT", set())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("command", COMMANDS)
def test_command_succeeds(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    status = main(shlex.split(command, comments=True)[1:])
    assert status == 0, "".join(capfd.readouterr())


def test_every_public_name_has_its_place_in_the_reference() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    documented = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    missing = []
    for name in xccl.__all__:
        if name.startswith("__"):
            continue
        thing = getattr(xccl, name)
        home = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", "")
        if not documented & {f"xccl.{name}", f"{home}.{name}", home}:
            missing.append(name)
    assert not missing, "add them to docs/reference/*.md"


def test_every_operation_has_its_place_in_the_reference() -> None:
    """A page shows the methods of the class it names, and not those that it inherits."""
    page = (ROOT / "docs" / "reference" / "communicator.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    bases = {f"{base.__module__}.{base.__name__}" for base in xccl.Communicator.__mro__[1:-1]}
    assert bases <= documented, "add them to docs/reference/communicator.md"


def test_every_record_is_on_the_page_on_memory_layout() -> None:
    path = ROOT / "docs" / "_hooks" / "layout_page.py"
    spec = importlib.util.spec_from_file_location("layout_page", path)
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = hook.fill((ROOT / "docs" / "memory-layout.md").read_text(encoding="utf-8"))
    for record in xccl.layout.ALL_RECORDS:
        assert record.diagram() in page
        for field in record.fields:
            assert f"| {field.offset_bytes} | {field.size_bytes} | `{field.name}` |" in page
