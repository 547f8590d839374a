"""`xccl calibrate`: figures of this machine are measured, written, read again, and predict what is measured then."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

import xccl
from xccl.cli import host_run
from xccl.cli.host_measure import SIZES, HostMeter, pin
from xccl.cli.host_moe import describe
from xccl.cli.host_profile import host_machine
from xccl.cli.host_samples import Samples, Steps, Stopwatch, figures
from xccl.cli.main import main
from xccl.errors import ModelError
from xccl.model.machine import Machine, load_machine, parse_machine, profile_text
from xccl.model.project import describe_moe, project
from xccl.model.sensitivity import sensitivities

CORES = 2
_GBPS = 20.0


def measured(gbps_of_large: float) -> dict[str, float]:
    """Times of a made-up machine, us: the same rate everywhere, but another one for working sets from 4 MiB on."""
    times = {"rows": 10.0, "near_copy": 8.0, "near_quantise": 20.0, "trip": 40.0}
    calls = {"call": 0.2, "wait": 1.2, "launch": 2.0, "record": 4.0, "evict": 1.0}
    for size in SIZES:
        times |= {f"{name} {size}": us for name, us in calls.items()}
        rate = (_GBPS if size < (4 << 20) else gbps_of_large) * 1e3
        times |= {f"{name} {size}": size / rate for name in ("repeat", "copy")}
        times |= {f"{name} {size}": size / 2 / rate for name in ("get", "local_get", "sum", "local_sum", "put", "take")}
    return times


@pytest.fixture(scope="module")
def made_up() -> Machine:
    return host_machine(measured(_GBPS / 2), CORES)


def time_us(machine: Machine, operation: str, hidden: int, tokens: int, quant: str = "none") -> float:
    return project(describe(operation, hidden, quant, tokens, experts=32, top_k=8), machine).time_us


# -- measuring --------------------------------------------------------------------------------------------------------


def test_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured predicts what is measured: by a factor of three at most, however busy the machine is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(host_run, "_TOKENS", (8, 32))
    monkeypatch.setattr(host_run, "_HIDDEN", (2048,))
    assert main(["calibrate", "host", "--rounds", "2", "--check"]) == 0
    out = capsys.readouterr().out
    assert "undisturbed" in out
    assert str(tmp_path) in out
    machine = load_machine("host")
    sources = [parameter.source for parameter in machine.parameters.values()]
    assert sum(source.startswith("measured by xccl calibrate host, ") for source in sources) >= 15
    for parameter in machine.parameters.values():
        least = 0.01 if parameter.name.endswith("_us") else 0.05  # times, or rates
        assert all(least < figure < 1000 for _, figure in parameter.curve), parameter
    assert 0.1 < machine["vector.rate_gelements"] < 1000
    check_rows(out)
    assert main(["validate", "--machine", "host"]) in (0, 1)  # the machine may be too busy for the bounds
    out = capsys.readouterr().out
    check_rows(out)
    assert re.search(r"worst .*bound 25%.*mean .*bound 12%.*(ok|OUTSIDE)", out)
    assert main(["project", "dispatch", "--machine", "host", "--ep", "2", "--experts", "32", "--protocol", "pull"]) == 0


def check_rows(out: str) -> None:
    rows = re.findall(r"(?:dispatch|combine) +(?:int8|none) +\d+ +\d+ +([\d.]+) +[\d.]+% +\d+% +([\d.]+)", out)
    assert len(rows) == 8
    close = [1 / 3 < float(predicted) / float(seen) < 3 for seen, predicted in rows]
    assert sum(close) >= 6, rows


def test_all_steps_are_measured() -> None:
    def rank(comm: xccl.Communicator) -> Samples:
        pin(comm.rank)
        return HostMeter(comm).round(sizes=(1 << 16,))

    rounds = xccl.launch(rank, 2, timeout_s=60.0)
    assert rounds[0].keys() == rounds[1].keys()
    expected = {name for name in measured(1.0) if " " not in name or name.endswith(f" {1 << 16}")}
    assert set(rounds[0]) == expected
    assert all(time_ns > 0 for samples in rounds[0].values() for time_ns, _ in samples)


def test_both_ranks_stop_together(fabric: str) -> None:
    """The limit of one rank is a hundred times that of the other; both take the same samples."""

    def rank(comm: xccl.Communicator) -> Samples:
        watch = Stopwatch(comm, wanted=1 << 20)
        for _ in range(3):
            cycle: list[Steps] = [{"a": lambda: None, "b": lambda: time.sleep(1e-4)}, {"c": lambda: None}]
            watch.collect(cycle, 0.01 if comm.rank == 0 else 1.0)
        return watch.take()

    one, other = xccl.launch(rank, 2, fabric=fabric, timeout_s=30.0)
    assert {name: len(samples) for name, samples in one.items()} == {name: len(s) for name, s in other.items()}
    assert len(one["a"]) == len(one["b"]) == len(one["c"]) >= 3
    assert min(time_ns for time_ns, _ in one["b"]) >= 100_000


def test_a_step_that_gives_its_core_away_is_disturbed(fabric: str) -> None:
    def rank(comm: xccl.Communicator) -> Samples:
        watch = Stopwatch(comm, wanted=1 << 20)
        watch.collect([{"sleep": lambda: time.sleep(1e-3) if comm.rank == 0 else None}], 0.05)
        return watch.take()

    for samples in xccl.launch(rank, 2, fabric=fabric, timeout_s=30.0):
        assert all(quality == 2 for _, quality in samples["sleep"])


@pytest.mark.parametrize("allowed", [True, False])
def test_real_time_priority_is_given_back(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not allowed, samples are taken all the same."""

    def refuse(*_: object) -> None:
        raise PermissionError

    if not allowed:
        monkeypatch.setattr(os, "sched_setscheduler", refuse)
    before = os.sched_getscheduler(0)

    def rank(comm: xccl.Communicator) -> tuple[int, int, int]:
        watch = Stopwatch(comm, wanted=3)
        seen = []
        watch.collect([{"look": lambda: seen.append(os.sched_getscheduler(0))}], 5.0)
        return len(watch.take()["look"]), seen[-1], os.sched_getscheduler(0)

    for samples, during, after in xccl.launch(rank, 2, timeout_s=60.0):
        assert samples >= 3
        assert after == before
        assert during in ((before, os.SCHED_FIFO) if allowed else (before,))


# -- figures of samples -----------------------------------------------------------------------------------------------


def test_the_slower_rank_counts() -> None:
    rounds = [[{"a": [(1000, 0), (5000, 0), (1000, 0)]}], [{"a": [(2000, 0), (1000, 0), (3000, 0)]}]]
    found = figures(rounds)["a"]
    assert (found.p50_us, found.spread, found.undisturbed) == (3.0, 0.0, 1.0)


def test_undisturbed_samples_are_preferred() -> None:
    good, after, bad = [(1000, 0)] * 3, [(2000, 1)] * 5, [(9000, 2)] * 12
    for samples, p50_us, share in (
        (good + after + bad, 1.0, 8 / 20),
        (good[:2] + after + bad, 2.0, 7 / 19),  # two are too few
        (bad, 9.0, 0.0),
    ):
        found = figures([[{"a": samples}], [{"a": samples}]])["a"]
        assert found.p50_us == p50_us
        assert found.undisturbed == pytest.approx(share)


def test_rounds_without_good_samples_do_not_count() -> None:
    bad = [(9000, 2)] * 5
    rounds = [{"a": [(1000, 0)] * 3 + bad}, {"a": bad}, {"a": [(4000, 0), *bad]}]
    assert figures([rounds])["a"].p50_us == 1.0
    assert figures([rounds[1:]])["a"].p50_us == 9.0
    few = [{"a": [(time_ns, 0), *bad]} for time_ns in (1000, 2000, 3000)]  # enough together
    assert figures([few])["a"].p50_us == 2.0


def test_two_kinds_of_times_are_both_in_the_mean() -> None:
    samples = [(1000, 0), (3000, 0)] * 10
    assert figures([[{"a": samples}]])["a"].mid_us == pytest.approx(2.0)


def test_rounds_that_differ_are_noise() -> None:
    rounds = [[{"a": [(time_ns, 0)] * 3} for time_ns in (1000, 2000, 3000)]]
    found = figures(rounds)["a"]
    assert (found.p50_us, found.mid_us, found.spread) == (2.0, 2.0, 0.25)


# -- the profile ------------------------------------------------------------------------------------------------------


def test_a_profile_is_read_as_it_was_written(made_up: Machine) -> None:
    again = parse_machine(profile_text(made_up), "again")
    assert dict(again.parameters) == dict(made_up.parameters)


def test_figures_by_hand(made_up: Machine) -> None:
    assert made_up["lane.startup_us"] == pytest.approx(10.0 / 1024)
    assert made_up["vector.rate_gelements"] == pytest.approx(7 * 16 * 4 * 2048 / 12e3)
    assert made_up["sync.post_us"] == pytest.approx(1.0 - 0.2)
    assert made_up["sync.poll_us"] == pytest.approx(0.5)
    assert made_up["kernel.record_us"] == pytest.approx(2.0)


@pytest.mark.parametrize("quant", ["none", "int8"])
@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_more_work_takes_longer(operation: str, quant: str, made_up: Machine) -> None:
    shapes = [(hidden, tokens) for hidden in (1024, 2048, 7168) for tokens in (1, 8, 32, 128)]
    times = {shape: time_us(made_up, operation, *shape, quant) for shape in shapes}
    for (hidden, tokens), at in times.items():
        assert at > 0
        assert all(at < times[h, t] for h, t in shapes if h >= hidden and t >= tokens and (h, t) != (hidden, tokens))


def test_int8_halves_what_a_dispatch_moves(made_up: Machine) -> None:
    """In the paper's form; here own rows that are not quantised skip the managed area, which is half of them."""
    of_paper = {
        quant: project(
            describe_moe("dispatch", ranks=2, tokens=128, experts=32, quant=quant, protocol="pull"), made_up
        ).time_us
        for quant in ("int8", "none")
    }
    assert of_paper["int8"] < 0.7 * of_paper["none"]
    assert time_us(made_up, "dispatch", 7168, 128, "int8") < time_us(made_up, "dispatch", 7168, 128, "none")
    assert time_us(made_up, "dispatch", 7168, 128, "none") < of_paper["none"]


def test_the_curve_of_caches_counts(made_up: Machine) -> None:
    """Twice the bytes take more than twice the time once the working set has outgrown the caches."""
    flat = host_machine(measured(_GBPS), CORES)
    small = time_us(made_up, "dispatch", 2048, 8), time_us(flat, "dispatch", 2048, 8)
    large = time_us(made_up, "dispatch", 7168, 128), time_us(flat, "dispatch", 7168, 128)
    assert small[0] == pytest.approx(small[1])
    assert large[0] > 1.5 * large[1]


def test_between_points_time_grows_in_a_straight_line(made_up: Machine) -> None:
    low, high = 2 << 20, 4 << 20
    sizes = np.array([1.0, low, 3 << 20, high, 1 << 30])
    us = sizes / made_up.at("lane.pull_rate_gbps", sizes) / 1e3
    assert us[2] == pytest.approx((us[1] + us[3]) / 2)
    assert us[0] == pytest.approx(sizes[0] / _GBPS / 1e3)
    assert us[4] == pytest.approx(sizes[4] / (_GBPS / 2) / 1e3)


def test_the_bytes_explain_the_time(made_up: Machine) -> None:
    """By hand: 64 rows are written, and read by two ranks, at 20 GB/s; the rest are calls, arrays and signals."""
    rows_us = 2 * 64 * 2 * 2048 / (_GBPS * 1e3)
    assert rows_us < time_us(made_up, "dispatch", 2048, 8) < rows_us + 20


def test_a_rate_moves_with_its_curve(made_up: Machine) -> None:
    """One per cent more of all rates of rows, one after the other, is worth what rows take of the time."""
    found = sensitivities([describe("dispatch", 7168, "none", 128, experts=32, top_k=8)], made_up)
    by_name = {item.parameter: item.elasticity for item in found}
    assert by_name["lane.local_repeat_rate_gbps"] < -0.3
    rates = [value for name, value in by_name.items() if name.startswith("lane.") and name.endswith("_gbps")]
    assert sum(rates) == pytest.approx(-1, abs=0.05)


def test_there_are_no_more_ranks_than_cores(made_up: Machine) -> None:
    described = describe_moe("dispatch", ranks=4, tokens=8, protocol="pull", machine=made_up)
    with pytest.raises(ModelError, match="4 ranks"):
        project(described, made_up)


def test_without_a_profile_host_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for words in (["project", "dispatch", "--machine", "host"], ["validate", "--machine", "host"]):
        assert main(words) != 0
        message = capsys.readouterr().err
        assert "xccl calibrate host" in message
        assert message.count("\n") == 1


# -- published figures, and mistakes ----------------------------------------------------------------------------------


def test_fitting_published_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fitted.toml"
    assert main(["calibrate", "h800-rdma", "-o", str(path)]) == 0
    assert "->" in capsys.readouterr().out
    fitted, shipped = load_machine(str(path)), load_machine("h800-rdma")
    for parameter in shipped.free:
        assert fitted[parameter.name] == pytest.approx(parameter.value, rel=0.05)


@pytest.mark.parametrize(
    "words", [["abacus"], ["cm384", "--check"], ["host", "-o", "/proc/no/x.toml"], ["host", "-o", "/"]]
)
def test_mistakes_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    began_s = time.monotonic()
    assert main(["calibrate", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert time.monotonic() - began_s < 10  # before anything is measured


@pytest.mark.parametrize("curve", ["[[2, 1.0], [1, 1.0]]", "[[1, 0.0]]", "[[0, 1.0]]"])
def test_impossible_curves(curve: str, made_up: Machine) -> None:
    text = re.sub(r"curve = .*", f"curve = {curve}", profile_text(made_up), count=1)
    with pytest.raises(ModelError, match="growing sizes"):
        parse_machine(text, "edited")
