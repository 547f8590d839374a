"""Sessions of processes that something else has started: how they come together."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import pytest

import xccl
from tests.faults.members import SMALL, Member, members, prefix_of, session_name, session_of
from tests.faults.support import NOTICE_S, at_most, no_new_names, segment_names, wait_for

WORK = """
comm = xccl.init()
a = comm.empty(4, np.int64)
comm.put(a, np.full(4, 10 + comm.rank), peer=(comm.rank + 1) % comm.size)
comm.barrier()
say(comm.rank, comm.size, comm.fabric_name, int(a.local[0]))
"""


@pytest.mark.parametrize("style", ["xccl", "torchrun"])
def test_environment_variables(style: str) -> None:
    before = segment_names()
    with session_of(WORK, 2, style) as scripts:
        for rank, script in enumerate(scripts):
            status, said, err = script.finish()
            assert (status, err) == (0, "")
            assert said == [[rank, 2, "shm", 10 + (rank - 1) % 2]]
    no_new_names(before)


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing in the environment says what rank this is."""
    for name in ("XCCL_RANK", "XCCL_SIZE", "XCCL_SESSION", "RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
                 "OMPI_COMM_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {"XCCL_RANK": "0", "XCCL_SIZE": "1", "RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "7"},
    ],
    ids=["mpirun", "srun", "own ones come first"],
)
def test_variables_of_other_launchers(variables: dict[str, str], no_variables: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        no_variables.setenv(name, value)
    with xccl.init(session=session_name(), **SMALL) as comm:
        assert (comm.rank, comm.size) == (0, 1)


@pytest.mark.parametrize("missing", ["XCCL_RANK", "XCCL_SIZE", "XCCL_SESSION"])
def test_missing_variables(missing: str, no_variables: pytest.MonkeyPatch) -> None:
    for name, value in {"XCCL_RANK": "0", "XCCL_SIZE": "1", "XCCL_SESSION": "x"}.items():
        if name != missing:
            no_variables.setenv(name, value)
    with pytest.raises(xccl.UsageError, match=missing):
        xccl.init()


def test_work_in_a_context() -> None:
    def main(comm: xccl.Communicator) -> list[float]:
        into = np.zeros(3)
        request = comm.isend(np.full(3, float(comm.rank)), (comm.rank + 1) % comm.size, event_id=4)
        comm.recv(into, (comm.rank - 1) % comm.size, event_id=4)
        request.wait()
        comm.barrier()
        assert not [name for name in segment_names() if name.startswith(names)], "a name lives on after all have joined"
        return into.tolist()

    session = session_name()
    names = prefix_of(session)
    with members(main, 4, session) as ranks:
        assert [member.outcome() for member in ranks] == [("result", [float((r - 1) % 4)] * 3) for r in range(4)]


def test_late_ranks_are_waited_for() -> None:
    session = session_name()
    early = Member(lambda comm: comm.barrier(), 0, 2, session)
    try:
        time.sleep(0.3)
        late = Member(lambda comm: comm.barrier(), 1, 2, session)
        try:
            assert early.outcome() == late.outcome() == ("result", None)
        finally:
            late.end()
    finally:
        early.end()


def test_join_timeout() -> None:
    before = segment_names()
    with at_most(1.0), pytest.raises(xccl.WaitTimeout) as caught:
        xccl.init(0, 3, session_name(), join_timeout_s=0.15, **SMALL)
    error = caught.value
    assert (error.operation, error.rank, error.peer, error.timeout_s) == ("join", 0, 1, 0.15)
    no_new_names(before)


@pytest.mark.parametrize(
    "options",
    [{"app_bytes": 1 << 21}, {"heap_bytes": 1 << 21}, {"ring_slots": 8}, {"slot_bytes": 4096}, {"size": 4}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_other_options_at_one_rank(options: dict[str, int], odd: int) -> None:
    """All ranks end, at once, and say why, although the odd one cannot attach the others."""
    session, size = session_name(), 3
    with at_most(NOTICE_S), contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(size):
            own = {"size": size} | (options if rank == odd else {})
            ranks.append(Member(lambda comm: None, rank, session=session, **own))
            stack.callback(ranks[-1].end)
        errors = [member.outcome()[1] for member in ranks]
    for error in errors:
        assert isinstance(error, xccl.SegmentError | xccl.SessionAborted)
        assert "all ranks need the same options" in str(error)
        if isinstance(error, xccl.SegmentError):
            assert error.reason == "wrong_size"
    assert any(isinstance(error, xccl.SegmentError) for error in errors)


def test_a_rank_number_is_taken_once() -> None:
    session = session_name()
    first = Member(lambda comm: None, 0, 2, session)
    try:
        wait_for(lambda: any(name.startswith(prefix_of(session)) for name in segment_names()), "segment of rank 0")
        with pytest.raises(xccl.FabricError, match="rank 0 of this session exists already"):
            xccl.init(0, 2, session, **SMALL)
        second = Member(lambda comm: comm.rank, 1, 2, session)  # the session is none the worse for it
        try:
            assert second.outcome() == ("result", 1)
            assert first.outcome() == ("result", None)
        finally:
            second.end()
    finally:
        first.end()


def test_a_session_may_be_started_again_under_its_name() -> None:
    session = session_name()
    for _ in range(3):
        with members(lambda comm: comm.barrier(), 3, session) as ranks:
            assert [member.outcome() for member in ranks] == [("result", None)] * 3


def test_names_of_a_killed_start_are_not_in_the_way() -> None:
    """The ranks of the first start were killed while they joined; the second start uses the same names."""
    session = session_name()
    prefix = prefix_of(session)
    killed = Member(lambda comm: None, 0, 2, session)
    wait_for(lambda: any(name.startswith(prefix) for name in segment_names()), "segment of rank 0")
    time.sleep(0.02)
    killed.end()
    assert any(name.startswith(prefix) for name in segment_names())
    with members(lambda comm: comm.barrier(), 2, session) as ranks:
        assert [member.outcome() for member in ranks] == [("result", None)] * 2
    assert not any(name.startswith(prefix) for name in segment_names())
