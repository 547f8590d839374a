"""The exception tree. Everything that xccl raises on purpose is an `XcclError`.

    XcclError
    ├── UsageError       (ValueError)    the call is wrong: fix the arguments
    ├── CapacityError                    it does not fit: `needed_bytes`, `available_bytes`
    ├── SegmentError                     a memory segment cannot be attached: `reason`
    ├── WaitTimeout      (TimeoutError)  a wait reached its deadline: `expected`, `seen`
    ├── EventMismatch                    two ranks mean different transfers: `event_id`, `peer_event_id`
    ├── PeerDied                         a rank of the session is gone: `peer`
    ├── SessionAborted                   another rank failed first, or the user stopped the session
    ├── FabricError                      this fabric cannot do that, or the machine beneath it failed
    └── ModelError                       the cost model has no answer

Errors cross process boundaries (the parent raises a rank's error again): they pickle with their numbers and notes.
"""

from __future__ import annotations

from typing import Literal

SegmentProblem = Literal["absent", "not_ready", "wrong_magic", "wrong_version", "wrong_size", "wrong_session"]


class XcclError(Exception):
    """Base of all errors of xccl.

    Args:
        message: One sentence for people, with the values and bounds in it.
        **details: The same numbers for programs. Each becomes an attribute; `details` holds all that were given. The
            attributes that a subclass documents exist always, and are None where the raiser did not know them.
    """

    # Pickling needs no code: `args` is the message alone, and BaseException keeps `__dict__`, with details and notes.

    details: dict[str, object]

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.details = details
        self.__dict__.update(details)


class UsageError(XcclError, ValueError):
    """A call is wrong whatever the state of the machine: dtype, shape, rank, size, option.

    Raised by every public call before anything is moved; a mismatch between ranks is raised by all of them. Correct the
    arguments. The message shows the value and its bound; where there is one pair of them, they are `value` and `bound`.
    """

    value: object = None
    bound: object = None


class CapacityError(XcclError):
    """Something does not fit: /dev/shm, the app data area, a buffer sized by `max_tokens`.

    Raised before anything runs. Make room, or ask for less: `needed_bytes` is the size that would have been enough, and
    `available_bytes` what there is.
    """

    needed_bytes: int | None = None
    available_bytes: int | None = None


class SegmentError(XcclError):
    """A memory segment could not be attached.

    Raised when a rank joins a session. `reason` says which check failed: `absent` and `not_ready` may pass with time
    (the owner is still starting, or has gone); the others mean another version of xccl, another session or a foreign
    file.
    """

    reason: SegmentProblem | None = None
    name: str | None = None


class WaitTimeout(XcclError, TimeoutError):
    """A wait reached its deadline while all peers were alive.

    Raised by any call that waits. Either a peer never made the matching call (compare `operation`, `event` and `peer`
    with what that rank runs), or the deadline is too short for the load of this machine.

    Attributes:
        operation: What waited, for example "recv".
        event: Event ID or epoch of the operation.
        rank: The rank that waited.
        peer: The rank waited for, when there is one.
        expected: The value waited for.
        seen: The value last seen.
        timeout_s: The deadline, in seconds.
    """

    operation: str | None = None
    event: int | None = None
    rank: int | None = None
    peer: int | None = None
    expected: int | None = None
    seen: int | None = None
    timeout_s: float | None = None


class EventMismatch(XcclError):
    """Two ranks met with different event IDs: they do not mean the same transfer.

    Raised on both sides. The ranks have run apart; look at the order of their calls.

    Attributes:
        operation: The operation on this side.
        event_id: The event ID given on this side.
        peer_event_id: The one found on the other side.
        rank: This rank.
        peer: The other rank.
    """

    operation: str | None = None
    event_id: int | None = None
    peer_event_id: int | None = None
    rank: int | None = None
    peer: int | None = None


class PeerDied(XcclError):
    """A rank of the session exited, was killed, or is a zombie, and so cannot answer any more.

    Raised by waits of the other ranks and by `launch`. The session is over: start a new one.

    Attributes:
        rank: The rank that noticed, or None for the launcher.
        peer: The rank that died.
        reason: How, for example "killed by signal 9".
    """

    rank: int | None = None
    peer: int | None = None
    reason: str | None = None


class SessionAborted(XcclError):
    """The session ended while this rank was in the middle of something: another rank failed, or the user stopped it.

    Raised by waits. Look for the first error: `peer` is the rank that raised it, None if it was the launcher, `reason`
    what it said, and `rank` the rank that was interrupted.
    """

    rank: int | None = None
    peer: int | None = None
    reason: str | None = None


class FabricError(XcclError):
    """This fabric cannot do what was asked (for example a view of a peer's memory), or the system beneath it failed.

    Raised by fabrics and by the launcher. Choose another fabric, or see the system's error in `__cause__`.
    """

    fabric: str | None = None


class ModelError(XcclError):
    """The cost model has no answer: an unknown machine, or a shape outside of what it describes.

    Raised by projections, never by operations on data.
    """

    machine: str | None = None
