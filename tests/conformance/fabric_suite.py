"""The interface `xccl.fabric.Fabric`: what the operations may rely on, whatever the fabric.

A new fabric passes when a class derived from `FabricSuite` does. The tests use nothing but the interface, and the
kernels that read and write single words.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xccl
from tests.conformance.suite import Suite
from xccl.errors import PeerDied, SessionAborted
from xccl.fabric import Fabric
from xccl.kernels import words
from xccl.layout.segment import (
    ABORT_DIED,
    ABORT_EXCEPTION,
    CONTROL_END,
    CONTROL_OFFSET,
    CTL_ABORT,
    CTL_BARRIER_ARRIVALS,
    CTL_BARRIER_RELEASE,
    CTL_STATE,
    STATE_FAILED,
    STATE_LEFT,
    STATE_RUNNING,
)

#: How soon a rank must notice what another did. The machine may be busy.
NOTICE_S = 5.0
#: Small areas, so that whole ones can be looked at.
SMALL = {"app_bytes": 1 << 16, "heap_bytes": 1 << 16, "ring_slots": 2, "slot_bytes": 64}


def until(condition: Callable[[], Any], what: str) -> Any:
    """Poll until the condition is true; its value."""
    deadline = time.monotonic() + NOTICE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.001)
    return value


def parts_of(fabric: Fabric) -> dict[str, tuple[int, int]]:
    """Offset and size of the areas of a segment."""
    geometry = fabric.geometry
    return {
        "app data": (geometry.app_offset, geometry.app_bytes),
        "point-to-point fields": (geometry.metadata_offset, geometry.ranks * geometry.fields_per_peer_bytes),
        "expert-parallel fields": (geometry.expert_metadata_offset, 1 << 16),
        "rings": (geometry.managed_offset, geometry.ranks * geometry.ring_bytes),
        "managed blocks": (geometry.heap_offset, geometry.heap_bytes),
    }


class FabricSuite(Suite):
    """Global memory, and the life and death of its ranks."""

    # -- memory -----------------------------------------------------------------------------------------------------

    def test_a_fabric_says_who_it_is(self) -> None:
        def main(comm: xccl.Communicator) -> tuple[int, int, int]:
            fabric = comm.core.fabric
            return fabric.rank, fabric.ranks, fabric.geometry.app_bytes

        assert self.run(main, 3, **SMALL) == [(0, 3, 1 << 16), (1, 3, 1 << 16), (2, 3, 1 << 16)]

    def test_address_tables(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            fabric = comm.core.fabric
            assert fabric.segments.dtype == fabric.controls.dtype == np.int64
            assert fabric.segments.shape == fabric.controls.shape == (3,)
            assert (fabric.controls - fabric.segments == CONTROL_OFFSET).all()
            assert fabric.control == fabric.controls[fabric.rank]
            assert (fabric.segments % 4096 == 0).all()
            starts = np.sort(fabric.segments)
            assert (np.diff(starts) >= fabric.geometry.total_bytes).all(), "segments overlap"
            for rank in range(3):
                fabric.require_peer(rank)
                assert fabric.view(rank, 128, 64).ctypes.data == fabric.segments[rank] + 128

        self.run(main, 3, **SMALL)

    def test_a_new_segment_is_zero(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            fabric = comm.core.fabric
            for name, (offset, n_bytes) in parts_of(fabric).items():
                fabric.commit(fabric.rank, offset, n_bytes)
                assert not fabric.view(fabric.rank, offset, n_bytes).any(), name
            for word in (CTL_ABORT, CTL_BARRIER_ARRIVALS, CTL_BARRIER_RELEASE, CTL_STATE):
                assert words.load(fabric.control + word) == 0, word
            rest = fabric.geometry.app_offset - CONTROL_END
            assert not fabric.view(fabric.rank, CONTROL_END, rest).any()

        self.run(main, **SMALL)

    def test_all_ranks_see_the_same_bytes(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            fabric, ranks = comm.core.fabric, comm.size
            parts = parts_of(fabric)
            for offset, n_bytes in parts.values():
                fabric.commit(comm.rank, offset, n_bytes)
            comm.barrier()
            # Each rank writes a byte of its own into each 16 of every segment, its own segment and those of others.
            for segment in range(ranks):
                for i, (offset, n_bytes) in enumerate(parts.values()):
                    fabric.view(segment, offset, n_bytes)[comm.rank :: 16] = 1 + i + 10 * comm.rank + 50 * segment
            comm.barrier()
            for segment in range(ranks):
                for i, (name, (offset, n_bytes)) in enumerate(parts.items()):
                    area = fabric.view(segment, offset, n_bytes)
                    for writer in range(16):
                        expected = 1 + i + 10 * writer + 50 * segment if writer < ranks else 0
                        assert (area[writer::16] == expected).all(), (name, segment, writer)

        self.run(main, 3, **SMALL)

    def test_addresses_and_views_are_the_same_memory(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            fabric = comm.core.fabric
            last = fabric.geometry.total_bytes - 8
            peer = 1 - comm.rank
            fabric.commit(comm.rank, last, 8)
            comm.barrier()
            words.store(int(fabric.segments[peer]) + last, 1000 + comm.rank)
            comm.barrier()
            assert fabric.view(comm.rank, last, 8).view(np.int64)[0] == 1000 + peer
            assert words.load(int(fabric.segments[comm.rank]) + last) == 1000 + peer

        self.run(main, **SMALL)

    def test_words_are_atomic_between_ranks(self) -> None:
        def main(comm: xccl.Communicator) -> int:
            fabric = comm.core.fabric
            offset = fabric.geometry.app_offset
            fabric.commit(comm.rank, offset, 8)
            comm.barrier()
            for i in range(3000):
                words.add(int(fabric.segments[i % comm.size]) + offset, 1 + comm.rank)
            comm.barrier()
            return int(words.load(int(fabric.segments[comm.rank]) + offset))

        assert self.run(main, 3, **SMALL) == [6000, 6000, 6000]

    def test_commit_keeps_what_is_there(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            fabric = comm.core.fabric
            offset, n_bytes = parts_of(fabric)["app data"]
            peer = 1 - comm.rank
            fabric.commit(comm.rank, offset, 100)
            view = fabric.view(comm.rank, offset, 100)
            view[:] = comm.rank + 1
            comm.barrier()
            fabric.commit(comm.rank, offset, n_bytes)  # once more, and more of it
            fabric.commit(peer, offset + 3, 5000)  # a peer's, at an odd place
            fabric.commit(peer, offset, 0)
            comm.barrier()
            assert (view == comm.rank + 1).all()
            assert not fabric.view(comm.rank, offset + 100, n_bytes - 100).any()

        self.run(main, **SMALL)

    def test_a_view_outlives_the_fabric(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            fabric = comm.core.fabric
            offset = fabric.geometry.app_offset
            fabric.commit(comm.rank, offset, 4096)
            comm.barrier()
            mine, theirs = fabric.view(comm.rank, offset, 4096), fabric.view(1 - comm.rank, offset, 4096)
            mine[:] = 7
            comm.barrier()
            comm.close()
            del comm, fabric
            assert (mine == 7).all()
            assert (theirs == 7).all()

        self.run(main, **SMALL)

    # -- the end of a session ---------------------------------------------------------------------------------------

    def test_an_abort_reaches_every_rank_with_last_words(self) -> None:
        def main(comm: xccl.Communicator) -> tuple[tuple[int, int] | None, str]:
            fabric, signals = comm.core.fabric, comm.signals(1)
            assert fabric.abort_word() is None
            assert fabric.last_words(1) == ""
            comm.signal(signals, 0, 1, peer=1, op="add")
            if comm.rank == 1:
                comm.wait_until(signals, 0, "eq", 3)  # no rank is in a wait, which the abort would end
                fabric.abort(ABORT_EXCEPTION, 1, "it was the butler, naïvely")
            until(fabric.abort_word, "abort word")
            return fabric.abort_word(), fabric.last_words(1)

        assert self.run(main, 3) == [((ABORT_EXCEPTION, 1), "it was the butler, naïvely")] * 3

    def test_the_first_abort_counts(self) -> None:
        def main(comm: xccl.Communicator) -> tuple[int, int] | None:
            fabric = comm.core.fabric
            comm.barrier()  # nobody is still joining, and would be told there
            if comm.rank == 0:
                fabric.abort(ABORT_EXCEPTION, 0, "first")
                fabric.abort(ABORT_DIED, 1, "second")
            until(fabric.abort_word, "abort word")
            return fabric.abort_word()

        assert self.run(main) == [(ABORT_EXCEPTION, 0)] * 2

    def test_last_words_are_cut_to_size(self) -> None:
        def main(comm: xccl.Communicator) -> str:
            fabric = comm.core.fabric
            comm.barrier()  # nobody is still joining, and would be told there
            if comm.rank == 0:
                fabric.abort(ABORT_EXCEPTION, 0, "x" + 400 * "é")  # a cut falls into the middle of a character
            until(fabric.abort_word, "abort word")
            return fabric.last_words(0)

        for text in self.run(main):
            assert text.startswith("xéé")
            assert 200 < len(text) < 400

    def test_an_abort_wakes_who_sleeps(self) -> None:
        def main(comm: xccl.Communicator) -> tuple[str, float]:
            signals = comm.signals(1)
            start = time.monotonic()
            if comm.rank == 0:
                time.sleep(0.2)  # by now the others sleep in the kernel
                comm.core.fabric.abort(ABORT_EXCEPTION, 0, "said no")
            with pytest.raises(SessionAborted) as caught:
                comm.wait_until(signals, 0, "ge", 1)
            assert caught.value.peer == 0
            assert caught.value.rank == comm.rank
            return str(caught.value), time.monotonic() - start

        for message, seconds in self.run(main, 3):
            assert "rank 0 said no" in message
            assert seconds < NOTICE_S

    def test_who_has_left_is_not_dead(self) -> None:
        def main(comm: xccl.Communicator) -> list[tuple[int, str]]:
            fabric = comm.core.fabric
            assert fabric.state(comm.rank) == STATE_RUNNING
            comm.barrier()
            if comm.rank != 0:
                return []
            until(lambda: fabric.state(1) == STATE_LEFT, "rank 1 leaves")
            time.sleep(0.1)  # and ends
            fabric.check_peers()
            assert fabric.abort_word() is None
            return fabric.dead_peers()

        assert self.run(main) == [[], []]

    def test_waiting_for_who_has_left_ends(self) -> None:
        def main(comm: xccl.Communicator) -> BaseException | None:
            comm.barrier()
            if comm.rank == 1:
                return None
            with pytest.raises(PeerDied, match="left the session") as caught:
                comm.barrier()
            return caught.value

        error = self.run(main)[0]
        assert error.peer == 1

    def test_death_is_noticed_and_told_to_all(self) -> None:
        """A rank that dies is in `dead_peers` of the others; `check_peers` turns it into an abort that all see."""
        reports: dict[int, Any] = {}

        def main(comm: xccl.Communicator) -> None:
            fabric, signals = comm.core.fabric, comm.signals(1)
            comm.signal(signals, 0, 1, peer=1, op="add")
            if comm.rank == 1:
                comm.wait_until(signals, 0, "eq", 3)  # no rank is in a wait, which the death would end
                self.die()
            dead = until(fabric.dead_peers, "the death of rank 1")
            fabric.check_peers()
            comm.report((dead, fabric.abort_word()))

        with pytest.raises(PeerDied) as caught:
            self.run(main, 3, on_report=reports.__setitem__)
        assert caught.value.peer == 1
        assert sorted(reports) == [0, 2]
        for dead, abort in reports.values():
            assert [rank for rank, _ in dead] == [1]
            assert all(how for _, how in dead)
            assert abort == (ABORT_DIED, 1)

    def test_death_ends_waits_of_the_others(self) -> None:
        reports: dict[int, Any] = {}

        def main(comm: xccl.Communicator) -> None:
            comm.barrier()
            if comm.rank == 1:
                time.sleep(0.1)
                self.die()
            start = time.monotonic()
            try:
                comm.barrier()
            except PeerDied as error:
                comm.report((error.peer, error.rank, time.monotonic() - start))

        with pytest.raises(PeerDied, match="rank 1"):
            self.run(main, 3, on_report=reports.__setitem__)
        assert {rank: report[:2] for rank, report in reports.items()} == {0: (1, 0), 2: (1, 2)}
        assert max(report[2] for report in reports.values()) < NOTICE_S

    def test_a_failed_rank_says_so(self) -> None:
        states: dict[int, Any] = {}

        def main(comm: xccl.Communicator) -> None:
            if comm.rank == 1:
                raise ValueError("no such luck")
            until(comm.core.fabric.abort_word, "abort word")
            comm.report((comm.core.fabric.state(1), comm.core.fabric.last_words(1)))

        with pytest.raises(ValueError, match="no such luck"):
            self.run(main, on_report=states.__setitem__)
        assert states == {0: (STATE_FAILED, "raised ValueError: no such luck")}
