"""The first start takes long, and says so, but only to somebody who sits there and waits."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from xccl.runtime import compiling


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "is_cold", "is_told"),
    [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)],
)
def test_who_waits_is_told(
    stream: type[io.StringIO], is_cold: bool, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = stream()
    compiled = []
    if not is_cold:
        (tmp_path / "kernel.nbi").touch()
    monkeypatch.setattr("sys.stderr", said)
    monkeypatch.setattr(compiling, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(compiling, "warm", lambda: compiled.append(said.getvalue()))
    compiling.compile_kernels()
    assert compiled == [said.getvalue()], "told before it begins"
    assert (str(tmp_path) in said.getvalue()) == is_told
    assert said.getvalue().count("\n") == is_told
