"""Routings have the shapes of load that they promise, and files are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xccl.errors import UsageError
from xccl.protocol.routing import expert_shares, load_imbalance, make_routing

SPECS = ["uniform", "zipf", "zipf:1.2", "zipf:10", "hot", "hot:1", "hot:4", "skew"]


def routing(spec: str, **changes: Any) -> Any:
    shape: dict[str, Any] = {"tokens": 128, "experts": 256, "topk": 8, "seed": 1, "rank": 0, "ranks": 8}
    return make_routing(spec, **(shape | changes))


def load_of(spec: str, experts: int, topk: int, tokens: int = 20000) -> Any:
    """Loads, most loaded first, in multiples of the mean."""
    idx = routing(spec, tokens=tokens, experts=experts, topk=topk)
    load = np.bincount(idx.reshape(-1), minlength=experts)
    return np.sort(load)[::-1] / load.mean()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("experts", "topk"), [(1, 1), (2, 1), (4, 4), (8, 7), (8, 2), (32, 8), (256, 8), (512, 16), (300, 3)]
)
def test_experts_are_in_range_and_distinct(spec: str, experts: int, topk: int) -> None:
    if spec == "hot:4" and experts < 4:
        with pytest.raises(UsageError, match="4"):
            routing(spec, experts=experts, topk=topk)
        return
    idx = routing(spec, experts=experts, topk=topk)
    assert idx.shape == (128, topk)
    assert idx.dtype == np.int64
    assert idx.min() >= 0
    assert idx.max() < experts
    assert all(len(set(row)) == topk for row in idx.tolist())
    shares = expert_shares(spec, experts=experts, topk=topk)
    assert shares.sum() == pytest.approx(topk)
    assert (np.diff(shares) <= 1e-12).all()
    assert shares.min() >= 0
    assert shares.max() <= 1


@pytest.mark.parametrize("spec", SPECS)
def test_deterministic_by_seed_and_rank(spec: str) -> None:
    assert (routing(spec) == routing(spec)).all()
    assert (routing(spec) != routing(spec, rank=1)).any()
    assert (routing(spec) != routing(spec, seed=2)).any()


def test_ranks_agree_on_the_popular_experts() -> None:
    hottest = {int(np.bincount(routing("skew", rank=rank).reshape(-1)).argmax()) for rank in range(8)}
    assert len(hottest) == 1


def test_uniform_is_flat_and_choices_are_independent_of_order() -> None:
    load = load_of("uniform", 256, 8, tokens=50000)
    assert load[0] < 1.12
    assert load[-1] > 0.88
    idx = routing("uniform", tokens=4000, experts=16, topk=2)
    pairs = np.unique(np.sort(idx, axis=1), axis=0)
    assert len(pairs) == 16 * 15 / 2  # every pair occurs
    assert 0.45 < (idx[:, 0] < idx[:, 1]).mean() < 0.55  # slots are in no order


def test_zipf_falls_as_a_power() -> None:
    load = load_of("zipf:0.5", 64, 2, tokens=50000)
    assert load[0] / load[3] == pytest.approx(2, rel=0.1)
    assert load[0] / load[15] == pytest.approx(4, rel=0.1)


def test_hot_experts_take_most_choices() -> None:
    load = load_of("hot:16", 256, 8) / 256
    assert load[:16].sum() == pytest.approx(0.8, abs=0.01)
    load = load_of("hot:2", 256, 8) / 256 * 8
    assert load[:2].tolist() == [1, 1]  # chosen by every token: there is no more


def test_skew_is_what_xds_measured() -> None:
    load = load_of("skew", 256, 8, tokens=50000)
    assert load[0] == pytest.approx(30, rel=0.05)
    assert (load > 1).mean() == pytest.approx(0.2, abs=0.02)
    assert (load > 0).all()
    # Also at the batch of one decode step, where an expert's mean load is a handful of tokens.
    idx = np.concatenate([routing("skew", rank=rank) for rank in range(8)])
    load = np.bincount(idx.reshape(-1), minlength=256) / 32
    assert load.max() == pytest.approx(30, rel=0.07)
    assert 0.15 < (load > 1).mean() < 0.25
    assert load_imbalance(idx, 256) == load.max()


def test_load_imbalance() -> None:
    idx = np.array([[0, 1], [0, -1]])
    assert load_imbalance(idx, 4) == 2 / 0.75
    assert load_imbalance(idx, 4, groups=2) == 2
    assert load_imbalance([idx, np.array([[2, 3], [3, 2]])], 4) == 2 / 1.75
    assert load_imbalance(np.full((2, 2), -1), 4) == 1
    assert load_imbalance(np.zeros((0, 2), int), 4) == 1


def test_files_are_dealt_in_order_and_wrap_round(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(30, dtype=np.int32).reshape(2, 5, 3))
    first = routing(f"file:{path}", tokens=4, topk=2)
    third = routing(f"file:{path}", tokens=4, topk=2, rank=2)
    assert first.tolist() == [[0, 1], [3, 4], [6, 7], [9, 10]]
    assert third.tolist() == [[24, 25], [27, 28], [0, 1], [3, 4]]
    assert first.dtype == np.int64
    np.savez(tmp_path / "one.npz", ids=np.zeros((1, 2), np.int16))
    assert routing(f"file:{tmp_path / 'one.npz'}", tokens=3, topk=2).tolist() == [[0, 0]] * 3
    np.savez(tmp_path / "two.npz", weights=np.zeros((1, 2)), topk_idx=np.ones((1, 2), np.int64))
    assert routing(f"file:{tmp_path / 'two.npz'}", tokens=1, topk=2).tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((3, 8), 256), "256 to 256, must be -1 to 255"),
        (np.full((3, 8), -2), "-2 to -2, must be -1 to 255"),
        (np.zeros((3, 4), int), "4 columns, topk is 8"),
        (np.zeros((0, 8), int), "no rows"),
        (np.zeros((3, 8)), "found float64"),
        (np.zeros(8, int), r"found int64 \[8\]"),
        (np.array([[None] * 8]), "not an array file"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, array: Any, message: str) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(UsageError, match=message):
        routing(f"file:{path}")


def test_files_that_are_not_there_or_not_arrays(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        routing(f"file:{tmp_path / 'absent.npy'}")
    with pytest.raises(UsageError, match=r"must be \.npy or \.npz"):
        routing("file:ids.txt")
    for name in ("junk.npy", "junk.npz"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 or not")
        with pytest.raises(UsageError, match="not an array file"):
            routing(f"file:{tmp_path / name}")
    (tmp_path / "empty.npy").write_bytes(b"")
    with pytest.raises(UsageError, match="not an array file"):
        routing(f"file:{tmp_path / 'empty.npy'}")
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(UsageError, match="found a, b"):
        routing(f"file:{tmp_path / 'two.npz'}")


@pytest.mark.parametrize("spec", ["", "nope", "uniform:", "skew:3", "zipf:x", "zipf:-1", "hot:0", "hot:257", "hot:nan"])
def test_unknown_specs(spec: str) -> None:
    with pytest.raises(UsageError, match="routing"):
        routing(spec)


def test_bad_shapes() -> None:
    with pytest.raises(UsageError, match=r"topk is 9, must be 1 to experts \(8\)"):
        routing("uniform", experts=8, topk=9)
    with pytest.raises(UsageError, match="rank is 8 of 8"):
        routing("uniform", rank=8)
