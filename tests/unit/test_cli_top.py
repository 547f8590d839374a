"""`xccl top`: what it concludes, and how it says so. What it reads: test_observed, tests/multirank/test_top."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from xccl.cli import top_live, top_report
from xccl.cli.main import main
from xccl.cli.top_waits import analyse, named, ranges
from xccl.layout.segment import ABORT_DIED, ABORT_EXCEPTION, LAYOUT_VERSION
from xccl.runtime import sessions
from xccl.runtime.observed import ObservedRank, Process, Wait
from xccl.runtime.sessions import ObservedSession, Snapshot

S = 10**9
NOW_NS = 100 * S


def wait(operation: str, *ranks: int, who: Any = "all", since_s: float = 96.0, **options: Any) -> Wait:
    return Wait(
        operation, options.get("event", 12), who, ranks, options.get("expected"), options.get("seen"),
        int(since_s * S), int((since_s + 30) * S), 1,
    )  # fmt: skip


def rank(number: int, *waits: Wait, activity: Any = "sleeping", state: Any = "running", **more: Any) -> ObservedRank:
    process = Process(activity, threads=1, cpu_s=3.25)
    return ObservedRank(number, 1000 + number, state, process, waits, memory_bytes=8192, **more)


def session(*ranks: ObservedRank, size: int | None = None, version: int = LAYOUT_VERSION) -> ObservedSession:
    return ObservedSession("0123456789abcdef" * 2, size or len(ranks), version, ranks, "python serve.py", 93.0)


def findings(*ranks: ObservedRank, size: int | None = None) -> list[str]:
    found = session(*ranks, size=size)
    return top_report.findings(found, analyse(found), NOW_NS)


def barrier(number: int, size: int, missing: int, **options: Any) -> ObservedRank:
    """A rank in a barrier, for which `missing` ranks have not come."""
    others = [other for other in range(size) if other != number]
    return rank(number, wait("barrier", *others, who="some", expected=size, seen=size - missing), **options)


# -- conclusions --------------------------------------------------------------------------------------------------------


def test_ranges() -> None:
    assert ranges([9, 3, 4, 5]) == "3-5, 9"
    assert named([3]) == "rank 3"
    assert named([3, 4]) == "ranks 3-4"
    assert named([]) == "ranks "


def test_who_has_not_come_to_a_barrier_is_found() -> None:
    ranks = [barrier(number, 8, 1) if number != 2 else rank(2, activity="running") for number in range(8)]
    assert findings(*ranks) == [
        "ranks 0-1, 3-7 wait for rank 2 in barrier (event 12) since 4.0 s",
        "rank 2 waits for nobody: its process computes (3.2 s of CPU time so far)",
    ]


def test_a_rank_that_comes_while_others_are_looked_at_is_not_blamed() -> None:
    """One is missing, and two do not show that they are there."""
    found = findings(barrier(0, 4, 1), barrier(1, 4, 1), rank(2), rank(3))
    assert found[0] == "ranks 0-1 wait for 1 of ranks 2-3 in barrier (event 12) since 4.0 s"


def test_barriers_of_different_groups_are_different() -> None:
    group = [rank(0, wait("barrier", 1, 2, who="some", expected=3, seen=1))]
    other = [rank(1, wait("barrier", 3, who="some", expected=2, seen=1))]
    found = findings(*group, *other, rank(2), rank(3))
    assert "rank 0 waits for ranks 1-2 in barrier (event 12) since 4.0 s" in found
    assert "rank 1 waits for rank 3 in barrier (event 12) since 4.0 s" in found
    assert [line.split(" waits")[0] for line in found[2:]] == ["rank 2", "rank 3"]


def test_the_longest_wait_comes_first_and_the_chain_ends_at_its_root() -> None:
    found = findings(
        rank(0, wait("recv", 1, since_s=98)), rank(1, wait("dispatch, await-fields", 2, since_s=90, event=3)),
        rank(2, activity="stopped"),
    )  # fmt: skip
    assert found == [
        "rank 1 waits for rank 2 in dispatch, await-fields (event 3) since 10.0 s",
        "rank 0 waits for rank 1 in recv (event 12) since 2.0 s",
        "rank 2 is stopped, by a signal or a debugger",
    ]


def test_a_wait_for_anybody_says_the_values() -> None:
    anyone = {"who": "any", "event": None, "expected": 5, "seen": 1}
    found = findings(rank(0, wait("wait_until signal 0 ge 5", 1, 2, **anyone)), rank(1), rank(2, wait("recv", 0)))
    assert found == [
        "rank 0 waits for any rank in wait_until signal 0 ge 5: expected 5, seen 1, since 4.0 s",
        "rank 2 waits for rank 0 in recv (event 12) since 4.0 s",
        "rank 0 waits for any rank, in wait_until signal 0 ge 5",
    ]


def test_the_dead_the_failed_and_those_who_left() -> None:
    found = findings(
        rank(0, wait("recv", 1)), rank(1, wait("recv", 2), activity="dead", abort=(ABORT_DIED, 1)),
        rank(2, state="failed", last_words="raised ValueError: no page"), rank(3, state="left", activity="dead"),
        rank(4, wait("recv", 3), abort=(ABORT_EXCEPTION, 2)),
    )  # fmt: skip
    assert found[:2] == ["aborted, since rank 1 died", "aborted, since rank 2 raised ValueError: no page"]
    assert found[-3:] == [
        "rank 1 died, in recv (event 12)",
        "rank 2 has failed: raised ValueError: no page",
        "rank 3 has done its work and left the session",
    ]


@pytest.mark.parametrize(
    ("awaited", "cycle"),
    [
        ({0: [1], 1: [2], 2: [0]}, (0, 1, 2)),
        ({0: [3], 1: [2], 2: [0], 3: [4]}, ()),
        ({0: [5], 4: [5, 6], 5: [6], 6: [4]}, (4, 5, 6)),
        ({0: [1, 2], 1: [0]}, (0, 1)),
        ({rank: [(rank + 1) % 768] for rank in range(768)}, tuple(range(768))),
    ],
    ids=["three", "chain", "behind others", "two of three", "all"],
)
def test_cycles(awaited: dict[int, list[int]], cycle: tuple[int, ...]) -> None:
    size = max(*awaited, *(other for others in awaited.values() for other in others)) + 1
    ranks = [rank(n, *([wait("recv", *awaited[n])] if n in awaited else [])) for n in range(size)]
    found = analyse(session(*ranks))
    assert sorted(found.cycle) == sorted(cycle)
    for here, there in zip(found.cycle, (*found.cycle[1:], *found.cycle[:1]), strict=True):
        assert there in awaited[here]


def test_a_session_that_starts_names_the_missing() -> None:
    found = findings(rank(0, state="starting"), rank(2, state="starting"), size=4)
    assert found[0] == "starting: 2 of 4 ranks are there, ranks 1, 3 missing"


def test_another_layout_is_named() -> None:
    old = session(rank(0), version=LAYOUT_VERSION - 1)
    lines = top_report.plain(Snapshot(NOW_NS, (old,)), "0.1", 32)
    assert len(lines) == 3
    assert f"version {LAYOUT_VERSION - 1}, and this xccl reads {LAYOUT_VERSION}" in lines[2]


# -- what is printed ----------------------------------------------------------------------------------------------------


def test_a_table_by_rank() -> None:
    two = rank(1, wait("a2e", 0, since_s=90), wait("e2a", 2, since_s=95), chunks_received=7, chunks_acknowledged=5)
    lines = top_report.plain(Snapshot(NOW_NS, (session(rank(0), two, rank(2)),)), "0.1", 32)
    assert lines[0] == "# xccl 0.1 top: 1 live session"
    assert lines[1] == "session 01234567: 3 ranks, running for 93 s, 24 KiB, python serve.py"
    table = lines[lines.index(next(line for line in lines if line.startswith("# rank"))) :]
    assert [line.split()[:3] for line in table[1:]] == [
        ["0", "1000", "sleeping"], ["1", "1001", "sleeping"], ["e2a", "(event", "12)"], ["2", "1002", "sleeping"]
    ]  # fmt: skip
    assert "7" in table[2].split()
    assert "5" in table[2].split()


def test_768_ranks_are_readable() -> None:
    ranks = [barrier(n, 768, 1) if n != 500 else rank(500) for n in range(768)]
    lines = top_report.plain(Snapshot(NOW_NS, (session(*ranks),)), "0.1", 32)
    assert len(lines) == 4 + 1 + 32 + 1
    assert lines[2] == "  ranks 0-499, 501-767 wait for rank 500 in barrier (event 12) since 4.0 s"
    assert lines[5].split()[:2] == ["500", "1500"]
    assert lines[-1] == "# and 736 more ranks; --json has all of them"


def test_many_kinds_of_waits_are_cut_short() -> None:
    pairs = [rank(n, wait("recv", n + 1, event=n)) for n in range(0, 40, 2)]
    found = findings(*pairs, *(rank(n) for n in range(1, 41, 2)))
    assert len(found) == 18
    assert found[8] == "... and 12 more kinds of waits"
    assert found[17] == "... and 12 more ranks like that"


def test_json_has_everything() -> None:
    ranks = [barrier(n, 3, 1) if n != 2 else rank(2) for n in range(3)]
    document = json.loads(top_report.to_json(Snapshot(NOW_NS, (session(*ranks),), 4), ["xccl", "top"], "0.1"))
    assert (document["schema"], document["version"], document["command"]) == (1, "0.1", ["xccl", "top"])
    assert document["others_segments"] == 4
    assert "cpu" in document["environment"]
    (found,) = document["results"]
    assert (found["ranks"], found["state"], found["layout_version"]) == (3, "running", LAYOUT_VERSION)
    (blocked,) = found["blocked"]
    assert (blocked["ranks"], blocked["awaited"], blocked["who"]) == ([0, 1], [2], "all")
    assert (blocked["since_s"], blocked["ends_in_s"]) == (4.0, 26.0)
    assert found["roots"][0]["rank"] == 2
    assert found["roots"][0]["awaited_s"] == 4.0
    assert found["members"][2]["waits"] == []
    assert found["members"][0]["waits"][0]["operation"] == "barrier"


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("height", [8, 24, 60])
def test_the_live_view_fits_the_terminal(width: int, height: int) -> None:
    ranks = [barrier(n, 64, 1) if n != 5 else rank(5, activity="dead") for n in range(64)]
    snapshot = Snapshot(NOW_NS, (session(*ranks),))
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=width, height=height, record=True, file=nowhere)
        console.print(top_live.view(snapshot, "0.1", console))
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines)
    assert len(lines) <= max(height, 11)
    assert any(line.startswith("   5 ") and "dead" in line for line in lines)
    assert any("more ranks" in line for line in lines) == (height < 70)


# -- the command --------------------------------------------------------------------------------------------------------


def test_no_session_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sessions, "take_snapshot", lambda prefix: Snapshot(NOW_NS, ()))
    assert main(["top"]) == 0
    assert capsys.readouterr().out.endswith("top: no live sessions\n")


def test_foreign_segments_are_mentioned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sessions, "take_snapshot", lambda prefix: Snapshot(NOW_NS, (), 3))
    assert main(["top", "--once"]) == 0
    assert "no live sessions; 3 segments of other users" in capsys.readouterr().out


def test_json_goes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--json", str(tmp_path / "top.json"), "--session", "ffffffffffffffff"]) == 0
    assert json.loads((tmp_path / "top.json").read_text())["results"] == []
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--session", "xyz"], "--session is 'xyz'"),
        (["--interval", "0"], "must be a number of seconds above 0"),
        (["--onec"], "did you mean --once?"),
        (["--json", "/nonexistent/file"], "/nonexistent/file"),
    ],
)
def test_usage_errors(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["top", *words])
    except SystemExit as exit_:
        status = int(str(exit_.code))
    assert status == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_help_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["top", "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("how", ["q", "ctrl-c", "sigint"])
def test_the_live_view_ends_well_and_leaves_the_terminal_as_it_was(how: str) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen(
        [sys.executable, "-m", "xccl.cli.main", "top", "--interval", "0.1", "--session", "ffffffffffffffff"],
        stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(theirs), os.O_RDWR)),  # the terminal becomes its own
        env=os.environ | {"TERM": "xterm-256color"},
    )  # fmt: skip
    try:
        shown = read_until(ours, b"no live sessions")
        assert b"\033[?1049h" in shown  # a screen of its own
        assert not termios.tcgetattr(theirs)[3] & termios.ICANON
        if how == "sigint":
            process.send_signal(signal.SIGINT)
        else:
            os.write(ours, b"q" if how == "q" else b"\x03")
        read_until(ours, b"\033[?1049l")
        assert process.wait(timeout=20.0) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.communicate()
        os.close(ours)
        os.close(theirs)


def read_until(fd: int, what: bytes) -> bytes:
    found, deadline = b"", time.monotonic() + 30.0
    while what not in found:
        assert time.monotonic() < deadline, found
        if select.select([fd], [], [], 0.1)[0]:
            found += os.read(fd, 65536)
    return found
