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
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError, PeerDied, SegmentError, SessionAborted, WaitTimeout, XcclError
from ..kernels import processes, wait, words
from ..layout.ring import REACH_DIRECT, REACH_KERNEL, REACH_NONE, REACH_SLOWLY
from ..layout.segment import (
    ABORT_DIED,
    ABORT_EXCEPTION,
    ABORT_INTERRUPT,
    CONTROL_OFFSET,
    CTL_ABORT,
    CTL_ATTACHED,
    CTL_LAST_WORDS,
    CTL_REACHED,
    CTL_STATE,
    LAST_WORDS_BYTES,
    STATE_LEFT,
    Geometry,
)
from .base import Fabric, wait_policy, whole_pages
from .reading import reads_slowly
from .segment import Segment, start_ticks

#: An address at which nothing is mapped.
_NOWHERE = 8
#: Two for the segment (ours, and the one that mmap keeps), one for the process.
_DESCRIPTORS_PER_PEER = 3
_OTHER_DESCRIPTORS = 64

#: Between two looks for the segment of the next rank.
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.0002, 0.01
#: A rank that finds other options at another one waits so long for those that are still missing, to tell them.
_LINGER_S = 1.0
#: Between two looks for those of all missing ranks, and the least for each rank: such a look takes 5 us a rank.
_SWEEP_S, _SWEEP_PER_RANK_S = 0.2, 0.005


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
        #: Several threads of a rank may wait at once; a poll object serves one at a time.
        self._watching = threading.Lock()
        deadline = time.monotonic() + join_timeout_s
        try:
            self._segments[rank] = own = Segment.create(session_id, rank, geometry)
            self._attach_all(session_id, deadline, join_timeout_s)
            bases = [self._segments[r].base for r in range(geometry.ranks)]
            self._mapped(bases, *wait_policy(geometry.ranks, len(os.sched_getaffinity(0))))
            self._await_attached(deadline, join_timeout_s)
            if words.load(self.control + CTL_REACHED) == self.ranks - 1:
                self.reached = REACH_SLOWLY if reads_slowly() else REACH_KERNEL
            own.unlink()
        except BaseException as error:
            if isinstance(error, SegmentError):
                self._reach_the_missing(session_id)
            self._say_that_joining_failed(error)
            self.close()
            raise

    def _attach_all(self, session_id: bytes, deadline: float, timeout_s: float) -> None:
        """Attach the segments of all peers as they appear."""
        waiting = [peer for peer in range(self.ranks) if peer != self.rank]
        pause_s = _SHORTEST_PAUSE_S
        sweep_s = max(_SWEEP_S, _SWEEP_PER_RANK_S * self.ranks)
        next_sweep = time.monotonic() + sweep_s
        while waiting:
            problem = self._attach(session_id, waiting[0])
            if problem is None:
                del waiting[0]
                pause_s = _SHORTEST_PAUSE_S
                continue
            now = time.monotonic()
            if now > deadline:
                raise WaitTimeout(
                    f"rank {self.rank} waited {timeout_s} s for the segment of rank {waiting[0]}: {problem}",
                    operation="join", rank=self.rank, peer=waiting[0], timeout_s=timeout_s,
                ) from problem  # fmt: skip
            self._raise_if_over()
            if now > next_sweep:
                # The first may never come because of one behind it: one with other options, or one that has died.
                next_sweep = now + sweep_s
                waiting[1:] = [peer for peer in waiting[1:] if self._attach(session_id, peer) is not None]
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _attach(self, session_id: bytes, peer: int) -> SegmentError | None:
        """Attach the segment of a peer; why not, if that may pass with time."""
        try:
            segment = Segment.attach(session_id, peer, self.geometry)
        except SegmentError as error:
            if error.reason in ("absent", "not_ready"):
                return error
            if error.reason == "wrong_size":
                self._tell_stranger(session_id, peer, error)
            raise
        self._watch(peer, segment)
        self._segments[peer] = segment
        self.processes[peer] = segment.header().owner_pid
        # Before it is counted as attached: who has been attached by all knows by how many it is reached.
        words.add(segment.base + CONTROL_OFFSET + CTL_REACHED, int(self._may_read(peer)))
        words.add(segment.base + CONTROL_OFFSET + CTL_ATTACHED, 1)
        return None

    def _tell_stranger(self, session_id: bytes, peer: int, error: SegmentError) -> None:
        """Tell a rank with other options, which cannot attach this rank's segment to read it there."""
        with contextlib.suppress(OSError, XcclError):
            segment = Segment.attach_control(session_id, peer)
            _tell(segment, ABORT_EXCEPTION, self.rank, f"could not join ({error})")
            segment.close()

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
        word = _abort_word(self._segments[self.rank])
        ended = {fd for fd, _ in self._poll.poll(0)}
        for peer, pidfd in self._pidfds.items():
            # A rank whose work needs no others may have done it, and left, before the last one has joined.
            if not word and pidfd in ended and self._state_of(peer) != STATE_LEFT:
                word = _abort_word(self._segments[peer]) or ABORT_DIED << 32 | peer
        if not word:
            return
        kind, peer = word >> 32, word & 0xFFFFFFFF
        if kind == ABORT_DIED:
            raise PeerDied(f"rank {peer} died while the session was starting", rank=self.rank, peer=peer, reason="died")
        said = self.last_words(self.rank) or (self.last_words(peer) if peer in self._segments else "") or "failed"
        raise SessionAborted(
            f"rank {self.rank}: session aborted, since rank {peer} {said}; during join",
            rank=self.rank, peer=peer, reason=said,
        )  # fmt: skip

    def _state_of(self, peer: int) -> int:
        return int(words.load(self._segments[peer].base + CONTROL_OFFSET + CTL_STATE))

    def _reach_the_missing(self, session_id: bytes) -> None:
        """Wait a moment for ranks that come late: once this rank has gone, nothing would tell them what went wrong."""
        deadline = time.monotonic() + _LINGER_S
        missing = [peer for peer in range(self.ranks) if peer not in self._segments]
        while missing:
            for peer in list(missing):
                with contextlib.suppress(SegmentError, PeerDied):
                    if self._attach(session_id, peer) is not None:
                        continue
                missing.remove(peer)
            if time.monotonic() > deadline:
                return
            time.sleep(_LONGEST_PAUSE_S)

    def _say_that_joining_failed(self, error: BaseException) -> None:
        """Tell the ranks that this one could attach: they must not wait for it."""
        kind, culprit, text = ABORT_EXCEPTION, self.rank, f"could not join ({type(error).__name__}: {error})"
        if isinstance(error, (PeerDied, SessionAborted)):
            assert error.peer is not None
            kind = ABORT_DIED if isinstance(error, PeerDied) else ABORT_EXCEPTION
            culprit, text = error.peer, error.reason or ""
        elif isinstance(error, KeyboardInterrupt):
            kind, text = ABORT_INTERRUPT, "was interrupted"
        for segment in self._segments.values():
            _tell(segment, kind, culprit, text)

    def view(self, rank: int, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes of a rank's segment."""
        return self._segments[rank].view(offset, n_bytes)

    def commit(self, rank: int, offset: int, n_bytes: int) -> None:
        """Back a part of a rank's segment with memory, or raise CapacityError."""
        self._segments[rank].commit(offset, n_bytes)

    def release(self, offset: int, n_bytes: int) -> None:
        """Give the pages back to /dev/shm."""
        start, length = whole_pages(offset, n_bytes)
        if length:
            self._segments[self.rank].release(start, length)

    def private_reach(self, peer: int) -> tuple[int, int]:
        """By the operating system's kernel, if it lets this process read the peer's memory (see ptrace(2))."""
        if peer == self.rank:
            return REACH_DIRECT, 0
        return (REACH_KERNEL if self._may_read(peer) else REACH_NONE), int(self.processes[peer])

    def _may_read(self, peer: int) -> bool:
        """Does the operating system let this process read the private memory of a peer?"""
        scratch = np.zeros(4, np.int64)
        return bool(processes.may_read(int(self.processes[peer]), scratch.ctypes.data, _NOWHERE))

    def keep(self, array: npt.NDArray[Any]) -> None:
        """Nothing to do: the operating system's kernel fails to read what is gone."""

    def dead_peers(self) -> list[tuple[int, str]]:
        """Ranks whose processes have ended without leaving the session."""
        dead = []
        with self._watching:
            ended = {fd for fd, _ in self._poll.poll(0)}
            for peer, pidfd in list(self._pidfds.items()):
                if pidfd not in ended:
                    continue
                if self.state(peer) == STATE_LEFT:
                    self._unwatch(peer)
                else:
                    dead.append((peer, "died (its process has ended)"))
        return dead

    def check_peers(self) -> None:
        """Abort the session if a peer has died, with the reason that it had been given if it knew of one."""
        for rank, _ in self.dead_peers():
            word = _abort_word(self._segments[rank])
            if word:
                # It has ended because another one had, and whoever told it so has not come round to this rank yet.
                for control in self.controls:
                    wait.abort(int(control), word)
                return
        super().check_peers()

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


def _abort_word(segment: Segment) -> int:
    return int(words.load(segment.base + CONTROL_OFFSET + CTL_ABORT))


def _tell(segment: Segment, kind: int, culprit: int, text: str) -> None:
    """Abort one rank while it joins. It may not have attached the culprit, so the words are left in its own segment."""
    if not _abort_word(segment):
        area = segment.view(CONTROL_OFFSET + CTL_LAST_WORDS, LAST_WORDS_BYTES)
        said = text.encode(errors="replace")[: LAST_WORDS_BYTES - 1]
        area[: len(said)] = np.frombuffer(said, np.uint8)
    wait.abort(segment.base + CONTROL_OFFSET, kind << 32 | culprit)


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
