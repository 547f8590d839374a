"""Checks of what callers pass to the operations on experts: tokens, choices, outputs and gate weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError, UsageError
from ..layout.dtypes import BF16, CODE_OF, FP16, FP32, NAME_OF
from .buffers import address_of, readable, require_int, writable


def require_float(dtype: npt.DTypeLike) -> tuple[np.dtype[Any], int]:
    """A dtype that tokens may have, and its code.

    Raises:
        UsageError: it is neither bfloat16, float16 nor float32.
    """
    try:
        found: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        raise UsageError(f"dtype must be bfloat16, float16 or float32, got {dtype!r}", value=dtype) from None
    code = CODE_OF.get(found)
    if code not in (BF16, FP16, FP32):
        names = ", ".join(NAME_OF[c] for c in (BF16, FP16, FP32))
        raise UsageError(f"dtype must be one of {names}, got {found}", value=str(found))
    return found, code


def require_choice(value: str, name: str, choices: tuple[str, ...]) -> str:
    """The value, if it is one of `choices`; UsageError if not."""
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}, got {value!r}", value=value, bound=choices)
    return value


def check_x(
    x: npt.NDArray[Any], *, dtype: np.dtype[Any], hidden: int, top_k: int, max_tokens: int, row_bytes: int
) -> npt.NDArray[Any]:
    """Tokens as a C-contiguous array.

    Args:
        x: [tokens, hidden].
        dtype: that x must have.
        hidden: elements of a token.
        top_k: slots of a token.
        max_tokens: the most tokens at once.
        row_bytes: of a row sent, to say how much memory would be needed.

    Raises:
        UsageError: the dtype or the shape is wrong.
        CapacityError: more tokens than max_tokens.
    """
    x = readable(x, "x")
    if x.dtype != dtype:
        raise UsageError(f"x must be {dtype}, got {x.dtype}", value=str(x.dtype), bound=str(dtype))
    if x.ndim != 2 or x.shape[1] != hidden:
        raise UsageError(f"x must have shape [tokens, {hidden}], got {x.shape}", value=x.shape, bound=hidden)
    tokens = x.shape[0]
    if tokens > max_tokens:
        raise CapacityError(
            f"x has {tokens} tokens, max_tokens is {max_tokens}; it must be at least {tokens}",
            needed_bytes=tokens * top_k * row_bytes, available_bytes=max_tokens * top_k * row_bytes,
            value=tokens, bound=max_tokens,
        )  # fmt: skip
    return x


def check_choices(topk_idx: npt.NDArray[Any], *, tokens: int, top_k: int, num_experts: int) -> npt.NDArray[np.int64]:
    """Choices as a C-contiguous array; whether the experts exist is for `kernels.moe_routing.route` to find.

    Args:
        topk_idx: integers [tokens, top_k].
        tokens: how many there are.
        top_k: slots of a token.
        num_experts: experts in all.

    Raises:
        UsageError: the dtype or the shape is wrong.
    """
    idx = readable(topk_idx, "topk_idx")
    if idx.dtype.kind not in "iu":
        raise UsageError(f"topk_idx must be integers, got {idx.dtype}", value=str(idx.dtype))
    if idx.shape != (tokens, top_k):
        raise UsageError(
            f"topk_idx must have shape ({tokens}, {top_k}), got {idx.shape}", value=idx.shape, bound=(tokens, top_k)
        )
    if idx.dtype == np.uint64 and idx.size and idx.max() >= num_experts:  # would wrap to negative numbers
        raise UsageError(
            f"topk_idx has {idx.max()}, allowed are -1 to {num_experts - 1}",
            value=int(idx.max()), bound=num_experts - 1,
        )  # fmt: skip
    return idx.astype(np.int64, copy=False)


def check_active(active: npt.NDArray[Any] | int, tokens: int) -> npt.NDArray[np.bool_]:
    """Which tokens are active, bool [tokens], from such a mask or from how many of the first ones are.

    Raises:
        UsageError: it is neither, or there are not so many tokens.
    """
    if isinstance(active, np.ndarray):
        if active.dtype != np.bool_ or active.shape != (tokens,):
            raise UsageError(
                f"active must be bool ({tokens},) or a number of tokens, got {active.dtype} {active.shape}",
                value=active.shape, bound=tokens,
            )  # fmt: skip
        return active
    return np.arange(tokens) < require_int(active, "active", 0, tokens)


def bad_choice(topk_idx: npt.NDArray[np.int64], element: int, num_experts: int) -> UsageError:
    """The error for an element of `topk_idx` that is no expert."""
    t, k = divmod(element, topk_idx.shape[1])
    return UsageError(
        f"topk_idx[{t}, {k}] is {topk_idx[t, k]}, allowed are -1 to {num_experts - 1}",
        value=int(topk_idx[t, k]), bound=num_experts - 1,
    )  # fmt: skip


def check_outputs(expert_out: npt.NDArray[Any], shape: tuple[int, int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The outputs of experts as a C-contiguous array.

    Raises:
        UsageError: the dtype or the shape is wrong.
    """
    out = readable(expert_out, "expert_out")
    if out.dtype != dtype:
        raise UsageError(f"expert_out must be {dtype}, got {out.dtype}", value=str(out.dtype), bound=str(dtype))
    if out.shape != shape:
        raise UsageError(f"expert_out must have shape {shape}, got {out.shape}", value=out.shape, bound=shape)
    return out


def check_output(out: npt.NDArray[Any], shape: tuple[int, int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Memory for a result.

    Raises:
        UsageError: the dtype or the shape is wrong, or it cannot be written into.
    """
    out = writable(out, "out")
    if out.dtype != dtype or out.shape != shape:
        raise UsageError(f"out must be {dtype} {shape}, got {out.dtype} {out.shape}", value=out.shape, bound=shape)
    return out


def check_shared(
    shared_out: npt.NDArray[Any], shape: tuple[int, int], dtype: np.dtype[Any], y: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """The output of a shared expert as a C-contiguous array that does not overlap `y`, unless it is `y` itself.

    Raises:
        UsageError: the dtype or the shape is wrong.
    """
    shared = readable(shared_out, "shared_out")
    if shared.dtype != dtype or shared.shape != shape:
        raise UsageError(
            f"shared_out must be {dtype} {shape}, got {shared.dtype} {shared.shape}", value=shared.shape, bound=shape
        )
    return shared.copy() if np.may_share_memory(shared, y) and address_of(shared) != address_of(y) else shared


def check_weights(topk_weights: npt.NDArray[Any], shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Gate weights as a C-contiguous float32 array.

    Raises:
        UsageError: they are no floats, or the shape is wrong.
    """
    weights = readable(topk_weights, "topk_weights")
    if weights.shape != shape:
        raise UsageError(f"topk_weights must have shape {shape}, got {weights.shape}", value=weights.shape, bound=shape)
    if weights.dtype != np.float32:
        if weights.dtype.kind != "f" and CODE_OF.get(weights.dtype) != BF16:
            raise UsageError(f"topk_weights must be floating point, got {weights.dtype}", value=str(weights.dtype))
        weights = weights.astype(np.float32)
    return weights
