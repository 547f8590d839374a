"""For tests that look at the clock: kernels are compiled before."""

from __future__ import annotations

import pytest

from xccl.kernels import warm


@pytest.fixture(autouse=True, scope="session")
def warm_kernels() -> None:
    warm()
