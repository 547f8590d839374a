"""Compiled functions are found by their names, also by processes that did not compile them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.multirank.support import BF16, FLOATS, Array
from xccl import reference
from xccl.kernels._jit import device, named

#: Compiles a kernel as a process does that has compiled so many functions before; the numbers of its row functions.
_COMPILE = """
import itertools, json, sys
from numba.core.bytecode import FunctionIdentity
from xccl.kernels import moe_pull, quantise

FunctionIdentity._unique_ids = itertools.count(int(sys.argv[2]))
{"quantise": quantise.quantise, "write": moe_pull.dispatch_write}[sys.argv[1]].compile()
variants = (quantise._quantise_bf16, quantise._quantise_fp16, quantise._quantise_fp32)
names = [overload.fndesc.unique_name for variant in variants for overload in variant.overloads.values()]
print(json.dumps([int(name.rpartition("$")[2]) for name in names]))
"""

#: Loads both kernels, and quantises a row of each element type.
_QUANTISE = """
import json, sys
import numpy as np
from xccl.kernels import moe_pull, quantise

moe_pull.dispatch_write.compile()
found = []
for code, dtype in enumerate((np.uint16, np.float16, np.float32)):
    row, q = np.arange(1, 41).astype(dtype), np.zeros(40, np.int8)
    found.append([float(quantise.quantise.call(code, row.ctypes.data, 40, q.ctypes.data)), q.tolist()])
print(json.dumps(found))
"""


def run(cache: Path, code: str, *arguments: object) -> Any:
    cache.mkdir(mode=0o700, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120.0, check=True,
        env=os.environ | {"XCCL_CACHE_DIR": str(cache)},
    )  # fmt: skip
    return json.loads(done.stdout)


def test_kernels_that_two_processes_have_cached_do_not_mix(tmp_path: Path) -> None:
    """Each process numbers what it compiles: here a number stands for bf16 in one, and for fp16 in the other."""
    both = tmp_path / "both"
    with ThreadPoolExecutor() as pool:
        here, there = pool.map(run, (both, tmp_path / "probe"), [_COMPILE] * 2, ("quantise", "write"), [1000] * 2)
    assert len(here) == len(there) == 3
    again = run(both, _COMPILE, "write", 1000 + here[0] - there[1])
    assert again[1] == here[0]
    assert run(both, _QUANTISE) == [[float(scale), q.tolist()] for q, scale in map(quantised_row, FLOATS)]


def quantised_row(dtype: np.dtype[Any]) -> tuple[Array, Any]:
    """What the oracle says of the row that `_QUANTISE` makes."""
    bits = np.arange(1, 41).astype(np.uint16).view(dtype) if dtype == BF16 else np.arange(1, 41).astype(dtype)
    q, scales = reference.quantise(bits.reshape(1, 40))
    return q[0], scales[0]


def test_two_device_functions_of_one_name_are_refused() -> None:
    def twice() -> None:
        """Does nothing."""

    device(twice)
    with pytest.raises(ImportError, match="twice"):
        device(twice)
    device(named("test_kernel_names.another")(twice))
