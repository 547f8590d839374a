"""Sums of the rows that experts return: of a token, in any protocol, and of a deduplicated row at its rank."""

from __future__ import annotations

from ..layout.moe import (
    EP_DTYPE,
    EP_HIDDEN,
)
from ._jit import device, kernel
from .atomics import load_f32, load_i32, load_i64, store_f32, store_i64
from .reduce import weighted_sum_rows


@device
def add_operand(addresses: int, gates: int, n: int, address: int, weight: float) -> int:
    """Note the operand behind `n` others of a sum: where it is, and its gate weight. How many there are then."""
    store_i64(addresses + 8 * n, address)
    store_f32(gates + 4 * n, weight)
    return n + 1


@device
def sum_operands(state: int, addresses: int, gates: int, n: int, shared: int, y: int) -> None:
    """Sum the rows of a token in the order in which they were noted, and last the output of a shared expert.

    Args:
        state: address of the ExpertParallel state.
        addresses: address of int64 [n + 1], the rows.
        gates: address of float32 [n + 1], their weights.
        n: how many were noted.
        shared: address of the row of the shared expert; 0 for none.
        y: address of the output row.
    """
    if shared != 0:
        n = add_operand(addresses, gates, n, shared, 1.0)
    weighted_sum_rows(load_i64(state + EP_DTYPE), addresses, gates, n, load_i64(state + EP_HIDDEN), y)


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def reduce_local(
    code: int,
    hidden: int,
    row_bytes: int,
    rows: int,
    entries: int,
    index: int,
    weights: int,
    expert_out: int,
    scratch: int,
    partial: int,
) -> None:
    """Sum the outputs of each row's local experts with their weights, in the order of the token's slots.

    Args:
        code: element type.
        hidden: elements of a row.
        row_bytes: bytes of a row.
        rows: number of rows.
        entries: number of entries.
        index: address of int32 [entries][3]: row, expert, slot.
        weights: address of float32 [entries].
        expert_out: address of [entries, hidden], in the order of the index.
        scratch: address of int64 [rows + 1 + 4 * entries].
        partial: address of the output [rows, hidden].
    """
    starts = scratch
    order = starts + 8 * (rows + 1)
    addresses = order + 8 * entries
    gates = addresses + 8 * entries
    for r in range(rows + 1):
        store_i64(starts + 8 * r, 0)
    for i in range(entries):
        at = starts + 8 * (load_i32(index + 12 * i) + 1)
        store_i64(at, load_i64(at) + 1)
    for r in range(rows):
        store_i64(starts + 8 * (r + 1), load_i64(starts + 8 * (r + 1)) + load_i64(starts + 8 * r))
    # Entries of a row by slot: each moves down until it meets one with a lower slot, or the row's start.
    filled = addresses
    for r in range(rows):
        store_i64(filled + 8 * r, load_i64(starts + 8 * r))
    for i in range(entries):
        r = load_i32(index + 12 * i)
        slot = load_i32(index + 12 * i + 8)
        at = load_i64(filled + 8 * r)
        store_i64(filled + 8 * r, at + 1)
        while at > load_i64(starts + 8 * r) and load_i32(index + 12 * load_i64(order + 8 * (at - 1)) + 8) > slot:
            store_i64(order + 8 * at, load_i64(order + 8 * (at - 1)))
            at -= 1
        store_i64(order + 8 * at, i)
    for r in range(rows):
        first, n = load_i64(starts + 8 * r), load_i64(starts + 8 * (r + 1)) - load_i64(starts + 8 * r)
        for j in range(n):
            i = load_i64(order + 8 * (first + j))
            add_operand(addresses, gates, j, expert_out + i * row_bytes, load_f32(weights + 4 * i))
        weighted_sum_rows(code, addresses, gates, n, hidden, partial + r * row_bytes)
