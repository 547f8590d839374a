"""Ranks of sessions that something else than `launch` starts: scripts, and children of the test."""

from __future__ import annotations

import contextlib
import multiprocessing
import secrets
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

import xccl
from tests.faults.support import PATIENCE_S, Script
from xccl.fabric.segment import segment_name
from xccl.fabric.shm import ShmFabric

SMALL: dict[str, Any] = {"app_bytes": 1 << 20, "heap_bytes": 1 << 20}


def session_name() -> str:
    return secrets.token_hex(8)


@contextlib.contextmanager
def session_of(code: str, ranks: int, style: str = "xccl") -> Iterator[list[Script]]:
    """A script a rank, told by environment variables who it is."""
    rank_variable, size_variable = {
        "xccl": ("XCCL_RANK", "XCCL_SIZE"),
        "torchrun": ("RANK", "WORLD_SIZE"),
    }[style]
    name = session_name()
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Script(code, **{rank_variable: str(rank), size_variable: str(ranks), "XCCL_SESSION": name})
            )
            for rank in range(ranks)
        ]


class Member:
    """A rank as a child of this process: forked with warm kernels, which a new interpreter would have to load."""

    def __init__(self, main: Callable[..., Any], rank: int, size: int, session: str, **options: Any) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        options = {"join_timeout_s": 10.0} | SMALL | options
        self.process = context.Process(target=self._main, args=(theirs, main, rank, size, session, options))
        self.process.start()
        theirs.close()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @staticmethod
    def _main(theirs: Connection, main: Callable[..., Any], rank: int, size: int, session: str, options: Any) -> None:
        try:
            with xccl.init(rank, size, session, **options) as comm:
                theirs.send(("result", main(comm)))
        except Exception as error:
            theirs.send(("error", error))

    def outcome(self) -> tuple[str, Any]:
        assert self._ours.poll(PATIENCE_S), "no word from a rank"
        word: tuple[str, Any] = self._ours.recv()
        return word

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self._ours.close()


@contextlib.contextmanager
def members(
    main: Callable[..., Any], size: int, session: str | None = None, of: Callable[[int], dict[str, Any]] | None = None
) -> Iterator[list[Member]]:
    session = session or session_name()
    made = [Member(main, rank, size, session, **(of(rank) if of else {})) for rank in range(size)]
    try:
        yield made
    finally:
        for member in made:
            member.end()


def prefix_of(session: str) -> str:
    """The common part of a session's names in /dev/shm."""
    seen: list[bytes] = []

    class Stop(Exception):
        pass

    def stop(self: ShmFabric, session_id: bytes, *_: Any, **__: Any) -> None:
        seen.append(session_id)
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(ShmFabric, "__init__", stop)
        xccl.init(0, 1, session)
    return segment_name(seen[0], 0)[1:-1]
