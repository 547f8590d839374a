"""Collectives: one kernel call each. The protocol and its proof are in `xccl.comm.collectives`.

A call is a sequence of steps. In each step a rank stages data in its own segment and says so to all others, waits until
all others have said so, and uses what they have staged. The kernel is a state machine: all progress is in the state, so
a call that returns SLICE or PENDING is simply made again.
"""

from __future__ import annotations

from ..layout.collectives import (
    CR_PAYLOAD,
    CS_CHUNK,
    CS_CLOSES,
    CS_CURSOR,
    CS_EXPOSED,
    CS_INDEX,
    CS_LARGEST,
    CS_PHASE,
    CS_PLAN,
    CS_RANK,
    CS_RANKS,
    CS_ROWS,
    CS_SEGMENT_BYTES,
    CS_STEP,
    CS_STEPS,
    CS_TAKES,
    CS_TARGET,
    EXPOSED,
    METER_FOLD,
    PL_BYTES,
    PL_CHUNK,
    PL_EXPOSE,
    PL_EXPOSE_PRIVATE,
    PL_FOLD,
    PL_INLINE,
    PL_ITEM_BYTES,
    PL_STEPS,
    PL_TWO_STEP,
    PL_X_BYTES,
    PRIVATE,
    TB_ROWS,
    TB_SENT,
    TB_SENT_AT,
)
from ._jit import device, kernel
from .atomics import load_i64, store_i64
from .collective_data import (
    gather_results,
    keep_slice,
    learn_exposed,
    learn_sizes,
    part_operands,
    slice_operands,
    stage,
    stage_window,
    take_own,
    take_parts,
)
from .collective_records import all_agree, await_all, meter, record_of, say, segment_of, table_at
from .copy import copy_bytes
from .fold import fold_rows
from .wait import MISMATCH, OK

#: Phases of a call.
IDLE, PUBLISH, AWAIT, CONSUME = range(4)
#: Status, beside those of `wait`: alltoallv knows what it will receive, and needs room for it.
SIZES_KNOWN = 1
#: Another call is in the middle.
BUSY = 2
#: The numbers of rows are not those of the input; nothing was begun.
UNFIT = 3
#: Alltoallv: other numbers of rows came than expected, or there was no room for them; none was written.
WRONG_ROWS = 4
#: The private memory of the rank that the cursor names cannot be read (any more).
UNREACHABLE = 5


@device
def _plan_rows(state: int, plan: int, rows: int) -> bool:
    """Alltoallv: from rows to bytes; False if they are not the `rows` rows of the input."""
    row_bytes = load_i64(plan + PL_ITEM_BYTES)
    rank = load_i64(state + CS_RANK)
    at, largest = 0, 0
    for peer in range(load_i64(state + CS_RANKS)):
        size = load_i64(table_at(state, TB_ROWS, peer)) * row_bytes
        if size < 0:
            return False
        store_i64(table_at(state, TB_SENT, peer), size)
        store_i64(table_at(state, TB_SENT_AT, peer), at)
        at += size
        if peer != rank:
            largest = max(largest, size)
    store_i64(state + CS_LARGEST, largest)
    return at == rows * row_bytes


@device
def _exposure(state: int, plan: int, x: int, out: int) -> int:
    """Do the others read the input where it lies (EXPOSED, and maybe PRIVATE)? If that is worth a step more."""
    if x == out and load_i64(plan + PL_FOLD) >= 0 and load_i64(plan + PL_TWO_STEP) == 0:
        return 0  # results would overwrite what others still read
    staged_bytes = load_i64(plan + PL_X_BYTES)
    if load_i64(plan + PL_BYTES) < 0:
        staged_bytes = load_i64(state + CS_LARGEST) * load_i64(state + CS_RANKS)
    within = x - segment_of(state, load_i64(state + CS_RANK))
    if 0 <= within < load_i64(state + CS_SEGMENT_BYTES):
        return EXPOSED if staged_bytes >= load_i64(plan + PL_EXPOSE) else 0
    return EXPOSED | PRIVATE if staged_bytes >= load_i64(plan + PL_EXPOSE_PRIVATE) else 0


@device
def _begin(state: int, plan: int, x: int, x_rows: int, out: int) -> bool:
    store_i64(state + CS_LARGEST, 0)
    if load_i64(plan + PL_BYTES) < 0 and not _plan_rows(state, plan, x_rows):
        return False
    store_i64(state + CS_PLAN, plan)
    store_i64(state + CS_INDEX, 0)
    store_i64(state + CS_STEPS, load_i64(plan + PL_STEPS))
    store_i64(state + CS_CHUNK, load_i64(plan + PL_CHUNK))
    store_i64(state + CS_EXPOSED, _exposure(state, plan, x, out))
    store_i64(state + CS_CLOSES, 0)
    store_i64(state + CS_TAKES, 1)
    return True


@device
def _is_closing(state: int) -> bool:
    """Is this the step that says that inputs were read?"""
    return load_i64(state + CS_CLOSES) != 0 and load_i64(state + CS_INDEX) + 1 == load_i64(state + CS_STEPS)


@device
def _publish(state: int, plan: int, x: int) -> None:
    """Stage and announce the next step."""
    step = load_i64(state + CS_STEP) + 1
    if load_i64(plan + PL_TWO_STEP) != 0:
        stage_window(state, plan, x, step)
    elif not _is_closing(state):
        stage(state, plan, x, step)
    store_i64(state + CS_STEP, step)
    store_i64(state + CS_CURSOR, 0)
    say(state, plan, x, step)


@device
def _learn(state: int, plan: int, out_rows: int, step: int) -> int:
    """After the first step: do the ranks agree, and what is yet to come?"""
    if not all_agree(state, plan, step):
        return MISMATCH
    ragged = load_i64(plan + PL_BYTES) < 0
    if ragged:
        learn_sizes(state, plan, step, out_rows)
    if load_i64(plan + PL_INLINE) == 0:
        learn_exposed(state, plan, step)
    return SIZES_KNOWN if ragged and out_rows < 0 and load_i64(state + CS_TAKES) != 0 else OK


@kernel("int64(int64, int64, int64, int64, int64, int64, int64)")
def collective(state: int, plan: int, x: int, x_rows: int, out: int, out_rows: int, until_ns: int) -> int:
    """Begin a call, or go on with the one that is under way.

    Args:
        state: address of the communicator's state.
        plan: address of the call's plan.
        x: address of the input; anything if there is none.
        x_rows: alltoallv: rows of the input.
        out: address of the output; 0 if there is none.
        out_rows: alltoallv: rows that the output has room for; below 0 if it is to be made when sizes are known.
        until_ns: when to return at the latest; below 0: so many ns from the first wait on; 0: do not wait.

    Returns:
        OK, SLICE, ABORTED, PENDING; MISMATCH if ranks disagree about the call: nothing was moved; or SIZES_KNOWN, BUSY,
        UNFIT, WRONG_ROWS, UNREACHABLE.
    """
    phase = load_i64(state + CS_PHASE)
    if phase == IDLE:
        if not _begin(state, plan, x, x_rows, out):
            return UNFIT
        phase = PUBLISH
    elif load_i64(state + CS_PLAN) != plan:
        return BUSY
    two_step, fold = load_i64(plan + PL_TWO_STEP) != 0, load_i64(plan + PL_FOLD)
    while True:
        index = load_i64(state + CS_INDEX)
        if phase == PUBLISH:
            _publish(state, plan, x)
            if out != 0 and fold < 0 and _is_closing(state) and load_i64(state + CS_TAKES) != 0:
                take_own(state, plan, x, out)  # while the others finish
            phase = AWAIT
        step = load_i64(state + CS_STEP)
        if phase == AWAIT:
            status = await_all(state, step, until_ns)
            if status != OK:
                store_i64(state + CS_PHASE, AWAIT)
                return status
            if index == 0:
                status = _learn(state, plan, out_rows, step)
                if status != OK:
                    store_i64(state + CS_PHASE, IDLE if status == MISMATCH else CONSUME)
                    return status
        size = 0
        makes = two_step and index + 1 < load_i64(state + CS_STEPS)
        if two_step:
            if index > 0:
                gather_results(state, plan, out, step)
            if makes:
                size = slice_operands(state, plan, x, step)
        elif not _is_closing(state):
            if fold >= 0:
                size = part_operands(state, plan, x, out, step)
            elif load_i64(state + CS_TAKES) != 0 and out != 0:
                if index == 0 and load_i64(state + CS_CLOSES) == 0:
                    take_own(state, plan, x, out)
                if not take_parts(state, plan, out, step):
                    store_i64(state + CS_PHASE, CONSUME)
                    return UNREACHABLE
        if size > 0:
            n = size // load_i64(plan + PL_ITEM_BYTES)
            fold_rows(fold, load_i64(state + CS_ROWS), load_i64(state + CS_RANKS), n, load_i64(state + CS_TARGET))
            meter(state, METER_FOLD, load_i64(state + CS_RANK), size)
        if makes:
            keep_slice(state, plan, out)
        if index + 1 >= load_i64(state + CS_STEPS):
            store_i64(state + CS_PHASE, IDLE)
            return OK if load_i64(state + CS_TAKES) != 0 else WRONG_ROWS
        store_i64(state + CS_INDEX, index + 1)
        phase = PUBLISH


@kernel("void(int64, int64)")
def refuse(state: int, plan: int) -> None:
    """Publish a step that no other rank agrees with, and wait for nobody; `collective` with this plan waits."""
    _begin(state, plan, 0, 0, 0)
    _publish(state, plan, 0)
    store_i64(state + CS_PHASE, AWAIT)


@kernel("void(int64, int64, int64)")
def read_said(state: int, out: int, n_bytes: int) -> None:
    """The first `n_bytes` of what the others said inside of their records in the last step; before the next call.

    Args:
        state: address of the communicator's state.
        out: address of [ranks, n_bytes]; the own row stays as it is.
        n_bytes: at most INLINE_BYTES.
    """
    step = load_i64(state + CS_STEP)
    for peer in range(load_i64(state + CS_RANKS)):
        if peer != load_i64(state + CS_RANK):
            copy_bytes(out + peer * n_bytes, record_of(state, peer, step) + CR_PAYLOAD, n_bytes)
