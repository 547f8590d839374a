"""Groups: communicators over some of the ranks of a session.

Rules
- A group is made by its members alone, all of which name the same ranks in the same order. A rank may be in any number
  of groups. Two ranks make the groups that they have in common in the same order.
- A group has words of its own for everything in which ranks could be taken for those of another group: communicator
  blocks (steps of collectives, barriers), fields and rings of send/receive, and whatever it allocates. So operations of
  different groups never mix, whatever is under way in each.
- What the ranks of a communicator allocate lies at the same offset in all their segments, also in a group: where their
  allocators have diverged, they look for an offset that is free in all of them (`symmetric.reserve`).

How it begins. The members share nothing yet, so each pair exchanges invitations, at a place that every pair has: the
digest of the list, and where the sender's communicator block is. An invitation has a number: how many groups these two
have made, so there is nothing to mix up with other groups that are being made. It lies in one of two places, in turn: a
rank writes number k + 2 after it has seen the other's number k + 1, and that was written after number k was read. With
the blocks known, the members have collectives, and agree by these on everything else.

How it ends. All members agree to free the group, then each gives back what the group has allocated, and after a barrier
its own block: by then no other member reads or writes there.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError, PeerDied, UsageError, WaitTimeout
from ..fabric import GroupFabric
from ..kernels import groups as kernels, words
from ..layout import collectives as layout
from ..layout.collectives import INVITATION_BYTES, block_bytes
from ..layout.segment import PAGE_BYTES
from .buffers import require_int
from .core import Core, Waiting
from .exchange import Exchange
from .p2p import PointToPoint
from .symmetric import Block, SymmetricAllocator, give_back, reserve

if TYPE_CHECKING:
    from collections.abc import Callable

    from .communicator import Communicator


_Named = TypeVar("_Named", WaitTimeout, PeerDied)


class GroupCore(Core):
    """Waits and agreements of one rank of a group. Ranks are numbered as in the group; errors say both numbers.

    Args:
        world: waits of this rank in the session.
        fabric: the group's memory.
        op_timeout_s: default deadline of a wait, in seconds.
    """

    def __init__(self, world: Core, fabric: GroupFabric, op_timeout_s: float) -> None:
        self._world = world
        super().__init__(fabric, op_timeout_s)
        self.members = fabric.members
        self.board = world.board.of_group(fabric.members)
        world.dependants.add(self.calls)

    @property
    def progress(self) -> Callable[[], object] | None:
        """Drives the requests of this rank, in whatever communicator; None while there are none."""
        return self._world.progress

    def require_open(self) -> None:
        """Raise UsageError if the group was freed, or this rank has left its session."""
        self._world.require_open()
        if self.closed:
            raise UsageError(f"rank {self.rank}: this group was freed", value="freed")
        super().require_open()

    def check_session(self, describe: Callable[[], Waiting]) -> None:
        """Raise PeerDied or SessionAborted if the session is over; with ranks of the session."""
        self._world.check_session(describe)

    def fail(self, error: BaseException) -> None:
        """Tell all ranks of the session that this one has failed."""
        self._world.fail(error)

    def timed_out(self, waiting: Waiting, timeout_s: float) -> WaitTimeout:
        """The error for a wait that reached its deadline."""
        return self._explained(super().timed_out(waiting, timeout_s))

    def left(self, waiting: Waiting) -> PeerDied:
        """The error for a wait for a rank that has left."""
        return self._explained(super().left(waiting))

    def _explained(self, error: _Named) -> _Named:
        """The error, with the session's numbers of the ranks that it names."""
        named = [rank for rank in (error.rank, error.peer) if rank is not None]
        numbers = ", ".join(f"rank {rank} is rank {self.members[rank]} of the session" for rank in named)
        numbers_of = {"world_rank": self.members[self.rank]}
        if error.peer is not None:
            numbers_of["world_peer"] = self.members[error.peer]
        return type(error)(f"{error} [in a group of {self.size}: {numbers}]", **error.details, **numbers_of)


def checked_members(comm: Communicator, ranks: Any) -> list[int]:
    """The members of a group, as ranks of the session.

    Raises:
        UsageError: they are not different ranks of `comm`, or this rank is not among them.
    """
    if not isinstance(ranks, Iterable):
        raise UsageError(f"the ranks of a group must be a sequence, got {ranks!r}", value=repr(ranks))
    found = [require_int(rank, "a rank of the group", 0, comm.size - 1) for rank in ranks]
    if len(set(found)) != len(found):
        twice = next(rank for rank in found if found.count(rank) > 1)
        raise UsageError(f"rank {twice} is in the group more than once: {_shown(found)}", value=twice)
    if comm.rank not in found:
        raise UsageError(
            f"rank {comm.rank} is not in the group {_shown(found)}: its members alone make it", value=comm.rank
        )
    return [comm.world_ranks[rank] for rank in found]


def members_of_color(seen: npt.NDArray[np.int64], color: int) -> list[int]:
    """Ranks with that color, ordered by key and rank, from the colors and keys of all, [ranks, 2]."""
    mine = np.flatnonzero(seen[:, 0] == color)
    order: list[int] = mine[np.argsort(seen[mine, 1], kind="stable")].tolist()
    return order


class Invitations:
    """Where the pairs of a session exchange the first words of their groups.

    Args:
        core: of the session.
        metadata: where the invitations, and the blocks of groups, are allocated.
    """

    def __init__(self, core: Core, metadata: SymmetricAllocator) -> None:
        self._core = core
        self._metadata = metadata
        self._offset = metadata.alloc(2 * core.size * INVITATION_BYTES)
        #: Groups made with each rank; none is counted before the first group.
        self._made: npt.NDArray[np.int64] | None = None

    def make_block(self, fabric: GroupFabric) -> npt.NDArray[np.int64]:
        """Allocate this rank's communicator block of a new group; addresses of those of all members.

        Raises:
            UsageError: the members name different groups.
            CapacityError: a member has no room.
            WaitTimeout, PeerDied, SessionAborted: see `xccl.errors`.
        """
        core = self._core
        n_bytes = block_bytes(fabric.ranks)
        offset, failure = -1, None
        try:
            offset = self._metadata.alloc(n_bytes, PAGE_BYTES)
            core.fabric.commit(core.rank, offset, n_bytes)
        except CapacityError as error:
            failure = error
        try:
            said = self._exchange(fabric, -1 if failure is not None else offset)
            if failure is not None:
                raise failure
            full = np.flatnonzero(said < 0)
            if full.size:
                peer = fabric.members[full[0]]
                raise CapacityError(f"group: rank {peer} of the session has no room for it", peer=peer)
        except BaseException:
            if offset >= 0:
                give_back(core, self._metadata, offset)
            raise
        core.blocks[offset] = self._metadata
        return fabric.segments + said

    def _exchange(self, fabric: GroupFabric, offset: int) -> npt.NDArray[np.int64]:
        """Tell all members where this rank's block is, or -1; what they say."""
        core, members = self._core, np.array(fabric.members, np.int64)
        digest = zlib.crc32(members.tobytes())
        if self._made is None:
            self._made = np.zeros(core.size, np.int64)
            core.fabric.commit(core.rank, self._offset, 2 * core.size * INVITATION_BYTES)
        others = np.flatnonzero(members != core.rank)
        peers = members[others]
        self._made[peers] += 1
        numbers = self._made[peers]
        for peer in peers.tolist():
            core.fabric.commit(peer, self._offset + 2 * core.rank * INVITATION_BYTES, 2 * INVITATION_BYTES)
        places = self._offset + (2 * core.rank + numbers % 2) * INVITATION_BYTES
        addresses = core.fabric.segments[peers] + places
        controls = core.fabric.controls[peers]
        kernels.invite.call(
            controls.ctypes.data, addresses.ctypes.data, numbers.ctypes.data, len(peers), digest, offset
        )
        addresses = core.fabric.segments[core.rank] + self._offset + (2 * peers + numbers % 2) * INVITATION_BYTES
        self._await(peers, addresses, numbers)
        said = np.full(len(members), offset, np.int64)
        for i, peer, address in zip(others.tolist(), peers.tolist(), addresses.tolist(), strict=True):
            if words.load(address + layout.IN_DIGEST) != digest:
                raise UsageError(
                    f"group: rank {core.rank} of the session makes one of {_shown(fabric.members)}, but rank {peer} "
                    f"makes another one; all members must name the same ranks in the same order",
                    value=fabric.members, peer=peer,
                )  # fmt: skip
            said[i] = words.load(address + layout.IN_BLOCK)
        return said

    def _await(
        self, peers: npt.NDArray[np.int64], addresses: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]
    ) -> None:
        cursor = np.zeros(1, np.int64)
        arguments = (
            self._core.control, addresses.ctypes.data, numbers.ctypes.data, len(peers), cursor.ctypes.data
        )  # fmt: skip

        def describe() -> Waiting:
            i = min(int(cursor[0]), len(peers) - 1)
            return Waiting("group", None, int(peers[i]), int(numbers[i]), number(i), missing=lambda: missing(i))

        def number(i: int) -> int:
            return int(words.load(int(addresses[i]) + layout.IN_NUMBER))

        def missing(first: int) -> list[int]:
            return [int(peers[i]) for i in range(first, len(peers)) if number(i) < numbers[i]]

        self._core.run(lambda until_ns: int(kernels.await_invited.call(*arguments, until_ns)), describe)


class GroupParts:
    """What one rank has of a group. Made by all members together.

    Attributes:
        fabric: the group's memory.
        core: its waits and agreements.
        blocks: int64 [size], addresses of the communicator blocks.
        exchange: its collectives.
        p2p: its channels.
    """

    def __init__(self, comm: Communicator, members: list[int]) -> None:
        self._world = comm.world.core
        self._metadata = comm.metadata_allocator
        self.fabric = GroupFabric(self._world.fabric, members)
        self.blocks = comm.invitations.make_block(self.fabric)
        self.core = GroupCore(self._world, self.fabric, comm.op_timeout_s)
        self.exchange = Exchange(self.core, comm.heap_allocator, self.blocks)
        self.core.exchange, self.core.refuse_exchange = self.exchange.tell_all, self.exchange.refuse
        geometry, size = self.fabric.geometry, len(members)
        try:
            # Whole pages, which read as 0 without being touched: a ring costs nothing until its pair talks.
            places = reserve(
                self.core, "group", {},
                Block(comm.metadata_allocator, size * geometry.fields_per_peer_bytes, 0, PAGE_BYTES),
                Block(comm.heap_allocator, size * geometry.ring_bytes, 0, PAGE_BYTES),
            )  # fmt: skip
        except CapacityError:
            self.give_back()
            raise
        self.fabric.place_point_to_point(*places)
        self.p2p = PointToPoint(self.core, comm.world._p2p)

    def give_back(self) -> None:
        """Give this rank's communicator block and staging area back; no other member uses them any more."""
        self.exchange.free()
        self.core.closed = True
        own = self.fabric.rank
        give_back(self._world, self._metadata, int(self.blocks[own] - self.fabric.segments[own]))


class Grouping:
    """How groups are made and freed, as methods of `Communicator`."""

    core: Core
    rank: int
    size: int
    _p2p: PointToPoint
    _exchange: Exchange
    _parts: GroupParts | None

    def group(self, ranks: Iterable[int]) -> Communicator:
        """A communicator over some ranks of this one; called by these ranks only, and by all of them.

        It has everything that this one has. Ranks in it are numbered from 0 in the given order; `world_ranks` says
        which ranks of the session they are. Groups may overlap, be made of groups, and have operations under way at
        once; a rank uses all its communicators from one thread. It is freed by `free`, or with the session.

        Args:
            ranks: different ranks of this communicator, this one among them; in the same order at all of them.

        Raises:
            UsageError: ranks are impossible; or, at those that see it, members name different groups.
            CapacityError: a member has no room for the group's words; at all of them.
            WaitTimeout, PeerDied, SessionAborted: see `xccl.errors`.
        """
        self.core.require_open()
        comm: Any = self
        group: Communicator = type(comm).of_group(comm, checked_members(comm, ranks))
        return group

    def stride(self, start: int, stride: int, size: int) -> Communicator:
        """The group of ranks start, start + stride, ...: a strided team; see `group`.

        Args:
            start: its first rank.
            stride: the distance of its ranks, 1 or more.
            size: how many ranks.
        """
        start = require_int(start, "start", 0, self.size - 1)
        stride = require_int(stride, "stride", 1, self.size)
        size = require_int(size, "size", 1, self.size)
        return self.group(range(start, start + stride * size, stride))

    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """A group of all ranks with the same color; called by all ranks of this communicator.

        Args:
            color: 0 or more; -1 or None for no group.
            key: ranks of a group are ordered by key, then by their rank in this communicator.

        Returns:
            The group of this rank, None without a color.

        Raises:
            UsageError: color or key is not an integer, or out of range; the other ranks hear of it.
            CapacityError, WaitTimeout, PeerDied, SessionAborted: as for `group`.
        """
        self.core.require_open()
        try:
            color = -1 if color is None else require_int(color, "color", -1, 1 << 62)
            key = require_int(key, "key", -(1 << 62), 1 << 62)
        except UsageError as error:
            self._exchange.refuse(error)
        seen = self.core.exchange("split", [color, key])
        return None if color < 0 else self.group(members_of_color(seen, color))

    if TYPE_CHECKING:

        def barrier(self, timeout_s: float | None = None) -> None:
            """`Communicator` has it."""

    def free(self) -> None:
        """Give everything back that this group has, and what was allocated in it. Collective among its members.

        Raises:
            UsageError: this is no group but the session's communicator (which is closed, not freed), the group was
                freed before, or sends or receives of it are under way.
            WaitTimeout, PeerDied, SessionAborted: see `xccl.errors`.
        """
        core, parts = self.core, self._parts
        if parts is None:
            raise UsageError("the communicator of a session is closed, not freed", value="session")
        core.require_open()
        try:
            self._p2p.require_idle()
        except UsageError as error:
            core.refuse(error)
        core.agree("free", {"offset": 0})
        self._p2p.retire()
        for offset, allocator in list(core.blocks.items()):
            give_back(core, allocator, offset)
        self.barrier()  # when it ends, nobody reads or writes this rank's block any more
        parts.give_back()


def _shown(ranks: Iterable[int]) -> str:
    listed = list(ranks)
    return f"{listed}" if len(listed) <= 16 else f"[{', '.join(map(str, listed[:16]))}, ...: {len(listed)} ranks]"
