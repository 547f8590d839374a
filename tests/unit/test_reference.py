"""The oracle against hand-computed cases and naive loops."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from xccl.comm import reference as ref
from xccl.errors import UsageError

BF16 = np.dtype(ml_dtypes.bfloat16)
FP16 = np.dtype(np.float16)
FP32 = np.dtype(np.float32)
NAN_BITS = {BF16: 0x7FC0, FP16: 0x7E00, FP32: 0x7FC00000}
DTYPES = [BF16, FP16, FP32]


def bits(array: Any) -> Any:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def test_put_get_sendrecv_move_bytes() -> None:
    targets = [np.zeros((2, 2), np.int32), np.ones((2, 2), np.int32)]
    after = ref.put(targets, [np.array([7]), np.array([8, 9])], peers=[1, 0], offset=1)
    assert after[0].tolist() == [[0, 8], [9, 0]]
    assert after[1].tolist() == [[1, 7], [1, 1]]
    assert targets[0].sum() == 0
    got = ref.get(after, counts=[2, 3], peers=[1, 0], offset=1)
    assert [g.tolist() for g in got] == [[7, 1], [8, 9, 0]]
    received = ref.sendrecv([np.array([1]), np.array([2]), np.array([3])], peers=[1, 2, 0])
    assert [r.tolist() for r in received if r is not None] == [[3], [1], [2]]
    assert ref.sendrecv([np.array([1]), np.array([2])], peers=[1, 0])[0] is not None
    with pytest.raises(UsageError, match="rank 0"):
        ref.sendrecv([np.array([1]), np.array([2])], peers=[0, 0])


def test_quantise_by_hand() -> None:
    x = np.array([[127, -63.5, 0.5, 1.5, 2.5], [0, -0.0, 0, 0, 0], [-254, 1, 3, 5, 0]], np.float32)
    q, scales = ref.quantise(x)
    assert scales.dtype == np.float32
    assert q.dtype == np.int8
    assert scales.tolist() == [1.0, 0.0, 2.0]
    assert q.tolist() == [[127, -64, 0, 2, 2], [0] * 5, [-127, 0, 2, 2, 0]]  # ties to even
    assert ref.dequantise(q, scales, FP32)[2].tolist() == [-254, 0, 4, 4, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_reads_as_nan(dtype: np.dtype[Any], bad: float) -> None:
    x = np.ones((2, 3), np.float32).astype(dtype)
    x[0, 1] = bad
    q, scales = ref.quantise(x)
    assert bits(scales)[0] == 0x7FC00000
    assert q[0].tolist() == [0, 0, 0]
    assert q[1].tolist() == [127, 127, 127]
    back = ref.dequantise(q, scales, dtype)
    assert (bits(back)[0] == NAN_BITS[dtype]).all()


def test_quantise_of_tiny_and_huge_values_and_of_nothing() -> None:
    tiny = np.float32(2.0**-149)
    huge = np.finfo(np.float32).max
    q, scales = ref.quantise(np.array([[tiny, 0], [np.float32(127 * 2.0**-130), tiny], [huge, -huge]], np.float32))
    assert scales[0] == np.float32(2.0**-126)
    assert q.tolist() == [[0, 0], [8, 0], [127, -127]]
    q, scales = ref.quantise(np.zeros((2, 0), np.float32))
    assert q.shape == (2, 0)
    assert scales.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantise_equals_a_naive_loop(dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((20, 33)) * 10.0 ** rng.integers(-4, 4, (20, 1))).astype(dtype)
    q, scales = ref.quantise(x)
    for t in range(20):
        row = [np.float32(v) for v in x[t]]
        scale = max(abs(v) for v in row) / np.float32(127)
        inverse = np.float32(1) / scale
        assert scales[t] == scale
        assert q[t].tolist() == [round(float(v * inverse)) for v in row]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_overflows_to_infinity_and_makes_one_nan(dtype: np.dtype[Any]) -> None:
    huge = np.finfo(np.float32).max
    odd_nan = np.array([0xFFC12345], np.uint32).view(np.float32)[0]
    values = np.array([huge, -huge, odd_nan, -0.0], np.float32)
    rounded = ref.round_to(values, dtype)
    if dtype != FP32:
        assert rounded[:2].astype(np.float32).tolist() == [np.inf, -np.inf]
    assert bits(rounded)[2] == NAN_BITS[dtype]
    assert np.signbit(rounded[3].astype(np.float32))


def make_inputs(dtype: np.dtype[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    rng = np.random.default_rng(2)
    tokens = [5, 0, 9, 1]
    xs = [rng.standard_normal((n, 6)).astype(dtype) for n in tokens]
    topk_idxs = [rng.integers(-1, 8, (n, 3)) for n in tokens]  # duplicates and holes
    weights = [rng.standard_normal((n, 3)).astype(np.float32) for n in tokens]
    return xs, topk_idxs, weights


@pytest.mark.parametrize("quant", ["int8", "none", None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dispatch_and_combine_equal_naive_loops(dtype: np.dtype[Any], quant: ref.Quant | None) -> None:
    xs, topk_idxs, weights = make_inputs(dtype)
    results = ref.dispatch(xs, topk_idxs, 8, quant)
    for rank, result in enumerate(results):
        rows = []
        counts = []
        for expert in (2 * rank, 2 * rank + 1):
            before = len(rows)
            for source in range(4):
                for t in range(len(xs[source])):
                    rows += [(source, t, k) for k in range(3) if topk_idxs[source][t, k] == expert]
            counts.append(len(rows) - before)
        assert result.source.tolist() == rows
        assert result.counts.tolist() == counts
        for row, (source, t, _) in enumerate(rows):
            token = xs[source][t]
            if quant == "int8":
                q, scale = ref.quantise(token)
                assert result.scales is not None
                assert (result.tokens[row] == q).all()
                assert result.scales[row] == scale
            else:
                assert result.scales is None
                assert (bits(result.tokens[row]) == bits(token)).all()

    outs = [
        (r.tokens.astype(np.float32) * (1 + np.arange(len(r.tokens), dtype=np.float32)[:, None])).astype(dtype)
        for r in results
    ]
    ys = ref.combine(outs, results, weights, topk_idxs)
    for rank, y in enumerate(ys):
        assert y.shape == xs[rank].shape
        assert y.dtype == dtype
        for t in range(len(xs[rank])):
            acc = [np.float32(0)] * 6
            for k in range(3):
                expert = topk_idxs[rank][t, k]
                if expert < 0:
                    continue
                owner = expert // 2
                row = results[owner].source.tolist().index((rank, t, k))
                for i in range(6):
                    product = np.float32(weights[rank][t, k] * np.float32(outs[owner][row, i]))
                    acc[i] = np.float32(acc[i] + product)
            assert (bits(y[t]) == bits(np.array(acc, np.float32).astype(dtype))).all()


def test_slots_without_an_expert_add_nothing() -> None:
    rows = np.full((2, 2, 1), -1, np.float32)
    weights = np.array([[np.nan, 0.0], [np.inf, np.nan]], np.float32)
    y = ref.weighted_sum(rows, weights, np.array([[-1, 3], [-1, -1]]))
    assert bits(y).tolist() == [[0], [0]]  # +0 + (0 * -1) is +0, and no expert at all is +0


def test_sum_is_in_slot_order_and_not_fused() -> None:
    rows = np.array([[[1e8], [1], [-1e8]]], np.float32)
    y = ref.weighted_sum(rows, np.ones((1, 3), np.float32), np.zeros((1, 3), int))
    assert y[0, 0] == 0  # (1e8 + 1) - 1e8: the 1 is lost, in this order
    a = np.float32(1 + 2.0**-12)
    fused_differs = ref.weighted_sum(
        np.array([[[-1 - 2.0**-11], [a]]], np.float32), np.array([[1, a]], np.float32), np.zeros((1, 2), int)
    )
    assert fused_differs[0, 0] == 0  # a fused multiply-add would leave 2**-24


def test_bad_routing_is_a_usage_error() -> None:
    x = [np.zeros((1, 2), np.float32)] * 2
    with pytest.raises(UsageError, match="-1 to 3"):
        ref.dispatch(x, [np.array([[4]]), np.array([[0]])], 4)

    with pytest.raises(UsageError, match="shape"):
        ref.dispatch(x, [np.array([[0], [1]])] * 2, 4)
