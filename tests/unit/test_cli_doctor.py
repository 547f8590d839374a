"""The doctor finds what is wrong, and says what to do."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from xccl.cli import doctor_checks
from xccl.cli.doctor_checks import Status
from xccl.cli.main import main


@dataclass
class FakeSegment:
    name: str
    size_bytes: int
    owner_pid: int
    alive: bool


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> list[FakeSegment]:
    """Segments that the doctor sees; removing takes the stale ones away."""
    found: list[FakeSegment] = []
    module: Any = ModuleType("xccl.runtime.cleanup")

    def remove_stale() -> list[FakeSegment]:
        stale = [segment for segment in found if not segment.alive]
        found[:] = [segment for segment in found if segment.alive]
        return stale

    module.find_stale = lambda: list(found)
    module.remove_stale = remove_stale
    monkeypatch.setitem(sys.modules, "xccl.runtime.cleanup", module)
    return found


def test_this_machine_is_fit(segments: list[FakeSegment], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("versions", "cores", "shared memory", "permissions", "kernel cache", "open files", "stale segments"):
        assert name in out
    assert not list(Path("/dev/shm").glob("xccl-doctor-*"))


def test_stale_segments_are_listed_and_cleaned(segments: list[FakeSegment], capsys: pytest.CaptureFixture[str]) -> None:
    segments += [FakeSegment("xccl-a", 2**20, 7, False), FakeSegment("xccl-b", 2**20, os.getpid(), True)]
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "xccl-a: 1.0 MiB, owner 7 is dead" in out
    assert "xccl-b" not in out
    assert main(["doctor", "--clean"]) == 0
    assert "1 removed" in capsys.readouterr().out
    assert [segment.name for segment in segments] == ["xccl-b"]


def test_missing_shared_memory_is_broken(
    segments: list[FakeSegment], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_checks, "SHM", Path("/nonexistent"))
    assert main(["doctor"]) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_small_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "_SHM_ENOUGH_BYTES", 2**60)
    check = doctor_checks.shared_memory_size()
    assert check.status is Status.WARNING
    assert "--shm-size" in check.notes[0]


def test_segments_that_cannot_be_made_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    check = doctor_checks.shared_memory_works()
    assert check.status is Status.BROKEN
    assert "No space left" in check.found
    assert not list(Path("/dev/shm").glob("xccl-doctor-*"))


def test_one_core_and_few_files_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "usable_cores", lambda: 1)
    assert doctor_checks.cores().status is Status.WARNING
    monkeypatch.setattr(doctor_checks.resource, "getrlimit", lambda _: (64, 4096))
    assert doctor_checks.open_files().status is Status.WARNING


def test_a_missing_package_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "package_versions", lambda: {"python": "3", "numba": "absent"})
    check = doctor_checks.versions()
    assert check.status is Status.BROKEN
    assert check.notes == ("install numba",)
