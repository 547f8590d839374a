"""The symmetric allocator: blocks never overlap, are aligned, and merge when they are freed. One rank's part of it is
pure arithmetic, so it is tested without ranks."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from xccl.comm.symmetric import SymmetricAllocator
from xccl.errors import CapacityError, UsageError

#: Alignment of blocks that do not ask for another.
DEFAULT_ALIGNMENT: Final = 128


class AllocatorMachine(RuleBasedStateMachine):
    """Random allocations and frees, next to a map of what is taken."""

    offsets: Bundle[int] = Bundle("offsets")

    @initialize(
        start=st.integers(0, 100).map(lambda n: n * 4096),
        size_bytes=st.one_of(st.integers(0, 100), st.integers(1, 64).map(lambda n: n * 128), st.integers(1, 1 << 16)),
    )
    def make(self, start: int, size_bytes: int) -> None:
        self.start, self.end = start, start + size_bytes
        self.taken: dict[int, int] = {}
        self.allocator = SymmetricAllocator("test area", start, size_bytes)

    def gaps(self) -> list[tuple[int, int]]:
        """Free ranges, by what is taken."""
        found, at = [], self.start
        for offset, n_bytes in sorted(self.taken.items()):
            found.append((at, offset - at))
            at = offset + n_bytes
        return [*found, (at, self.end - at)]

    @rule(
        target=offsets,
        n_bytes=st.one_of(st.integers(0, 300), st.integers(0, 1 << 14), st.integers(0, 1 << 17)),
        alignment=st.sampled_from([None, 1, 2, 64, 128, 4096]),
    )
    def alloc(self, n_bytes: int, alignment: int | None) -> object:
        unit = DEFAULT_ALIGNMENT if alignment is None else alignment
        needed = -(-max(n_bytes, 1) // unit) * unit
        try:
            if alignment is None:
                offset = self.allocator.alloc(n_bytes)
            else:
                offset = self.allocator.alloc(n_bytes, alignment)
        except CapacityError as error:
            for start, length in self.gaps():
                spare = -start % unit
                assert spare + needed > length, f"{needed} bytes fit at {start + spare}"
            longest = max(length for _, length in self.gaps())
            assert (error.needed_bytes, error.available_bytes) == (needed, longest)
            assert "test area" in str(error)
            assert str(needed) in str(error)
            assert str(longest) in str(error)
            return multiple()
        assert offset % unit == 0
        self.taken[offset] = needed
        return offset

    @rule(offset=consumes(offsets))
    def free(self, offset: int) -> None:
        self.allocator.free(offset)
        del self.taken[offset]

    @rule(offset=st.integers(-200, 1 << 17))
    def free_what_is_not_there(self, offset: int) -> None:
        if offset not in self.taken:
            with pytest.raises(UsageError, match=str(offset)):
                self.allocator.free(offset)

    @precondition(lambda self: not self.taken)
    @rule()
    def all_of_it_is_free_in_one_piece(self) -> None:
        if self.end > self.start:
            assert self.allocator.alloc(self.end - self.start, 1) == self.start
            self.allocator.free(self.start)

    @invariant()
    def blocks_are_apart_and_inside(self) -> None:
        at = self.start
        for offset, n_bytes in sorted(self.taken.items()):
            assert offset >= at
            at = offset + n_bytes
        assert at <= self.end

    def teardown(self) -> None:
        for offset in list(self.taken):
            self.allocator.free(offset)
        self.taken.clear()
        self.all_of_it_is_free_in_one_piece()


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40)


def test_ranks_that_make_the_same_calls_get_the_same_offsets() -> None:
    def calls() -> list[int]:
        allocator = SymmetricAllocator("area", 0, 1 << 16)
        offsets = [allocator.alloc(n) for n in (5, 1000, 128, 0, 4096)]
        allocator.free(offsets[1])
        allocator.free(offsets[3])
        return [*offsets, allocator.alloc(900), allocator.alloc(200), allocator.alloc(100)]

    assert calls() == calls()
