"""Which cores ranks run on that are threads."""

from __future__ import annotations

import os

import pytest

import xccl
from xccl.runtime import threads


def cores_of(comm: xccl.Communicator) -> set[int]:
    comm.barrier()
    return os.sched_getaffinity(0)


def test_many_ranks_share_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_ONE_CORE_RANKS", 5)
    before = os.sched_getaffinity(0)
    assert xccl.launch(cores_of, 4, fabric="local") == [before] * 4
    found = xccl.launch(cores_of, 5, fabric="local")
    assert len(found[0]) == 1
    assert found[0] <= before
    assert found == [found[0]] * 5
    assert os.sched_getaffinity(0) == before
