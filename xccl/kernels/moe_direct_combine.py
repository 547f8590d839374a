"""Direct combine; see `moe_direct`."""

from __future__ import annotations

from ..layout.moe import (
    EP_RANKS,
    EP_RETURN_BYTES,
    EP_SCRATCH,
    EP_TOP_K,
    RT_EPOCH,
    RT_ROW_OF,
    RT_ROWS,
    RT_TOKENS,
)
from ..layout.moe_direct import (
    DF_DISPATCH,
    DF_READ,
    DF_READY,
    DF_RETURNS,
    DI_FIELDS,
    DI_RESULT,
    DI_STAGE,
    DIRECT_FIELD_BYTES,
)
from ._jit import device, kernel
from .atomics import load_f32, load_i64, store_i64
from .copy import copy_bytes_auto
from .moe import (
    ROW_BITS,
    ROW_MASK,
    own_segment,
    segment,
    tell_all,
)
from .moe_direct import await_direct, direct_field_at, direct_field_from
from .moe_sums import add_operand, sum_operands
from .wait import MISMATCH, OK

#: Stages.
RETURN, ANNOUNCE_RETURNS, AWAIT_READY, REDUCE, RELEASE, AWAIT_READ, COMBINED = range(7)


@device
def _reduce(state: int, direct: int, routing: int, weights: int, shared: int, y: int) -> int:
    """Sum the rows of each token where they lie, in slot order; MISMATCH if rank `result` returns other rows."""
    epoch = load_i64(routing + RT_EPOCH)
    for peer in range(load_i64(state + EP_RANKS)):
        if load_i64(direct_field_from(state, direct, peer) + DF_DISPATCH) != epoch:
            store_i64(direct + DI_RESULT, peer)
            return MISMATCH
    top_k, row_bytes = load_i64(state + EP_TOP_K), load_i64(state + EP_RETURN_BYTES)
    row_of = load_i64(routing + RT_ROW_OF)
    addresses = load_i64(state + EP_SCRATCH)
    gates = addresses + 8 * (top_k + 1)
    # Backwards: the rows that were written last by the dispatch before, and are read first by the next one, are cached.
    for t in range(load_i64(routing + RT_TOKENS) - 1, -1, -1):
        n = 0
        for k in range(top_k):
            i = t * top_k + k
            row = load_i64(row_of + 8 * i)
            if row < 0:
                continue
            peer = row >> ROW_BITS
            rows = segment(state, peer) + load_i64(direct_field_from(state, direct, peer) + DF_RETURNS)
            address = rows + (row & ROW_MASK) * row_bytes
            n = add_operand(addresses, gates, n, address, 1.0 if weights == 0 else load_f32(weights + 4 * i))
        sum_operands(state, addresses, gates, n, 0 if shared == 0 else shared + t * row_bytes, y + t * row_bytes)
    return OK


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def combine(
    state: int,
    direct: int,
    routing: int,
    epoch: int,
    expert_out: int,
    returns: int,
    weights: int,
    shared: int,
    y: int,
    stop: int,
    until_ns: int,
) -> int:
    """A combine, up to a stage.

    Args:
        state: see above.
        direct: see above; `stage` and `cursor` are 0 at first.
        routing: see above; of the dispatch.
        epoch: of this combine.
        expert_out: address of [rows, hidden], to be copied to `returns`; 0 if they lie there already.
        returns: offset in the own segment where peers find the rows.
        weights: address of float32 [tokens, top_k]; 0 for weights of 1.
        shared: address of [tokens, hidden] to be added last; 0 for none.
        y: address of the output [tokens, hidden].
        stop: number of stages to be done.
        until_ns: when to give up waiting for now.

    Returns:
        OK; SLICE, MOVED, ABORTED or PENDING of a wait; MISMATCH if rank `result` combines another dispatch.
    """
    began = stage = load_i64(direct + DI_STAGE)
    if stage == RETURN and stage < stop:
        if expert_out != 0:
            n_bytes = load_i64(routing + RT_ROWS) * load_i64(state + EP_RETURN_BYTES)
            copy_bytes_auto(own_segment(state) + returns, expert_out, n_bytes)
        stage = ANNOUNCE_RETURNS
    if stage == ANNOUNCE_RETURNS and stage < stop:
        for peer in range(load_i64(state + EP_RANKS)):
            field = direct_field_at(state, direct, peer)
            store_i64(field + DF_RETURNS, returns)
            store_i64(field + DF_DISPATCH, load_i64(routing + RT_EPOCH))
        # SYNC POINT direct-returns: released after the experts' outputs, and where they are.
        tell_all(state, load_i64(direct + DI_FIELDS), DIRECT_FIELD_BYTES, DF_READY, epoch)
        stage = AWAIT_READY
    if stage == AWAIT_READY and stage < stop:
        # SYNC POINT direct-returns: acquires the outputs of all.
        status = await_direct(state, direct, DF_READY, epoch, stage, began, until_ns)
        if status != OK:
            return status
        stage = REDUCE
    if stage == REDUCE and stage < stop:
        status = _reduce(state, direct, routing, weights, shared, y)
        if status != OK:
            return status
        stage = RELEASE
    if stage == RELEASE and stage < stop:
        # SYNC POINT direct-read: released after the last read.
        tell_all(state, load_i64(direct + DI_FIELDS), DIRECT_FIELD_BYTES, DF_READ, epoch)
        stage = AWAIT_READ
    if stage == AWAIT_READ and stage < stop:
        # SYNC POINT direct-read: acquires that all have read what lies here; it may be overwritten then.
        status = await_direct(state, direct, DF_READ, epoch, stage, began, until_ns)
        if status != OK:
            return status
        stage = COMBINED
    store_i64(direct + DI_STAGE, stage if stage < COMBINED else RETURN)
    return OK
