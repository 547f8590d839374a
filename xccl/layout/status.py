"""What a rank that waits says of itself, for readers outside of its session (`xccl top`).

Records of this kind lie behind the control area of each segment. They are written by their rank alone, on the long way
of a wait: one that ends within a slice is not shown.
"""

from __future__ import annotations

from typing import Final

from .record import HOT_LINE_BYTES, Record

#: Ranks that can be named: as many as a session may have.
MAX_PEERS: Final = 1024
OPERATION_BYTES: Final = 96

STATUS = Record(
    "status record",
    "What one thread of a rank waits for. A reader takes it only if `sequence` is even, and the same before and after.",
)
ST_SEQUENCE = STATUS.add("sequence", 8, "raised before and after each change: odd in between (SYNC POINT status)")
ST_SINCE_NS = STATUS.add("since_ns", 8, "when the wait began, by CLOCK_MONOTONIC; 0 if nothing is waited for")
ST_UNTIL_NS = STATUS.add("until_ns", 8, "its deadline")
ST_THREAD = STATUS.add("thread", 8, "thread id of who waits")
ST_FLAGS = STATUS.add("flags", 8, "a WHO_ code, plus HAS_EVENT, plus HAS_VALUES")
ST_EVENT = STATUS.add("event", 8, "event ID or epoch")
ST_EXPECTED = STATUS.add("expected", 8, "value waited for")
ST_SEEN = STATUS.add("seen", 8, "value seen last")
ST_PEERS = STATUS.add("peers", MAX_PEERS // 8, "ranks of the session that are waited for, a bit each")
ST_OPERATION = STATUS.add("operation", OPERATION_BYTES, "UTF-8 text: name of the operation, and of its stage")
STATUS.pad_to(HOT_LINE_BYTES)

#: Threads of a rank whose waits are shown at the same time.
STATUS_SLOTS: Final = 4

#: What `peers` are: none of them has done its part; or `expected - seen` of them have not; or any of them may.
WHO_ALL: Final = 0
WHO_SOME: Final = 1
WHO_ANY: Final = 2
WHO_MASK: Final = 3
#: Do `event`, and `expected` and `seen`, mean anything?
HAS_EVENT: Final = 4
HAS_VALUES: Final = 8
