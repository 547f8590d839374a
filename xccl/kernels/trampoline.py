"""What a trampoline does besides, between attention dies and expert dies (XDS §3.3). See `xccl.comm.a2e`.

A2E: it collects all rows of its attention dies, block after block, and forwards them to the expert dies. E2A: it
gathers the outputs for its attention dies from all expert dies, in the order of those blocks, and hands them on.
"""

from __future__ import annotations

from ..layout.a2e import (
    DIE_EXPERTS,
    DIE_FIRSTS,
    DIE_HANDED,
    DIE_LOCAL_EXPERTS,
    DIE_PLACES,
    DIE_QUANT,
    DIE_RETURN_BYTES,
    DIE_RETURNS,
    DIE_ROW_BYTES,
    DIE_ROWS,
    DIE_SCALES,
    DIE_SEGMENT,
    PEER_BYTES,
    PEER_SEGMENT,
    PEER_THEIRS,
)
from ..layout.moe import EXF_BLOCK, EXF_COUNT
from ._jit import device, kernel
from .atomics import load_i32, load_i64, store_i32
from .copy import copy_bytes, copy_bytes_auto
from .fields import announce, count_of, tagged
from .wait import OK


@kernel("int64(int64, int64, int64)")
def collect(die: int, served: int, count: int) -> int:
    """A2E, pull: all that each attention die served has written, into one block each.

    Args:
        die: address of the expert die state.
        served: table of the attention dies that this trampoline serves.
        count: how many.

    Returns:
        Rows in all, or -1 - j if attention die j's table contradicts its field.
    """
    own = load_i64(die + DIE_SEGMENT)
    experts = load_i64(die + DIE_EXPERTS)
    row_bytes = load_i64(die + DIE_ROW_BYTES)
    base = 0
    for j in range(count):
        peer = served + PEER_BYTES * j
        segment = load_i64(peer + PEER_SEGMENT)
        rows = count_of(peer)
        table = segment + load_i64(die + DIE_FIRSTS)
        if load_i32(table) != 0 or load_i32(table + 4 * experts) != rows:
            return -1 - j
        own_table = own + load_i64(die + DIE_FIRSTS) + 4 * j * (experts + 1)
        for e in range(experts + 1):
            store_i32(own_table + 4 * e, base + load_i32(table + 4 * e))
        copy_bytes(own + load_i64(die + DIE_PLACES) + 8 * base, segment + load_i64(die + DIE_PLACES), 8 * rows)
        if load_i64(die + DIE_QUANT) != 0:
            copy_bytes(own + load_i64(die + DIE_SCALES) + 4 * base, segment + load_i64(die + DIE_SCALES), 4 * rows)
        copy_bytes_auto(
            own + load_i64(die + DIE_ROWS) + base * row_bytes, segment + load_i64(die + DIE_ROWS), rows * row_bytes
        )
        base += rows
    return base


@device
def _rows_of(die: int, tables: int, served: int, expert_die: int) -> int:
    """Rows from all attention dies served to one expert die."""
    local = load_i64(die + DIE_LOCAL_EXPERTS)
    table_bytes = 4 * (load_i64(die + DIE_EXPERTS) + 1)
    total = 0
    for j in range(served):
        at = tables + j * table_bytes + 4 * expert_die * local
        total += load_i32(at + 4 * local) - load_i32(at)
    return total


@kernel("void(int64, int64, int64, int64, int64, int64)")
def forward(die: int, expert_dies: int, count: int, start: int, served: int, event: int) -> None:
    """A2E, forward-announce: tell each expert die how many rows there are for it; the tables say where."""
    local = load_i64(die + DIE_LOCAL_EXPERTS)
    tables = load_i64(die + DIE_SEGMENT) + load_i64(die + DIE_FIRSTS)
    for i in range(count):
        x = (start + i) % count
        first = load_i32(tables + 4 * x * local)
        announce(expert_dies + PEER_BYTES * x, event, first, _rows_of(die, tables, served, x), event)


@kernel("int64(int64, int64, int64, int64, int64, int64)")
def gather_check(die: int, expert_dies: int, count: int, tables: int, served: int, epoch: int) -> int:
    """Does each expert die return what was forwarded to it? OK, or -1 - x for the first that does not."""
    for x in range(count):
        theirs = load_i64(expert_dies + PEER_BYTES * x + PEER_THEIRS)
        if theirs == 0:
            continue
        if load_i64(theirs + EXF_COUNT) != tagged(_rows_of(die, tables, served, x), epoch):
            return -1 - x
    return OK


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def gather(die: int, expert_dies: int, count: int, start: int, tables: int, served: int, own_first: int) -> None:
    """E2A, pull: outputs from all expert dies, into the blocks of their attention dies.

    Args:
        die: address of the expert die state.
        expert_dies: table of them, the own one among them.
        count: how many.
        start: with which to begin.
        tables: address of int32 [served][experts + 1]: the rows as they were forwarded.
        served: attention dies that this trampoline serves.
        own_first: where the own outputs for them lie in the own managed area.
    """
    own = load_i64(die + DIE_SEGMENT)
    local = load_i64(die + DIE_LOCAL_EXPERTS)
    table_bytes = 4 * (load_i64(die + DIE_EXPERTS) + 1)
    row_bytes = load_i64(die + DIE_RETURN_BYTES)
    for i in range(count):
        x = (start + i) % count
        peer = expert_dies + PEER_BYTES * x
        theirs = load_i64(peer + PEER_THEIRS)
        row = own_first if theirs == 0 else load_i64(theirs + EXF_BLOCK)
        source = load_i64(peer + PEER_SEGMENT) + load_i64(die + DIE_RETURNS)
        for j in range(served):
            at = tables + j * table_bytes + 4 * x * local
            first = load_i32(at)
            rows = load_i32(at + 4 * local) - first
            copy_bytes_auto(
                own + load_i64(die + DIE_HANDED) + first * row_bytes, source + row * row_bytes, rows * row_bytes
            )
            row += rows


@kernel("void(int64, int64, int64, int64, int64, int64)")
def hand(die: int, served: int, count: int, tables: int, event: int, epoch: int) -> None:
    """E2A, forward-announce: tell each attention die served where its outputs are."""
    table_bytes = 4 * (load_i64(die + DIE_EXPERTS) + 1)
    for j in range(count):
        first = load_i32(tables + j * table_bytes)
        rows = load_i32(tables + (j + 1) * table_bytes - 4) - first
        announce(served + PEER_BYTES * j, event, first, rows, epoch)
