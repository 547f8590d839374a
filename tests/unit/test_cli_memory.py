"""`xccl bench` refuses at once what memory does not suffice for."""

from __future__ import annotations

from pathlib import Path

import pytest

from xccl.cli.deployment import Deployment
from xccl.cli.main import main
from xccl.cli.memory import available_bytes, needed_bytes, require_memory
from xccl.cli.options import BenchOptions
from xccl.errors import UsageError


@pytest.mark.parametrize(
    ("options", "least_gb", "most_gb"),
    [  # measured: 14.2 to 15.4 GB, 15.2 GB, 0.9 GB at their peaks
        (BenchOptions("moe", 320, "local", tokens=(96,), experts=320), 10, 15.5),
        (BenchOptions("a2e", 768, "local", tokens=(96,), experts=288, deployment=Deployment(160, 3)), 10, 15.5),
        (BenchOptions("moe", 320, "local", tokens=(8, 96), hidden=64, experts=320), 0.4, 1.0),
    ],
)
def test_what_deployments_take(options: BenchOptions, least_gb: float, most_gb: float) -> None:
    assert least_gb * 1e9 < needed_bytes(options, "tokens") < most_gb * 1e9


def test_messages_and_barriers() -> None:
    barrier = needed_bytes(BenchOptions("barrier", 4, "local"), "nothing")
    put = needed_bytes(BenchOptions("put", 4, "local", max_bytes=1 << 30), "bytes")
    assert put == barrier + 2 * 4 * (1 << 30)
    assert needed_bytes(BenchOptions("barrier", 4), "nothing") > barrier  # processes take more


def test_what_is_available(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert available_bytes(meminfo, cgroup) is None
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:       5 kB\n")
    assert available_bytes(meminfo, cgroup) == 5120
    cgroup.mkdir()
    (cgroup / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, cgroup) == 5120
    (cgroup / "memory.max").write_text("4096\n")
    (cgroup / "memory.current").write_text("1096\n")
    assert available_bytes(meminfo, cgroup) == 3000


def test_too_much_is_refused_with_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    options = BenchOptions("moe", 320, "local", tokens=(96,), experts=320)
    require_memory(options, "tokens", None)
    require_memory(options, "tokens", needed_bytes(options, "tokens"))
    with pytest.raises(UsageError, match=r"about 1\d\.\d GB at the least, 1\.0 GB is available: .*--hidden or --ranks"):
        require_memory(options, "tokens", 10**9)
    assert main(["bench", "moe", "--ranks", "1000", "--hidden", "65536", "--tokens", "4096", "--experts", "4000"]) == 2
    assert "GB is available" in capsys.readouterr().err
