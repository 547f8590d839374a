"""What a dispatch leaves with the caller: the rows, and where each of them came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError, UsageError
from ..layout import moe as layout
from ..layout.moe import INDEX_DTYPE, ROUTING_WORDS, SOURCE_DTYPE
from .buffers import BufferPool, address_of, require_array, writable

if TYPE_CHECKING:
    from .moe import ExpertParallel
    from .moe_shape import MoeShape
    from .slots import Slots

_HEAD_WORDS = ROUTING_WORDS


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What a dispatch that repeats another one brings again without being told."""

    counts: npt.NDArray[np.int64]
    source: npt.NDArray[np.void]
    index: npt.NDArray[np.void] | None
    weights: npt.NDArray[np.float32] | None


class RoutingShape(NamedTuple):
    """What routing records of one size have in common.

    Attributes:
        words: of the record with its arrays.
        head: the record, addresses from the record's start.
        is_address: 1 where the record has one, else 0.
    """

    words: int
    head: npt.NDArray[np.int64]
    is_address: npt.NDArray[np.int64]


@lru_cache(maxsize=256)
def routing_shape(
    tokens: int, top_k: int, experts: int, local_experts: int, ranks: int, destinations: int, dedup: bool
) -> RoutingShape:
    """What routing records of these dimensions are like; see `Routing`. What depends on tokens comes last.

    The direct protocol has no use for RT_AT, and allocates nothing behind RT_ROW_OF.
    """
    runs = ranks * local_experts
    sizes = {
        layout.RT_SENT_FIRST: experts + 1,
        layout.RT_SENT_ROWS: destinations + 1,
        layout.RT_ENTRY_COUNTS: runs,
        layout.RT_ENTRY_FIRST: runs,
        layout.RT_ARRIVING: destinations,
        layout.RT_GOT_COUNTS: ranks if dedup else 0,
        layout.RT_GOT_FIRST: ranks if dedup else 0,
        layout.RT_COUNTS: local_experts,
        layout.RT_ROW_OF: tokens * top_k,
        layout.RT_AT: tokens * top_k,
    }
    head, is_address = np.zeros(_HEAD_WORDS, np.int64), np.zeros(_HEAD_WORDS, np.int64)
    words = _HEAD_WORDS
    for offset, size in sizes.items():
        head[offset // 8] = 8 * words
        is_address[offset // 8] = 1
        words += size
    if not dedup:
        head[layout.RT_GOT_COUNTS // 8] = head[layout.RT_ENTRY_COUNTS // 8]
        head[layout.RT_GOT_FIRST // 8] = head[layout.RT_ENTRY_FIRST // 8]
    head[layout.RT_TOKENS // 8] = tokens
    head[layout.RT_GROUPS // 8] = 1 if dedup else local_experts
    return RoutingShape(words, head, is_address)


class Routing:
    """Where each row of one dispatch went and came from: what combine needs to find it again.

    Args:
        tokens: that this rank sends.
        top_k: slots of a token.
        experts: in all.
        local_experts: of this rank.
        ranks: that send rows to this one.
        destinations: ranks that hold experts; `ranks` if None.
        dedup: are rows deduplicated?

    Attributes:
        address: of the record.
        tokens: that this rank sends.
        known: what the dispatch that this one repeats has brought besides tokens; None if it repeats none.
        idx: experts of each token, int64 [tokens, top_k], until they are sent; None if it repeats another one.
        gates: with deduplicated rows, their weights, float32 [tokens, top_k], until they are sent.
    """

    __slots__ = ("_arrays", "_destinations", "_head", "_places", "_start", "address", "gates", "idx", "known", "tokens")

    def __init__(
        self,
        tokens: int,
        top_k: int,
        experts: int,
        local_experts: int,
        ranks: int,
        *,
        destinations: int | None = None,
        dedup: bool = False,
    ) -> None:
        shape = routing_shape(
            tokens, top_k, experts, local_experts, ranks, ranks if destinations is None else destinations, dedup
        )
        self._arrays = np.zeros(shape.words, np.int64)
        self._start: int = address_of(self._arrays)
        self.address = self._start
        self._head = self._arrays[:_HEAD_WORDS]
        np.multiply(shape.is_address, self._start, out=self._head)
        self._head += shape.head
        self._places: npt.NDArray[np.int64] | None = None
        self.tokens = tokens
        self._destinations = ranks if destinations is None else destinations
        self.known: Known | None = None
        self.idx: npt.NDArray[np.int64] | None = None
        self.gates: npt.NDArray[np.float32] | None = None

    @classmethod
    def filled(cls, words: npt.NDArray[np.int64], tokens: int, destinations: int) -> Routing:
        """The routing of a new dispatch, from a record with its arrays that a kernel has filled."""
        routing = cls.__new__(cls)
        routing._arrays = routing._head = words
        routing._start = routing.address = address_of(words)
        routing._places = routing.known = routing.idx = routing.gates = None
        routing.tokens, routing._destinations = tokens, destinations
        return routing

    @classmethod
    def again(cls, handle: Dispatched) -> Routing:
        """The routing of a dispatch that repeats another one: the same arrays, an epoch of its own."""
        first = handle.routing
        routing = cls.__new__(cls)
        routing._arrays, routing._start, routing._places = first._arrays, first._start, first._places
        routing._head = first._head[:_HEAD_WORDS].copy()
        routing.address = address_of(routing._head)
        routing.tokens, routing._destinations = first.tokens, first._destinations
        routing.known = Known(handle.counts, handle.source, handle.index, handle.weights)
        routing.idx = routing.gates = None
        return routing

    @property
    def record(self) -> npt.NDArray[np.int64]:
        """The record, and perhaps more behind it."""
        return self._head

    @property
    def epoch(self) -> int:
        """Epoch of the dispatch."""
        return int(self._head[layout.RT_EPOCH // 8])

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._head[layout.RT_EPOCH // 8] = value
        if self.known is None:
            self._head[layout.RT_ROOT // 8] = value

    @property
    def root(self) -> int:
        """Epoch of the dispatch that made this routing."""
        return int(self._head[layout.RT_ROOT // 8])

    @property
    def sent(self) -> int:
        """Rows that this rank sends."""
        return int(self.part(layout.RT_SENT_ROWS, self._destinations + 1)[-1])

    @property
    def groups(self) -> int:
        """Runs of rows of each source: the local experts, or 1 if rows are deduplicated."""
        return int(self._head[layout.RT_GROUPS // 8])

    @property
    def rows(self) -> int:
        """Rows that have come."""
        return int(self._head[layout.RT_ROWS // 8])

    @property
    def entries(self) -> int:
        """Entries that have come."""
        return int(self._head[layout.RT_ENTRIES // 8])

    def make_places(self) -> None:
        """Memory for the place at its origin of each row that has come."""
        self._places = np.empty(self.rows, np.int64)
        self._head[layout.RT_PLACES // 8] = address_of(self._places)

    def part(self, offset: int, size: int) -> npt.NDArray[np.int64]:
        """The first `size` words of the array whose address the record has at `offset`."""
        start = (int(self._head[offset // 8]) - self._start) // 8
        return self._arrays[start : start + size]


@dataclass(slots=True, eq=False)
class Dispatched:
    """What a rank got from a dispatch.

    Expanded rows are grouped by local expert, within an expert by (source rank, token, slot). Deduplicated rows, one
    for each token and rank, are ordered by (source rank, token); `index` then says which expert is to work on which
    row, in the order of expanded rows: `tokens[index["row"]]` are those.

    Attributes:
        tokens: [n, hidden], int8 or the dtype of the ExpertParallel object.
        scales: float32 [n], or None without quantisation; a token's values are `tokens * scales[:, None]`.
        counts: int64 [local experts], rows of each; with deduplicated rows, entries of the index.
        source: structured [n] with fields rank, token, slot: where each row comes from; with deduplicated rows, the
            first slot that has an expert here.
        routing: for combine.
        owner: the ExpertParallel object it belongs to.
        index: structured [m] with fields row, expert, slot, if rows are deduplicated, else None.
        weights: float32 [m], the gate weight of each entry of the index, or None.
    """

    tokens: npt.NDArray[Any]
    scales: npt.NDArray[np.float32] | None
    counts: npt.NDArray[np.int64]
    source: npt.NDArray[np.void]
    routing: Routing
    owner: ExpertParallel
    index: npt.NDArray[np.void] | None = None
    weights: npt.NDArray[np.float32] | None = None
    #: Where arrays lie that nobody has asked for yet: slots, one of them, and its memory, which is held by this.
    _place: tuple[Slots, int, npt.NDArray[np.uint8]] | None = field(default=None, repr=False)

    @classmethod
    def unread(
        cls, routing: Routing, owner: ExpertParallel, place: tuple[Slots, int, npt.NDArray[np.uint8]]
    ) -> Dispatched:
        """What a new dispatch has brought to a slot; each of its arrays is made when one is asked for."""
        result = cls.__new__(cls)
        result.routing, result.owner, result._place = routing, owner, place
        return result

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            """Called for what is not set: the arrays, of an unread result."""
            place = None if name == "_place" else self._place
            if place is None or name not in self.__slots__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            slots, slot, _ = place
            if name in ("tokens", "scales"):
                self.tokens, self.scales = slots.rows(slot, self.routing)
            elif name == "counts":
                self.counts = slots.counts(self.routing)
            else:
                self.source, self.index, self.weights = slots.origins(slot, self.routing)
            return object.__getattribute__(self, name)


class Outputs:
    """Memory for the rows that a dispatch brings: the caller's if it gave some, or the pool's.

    Args:
        owner: the ExpertParallel object.
        shape: of it.
        pool: of results.
        out: tokens [capacity, hidden], or a pair of them and float32 scales [capacity]; or None.

    Attributes:
        owner: the ExpertParallel object.
        problem: that the caller's memory was too small, once that is known.

    Raises:
        UsageError: `out` has a wrong dtype or shape, or cannot be written into.
    """

    def __init__(self, owner: ExpertParallel, shape: MoeShape, pool: BufferPool, out: object) -> None:
        self.owner = owner
        self._shape = shape
        self._pool = pool
        self._tokens: npt.NDArray[Any] | None = None
        self._scales: npt.NDArray[np.float32] | None = None
        self.problem: CapacityError | None = None
        if out is not None:
            self._take_from(out)

    def _take_from(self, out: object) -> None:
        shape = self._shape
        tokens, scales = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
        tokens = writable(require_array(tokens, "out"), "out")
        if tokens.dtype != shape.token_dtype or tokens.ndim != 2 or tokens.shape[1] != shape.hidden:
            raise UsageError(
                f"out must be {shape.token_dtype} [rows, {shape.hidden}], got {tokens.dtype} {tokens.shape}",
                value=tokens.shape, bound=shape.hidden,
            )  # fmt: skip
        if scales is not None:
            scales = writable(require_array(scales, "out[1]"), "out[1]")
            if not shape.is_int8:
                raise UsageError("out has scales, but without quantisation there are none", value="scales")
            if scales.dtype != np.float32 or scales.shape != tokens.shape[:1]:
                raise UsageError(
                    f"out[1] must be float32 ({len(tokens)},), got {scales.dtype} {scales.shape}",
                    value=scales.shape, bound=len(tokens),
                )  # fmt: skip
        self._tokens, self._scales = tokens, scales

    @property
    def are_given(self) -> bool:
        """Has the caller given memory?"""
        return self._tokens is not None

    def require(self, rows: int) -> None:
        """Before anything is sent: is there room for so many rows?

        Raises:
            CapacityError: `out` is too small.
        """
        if self._tokens is not None and len(self._tokens) < rows:
            raise self._too_small(self._tokens, rows)

    def make(self, routing: Routing, counts: npt.NDArray[np.int64] | None = None) -> Dispatched:
        """The result of a dispatch, to be filled: all of it, or tokens and scales if the rest is known.

        Args:
            routing: of the dispatch, with the numbers of rows and entries.
            counts: entries of each local expert.
        """
        tokens, scales = self._rows(routing.rows)
        source = index = weights = None
        if routing.known is None:
            source = np.empty(routing.rows, SOURCE_DTYPE)
            if self._shape.is_dedup:
                index, weights = np.empty(routing.entries, INDEX_DTYPE), np.empty(routing.entries, np.float32)
        return self.wrap(routing, tokens, scales, counts, source, index, weights)

    def wrap(
        self,
        routing: Routing,
        tokens: npt.NDArray[Any],
        scales: npt.NDArray[np.float32] | None,
        counts: npt.NDArray[np.int64] | None,
        source: npt.NDArray[np.void] | None,
        index: npt.NDArray[np.void] | None,
        weights: npt.NDArray[np.float32] | None,
    ) -> Dispatched:
        """The result with these parts; all but tokens and scales are of no account if they are known."""
        known = routing.known
        if known is not None:
            return Dispatched(
                tokens, scales, known.counts, known.source, routing, self.owner, known.index, known.weights
            )
        assert counts is not None
        assert source is not None
        return Dispatched(tokens, scales, counts, source, routing, self.owner, index, weights)

    def _rows(self, n: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
        """Tokens [n, hidden] and scales [n]; the pool's if the caller's have no room, with `problem` set."""
        tokens, scales = self._tokens, self._scales
        if tokens is not None and len(tokens) < n:
            self.problem = self._too_small(tokens, n)
            tokens = scales = None
        shape = self._shape
        tokens = self._pool.take((n, shape.hidden), shape.token_dtype) if tokens is None else tokens[:n]
        if shape.is_int8:
            scales = np.empty(n, np.float32) if scales is None else scales[:n]
        return tokens, scales

    def _too_small(self, tokens: npt.NDArray[Any], rows: int) -> CapacityError:
        row_bytes = self._shape.row_bytes
        return CapacityError(
            f"out has {len(tokens)} rows, {rows} have come: it must have at least {rows}",
            needed_bytes=rows * row_bytes, available_bytes=len(tokens) * row_bytes, value=len(tokens), bound=rows,
        )  # fmt: skip
