"""Errors carry their numbers, also through a pickle."""

from __future__ import annotations

import pickle

import pytest

from xccl import errors

TREE = [
    errors.XcclError,
    errors.UsageError,
    errors.CapacityError,
    errors.SegmentError,
    errors.WaitTimeout,
    errors.EventMismatch,
    errors.PeerDied,
    errors.SessionAborted,
    errors.FabricError,
    errors.ModelError,
]


@pytest.mark.parametrize("kind", TREE)
def test_pickle_keeps_message_details_and_notes(kind: type[errors.XcclError]) -> None:
    error = kind("too much", needed_bytes=10, peer=None)
    error.add_note("raised by rank 3")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert isinstance(copy, errors.XcclError)
    assert str(copy) == "too much"
    assert copy.args == ("too much",)
    assert copy.details == {"needed_bytes": 10, "peer": None}
    assert copy.needed_bytes == 10
    assert copy.__notes__ == ["raised by rank 3"]


def test_builtin_bases() -> None:
    assert issubclass(errors.UsageError, ValueError)
    assert issubclass(errors.WaitTimeout, TimeoutError)


def test_documented_attributes_default_to_none() -> None:
    error = errors.WaitTimeout("late", rank=1)
    assert (error.rank, error.peer, error.timeout_s) == (1, None, None)
