"""Dispatch and combine by the direct protocol, straight from Python. The rule is that of `kernels.calls`.

Between two operations the caches are full of rows, and all that Python touches is read from memory again: the checks of
a call that takes 10 microseconds alone take 30 then, and ranks that share a core do them one after the other. So what
is as usual is checked here. Whatever is not (NOT_MADE) was not begun.
"""

from __future__ import annotations

from ..layout.calls import CA_BEGAN_NS, CA_INT64, CA_NONE, CA_SLICE_NS
from ..layout.moe import (
    EP_HIDDEN,
    EP_RETURN_BYTES,
    EP_TOP_K,
    ROUTING_WORDS,
    RT_EPOCH,
    RT_ROOT,
    RT_ROWS,
    RT_TOKENS,
)
from ..layout.moe_direct import (
    DI_CAPACITY,
    DI_DEDUP,
    DI_SLOT,
    SLOTS,
    XC_CALLS,
    XC_CAPACITIES,
    XC_COMBINE,
    XC_DIRECT,
    XC_DISPATCH,
    XC_DTYPE,
    XC_FLOAT32,
    XC_HEAD,
    XC_MAX_TOKENS,
    XC_OFFSETS,
    XC_RETURNS,
    XC_RETURNS_BYTES,
    XC_SEGMENT_BYTES,
    XC_STATE,
)
from ._jit import device
from .atomics import load_i64, store_i64
from .calls import must_detour
from .fastcall import call_kernel, fastcall, release_lock, take_lock
from .moe import own_segment
from .moe_direct import DISPATCHED
from .moe_direct_combine import COMBINED
from .objects import (
    argument,
    array_address,
    array_bytes,
    array_dims,
    array_dtype,
    array_row_bytes,
    array_rows,
    as_index,
    new_int,
    own_state,
)
from .wait import now_ns

#: The call was not made: make the long one. No status of the kernels of the protocol is the same.
NOT_MADE = 64

_MAX_EPOCH = (1 << 62) - 1


@device
def _is_table(calls: int, found: int, dtype: int, rows: int, row_bytes: int, writable: bool) -> bool:
    """Is an object a plain array of that dtype with two dimensions, so many rows, and so many bytes in each?"""
    if array_bytes(calls, found, writable) < 0 or array_dtype(found) != dtype or array_dims(found) != 2:
        return False
    return array_rows(found) == rows and array_row_bytes(found) == row_bytes


@device
def _until(calls: int) -> int:
    """When the kernel is to return at the latest; the wait is taken to begin now."""
    began_ns = now_ns()
    store_i64(calls + CA_BEGAN_NS, began_ns)
    return began_ns + load_i64(calls + CA_SLICE_NS)


@device
def _begin_routing(record: int, routing: int, tokens: int, epoch: int) -> None:
    """Fill the head of a routing record: two words of the object's for each, an offset and if it is an address."""
    head = load_i64(record + XC_HEAD)
    for i in range(ROUTING_WORDS):
        store_i64(routing + 8 * i, load_i64(head + 16 * i) + load_i64(head + 16 * i + 8) * routing)
    store_i64(routing + RT_TOKENS, tokens)
    store_i64(routing + RT_EPOCH, epoch)
    store_i64(routing + RT_ROOT, epoch)


@device
def _dispatch(record: int, args: int) -> int:
    calls, state = load_i64(record + XC_CALLS), load_i64(record + XC_STATE)
    direct, none = load_i64(record + XC_DIRECT), load_i64(calls + CA_NONE)
    x, topk_idx, gates = argument(args, 0), argument(args, 1), argument(args, 2)
    slot = as_index(calls, argument(args, 4), 0, SLOTS - 1)
    epoch = as_index(calls, argument(args, 5), 1, _MAX_EPOCH)
    out_of_the_ordinary = must_detour(calls)
    if out_of_the_ordinary or slot < 0 or epoch < 0 or array_bytes(calls, x, False) < 0 or array_dims(x) != 2:
        return NOT_MADE
    tokens, top_k = array_rows(x), load_i64(state + EP_TOP_K)
    if tokens > load_i64(record + XC_MAX_TOKENS) or array_dtype(x) != load_i64(record + XC_DTYPE):
        return NOT_MADE
    if array_row_bytes(x) != load_i64(state + EP_RETURN_BYTES):
        return NOT_MADE
    if not _is_table(calls, topk_idx, load_i64(calls + CA_INT64), tokens, 8 * top_k, False):
        return NOT_MADE
    weights = 0
    if load_i64(direct + DI_DEDUP) != 0:
        if not _is_table(calls, gates, load_i64(record + XC_FLOAT32), tokens, 4 * top_k, False):
            return NOT_MADE
        weights = array_address(gates)
    elif gates != none:
        return NOT_MADE
    routing = array_address(argument(args, 3))
    _begin_routing(record, routing, tokens, epoch)
    store_i64(direct + DI_SLOT, load_i64(load_i64(record + XC_OFFSETS) + 8 * slot))
    store_i64(direct + DI_CAPACITY, load_i64(load_i64(record + XC_CAPACITIES) + 8 * slot))
    kernel, until_ns = load_i64(record + XC_DISPATCH), _until(calls)
    tokens_at, chosen_at = array_address(x), array_address(topk_idx)
    thread = release_lock()
    status = call_kernel(kernel, (state, direct, routing, tokens_at, chosen_at, weights, DISPATCHED, until_ns))
    take_lock(thread)
    return status


@fastcall
def dispatch(self, args, count):  # type: ignore[no-untyped-def]
    """(x, topk_idx, gates, routing, slot, epoch) -> the kernel's status, or NOT_MADE.

    `routing` is an int64 array that has room for a routing of so many tokens.
    """
    return new_int(_dispatch(own_state(self), args))


@device
def _combine(record: int, args: int) -> int:
    calls, state = load_i64(record + XC_CALLS), load_i64(record + XC_STATE)
    direct, none = load_i64(record + XC_DIRECT), load_i64(calls + CA_NONE)
    expert_out, weights, y = argument(args, 0), argument(args, 2), argument(args, 3)
    epoch = as_index(calls, argument(args, 4), 1, _MAX_EPOCH)
    out_of_the_ordinary = must_detour(calls)
    if out_of_the_ordinary or epoch < 0:
        return NOT_MADE
    routing = array_address(argument(args, 1))
    rows, tokens = load_i64(routing + RT_ROWS), load_i64(routing + RT_TOKENS)
    dtype, row_bytes = load_i64(record + XC_DTYPE), load_i64(state + EP_RETURN_BYTES)
    if not _is_table(calls, expert_out, dtype, rows, row_bytes, False):
        return NOT_MADE
    if not _is_table(calls, y, dtype, tokens, row_bytes, True):
        return NOT_MADE
    gates = 0
    if load_i64(direct + DI_DEDUP) == 0:
        if not _is_table(calls, weights, load_i64(record + XC_FLOAT32), tokens, 4 * load_i64(state + EP_TOP_K), False):
            return NOT_MADE
        gates = array_address(weights)
    elif weights != none:
        return NOT_MADE
    # Peers read it where it is: whole in the own segment, and not where the result goes. Else it is copied.
    copied, result, n_bytes = array_address(expert_out), array_address(y), rows * row_bytes
    returns = copied - own_segment(state)
    is_here = 0 <= returns <= load_i64(record + XC_SEGMENT_BYTES) - n_bytes
    is_aligned = copied % (row_bytes // load_i64(state + EP_HIDDEN)) == 0
    if is_here and is_aligned and (result >= copied + n_bytes or result + tokens * row_bytes <= copied):
        copied = 0
    elif n_bytes <= load_i64(record + XC_RETURNS_BYTES):
        returns = load_i64(record + XC_RETURNS)
    else:
        return NOT_MADE
    kernel, until_ns = load_i64(record + XC_COMBINE), _until(calls)
    thread = release_lock()
    status = call_kernel(kernel, (state, direct, routing, epoch, copied, returns, gates, 0, result, COMBINED, until_ns))
    take_lock(thread)
    return status


@fastcall
def combine(self, args, count):  # type: ignore[no-untyped-def]
    """(expert_out, routing, weights, y, epoch) -> the kernel's status, or NOT_MADE."""
    return new_int(_combine(own_state(self), args))
