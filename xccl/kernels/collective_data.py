"""What moves in a step of a collective: parts that are staged, read, and made ready to be reduced."""

from __future__ import annotations

from ..layout.collectives import (
    CR_BYTES,
    CR_LIMIT,
    CR_PAYLOAD,
    CS_CAME,
    CS_CHUNK,
    CS_CLOSES,
    CS_COUNTS,
    CS_CURSOR,
    CS_EXPOSED,
    CS_INDEX,
    CS_LARGEST,
    CS_PROCESSES,
    CS_RANK,
    CS_RANKS,
    CS_ROWS,
    CS_STEPS,
    CS_TAKES,
    CS_TARGET,
    CS_VECTORS,
    EXPOSED,
    INLINE_BYTES,
    LIMIT_SHIFT,
    METER_GATHER,
    METER_OWN,
    METER_PULL,
    METER_RESULT,
    METER_STAGE,
    METER_UNPACK,
    PL_BYTES,
    PL_INLINE,
    PL_ITEM_BYTES,
    PL_RECEIVER,
    PL_RECV_STRIDE,
    PL_RESULTS,
    PL_SENDER,
    PL_TWO_STEP,
    PRIVATE,
    TB_CAME,
    TB_EXPECTED,
    TB_RECEIVED,
    TB_RECEIVED_AT,
    TB_SENT,
)
from ._jit import device
from .atomics import load_i64, store_i64
from .collective_records import (
    half_of,
    has_parts,
    is_inline,
    limit_of,
    meter,
    place_of,
    record_of,
    results_of,
    segment_of,
    sent_at,
    sent_bytes,
    table_at,
)
from .copy import copy_bytes, copy_bytes_auto
from .processes import read_memory


@device
def piece_of(state: int, n_bytes: int) -> int:
    """Bytes of a part of `n_bytes` that go in the present step."""
    chunk = load_i64(state + CS_CHUNK)
    return min(chunk, max(0, n_bytes - load_i64(state + CS_INDEX) * chunk))


# -- to stage ---------------------------------------------------------------------------------------------------------


@device
def _stage_piece(state: int, target: int, source: int, n_bytes: int) -> None:
    if n_bytes > 0:
        copy_bytes_auto(target, source, n_bytes)
        meter(state, METER_STAGE, load_i64(state + CS_RANK), n_bytes)


@device
def stage(state: int, plan: int, x: int, step: int) -> None:
    """Stage this step's pieces of the parts for all receivers, unless these read the input where it lies."""
    ranks, rank = load_i64(state + CS_RANKS), load_i64(state + CS_RANK)
    sender, receiver = load_i64(plan + PL_SENDER), load_i64(plan + PL_RECEIVER)
    if load_i64(plan + PL_INLINE) != 0 or (sender >= 0 and sender != rank) or ranks == 1:
        return
    chunk = load_i64(state + CS_CHUNK)
    start = load_i64(state + CS_INDEX) * chunk
    target = segment_of(state, rank) + half_of(state, plan, step)
    ragged = load_i64(plan + PL_BYTES) < 0
    if ragged and start == 0 and load_i64(state + CS_COUNTS) != 0:
        for peer in range(ranks):
            store_i64(target + load_i64(plan + PL_RESULTS) + 8 * peer, sent_bytes(state, plan, peer))
    if load_i64(state + CS_EXPOSED) != 0:
        return
    if not has_parts(plan):
        if receiver != rank:
            _stage_piece(state, target, x + start, piece_of(state, load_i64(plan + PL_BYTES)))
        return
    for peer in range(ranks):
        size = sent_bytes(state, plan, peer)
        if peer != rank and (receiver < 0 or receiver == peer) and not is_inline(state, plan, size):
            source = x + sent_at(state, plan, peer) + start
            _stage_piece(state, target + peer * chunk, source, piece_of(state, size))


@device
def _slice_bytes(n_bytes: int, ranks: int) -> int:
    """Two steps: bytes of each rank's slice of a window, but for the last ones; whole cache lines."""
    return -(-n_bytes // (64 * ranks)) * 64


@device
def stage_window(state: int, plan: int, x: int, step: int) -> None:
    """Two steps: stage this step's window of the input, but for the own slice."""
    rank, sender = load_i64(state + CS_RANK), load_i64(plan + PL_SENDER)
    n_bytes = piece_of(state, load_i64(plan + PL_BYTES))
    if n_bytes == 0 or (sender >= 0 and sender != rank) or load_i64(state + CS_EXPOSED) != 0:
        return
    slice_bytes = _slice_bytes(n_bytes, load_i64(state + CS_RANKS))
    first = min(rank * slice_bytes, n_bytes)
    end = min(first + slice_bytes, n_bytes)
    target = segment_of(state, rank) + half_of(state, plan, step)
    source = x + load_i64(state + CS_INDEX) * load_i64(state + CS_CHUNK)
    _stage_piece(state, target, source, first)
    _stage_piece(state, target + end, source + end, n_bytes - end)


# -- to learn ---------------------------------------------------------------------------------------------------------


@device
def learn_sizes(state: int, plan: int, step: int, room: int) -> None:
    """Alltoallv: what each rank sends to this one, whether that can be taken, and how many steps there will be.

    Args:
        state: of the communicator.
        plan: of the call.
        step: its first.
        room: rows that the output has room for; below 0 if it is yet to be made.
    """
    ranks, rank = load_i64(state + CS_RANKS), load_i64(state + CS_RANK)
    row_bytes = load_i64(plan + PL_ITEM_BYTES)
    largest, at, takes = load_i64(state + CS_LARGEST), 0, 1
    for peer in range(ranks):
        size = load_i64(table_at(state, TB_SENT, rank))
        if peer != rank:
            record = record_of(state, peer, step)
            largest = max(largest, load_i64(record + CR_LIMIT) >> LIMIT_SHIFT)
            size = load_i64(record + CR_BYTES)
            if load_i64(state + CS_COUNTS) != 0:
                size = load_i64(results_of(state, record, peer) + 8 * rank)
        expected = load_i64(table_at(state, TB_EXPECTED, peer))
        if expected >= 0 and expected * row_bytes != size:
            takes = 0
        store_i64(table_at(state, TB_RECEIVED, peer), size)
        store_i64(table_at(state, TB_RECEIVED_AT, peer), at)
        store_i64(table_at(state, TB_CAME, peer), size // row_bytes)
        at += size
    if room >= 0 and at > room * row_bytes:
        takes = 0
    store_i64(state + CS_TAKES, takes)
    store_i64(state + CS_CAME, at // row_bytes)
    store_i64(state + CS_STEPS, max(1, -(-largest // load_i64(state + CS_CHUNK))))


@device
def learn_exposed(state: int, plan: int, step: int) -> None:
    """Whose input is read where it lies? If that of anybody, a last step says that it was read.

    If nobody who gives stages anything, all is read in one step. (In the algorithm of two steps, the results of the
    last window are published after all operands were read.)
    """
    sender, rank = load_i64(plan + PL_SENDER), load_i64(state + CS_RANK)
    some, every = False, True
    for peer in range(load_i64(state + CS_RANKS)):
        if sender >= 0 and sender != peer:
            continue
        limit = limit_of(state) if peer == rank else load_i64(record_of(state, peer, step) + CR_LIMIT)
        exposed = limit & EXPOSED != 0
        some = some or exposed
        every = every and (exposed or (load_i64(plan + PL_BYTES) < 0 and limit >> LIMIT_SHIFT <= INLINE_BYTES))
    if some and load_i64(plan + PL_TWO_STEP) == 0:
        store_i64(state + CS_CLOSES, 1)
        if every:
            store_i64(state + CS_CHUNK, 1 << 62)
            store_i64(state + CS_STEPS, 1)
        store_i64(state + CS_STEPS, load_i64(state + CS_STEPS) + 1)


# -- to take ----------------------------------------------------------------------------------------------------------


@device
def received_bytes(state: int, plan: int, peer: int) -> int:
    """Size of the part that `peer` has for this rank."""
    n_bytes = load_i64(plan + PL_BYTES)
    return n_bytes if n_bytes >= 0 else load_i64(table_at(state, TB_RECEIVED, peer))


@device
def received_at(state: int, plan: int, peer: int) -> int:
    """Where in the output the part of `peer` goes."""
    if load_i64(plan + PL_BYTES) >= 0:
        return peer * load_i64(plan + PL_RECV_STRIDE)
    return load_i64(table_at(state, TB_RECEIVED_AT, peer))


@device
def _part_of(state: int, plan: int, peer: int, step: int) -> int:
    """Address of this step's piece of the part that another rank has for this one."""
    record = record_of(state, peer, step)
    if is_inline(state, plan, received_bytes(state, plan, peer)):
        return record + CR_PAYLOAD
    place = place_of(state, record, peer)
    if load_i64(record + CR_LIMIT) & EXPOSED != 0:  # the whole input lies there
        index = load_i64(state + CS_INDEX)
        place += index * load_i64(state + CS_CHUNK) if index != 0 else 0
    return place


@device
def _meter_part(state: int, plan: int, peer: int, n_bytes: int, size: int) -> None:
    """Count a piece of `size` bytes of a part of `n_bytes` that was read."""
    local = load_i64(state + CS_COUNTS) == 0 and is_inline(state, plan, n_bytes)
    meter(state, METER_UNPACK if local else METER_PULL, peer, size)


@device
def take_own(state: int, plan: int, x: int, out: int) -> None:
    """Copy the part that this rank has for itself to where it belongs."""
    rank = load_i64(state + CS_RANK)
    sender, receiver = load_i64(plan + PL_SENDER), load_i64(plan + PL_RECEIVER)
    if (sender >= 0 and sender != rank) or (receiver >= 0 and receiver != rank):
        return
    n_bytes = sent_bytes(state, plan, rank)
    source, target = x + sent_at(state, plan, rank), out + received_at(state, plan, rank)
    if n_bytes > 0 and source != target:
        copy_bytes_auto(target, source, n_bytes)
        meter(state, METER_OWN, rank, n_bytes)


@device
def _take_part(state: int, plan: int, peer: int, step: int, target: int, size: int) -> bool:
    """Copy this step's piece of the part of another rank; False if its private memory cannot be read (any more)."""
    n_bytes = received_bytes(state, plan, peer)
    place = _part_of(state, plan, peer, step)
    process = load_i64(load_i64(state + CS_PROCESSES) + 8 * peer)
    is_private = load_i64(record_of(state, peer, step) + CR_LIMIT) & PRIVATE != 0
    if process != 0 and is_private and not is_inline(state, plan, n_bytes):
        if not read_memory(process, state + CS_VECTORS, target, place, size):
            store_i64(state + CS_CURSOR, peer)
            return False
    else:
        copy_bytes_auto(target, place, size)
    _meter_part(state, plan, peer, n_bytes, size)
    return True


@device
def take_parts(state: int, plan: int, out: int, step: int) -> bool:
    """Copy this step's pieces of the parts of all others to where they belong. The next rank comes first.

    Returns:
        False, with the cursor at that rank, if the private memory of one cannot be read (any more).
    """
    rank, ranks = load_i64(state + CS_RANK), load_i64(state + CS_RANKS)
    sender, receiver = load_i64(plan + PL_SENDER), load_i64(plan + PL_RECEIVER)
    if receiver >= 0 and receiver != rank:
        return True
    index = load_i64(state + CS_INDEX)
    start = index * load_i64(state + CS_CHUNK) if index != 0 else 0
    peer = rank
    for _ in range(1, ranks):
        peer = peer + 1 if peer + 1 < ranks else 0
        if sender >= 0 and sender != peer:
            continue
        size = piece_of(state, received_bytes(state, plan, peer))
        if size > 0 and not _take_part(state, plan, peer, step, out + received_at(state, plan, peer) + start, size):
            return False
    return True


@device
def part_operands(state: int, plan: int, x: int, out: int, step: int) -> int:
    """Note where this step's pieces of the parts of all ranks lie, in the order of ranks; their size."""
    rank, ranks = load_i64(state + CS_RANK), load_i64(state + CS_RANKS)
    index = load_i64(state + CS_INDEX)
    start = index * load_i64(state + CS_CHUNK) if index != 0 else 0
    n_bytes = load_i64(plan + PL_BYTES)
    size = piece_of(state, n_bytes)
    rows = load_i64(state + CS_ROWS)
    for peer in range(ranks):
        if peer == rank:
            store_i64(rows + 8 * peer, x + sent_at(state, plan, rank) + start)
        else:
            store_i64(rows + 8 * peer, _part_of(state, plan, peer, step))
            if size > 0:
                _meter_part(state, plan, peer, n_bytes, size)
    store_i64(state + CS_TARGET, out + start)
    return size


# -- two steps --------------------------------------------------------------------------------------------------------


@device
def gather_results(state: int, plan: int, out: int, step: int) -> None:
    """Pull the results of the window before from the ranks that made them."""
    rank, ranks = load_i64(state + CS_RANK), load_i64(state + CS_RANKS)
    chunk = load_i64(state + CS_CHUNK)
    start = (load_i64(state + CS_INDEX) - 1) * chunk
    n_bytes = min(chunk, load_i64(plan + PL_BYTES) - start)
    slice_bytes = _slice_bytes(n_bytes, ranks)
    if load_i64(plan + PL_SENDER) == rank:
        return
    peer = rank
    for _ in range(1, ranks):
        peer = peer + 1 if peer + 1 < ranks else 0
        first = min(peer * slice_bytes, n_bytes)
        size = min(slice_bytes, n_bytes - first)
        if size > 0:
            copy_bytes_auto(out + start + first, results_of(state, record_of(state, peer, step), peer), size)
            meter(state, METER_GATHER, peer, size)


@device
def _own_slice(state: int, plan: int) -> tuple[int, int]:
    """Where the own slice of this step's window starts in the whole, and its size."""
    n_bytes = piece_of(state, load_i64(plan + PL_BYTES))
    slice_bytes = _slice_bytes(n_bytes, load_i64(state + CS_RANKS))
    first = min(load_i64(state + CS_RANK) * slice_bytes, n_bytes)
    return load_i64(state + CS_INDEX) * load_i64(state + CS_CHUNK) + first, min(slice_bytes, n_bytes - first)


@device
def _slice_from(state: int, peer: int, step: int, x: int, start: int, size: int) -> int:
    """Address of the own slice, which starts at `start` in the whole, of the input of `peer`."""
    if peer == load_i64(state + CS_RANK):
        return x + start
    meter(state, METER_PULL, peer, size)
    record = record_of(state, peer, step)
    if load_i64(record + CR_LIMIT) & EXPOSED == 0:
        start -= load_i64(state + CS_INDEX) * load_i64(state + CS_CHUNK)
    return place_of(state, record, peer) + start


@device
def slice_operands(state: int, plan: int, x: int, step: int) -> int:
    """As `part_operands`, of the own slice of this step's window; the result goes to the next step's half."""
    start, size = _own_slice(state, plan)
    if size == 0:
        return 0
    result = segment_of(state, load_i64(state + CS_RANK)) + half_of(state, plan, step + 1) + load_i64(plan + PL_RESULTS)
    store_i64(state + CS_TARGET, result)
    sender = load_i64(plan + PL_SENDER)
    if sender >= 0:
        copy_bytes(result, _slice_from(state, sender, step, x, start, size), size)
        return 0
    rows = load_i64(state + CS_ROWS)
    for peer in range(load_i64(state + CS_RANKS)):
        store_i64(rows + 8 * peer, _slice_from(state, peer, step, x, start, size))
    return size


@device
def keep_slice(state: int, plan: int, out: int) -> None:
    """Copy the result of the own slice from the staging area, where the others will find it."""
    start, size = _own_slice(state, plan)
    rank = load_i64(state + CS_RANK)
    if size == 0:
        return
    meter(state, METER_RESULT, rank, size)
    if load_i64(plan + PL_SENDER) != rank:
        copy_bytes(out + start, load_i64(state + CS_TARGET), size)
        meter(state, METER_OWN, rank, size)
