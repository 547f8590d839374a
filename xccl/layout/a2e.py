"""Layouts of A2E and E2A (XDS §3.3), and the private state of their dies.

Fields are those of expert parallelism (`xccl.layout.moe`), one for each peer, written by that peer alone. `event`,
`first_row` and `count` announce what goes from the writer to the owner, and `pulled` confirms what the writer has
pulled from the owner. Attention dies own a run of fields, expert dies three:

    at an attention die    [expert dies], written by expert dies
    at an expert die       [attention dies], written by attention dies, all domains
                           [trampolines], written by trampolines: they forward to it, and collect its outputs
                           [expert dies], written by expert dies, if it is a trampoline itself

Own managed area of one Disaggregated object, the same offsets at every rank. A block holds the rows of one attention
die; an attention die has one, and a trampoline one for each attention die of a domain that it serves.

    +--------------------------+ firsts
    | firsts                   |  int32 [blocks][experts + 1]: first row of each expert, and the end
    +--------------------------+ places
    | places                   |  int32 [blocks * rows][2]: token and slot of each row
    +--------------------------+ scales
    | scales                   |  float32 [blocks * rows], INT8 only
    +--------------------------+ rows
    | rows                     |  [blocks * rows][row bytes], blocks packed; within one by expert, token, slot
    +--------------------------+ returns
    | outputs of an expert die |  [attention dies * rows][hidden * item size], by holder, then origin, in its order
    +--------------------------+ handed
    | outputs at a trampoline  |  [blocks * rows][hidden * item size], by origin, in its order
    +--------------------------+

Here rows is max_tokens * slots, the most that an attention die can send; memory is taken only where rows come to lie.
"""

from __future__ import annotations

from dataclasses import dataclass

from .moe import EXPERT_FIELD_BYTES
from .record import HOT_LINE_BYTES, Record, align_up

PEER = Record(
    "peer",
    "Private to a rank: one entry of a table of peers, for kernels. Addresses are 0 for the rank itself, which has no "
    "field of its own.",
)
PEER_MINE = PEER.add("mine", 8, "address of the field that this rank writes at the peer")
PEER_THEIRS = PEER.add("theirs", 8, "address of the field that the peer writes here")
PEER_CONTROL = PEER.add("control", 8, "address of the peer's control area")
PEER_SEGMENT = PEER.add("segment", 8, "address of the peer's segment")
PEER_BYTES = PEER.size_bytes

DIE = Record("expert die state", "Private to an expert die; what kernels need to know of a Disaggregated object.")
DIE_SEGMENT = DIE.add("segment", 8, "address of the own segment")
DIE_ATTENTION = DIE.add("attention", 8, "attention dies of a domain")
DIE_HOLDERS = DIE.add("holders", 8, "dies that hold their rows: attention die a's are at holder a % holders")
DIE_EXPERTS = DIE.add("experts", 8, "number of experts, shared replicas included")
DIE_LOCAL_EXPERTS = DIE.add("local_experts", 8, "experts of one die")
DIE_FIRST_EXPERT = DIE.add("first_expert", 8, "the first of the own ones")
DIE_QUANT = DIE.add("quant", 8, "1 if rows are sent as INT8 with a scale, else 0")
DIE_ROW_BYTES = DIE.add("row_bytes", 8, "bytes of a row sent")
DIE_RETURN_BYTES = DIE.add("return_bytes", 8, "bytes of a row returned")
DIE_FIRSTS = DIE.add("firsts", 8, "offset in every segment")
DIE_PLACES = DIE.add("places", 8, "offset in every segment")
DIE_SCALES = DIE.add("scales", 8, "offset in every segment")
DIE_ROWS = DIE.add("rows", 8, "offset in every segment")
DIE_RETURNS = DIE.add("returns", 8, "offset in every segment")
DIE_HANDED = DIE.add("handed", 8, "offset in every segment")


@dataclass(frozen=True)
class Fields:
    """Where fields lie, from the start of those of one Disaggregated object.

    Attributes:
        attention: attention dies of all domains.
        experts: expert dies.
        trampolines: those of them that forward.
    """

    attention: int
    experts: int
    trampolines: int

    def by_expert(self, die: int) -> int:
        """At an attention die, the field that this expert die writes."""
        return die * EXPERT_FIELD_BYTES

    def by_attention(self, die: int) -> int:
        """At an expert die, the field that this attention die writes; counted over all domains."""
        return die * EXPERT_FIELD_BYTES

    def by_trampoline(self, die: int) -> int:
        """At an expert die, the field that this trampoline writes."""
        return (self.attention + die) * EXPERT_FIELD_BYTES

    def at_trampoline(self, die: int) -> int:
        """At a trampoline, the field that this expert die writes."""
        return (self.attention + self.trampolines + die) * EXPERT_FIELD_BYTES

    def bytes_at(self, *, expert: bool) -> int:
        """Bytes of the fields that a die owns."""
        count = self.attention + self.trampolines + self.experts if expert else self.experts
        return count * EXPERT_FIELD_BYTES


@dataclass(frozen=True)
class Area:
    """Offsets of the parts of the managed block of one Disaggregated object, from the block's start."""

    firsts: int
    places: int
    scales: int
    rows: int
    returns: int
    handed: int
    total_bytes: int


def area(*, attention: int, blocks: int, experts: int, rows: int, row_bytes: int, return_bytes: int) -> Area:
    """Where the parts of the managed block lie, sized for the worst case.

    Args:
        attention: attention dies of a domain.
        blocks: attention dies of a domain that a trampoline serves at most; 1 if there are none.
        experts: number of experts, shared replicas included.
        rows: the most that one attention die sends.
        row_bytes: of a row sent.
        return_bytes: of a row returned.
    """
    at = 0
    offsets: list[int] = []
    for part_bytes in (
        4 * blocks * (experts + 1), 8 * blocks * rows, 4 * blocks * rows, blocks * rows * row_bytes,
        attention * rows * return_bytes, blocks * rows * return_bytes,
    ):  # fmt: skip
        offsets.append(at)
        at = align_up(at + part_bytes, HOT_LINE_BYTES)
    firsts, places, scales, first_row, returns, handed = offsets
    return Area(firsts, places, scales, first_row, returns, handed, total_bytes=at)
