"""One rank, as its segment and its process show it to an observer outside of the session, who only reads.

Segments are read by `pread`: a file that is cut short, or a hole, does no harm, and nothing is mapped or allocated.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from ..layout import segment as layout, status as status_layout
from ..layout.ring import ACK_HEAD, DATA_TAIL, FIELD_BYTES, MAX_LANES
from ..layout.segment import Geometry
from ..layout.status import HAS_EVENT, HAS_VALUES, OPERATION_BYTES, STATUS, STATUS_SLOTS, WHO_MASK

#: A record that is written now is read again so often.
_TRIES: Final = 20
_PAUSE_S: Final = 0.0005
#: The rings of all pairs are looked at in sessions of up to so many ranks: there are as many as pairs.
TRAFFIC_RANKS: Final = 64

Who = Literal["all", "some", "any"]
_WHO: Final[tuple[Who, ...]] = ("all", "some", "any")
#: What a process does. "elsewhere": it is in another PID namespace.
Activity = Literal["running", "sleeping", "blocked", "stopped", "dead", "elsewhere"]
_ACTIVITIES: Final[dict[str, Activity]] = {
    "R": "running", "S": "sleeping", "I": "sleeping", "D": "blocked", "T": "stopped", "t": "stopped",
}  # fmt: skip
State = Literal["starting", "running", "left", "failed"]
_STATES: Final[dict[int, State]] = {layout.STATE_LEFT: "left", layout.STATE_FAILED: "failed"}


@dataclass(frozen=True)
class Wait:
    """What one thread of a rank waits for.

    Attributes:
        operation: name of the call, and of its stage.
        event: event ID or epoch.
        who: none of `ranks` has done its part ("all"); `expected - seen` of them have not ("some"); or any of them may
            end the wait ("any").
        ranks: those waited for.
        expected, seen: values of the word waited for.
        since_ns, until_ns: beginning and deadline, by CLOCK_MONOTONIC.
        thread: thread id of who waits.
    """

    operation: str
    event: int | None
    who: Who
    ranks: tuple[int, ...]
    expected: int | None
    seen: int | None
    since_ns: int
    until_ns: int
    thread: int


@dataclass(frozen=True)
class Process:
    """What the operating system says of a rank's process.

    Attributes:
        activity: what it does.
        threads: how many it has.
        cpu_s: time of cores that it has used.
        started_s: when it started, in seconds after boot.
    """

    activity: Activity
    threads: int = 0
    cpu_s: float = 0.0
    started_s: float = 0.0


@dataclass(frozen=True)
class ObservedRank:
    """A rank of a session.

    Attributes:
        rank: its number.
        pid: its process, as the rank itself knows it.
        state: what it says of itself.
        process: what the operating system says.
        waits: those of its threads that have taken long.
        abort: why the session was aborted, as this rank was told: an ABORT_ code and the rank that failed.
        last_words: why it failed.
        memory_bytes: memory that its segment takes.
        barriers: barriers of the session that it knows to be complete.
        wakeups: how often it was woken while it slept.
        attached: peers that have attached its segment.
        chunks_received: positions written into its rings by all peers; None in a session of many ranks.
        chunks_acknowledged: positions in the rings of its peers that it wrote, and they have read.
    """

    rank: int
    pid: int
    state: State
    process: Process
    waits: tuple[Wait, ...] = ()
    abort: tuple[int, int] | None = None
    last_words: str = ""
    memory_bytes: int = 0
    barriers: int = 0
    wakeups: int = 0
    attached: int = 0
    chunks_received: int | None = None
    chunks_acknowledged: int | None = None


class Observed:
    """An open segment, of whatever version, perhaps half made.

    Args:
        fd: its descriptor, which stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        #: Header, control area and status records, as far as the file goes.
        self._bytes = os.pread(fd, layout.STATUS_END, 0).ljust(layout.STATUS_END, b"\0")

    def header(self, offset: int) -> int:
        """A word of the header."""
        return _word(self._bytes, offset)

    def _control(self, offset: int) -> int:
        return self.header(layout.CONTROL_OFFSET + offset)

    @property
    def is_segment(self) -> bool:
        """Is it one, although its owner may not have finished it?"""
        return self.header(layout.HDR_MAGIC) in (0, layout.MAGIC)

    @property
    def is_ready(self) -> bool:
        """Has its owner finished the header, and can it be believed?"""
        is_made = self.header(layout.HDR_MAGIC) == layout.MAGIC and self.header(layout.HDR_READY) != 0
        return is_made and 1 <= self.header(layout.HDR_RANKS) <= status_layout.MAX_PEERS

    @property
    def version(self) -> int:
        """Version of all layouts in it."""
        return self.header(layout.HDR_VERSION)

    def rank(self, rank: int, *, same_pids: bool) -> ObservedRank:
        """All that is to be seen of it, which must be ready; of one of another version only what its header says.

        Args:
            rank: its number.
            same_pids: do process ids mean the same here and there?
        """
        pid = self.header(layout.HDR_OWNER_PID)
        process = process_of(pid, self.header(layout.HDR_OWNER_START)) if same_pids else Process("elsewhere")
        if self.version != layout.LAYOUT_VERSION:
            return ObservedRank(rank, pid, "running", process, memory_bytes=os.fstat(self._fd).st_blocks * 512)
        peers = self.header(layout.HDR_RANKS) - 1
        state = _STATES.get(self._control(layout.CTL_STATE), "running")
        attached = self._control(layout.CTL_ATTACHED)
        if state == "running" and attached < peers:
            state = "starting"
        abort = self._control(layout.CTL_ABORT)
        at = layout.CONTROL_OFFSET + layout.CTL_LAST_WORDS
        received, acknowledged = self._traffic()
        return ObservedRank(
            rank=rank,
            pid=pid,
            state=state,
            process=process,
            waits=self._waits(),
            abort=(abort >> 32, abort & 0xFFFFFFFF) if abort else None,
            last_words=printable(self._bytes[at : at + layout.LAST_WORDS_BYTES]),
            memory_bytes=os.fstat(self._fd).st_blocks * 512,
            barriers=self._control(layout.CTL_BARRIER_RELEASE),
            wakeups=self._control(layout.CTL_DOORBELL),
            attached=attached,
            chunks_received=received,
            chunks_acknowledged=acknowledged,
        )

    def _waits(self) -> tuple[Wait, ...]:
        found = []
        for slot in range(STATUS_SLOTS):
            at = layout.STATUS_OFFSET + slot * STATUS.size_bytes
            if self.header(at):
                data = untorn(self._fd, at)
                wait = None if data is None else wait_of(data)
                if wait is not None:
                    found.append(wait)
        return tuple(sorted(found, key=lambda wait: wait.since_ns))

    def _traffic(self) -> tuple[int | None, int | None]:
        """Ring positions written here by all peers, and acknowledged here by all peers."""
        ranks = self.header(layout.HDR_RANKS)
        if ranks > TRAFFIC_RANKS:
            return None, None
        geometry = Geometry(
            ranks=ranks,
            app_bytes=self.header(layout.HDR_APP_BYTES),
            ring_slots=self.header(layout.HDR_RING_SLOTS),
            slot_bytes=self.header(layout.HDR_SLOT_BYTES),
        )
        stride, start = geometry.fields_per_peer_bytes, geometry.metadata_offset
        try:
            data = os.pread(self._fd, ranks * stride, start).ljust(ranks * stride, b"\0")
        except (OSError, OverflowError):  # a header that is no header
            return None, None
        table = np.frombuffer(data, np.int64).reshape(ranks, stride // 8)

        def furthest(fields_at: int, word: int) -> int:
            first = (fields_at - start + word) // 8
            lanes: npt.NDArray[np.int64] = table[:, first : first + MAX_LANES * FIELD_BYTES // 8 : FIELD_BYTES // 8]
            return int(lanes.max(axis=1).sum())

        return furthest(geometry.data_fields_offset(0), DATA_TAIL), furthest(geometry.ack_fields_offset(0), ACK_HEAD)


def untorn(fd: int, at: int) -> bytes | None:
    """A status record that nobody was writing meanwhile; None if it never came to rest."""
    for _ in range(_TRIES):
        # SYNC POINT status: a record is as its rank wrote it (`kernels.status`) if the number is even, and the same
        # before and after. Each read is a system call, which takes and returns a reference to the page: fences enough.
        before = os.pread(fd, 8, at)
        data = os.pread(fd, STATUS.size_bytes, at)
        after = os.pread(fd, 8, at)
        if len(data) == STATUS.size_bytes and before == after and _word(before) % 2 == 0:
            return data
        time.sleep(_PAUSE_S)
    return None


def wait_of(data: bytes) -> Wait | None:
    """What a status record says; None if it says nothing."""
    words = np.frombuffer(data[: status_layout.ST_PEERS], np.int64)

    def word(offset: int) -> int:
        return int(words[offset // 8])

    if not word(status_layout.ST_SINCE_NS):
        return None
    flags = word(status_layout.ST_FLAGS)
    peers = np.frombuffer(data, np.uint8, status_layout.MAX_PEERS // 8, status_layout.ST_PEERS)
    has_values = bool(flags & HAS_VALUES)
    at = status_layout.ST_OPERATION
    return Wait(
        operation=printable(data[at : at + OPERATION_BYTES]),
        event=word(status_layout.ST_EVENT) if flags & HAS_EVENT else None,
        who=_WHO[min(flags & WHO_MASK, len(_WHO) - 1)],
        ranks=tuple(np.flatnonzero(np.unpackbits(peers, bitorder="little")).tolist()),
        expected=word(status_layout.ST_EXPECTED) if has_values else None,
        seen=word(status_layout.ST_SEEN) if has_values else None,
        since_ns=word(status_layout.ST_SINCE_NS),
        until_ns=word(status_layout.ST_UNTIL_NS),
        thread=word(status_layout.ST_THREAD),
    )


def process_of(pid: int, start_ticks: int) -> Process:
    """The process with this id that started then; a dead one if there is none any more, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return Process("dead")
    if len(fields) < 20 or int(fields[19]) != start_ticks or fields[0] in "ZXx":
        return Process("dead")
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    return Process(
        activity=_ACTIVITIES.get(fields[0], "sleeping"),
        threads=int(fields[17]),
        cpu_s=(int(fields[11]) + int(fields[12])) / ticks_per_s,
        started_s=int(fields[19]) / ticks_per_s,
    )


def _word(data: bytes, offset: int = 0) -> int:
    return int.from_bytes(data[offset : offset + 8], sys.byteorder, signed=True)


def printable(data: bytes) -> str:
    """UTF-8 text up to the first zero, on one line; whoever wrote it, it sends nothing to a terminal but letters."""
    text = data.split(b"\0", 1)[0].decode(errors="replace")
    return "".join(char if char.isprintable() else " " for char in text)
