"""Why a send or receive has not ended well."""

from __future__ import annotations

import time

from ..errors import EventMismatch, FabricError, UsageError, XcclError
from ..layout import ring as layout
from .core import Core
from .request import Request

#: A peer whose memory is gone is given so long to be seen dead; between two looks.
_DEATH_NS, _DEATH_PAUSE_S = 1_000_000_000, 0.001


def mismatch(core: Core, request: Request) -> XcclError:
    """Why the receiver has refused a message: event, size or lanes differ."""
    sending, rank, peer = request.channel.sending, core.rank, request.peer
    own_event_id, own_lanes = request.word(layout.OP_EVENT_ID), request.word(layout.OP_LANES)
    event_id = request.word(layout.OP_PEER_EVENT_ID)
    n_bytes = request.word(layout.OP_PEER_BYTES)
    lanes = request.word(layout.OP_PEER_LANES)
    does, did = ("sends", "receives") if sending else ("receives", "sent")
    if event_id != own_event_id:
        return EventMismatch(
            f"rank {rank} {does} event {own_event_id}, but rank {peer} {did} event {event_id}",
            operation="send" if sending else "recv", event_id=own_event_id, peer_event_id=event_id,
            rank=rank, peer=peer,
        )  # fmt: skip
    return UsageError(
        f"event {event_id}: rank {rank} {does} {request.buffer.nbytes} bytes on {own_lanes} lanes, but "
        f"rank {peer} {did} {n_bytes} bytes on {lanes} lanes; both must be the same",
        event_id=event_id, rank=rank, peer=peer, value=request.buffer.nbytes, bound=n_bytes,
    )  # fmt: skip


def broken_off(core: Core, request: Request, state: int) -> XcclError:
    """Why an operation that nobody refused did not end well: most often, because the other side is gone."""
    event_id, peer = request.word(layout.OP_EVENT_ID), request.peer
    # The memory of a process that dies goes before others can see that it has ended.
    until_ns = time.monotonic_ns() + (_DEATH_NS if state == layout.STATE_FAILED else 0)
    while True:
        try:
            core.check_session(request.describe)
        except XcclError as error:
            return error.with_traceback(None)
        if time.monotonic_ns() >= until_ns:
            break
        time.sleep(_DEATH_PAUSE_S)
    if state == layout.STATE_WITHDRAWN:
        text = f"rank {peer} gave event {event_id} up in the middle"
    else:
        text = f"event {event_id}: the buffer of rank {peer} cannot be reached any more"
    return FabricError(f"rank {core.rank}: {text}", rank=core.rank, peer=peer)


def unusable(core: Core, request: Request, reason: str) -> XcclError:
    """Why a request cannot go on whose channel was given up: if the session is over, that explains more."""
    try:
        core.check_session(request.describe)
    except XcclError as error:
        return error.with_traceback(None)
    channel = request.channel
    return FabricError(f"the channel to {channel.name} is unusable: {reason}", rank=core.rank, peer=channel.peer)
