"""How rows get from rank to rank: the strategies behind `ExpertParallel`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import EventMismatch, FabricError
from ..kernels import moe_routing as kernels
from ..layout.moe import EPOCH_MASK
from .buffers import address_of
from .core import Core
from .dispatched import Dispatched, Outputs, Routing
from .moe_input import bad_choice
from .moe_shape import KernelState, MoeShape
from .steps import Steps

if TYPE_CHECKING:
    from .moe import ExpertParallel


def overlap(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Do two C-contiguous arrays have memory in common?"""
    first, second = address_of(a), address_of(b)
    return first < second + b.nbytes and second < first + a.nbytes


class MoeProtocol(ABC):
    """One way to dispatch and combine. An object of it belongs to one ExpertParallel object, which checks arguments.

    A protocol is made on all ranks together, and takes memory only as far as an operation needs it. What it raises
    before it calls `steps.begin` leaves everything as it was.

    Args:
        core: of this rank.
        shape: of the ExpertParallel object.

    Attributes:
        state_address: of what kernels need to know, for `kernels.moe`.
    """

    #: Its name, for `ExpertParallel(protocol=...)`.
    name: ClassVar[str]
    #: Has it quick operations, `quick_dispatch` and `quick_combine`?
    is_quick: ClassVar[bool] = False
    #: Is a quick operation under way, so that what breaks it off leaves it half done?
    is_under_way: bool = False

    def __init__(self, core: Core, shape: MoeShape) -> None:
        self._core = core
        self._shape = shape
        self._own_segment = int(core.fabric.segments[core.rank])
        self._segment_bytes = core.fabric.segment_bytes
        self._state = KernelState(core, shape)
        self.state_address = self._state.address
        self._dispatches = 0
        self._combines = 0

    @abstractmethod
    def dispatch(self, steps: Steps, x: npt.NDArray[Any], routing: Routing, outputs: Outputs) -> Dispatched:
        """Send the tokens by a routing, and bring those for the own experts.

        Args:
            steps: told of each step.
            x: [tokens, hidden], C-contiguous.
            routing: filled with what goes where, and what comes, unless it repeats another dispatch.
            outputs: memory for the result.

        Raises:
            UsageError: a choice is no expert.
        """

    @abstractmethod
    def combine(
        self,
        steps: Steps,
        expert_out: npt.NDArray[Any],
        routing: Routing,
        weights: npt.NDArray[np.float32] | None,
        shared_out: npt.NDArray[Any] | None,
        y: npt.NDArray[Any],
    ) -> None:
        """Return the rows of a dispatch, and sum those that come back.

        Args:
            steps: told of each step.
            expert_out: [rows, hidden], C-contiguous.
            routing: of the dispatch.
            weights: float32 [tokens, top_k]; None for weights of 1.
            shared_out: [tokens, hidden], added last; or None.
            y: [tokens, hidden], the result.
        """

    def quick_dispatch(self, owner: ExpertParallel, x: Any, topk_idx: Any, gates: Any) -> Dispatched | None:
        """A new dispatch whose arguments are checked on the way; None if it was not made, since they are unusual."""
        return None

    def quick_combine(self, expert_out: Any, routing: Routing, weights: Any, y: npt.NDArray[Any]) -> bool:
        """A combine whose arguments are checked on the way; False if it was not made, since they are unusual."""
        return False

    def empty_outputs(self, rows: int) -> npt.NDArray[Any] | None:
        """Memory for the outputs of experts, [rows, hidden], if any is better than private one; else None.

        Raises:
            CapacityError: there is no memory.
        """
        return None

    def _route(self, routing: Routing) -> None:
        """Find out which rows go where, if the routing is new.

        Raises:
            UsageError: a choice is no expert.
        """
        if routing.idx is None:
            return
        router = kernels.route_dedup if self._shape.is_dedup else kernels.route
        rows = router.call(self.state_address, routing.address, address_of(routing.idx))
        if rows < 0:
            raise bad_choice(routing.idx, -1 - rows, self._shape.num_experts)

    @abstractmethod
    def free(self) -> None:
        """Give all memory back; collective."""

    def _can_be_read_in_place(self, expert_out: npt.NDArray[Any], y: npt.NDArray[Any]) -> bool:
        """May peers read it where it is: whole in the own segment, and not where the result goes?"""
        address, n_bytes = address_of(expert_out), expert_out.nbytes
        if not 0 <= address - self._own_segment <= self._segment_bytes - n_bytes or address % expert_out.itemsize:
            return False
        return not overlap(expert_out, y)

    def _bad_source(self, routing: Routing, peer: int, tag: int) -> Exception:
        """The error for a peer whose announcement does not fit, `tag` being the dispatch by whose routing it sends."""
        if tag == routing.root & EPOCH_MASK:
            return FabricError(
                f"rank {self._core.rank}: the counts of rank {peer} in dispatch {routing.epoch} contradict its field",
                rank=self._core.rank, peer=peer,
            )  # fmt: skip
        ours, theirs = (
            "makes a new routing" if root == routing.epoch & EPOCH_MASK else f"repeats dispatch {root}"
            for root in (routing.root & EPOCH_MASK, tag)
        )
        return EventMismatch(
            f"rank {self._core.rank} {ours} in dispatch {routing.epoch}, but rank {peer} {theirs}",
            operation="dispatch", event_id=routing.root, peer_event_id=tag, rank=self._core.rank, peer=peer,
        )  # fmt: skip

    def _other_dispatch(self, routing: Routing, peer: int, theirs: int) -> EventMismatch:
        """The error for a peer that combines another dispatch."""
        return EventMismatch(
            f"rank {self._core.rank} combines dispatch {routing.epoch}, but rank {peer} combines "
            f"{'another one' if theirs == routing.epoch else f'dispatch {theirs}'}",
            operation="combine", event_id=routing.epoch, peer_event_id=theirs, rank=self._core.rank, peer=peer,
        )  # fmt: skip
