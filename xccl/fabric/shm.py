"""Fabric `shm`: ranks are processes, and segments are POSIX shared memory.

Joining. Each rank creates its own segment, attaches those of all peers as they appear, and waits until all peers have
attached its own; then it unlinks its name. From then on nothing of the session has a name, so nothing can be left
behind.

Liveness. Each peer's process is watched through a pidfd, which becomes readable when the process ends, reaped or not. A
peer that ends without having left the session has died.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import time

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError, PeerDied, SegmentError, SessionAborted, WaitTimeout
from ..kernels import words
from ..layout.segment import (
    ABORT_DIED,
    ABORT_EXCEPTION,
    ABORT_INTERRUPT,
    CONTROL_OFFSET,
    CTL_ABORT,
    CTL_ATTACHED,
    CTL_STATE,
    STATE_LEFT,
    Geometry,
)
from .base import Fabric, wait_policy
from .segment import Segment, start_ticks

#: Two for the segment (ours, and the one that mmap keeps), one for the process.
_DESCRIPTORS_PER_PEER = 3
_OTHER_DESCRIPTORS = 64


class ShmFabric(Fabric):
    """One process's view of the segments of a session."""

    name = "shm"

    def __init__(self, session_id: bytes, rank: int, geometry: Geometry, *, join_timeout_s: float = 60.0) -> None:
        """Join a session. Returns when all ranks have attached this rank's segment.

        Args:
            session_id: 16 random bytes, the same at all ranks.
            rank: this rank.
            geometry: the same at all ranks.
            join_timeout_s: how long to wait for the other ranks.

        Raises:
            WaitTimeout: a peer did not appear in time.
            SegmentError: a peer's segment is of another version, session or geometry.
            CapacityError: /dev/shm has no room.
        """
        super().__init__(rank, geometry)
        _require_descriptors(_DESCRIPTORS_PER_PEER * geometry.ranks + _OTHER_DESCRIPTORS)
        self._segments: dict[int, Segment] = {}
        self._pidfds: dict[int, int] = {}
        self._poll = select.poll()
        deadline = time.monotonic() + join_timeout_s
        try:
            self._segments[rank] = own = Segment.create(session_id, rank, geometry)
            for peer in range(geometry.ranks):
                if peer != rank:
                    self._segments[peer] = self._attach(session_id, peer, deadline, join_timeout_s)
            bases = [self._segments[r].base for r in range(geometry.ranks)]
            self._mapped(bases, *wait_policy(geometry.ranks, len(os.sched_getaffinity(0))))
            self._await_attached(deadline, join_timeout_s)
            own.unlink()
        except BaseException as error:
            self._say_that_joining_failed(error)
            self.close()
            raise

    def _attach(self, session_id: bytes, peer: int, deadline: float, timeout_s: float) -> Segment:
        pause_s = 0.0002
        while True:
            try:
                segment = Segment.attach(session_id, peer, self.geometry)
                break
            except SegmentError as error:
                if error.reason not in ("absent", "not_ready"):
                    raise
                if time.monotonic() > deadline:
                    raise WaitTimeout(
                        f"rank {self.rank} waited {timeout_s} s for the segment of rank {peer}: {error}",
                        operation="join", rank=self.rank, peer=peer, timeout_s=timeout_s,
                    ) from error  # fmt: skip
                self._raise_if_over()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.01)
        self._watch(peer, segment)
        words.add(segment.base + CONTROL_OFFSET + CTL_ATTACHED, 1)
        return segment

    def _watch(self, peer: int, segment: Segment) -> None:
        header = segment.header()
        pidfd = -1
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(header.owner_pid)
        if pidfd < 0 or start_ticks(header.owner_pid) != header.owner_start_ticks:
            if pidfd >= 0:
                os.close(pidfd)
            segment.close()
            raise PeerDied(
                f"rank {peer} (pid {header.owner_pid}) died before rank {self.rank} joined",
                rank=self.rank, peer=peer, reason="died while joining",
            )  # fmt: skip
        self._pidfds[peer] = pidfd
        self._poll.register(pidfd, select.POLLIN)

    def _await_attached(self, deadline: float, timeout_s: float) -> None:
        while (attached := words.load(self.control + CTL_ATTACHED)) < self.ranks - 1:
            if time.monotonic() > deadline:
                raise WaitTimeout(
                    f"rank {self.rank} waited {timeout_s} s: {attached} of {self.ranks - 1} peers have joined",
                    operation="join", rank=self.rank, expected=self.ranks - 1, seen=attached, timeout_s=timeout_s,
                )  # fmt: skip
            self._raise_if_over()
            time.sleep(0.0005)

    def _raise_if_over(self) -> None:
        """Raise if the session has ended while this rank was still joining it."""
        own = self._segments[self.rank].base + CONTROL_OFFSET
        word = int(words.load(own + CTL_ABORT))
        if word:
            kind, peer = word >> 32, word & 0xFFFFFFFF
            said = self.last_words(peer) if peer in self._segments else ""
            if kind != ABORT_DIED:
                said = said or "failed"
                raise SessionAborted(
                    f"rank {self.rank}: session aborted, since rank {peer} {said}; during join",
                    rank=self.rank, peer=peer, reason=said,
                )  # fmt: skip
            raise self._died_early(peer)
        ended = {fd for fd, _ in self._poll.poll(0)}
        for peer, pidfd in self._pidfds.items():
            # A rank whose work needs no others may have done it, and left, before the last one has joined.
            if pidfd in ended and words.load(self._segments[peer].base + CONTROL_OFFSET + CTL_STATE) != STATE_LEFT:
                raise self._died_early(peer)

    def _died_early(self, peer: int) -> PeerDied:
        return PeerDied(f"rank {peer} died while the session was starting", rank=self.rank, peer=peer, reason="died")

    def _say_that_joining_failed(self, error: BaseException) -> None:
        """Tell the ranks that this one could attach: they must not wait for it."""
        if self.rank not in self._segments or isinstance(error, SessionAborted):
            return
        self.controls = np.array([segment.base + CONTROL_OFFSET for segment in self._segments.values()], np.int64)
        if isinstance(error, PeerDied):
            assert error.peer is not None
            self.abort(ABORT_DIED, error.peer)
        elif isinstance(error, KeyboardInterrupt):
            self.abort(ABORT_INTERRUPT, self.rank, "was interrupted")
        else:
            self.abort(ABORT_EXCEPTION, self.rank, f"could not join ({type(error).__name__}: {error})")

    def view(self, rank: int, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes of a rank's segment."""
        return self._segments[rank].view(offset, n_bytes)

    def commit(self, rank: int, offset: int, n_bytes: int) -> None:
        """Back a part of a rank's segment with memory, or raise CapacityError."""
        self._segments[rank].commit(offset, n_bytes)

    def dead_peers(self) -> list[tuple[int, str]]:
        """Ranks whose processes have ended without leaving the session."""
        ended = {fd for fd, _ in self._poll.poll(0)}
        dead = []
        for peer, pidfd in list(self._pidfds.items()):
            if pidfd not in ended:
                continue
            if self.state(peer) == STATE_LEFT:
                self._unwatch(peer)
            else:
                dead.append((peer, "died (its process has ended)"))
        return dead

    def _unwatch(self, peer: int) -> None:
        pidfd = self._pidfds.pop(peer)
        self._poll.unregister(pidfd)
        os.close(pidfd)

    def close(self) -> None:
        """Close descriptors, and remove this rank's name if it still has one."""
        for peer in list(self._pidfds):
            self._unwatch(peer)
        for segment in self._segments.values():
            segment.close()


def _require_descriptors(needed: int) -> None:
    """Raise this process's limit of open files to what is needed, as far as the system allows it.

    Raises:
        CapacityError: the system does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise CapacityError(
            f"so many ranks need {needed} open files in each, the limit is {hard}; raise it, or use fabric local",
            value=needed,
            bound=hard,
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
