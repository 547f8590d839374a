"""Which of several failures `launch` shows, and how they travel."""

from __future__ import annotations

import pickle

import pytest

from xccl.errors import CapacityError, FabricError, PeerDied, SessionAborted, UsageError, WaitTimeout, XcclError
from xccl.runtime.outcome import Outcome, RankTraceback, raise_failure

RESULT = Outcome("result", 1)
DEATH = Outcome("exit", "was killed by signal 9 (SIGKILL)")


def failed(error: BaseException) -> Outcome:
    try:
        raise error
    except BaseException as caught:
        return Outcome.of_error(caught)


def test_results_alone_are_no_failure() -> None:
    raise_failure({})
    raise_failure({0: RESULT, 1: RESULT})


@pytest.mark.parametrize(
    ("outcomes", "kind", "rank"),
    [
        # Consequences: what other ranks saw of it, and reported first.
        ({0: failed(PeerDied("x", peer=1)), 1: failed(ValueError("cause"))}, ValueError, 1),
        ({0: failed(SessionAborted("x", peer=2)), 1: RESULT, 2: failed(ValueError("cause"))}, ValueError, 2),
        ({2: failed(PeerDied("x", peer=1)), 1: DEATH, 0: RESULT}, PeerDied, 1),
        (
            {
                0: failed(CapacityError("rank 1 has no room", peer=1)),
                1: failed(CapacityError("full", needed_bytes=9)),
                2: failed(CapacityError("rank 1 has no room", peer=1)),
            },
            CapacityError,
            1,
        ),
        (
            {
                0: failed(SessionAborted("x", peer=2)),
                1: failed(UsageError("rank 2 was given an impossible argument", peer=2)),
                2: failed(UsageError("op must be one of sum, prod, max, min, got 'avg'", value="avg")),
            },
            UsageError,
            2,
        ),
        # What a rank was told explains more than that the session has ended.
        ({0: failed(SessionAborted("x", peer=1)), 1: failed(UsageError("rank 2 was given", peer=2))}, UsageError, 1),
        # A rank's own error explains more than a death, which may be due to it.
        ({0: DEATH, 1: failed(OSError("cause"))}, OSError, 1),
        # The first of equals.
        ({3: failed(ValueError("first")), 0: failed(KeyError("second"))}, ValueError, 3),
        ({1: failed(WaitTimeout("x")), 0: DEATH}, WaitTimeout, 1),
        ({1: failed(SessionAborted("x", peer=7)), 0: failed(PeerDied("y", peer=7))}, SessionAborted, 1),
    ],
)
def test_the_failure_that_explains_the_others(
    outcomes: dict[int, Outcome], kind: type[BaseException], rank: int
) -> None:
    with pytest.raises(kind) as caught:
        raise_failure(outcomes)
    error = caught.value
    if outcomes[rank].kind == "exit":
        assert str(error) == f"rank {rank} was killed by signal 9 (SIGKILL)"
        assert isinstance(error, PeerDied)
        assert (error.peer, error.reason, error.rank) == (rank, DEATH.value, None)
    else:
        assert error.__notes__ == [f"raised by rank {rank}"]
        assert isinstance(error.__cause__, RankTraceback)
        assert error.__cause__.rank == rank
        assert f"Traceback of rank {rank}:\nTraceback (most recent call last):" in str(error.__cause__)


def test_interrupts_name_the_rank() -> None:
    with pytest.raises(KeyboardInterrupt, match="rank 4 was interrupted"):
        raise_failure({4: failed(KeyboardInterrupt())})


@pytest.mark.parametrize(("code", "said"), [(None, "0"), (0, "0"), (5, "5"), ("bye", "bye")])
def test_sys_exit_is_an_exit(code: object, said: str) -> None:
    outcome = failed(SystemExit(code))
    assert (outcome.kind, outcome.value) == ("exit", f"exited with status {said} before its work was done")
    assert "SystemExit" in outcome.trace


def test_outcomes_travel() -> None:
    outcome = pickle.loads(failed(CapacityError("too much", needed_bytes=5)).to_bytes())
    assert type(outcome.value) is CapacityError
    assert outcome.value.needed_bytes == 5
    assert "in failed\n    raise error" in outcome.trace
    assert pickle.loads(RESULT.to_bytes()) == RESULT


def test_what_does_not_pickle_travels_as_text() -> None:
    result = pickle.loads(Outcome("result", lambda: None).to_bytes())
    assert (result.kind, type(result.value)) == ("error", FabricError)
    assert "the result of type function cannot be sent" in str(result.value)

    class Local(Exception):
        pass

    error = pickle.loads(failed(Local("only known here")).to_bytes())
    assert (error.kind, type(error.value)) == ("error", XcclError)
    assert str(error.value) == "Local: only known here"
    assert "only known here" in error.trace

    details = pickle.loads(failed(XcclError("kept", value=lambda: None, number=3)).to_bytes()).value
    assert (type(details), str(details), details.number) == (XcclError, "kept", 3)
    assert "function" in details.value


class UnpicklesToTrouble(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(one + two)


def test_what_pickles_one_way_only_travels_as_text() -> None:
    error = pickle.loads(failed(UnpicklesToTrouble(1, 2)).to_bytes()).value
    assert (type(error), str(error)) == (XcclError, "UnpicklesToTrouble: 3")
