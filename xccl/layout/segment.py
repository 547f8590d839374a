"""The segment of a rank: header, control area, and the three areas of XCCL (XDS section 3.1).

    +-----------------+ 0
    | header          |  who owns this, how large it is, is it ready
    +-----------------+ CONTROL_OFFSET
    | control area    |  doorbell, abort word, barrier
    +-----------------+ STATUS_OFFSET
    | status records  |  what the rank waits for, if it does so for long; for readers outside of the session
    +-----------------+ app_offset
    | app data area   |  the user's symmetric arrays and signals
    +-----------------+ metadata_offset
    | metadata area   |  32-byte fields: point to point (one pair a peer and lane), then those of expert parallelism
    +-----------------+ managed_offset
    | managed data    |  a ring a peer, then the blocks of expert parallelism
    +-----------------+ total_bytes

All ranks of a session have the same geometry, so an offset means the same in every segment. A segment reserves address
space for the worst case, and takes memory only for what is committed: rings cost nothing until their pair first talks.
A zeroed segment is a valid, empty one: every counter is an epoch that starts at 0 and never goes back.
"""

from __future__ import annotations

from dataclasses import dataclass

from .record import HOT_LINE_BYTES, Record, align_up
from .ring import ANSWER_BYTES, FIELD_BYTES, MAX_LANES, PUSHES_BYTES, REFUSAL_BYTES, SLOT_HEADER_BYTES
from .status import STATUS, STATUS_SLOTS

#: "XCCLSEG1" as a little-endian integer.
MAGIC = int.from_bytes(b"XCCLSEG1", "little")
#: Raised with every change of any layout.
LAYOUT_VERSION = 8
PAGE_BYTES = 4096

HEADER = Record("segment header", "Written once by the owner; `ready` is published last (SYNC POINT segment-ready).")
HDR_MAGIC = HEADER.add("magic", 8, 'the bytes "XCCLSEG1"')
HDR_VERSION = HEADER.add("layout_version", 8, "version of all layouts on this page")
HDR_SESSION = HEADER.add("session_id", 16, "128 random bits shared by the ranks of one launch")
HDR_RANK = HEADER.add("rank", 8, "the owner's rank")
HDR_RANKS = HEADER.add("ranks", 8, "number of ranks in the session")
HDR_OWNER_PID = HEADER.add("owner_pid", 8, "process id of the owner")
HDR_OWNER_START = HEADER.add(
    "owner_start_ticks", 8, "start time of the owner, so that a reused pid is not taken for it"
)
HDR_TOTAL_BYTES = HEADER.add("total_bytes", 8, "size of the segment")
HDR_APP_OFFSET = HEADER.add("app_offset", 8, "start of the app data area")
HDR_APP_BYTES = HEADER.add("app_bytes", 8, "size of the app data area")
HDR_METADATA_OFFSET = HEADER.add("metadata_offset", 8, "start of the metadata area")
HDR_METADATA_BYTES = HEADER.add("metadata_bytes", 8, "size of the metadata area")
HDR_MANAGED_OFFSET = HEADER.add("managed_offset", 8, "start of the managed data area")
HDR_MANAGED_BYTES = HEADER.add("managed_bytes", 8, "size of the managed data area")
HDR_RING_SLOTS = HEADER.add("ring_slots", 8, "slots in each ring")
HDR_SLOT_BYTES = HEADER.add("slot_bytes", 8, "payload bytes of a slot")
HDR_READY = HEADER.add("ready", 8, "1 when all of the above is valid", align=HOT_LINE_BYTES)
HEADER.pad_to(PAGE_BYTES)

CONTROL = Record(
    "control area",
    "Words by which ranks wait and end. A rank sleeps on its own doorbell only; whoever writes a word that it may "
    "wait for rings it. Words with different writers are two cache lines apart.",
)
CTL_DOORBELL = CONTROL.add("doorbell", 8, "raised by peers while the rank sleeps; the futex is its low half")
WAITERS_BITS = 16
CTL_WAITERS = CONTROL.add(
    "waiters",
    8,
    "number of threads of this rank that sleep or are about to; above it, from this area on, the offset of the only "
    "word that they wait for; 0 if there may be others",
    align=HOT_LINE_BYTES,
)
CTL_ABORT = CONTROL.add("abort", 8, "0, or why the session ended: kind << 32 | rank", align=HOT_LINE_BYTES)
CTL_BARRIER_ARRIVALS = CONTROL.add(
    "barrier_arrivals", 8, "arrivals of all ranks, counted at rank 0", align=HOT_LINE_BYTES
)
CTL_BARRIER_RELEASE = CONTROL.add("barrier_release", 8, "epoch of the last complete barrier", align=HOT_LINE_BYTES)
CTL_ATTACHED = CONTROL.add("attached", 8, "number of peers that have attached this segment", align=HOT_LINE_BYTES)
CTL_REACHED = CONTROL.add("reached", 8, "how many of these may read the owner's private memory")
CTL_STATE = CONTROL.add("state", 8, "0 running, 1 left after its work was done, 2 failed", align=HOT_LINE_BYTES)
CTL_PAUSES = CONTROL.add("pauses", 8, "wait policy: spins with a pause before it yields", align=HOT_LINE_BYTES)
CTL_YIELDS = CONTROL.add("yields", 8, "wait policy: yields before it sleeps")
CTL_ARMED_SEQ = CONTROL.add(
    "armed_seq", 8, "the doorbell's value when the rank last armed itself for several conditions"
)
CTL_LAST_WORDS = CONTROL.add("last_words", 512, "UTF-8 text, by the owner: why it failed", align=HOT_LINE_BYTES)
LAST_WORDS_BYTES = 512
CONTROL.pad_to(HOT_LINE_BYTES)

STATE_RUNNING = 0
STATE_LEFT = 1
STATE_FAILED = 2

#: Why a session was aborted (high half of the abort word).
ABORT_EXCEPTION = 1
ABORT_DIED = 2
ABORT_INTERRUPT = 3

CONTROL_OFFSET = HEADER.size_bytes
#: What every rank maps of a segment before it knows more of it.
CONTROL_END = CONTROL_OFFSET + CONTROL.size_bytes
STATUS_OFFSET = CONTROL_END
STATUS_END = STATUS_OFFSET + STATUS_SLOTS * STATUS.size_bytes

EXPERT_METADATA_BYTES = 64 << 20


@dataclass(frozen=True)
class Geometry:
    """Sizes and offsets of every segment of a session.

    Attributes:
        ranks: number of ranks.
        app_bytes: size of the app data area (address space; memory is taken by what is allocated).
        heap_bytes: address space for the blocks of expert parallelism in the managed area.
        ring_slots: slots in the ring of a pair.
        slot_bytes: payload bytes of a slot.
    """

    ranks: int
    app_bytes: int = 4 << 30
    heap_bytes: int = 32 << 30
    ring_slots: int = 32
    slot_bytes: int = 32 << 10

    @property
    def app_offset(self) -> int:
        """Start of the app data area."""
        return align_up(STATUS_END, PAGE_BYTES)

    @property
    def fixed_bytes(self) -> int:
        """Bytes that every segment needs from the start: header, control area and status records."""
        return self.app_offset

    @property
    def metadata_offset(self) -> int:
        """Start of the metadata area."""
        return self.app_offset + align_up(self.app_bytes, PAGE_BYTES)

    @property
    def fields_per_peer_bytes(self) -> int:
        """Bytes of the fields of one peer: data and acknowledgement for each lane, refusal and answer for each slot."""
        return 2 * MAX_LANES * FIELD_BYTES + self.pushes_bytes + self.ring_slots * (REFUSAL_BYTES + ANSWER_BYTES)

    @property
    def pushes_bytes(self) -> int:
        """Bytes of the counts of pieces that one peer has pushed."""
        return align_up(self.ring_slots * PUSHES_BYTES, 64)

    @property
    def expert_metadata_offset(self) -> int:
        """Start of the metadata of expert parallelism, behind the point-to-point fields."""
        return align_up(self.metadata_offset + self.ranks * self.fields_per_peer_bytes, PAGE_BYTES)

    @property
    def managed_offset(self) -> int:
        """Start of the managed data area: the rings."""
        return self.expert_metadata_offset + EXPERT_METADATA_BYTES

    @property
    def ring_bytes(self) -> int:
        """Bytes of one ring, headers of the slots included."""
        return align_up(self.ring_slots * self.slot_stride_bytes, PAGE_BYTES)

    @property
    def slot_stride_bytes(self) -> int:
        """Distance between two slots."""
        return SLOT_HEADER_BYTES + align_up(self.slot_bytes, 64)

    @property
    def heap_offset(self) -> int:
        """Start of the blocks of expert parallelism, behind the rings."""
        return self.managed_offset + self.ranks * self.ring_bytes

    @property
    def total_bytes(self) -> int:
        """Size of a segment."""
        return self.heap_offset + align_up(self.heap_bytes, PAGE_BYTES)

    def data_fields_offset(self, peer: int) -> int:
        """Where `peer`, as a sender, writes its fields: [MAX_LANES] of 32 bytes."""
        return self.metadata_offset + peer * self.fields_per_peer_bytes

    def pushes_offset(self, peer: int) -> int:
        """Where `peer`, as a sender, counts the pieces that it has pushed: [ring_slots] words."""
        return self.data_fields_offset(peer) + MAX_LANES * FIELD_BYTES

    def ack_fields_offset(self, peer: int) -> int:
        """Where `peer`, as a receiver, acknowledges what this rank sent: [MAX_LANES] of 32 bytes."""
        return self.pushes_offset(peer) + self.pushes_bytes

    def refusals_offset(self, peer: int) -> int:
        """Where `peer`, as a receiver, refuses what this rank sent: [ring_slots] refusals."""
        return self.ack_fields_offset(peer) + MAX_LANES * FIELD_BYTES

    def answers_offset(self, peer: int) -> int:
        """Where `peer`, as a receiver, says where zero-copy messages of this rank go: [ring_slots] answers."""
        return self.refusals_offset(peer) + self.ring_slots * REFUSAL_BYTES

    def ring_offset(self, peer: int) -> int:
        """The ring into which `peer` sends."""
        return self.managed_offset + peer * self.ring_bytes
