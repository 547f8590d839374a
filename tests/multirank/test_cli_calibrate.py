"""`xccl calibrate`: figures of this machine are measured, written, read again, and predict within an order of magnitude."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xccl.cli.calibrate import host_machine
from xccl.cli.host_measure import SIZES
from xccl.cli.host_moe import describe
from xccl.cli.main import main
from xccl.errors import ModelError
from xccl.model.machine import Machine, load_machine, parse_machine, profile_text
from xccl.model.project import project

#: Rates of a made-up machine: the same everywhere, but half as high for large working sets.
MEASURED = {
    **{
        f"{name} {size}": 20.0 if size < (4 << 20) else 10.0
        for size in SIZES
        for name in ("write", "put", "local_put", "get", "local_get", "sum", "local_sum")
    },
    "row_us": 0.01,
    "quantise_gelements": 10.0,
    "stage_us": 1.0,
    "signal_us": 2.0,
}


@pytest.fixture(scope="module")
def made_up() -> Machine:
    return host_machine(MEASURED)


def time_us(machine: Machine, operation: str, hidden: int, tokens: int, quant: str = "none") -> float:
    return project(describe(operation, hidden, quant, tokens, experts=32, top_k=8), machine).time_us


def test_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "host.toml"
    assert main(["calibrate", "host", "--rounds", "1", "--check", "-o", str(path)]) == 0
    out = capsys.readouterr().out
    machine = load_machine(str(path))
    assert machine["vector.rate_gelements"] > 0.1
    assert all(value > 0.01 for _, value in machine.parameters["lane.pull_rate_gbps"].curve)
    rows = re.findall(r"(?:dispatch|combine) +(?:int8|none) +\d+ +\d+ +([\d.]+) +([\d.]+)", out)
    assert len(rows) == 24
    # On a machine that is busy with other things either may be far off; it must still be about the same thing.
    close = [0.1 < float(predicted) / float(measured) < 10 for measured, predicted in rows]
    assert sum(close) >= 18


def test_a_profile_is_read_as_it_was_written(made_up: Machine) -> None:
    again = parse_machine(profile_text(made_up), "again")
    assert dict(again.parameters) == dict(made_up.parameters)


def test_more_work_takes_longer(made_up: Machine) -> None:
    for operation in ("dispatch", "combine"):
        times = [time_us(made_up, operation, hidden, tokens) for hidden, tokens in ((2048, 8), (2048, 32), (7168, 128))]
        assert times == sorted(times)
        assert times[0] < times[2]
    assert time_us(made_up, "dispatch", 7168, 128, "int8") < time_us(made_up, "dispatch", 7168, 128, "none")


def test_the_curve_of_caches_counts(made_up: Machine) -> None:
    """Twice the bytes take more than twice the time once the working set has outgrown the caches."""
    flat = host_machine({name: 20.0 if " " in name else value for name, value in MEASURED.items()})
    small = time_us(made_up, "dispatch", 2048, 8), time_us(flat, "dispatch", 2048, 8)
    large = time_us(made_up, "dispatch", 7168, 128), time_us(flat, "dispatch", 7168, 128)
    assert small[0] == pytest.approx(small[1])
    assert large[0] > 1.5 * large[1]


def test_the_bytes_explain_the_time(made_up: Machine) -> None:
    """By hand: 64 rows are written, and read by two ranks, at 20 GB/s; the rest are calls and signals."""
    rows_us = 2 * 64 * 2 * 2048 / 20e3
    assert rows_us < time_us(made_up, "dispatch", 2048, 8) < rows_us + 25


def test_without_a_profile_host_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModelError, match="xccl calibrate host"):
        load_machine("host")


def test_fitting_published_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fitted.toml"
    assert main(["calibrate", "h800-rdma", "-o", str(path)]) == 0
    assert "->" in capsys.readouterr().out
    fitted, shipped = load_machine(str(path)), load_machine("h800-rdma")
    for parameter in shipped.free:
        assert fitted[parameter.name] == pytest.approx(parameter.value, rel=0.05)


@pytest.mark.parametrize(
    "words", [["abacus"], ["cm384", "--check"], ["host", "--rounds", "1", "-o", "/proc/no/x.toml"]]
)
def test_mistakes_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("curve", ["[[2, 1.0], [1, 1.0]]", "[[1, 0.0]]", "[[0, 1.0]]"])
def test_impossible_curves(curve: str, made_up: Machine) -> None:
    text = re.sub(r"curve = .*", f"curve = {curve}", profile_text(made_up), count=1)
    with pytest.raises(ModelError, match="growing sizes"):
        parse_machine(text, "edited")
