"""The global memory of a group: some ranks of a session, numbered anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ..layout.segment import Geometry
from .base import Fabric


@dataclass(frozen=True)
class GroupGeometry(Geometry):
    """Where a group's send/receive lies: in blocks of its own, at the same offsets in the segments of all members.

    Attributes:
        fields_at: start of the point-to-point fields, of each member.
        rings_at: start of the rings.
    """

    fields_at: int = 0
    rings_at: int = 0

    @classmethod
    def of(cls, world: Geometry, ranks: int, fields_at: int = 0, rings_at: int = 0) -> GroupGeometry:
        """For a group of `ranks` members in a session with that geometry."""
        sizes = {field.name: getattr(world, field.name) for field in fields(Geometry)}
        return cls(**(sizes | {"ranks": ranks, "fields_at": fields_at, "rings_at": rings_at}))

    @property
    def metadata_offset(self) -> int:
        """Start of the point-to-point fields."""
        return self.fields_at

    @property
    def managed_offset(self) -> int:
        """Start of the rings."""
        return self.rings_at


class GroupFabric(Fabric):
    """A rank's view of the segments of its group.

    Args:
        world: the view of all segments.
        members: ranks of the session, in the order of their numbers in the group; this rank among them.
    """

    def __init__(self, world: Fabric, members: Sequence[int]) -> None:
        super().__init__(list(members).index(world.rank), GroupGeometry.of(world.geometry, len(members)))
        self.world = world
        self.members = tuple(members)
        self.segments = world.segments[list(members)]
        self.controls = world.controls[list(members)]
        self.processes = world.processes[list(members)]
        self.reached = world.reached
        self.name = world.name  # type: ignore[misc]

    @property
    def segment_bytes(self) -> int:
        """Size of a segment, whatever of it is the group's."""
        return self.world.segment_bytes

    def place_point_to_point(self, fields_at: int, rings_at: int) -> None:
        """Say where the group's fields and rings are."""
        self.geometry = GroupGeometry.of(self.world.geometry, len(self.members), fields_at, rings_at)

    def view(self, rank: int, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes of a member's segment."""
        return self.world.view(self.members[rank], offset, n_bytes)

    def commit(self, rank: int, offset: int, n_bytes: int) -> None:
        """Back a part of a member's segment with memory."""
        self.world.commit(self.members[rank], offset, n_bytes)

    def release(self, offset: int, n_bytes: int) -> None:
        """Give the memory behind a part of the own segment back."""
        self.world.release(offset, n_bytes)

    def private_reach(self, peer: int) -> tuple[int, int]:
        """How the private memory of a member is reached."""
        return self.world.private_reach(self.members[peer])

    def keep(self, array: npt.NDArray[Any]) -> None:
        """An operation was given up while members may still read this array."""
        self.world.keep(array)

    def dead_peers(self) -> list[tuple[int, str]]:
        """Members that have ended without leaving the session."""
        number = {rank: i for i, rank in enumerate(self.members)}
        return [(number[rank], reason) for rank, reason in self.world.dead_peers() if rank in number]

    def check_peers(self) -> None:
        """Abort the session if any of its ranks has died."""
        self.world.check_peers()

    def abort(self, kind: int, culprit: int, last_words: str = "") -> None:
        """End the session, for all of its ranks; `culprit` is a member."""
        self.world.abort(kind, self.members[culprit], last_words)

    def leave(self) -> None:
        """A group is not left: the session is."""

    def close(self) -> None:
        """The session's view goes with the session."""
