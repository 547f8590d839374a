"""What tests of several ranks share: a launch with deadlines, comparisons bit for bit, and inputs for dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

import xccl
from xccl import reference

Array = npt.NDArray[Any]

BF16: Final = np.dtype(ml_dtypes.bfloat16)
FP16: Final = np.dtype(np.float16)
FP32: Final = np.dtype(np.float32)
FLOATS: Final = [BF16, FP16, FP32]

#: Kinds of numbers that `numbers` makes.
KINDS: Final = ["normal", "wide", "subnormal", "any bits", "specials"]

#: No test waits longer than this for anything; pytest's own limit is above it.
LAUNCH_TIMEOUT_S: Final = 60.0
OP_TIMEOUT_S: Final = 20.0


def launch(main: Callable[..., Any], ranks: int, fabric: str, **options: Any) -> list[Any]:
    """`xccl.launch` with the deadlines of tests."""
    options = {"timeout_s": LAUNCH_TIMEOUT_S, "op_timeout_s": OP_TIMEOUT_S} | options
    return xccl.launch(main, ranks, fabric=fabric, **options)


def error_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> BaseException | None:
    """What a call raises, or None: a rank returns it, and the parent judges those of all ranks."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return error.with_traceback(None)
    return None


def bits(array: Array) -> Array:
    """The elements as bytes, so that NaNs compare, and signs of zeros count."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def assert_same(actual: Array | None, expected: Array | None, what: str = "") -> None:
    """Same shape, dtype and bits."""
    if actual is None or expected is None:
        assert actual is expected, f"{what}: {actual!r}, expected {expected!r}"
        return
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    if actual.size and not np.array_equal(bits(actual), bits(expected)):
        wrong = np.flatnonzero(bits(actual) != bits(expected))
        where = np.unravel_index(wrong[0] // actual.itemsize, actual.shape)
        at = tuple(int(i) for i in where)
        raise AssertionError(
            f"{what}: {wrong.size} wrong bytes of {actual.nbytes}, the first in element {at}: "
            f"{actual[at]!r} ({actual[at].tobytes().hex()}), expected {expected[at]!r} ({expected[at].tobytes().hex()})"
        )


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any], kind: str) -> Array:
    """Numbers of one of the `KINDS`."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    if kind == "any bits":
        return rng.integers(0, 1 << (8 * dtype.itemsize), shape, unsigned).view(dtype)
    if kind == "subnormal":
        largest = {BF16: 0x7F, FP16: 0x3FF, FP32: 0x7FFFFF}[dtype]
        sign = 1 << (8 * dtype.itemsize - 1)
        return (rng.integers(0, 1 << (8 * dtype.itemsize), shape, unsigned) & unsigned.type(sign | largest)).view(dtype)
    values = rng.standard_normal(shape, np.float32)
    with np.errstate(over="ignore", under="ignore"):
        if kind == "wide":
            limit = 14 if dtype == FP16 else 120
            values *= np.float32(2) ** rng.integers(-limit, limit + 1, shape).astype(np.float32)
        array = values.astype(dtype)
    if kind == "specials" and array.size:
        special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32).astype(dtype)
        count = 1 + array.size // 50
        array.reshape(-1)[rng.integers(0, array.size, count)] = rng.choice(special.view(unsigned), count).view(dtype)
    return array


@dataclass(frozen=True)
class Round:
    """One dispatch and one combine, for all ranks: inputs by rank, and what the oracle says of them.

    `partials` is None unless rows are deduplicated, `shared` unless a shared expert adds its output.
    """

    xs: list[Array]
    topk_idxs: list[Array]
    outs: list[Array]
    weights: list[Array]
    dispatched: list[reference.DispatchResult]
    ys: list[Array]
    partials: list[Array] | None = None
    shared: list[Array] | None = None

    def check_dispatched(self, rank: int, d: xccl.Dispatched, what: str = "") -> None:
        """All that a dispatch returns, bit for bit."""
        expected = self.dispatched[rank]
        for name in ("counts", "source", "scales", "tokens", "index", "weights"):
            assert_same(getattr(d, name), getattr(expected, name), f"{what} {name} of rank {rank}")

    def dispatch(self, rank: int, ep: xccl.ExpertParallel, what: str = "", **options: Any) -> xccl.Dispatched:
        """Run and check the dispatch at one rank."""
        if self.partials is not None:
            options["topk_weights"] = self.weights[rank]
        d = ep.dispatch(self.xs[rank], self.topk_idxs[rank], **options)
        self.check_dispatched(rank, d, what)
        return d

    def combine(
        self,
        rank: int,
        ep: xccl.ExpertParallel,
        d: xccl.Dispatched,
        what: str = "",
        out: Array | None = None,
        *,
        lent: bool = False,
    ) -> Array:
        """Run and check the combine at one rank, of outputs in memory that the object has lent if asked."""
        returned, weights = self.outs[rank], self.weights[rank]
        shared = None if self.shared is None else self.shared[rank]
        if self.partials is None:
            if lent:
                returned = ep.empty_outputs(d)
                returned[...] = self.outs[rank]
            y = ep.combine(returned, d, weights, shared_out=shared, out=out)
        else:
            partial = ep.reduce_local(returned, d)
            assert_same(partial, self.partials[rank], f"{what} partial rows of rank {rank}")
            y = ep.combine(partial, d, shared_out=shared, out=out)
        assert_same(y, self.ys[rank], f"{what} y of rank {rank}")
        return y

    def run(self, rank: int, ep: xccl.ExpertParallel, what: str = "") -> None:
        """Both."""
        self.combine(rank, ep, self.dispatch(rank, ep, what), what)


@dataclass(frozen=True)
class Shape:
    """Arguments of an ExpertParallel object, and whether a shared expert adds its output."""

    num_experts: int = 8
    hidden: int = 24
    top_k: int = 3
    max_tokens: int = 16
    dtype: np.dtype[Any] = BF16
    quant: reference.Quant = "none"
    protocol: str = "pull"
    rows: str = "expanded"
    shared: bool = False

    def expert_parallel(self, comm: xccl.Communicator) -> xccl.ExpertParallel:
        """Make the object; collective. Tokens of tests may name one expert in every slot, and buffers have the room."""
        buffer_bytes = None
        if self.protocol == "push":
            buffer_bytes = xccl.buffer_size_hint(
                ranks=comm.size, local_batch=self.max_tokens, top_k=self.top_k, experts_per_die=self.top_k,
                hidden=self.hidden, item_bytes=self.dtype.itemsize, quant=self.quant,
            ).total_bytes  # fmt: skip
        return xccl.ExpertParallel(
            comm, num_experts=self.num_experts, hidden=self.hidden, top_k=self.top_k, max_tokens=self.max_tokens,
            dtype=self.dtype, quant=self.quant, protocol=self.protocol, rows=self.rows, buffer_bytes=buffer_bytes,
        )  # fmt: skip

    def round(
        self, seed: int, tokens: Sequence[int], kind: str = "normal", *, no_expert: float = 0.1, hot: bool = False
    ) -> Round:
        """Random inputs for one dispatch and combine; the expert outputs do not depend on what was dispatched.

        Args:
            seed: what makes this round differ from others.
            tokens: tokens of each rank.
            kind: of numbers.
            no_expert: part of slots that are -1.
            hot: choose a few experts only, so that others stay empty and a token names one twice.
        """
        rng = np.random.default_rng(seed)
        choices = min(self.num_experts, 2) if hot else self.num_experts
        xs, idxs, weights = [], [], []
        for n in tokens:
            xs.append(numbers(rng, (n, self.hidden), self.dtype, kind))
            idx = rng.integers(0, choices, (n, self.top_k))
            idx[rng.random(idx.shape) < no_expert] = -1
            idxs.append(idx)
            weights.append(numbers(rng, (n, self.top_k), FP32, kind))
        shared = [numbers(rng, x.shape, self.dtype, kind) for x in xs] if self.shared else None
        return self.round_of(xs, idxs, weights, shared, kind, rng)

    def round_of(
        self,
        xs: list[Array],
        idxs: list[Array],
        weights: list[Array],
        shared: list[Array] | None = None,
        kind: str = "normal",
        rng: np.random.Generator | None = None,
    ) -> Round:
        """A round with these inputs."""
        rng = np.random.default_rng(0) if rng is None else rng
        is_dedup = self.rows == "dedup"
        with np.errstate(invalid="ignore"):  # signalling NaNs
            if is_dedup:
                dispatched = reference.dispatch_dedup(xs, idxs, weights, self.num_experts, self.quant)
            else:
                dispatched = reference.dispatch(xs, idxs, self.num_experts, self.quant)
        outs = [numbers(rng, (int(r.counts.sum()), self.hidden), self.dtype, kind) for r in dispatched]
        if not is_dedup:
            ys = reference.combine(outs, dispatched, weights, idxs, shared_outs=shared)
            return Round(xs, idxs, outs, weights, dispatched, ys, shared=shared)
        partials = [reference.reduce_local(out, r, self.top_k) for out, r in zip(outs, dispatched, strict=True)]
        ys = reference.combine_dedup(partials, dispatched, idxs, shared)
        return Round(xs, idxs, outs, weights, dispatched, ys, partials, shared)
