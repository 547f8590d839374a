"""What a benchmark leaves out of what is compiled before it begins, its ranks do not call."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from xccl.cli.bench_ops import BENCHMARKS

#: Ranks are threads, so that what they compile can be seen.
_CODE = """
import contextlib, io, json, sys
from xccl.cli.main import main
from xccl.kernels import _jit

for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["bench", *arguments, "--fabric", "local", "-n", "2"]) == 0
late = [k.function.__name__ for k in _jit._DECLARED if k.is_compiled and _jit.is_left_out(k)]
left = [k.function.__name__ for k in _jit._DECLARED if not k.is_compiled]
print(json.dumps([late, len(left)]))
"""
_EXPERTS = ["--tokens", "3", "--hidden", "32", "--experts", "8", "--topk", "2"]
_EXPERT_PARALLEL = [*_EXPERTS, "--ranks", "2", "--dtype", "fp16"]
_DIES = [*_EXPERTS, "--ranks", "4", "--attention", "2"]
_SIZES = ["--ranks", "2", "-b", "8", "-e", "64K", "-f", "8192"]


def moe(protocol: str) -> list[list[str]]:
    """Both kinds of rows, with and without quantisation: what is left out is the same."""
    always = ["moe", *_EXPERT_PARALLEL, "--protocol", protocol]
    return [[*always, "--rows", "dedup", "--quant", "none"], [*always, "--quant", "int8"]]


RUNS = {
    "moe by pull": moe("pull"),
    "moe by push": moe("push"),
    "moe by direct": moe("direct"),
    "attention and experts apart": [["a2e", *_DIES], ["e2a", *_DIES]],
    "one-sided": [[op, *_SIZES] for op in ("put", "get", "put-signal")],
    "two-sided": [["sendrecv", *_SIZES]],
    "kv": [["kv", "--ranks", "2"]],
    "collectives": [["barrier", "--ranks", "2"], *([op, *_SIZES] for op in ("allreduce", "alltoallv", "broadcast"))],
}


def test_all_benchmarks_are_meant() -> None:
    assert {run[0] for runs in RUNS.values() for run in runs} <= set(BENCHMARKS)


@pytest.mark.parametrize("name", RUNS)
def test_ranks_compile_nothing_late(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CODE, json.dumps(RUNS[name])], capture_output=True, text=True, timeout=120.0,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    late, left = json.loads(done.stdout)
    assert late == []
    assert left > 0
