"""Routings: which experts each token chooses, in the shapes of load that matter.

A routing is made in two steps. First the share of tokens that each expert gets, from `spec`; it depends on the seed
alone, so that all ranks agree which experts are hot. Then, for each rank, tokens are drawn so that a token's experts
are distinct and every expert is chosen with exactly its share: systematic sampling over experts in random order
(Goodman and Kish, 1950). Drawing top-k with weighted noise, the usual way, would flatten the hottest experts, as a
token cannot choose one twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from ..errors import UsageError

Array = npt.NDArray[Any]

#: The specs, for help texts.
SPECS: Final = "uniform, zipf[:EXPONENT], hot[:K], skew, file:PATH"

#: Resolution of shares when tokens are drawn; integers, because a rounded sum could lose a choice.
_TICKS: Final = 2**32

_ZIPF_EXPONENT: Final = 1.0
#: `hot`: the part of all choices that the hot experts get, as far as a token can choose each only once.
_HOT_PART: Final = 0.8
#: `skew`, in multiples of the mean load, as XDS §4.5 measured; the last is the least loaded expert above the mean.
_SKEW_PART: Final = 0.2
_SKEW_HOTTEST: Final = 30.0
_SKEW_MOST_TOKENS: Final = 15 / 16
_SKEW_ABOVE_MEAN: Final = 1.25


def make_routing(
    spec: str, *, tokens: int, experts: int, topk: int, seed: int, rank: int, ranks: int
) -> npt.NDArray[np.int64]:
    """The experts that the tokens of one rank choose; deterministic by (spec, shape, seed, rank).

    Args:
        spec: The shape of the load:
            `uniform`: every expert alike.
            `zipf` or `zipf:S`: the i-th most popular expert in proportion to i**-S (1 by default).
            `hot` or `hot:K`: K experts (`topk` by default) get 80% of all choices, the others share the rest.
            `skew`: 20% of the experts are above the mean load, and the hottest is at 30 times the mean, as XDS §4.5
            measured, or chosen by 15 of 16 tokens where that is less (chosen by all, it would be at experts / topk).
            `file:PATH`: recorded expert ids, .npy or .npz (its only array, or the one named `topk_idx`), of any shape
            [..., n, >= topk]. Leading axes, such as layers, follow one another. The first `topk` columns are used; -1
            is no expert. Rows are dealt to the ranks in order, `tokens` to each, and start again at the end.
        tokens: Tokens of this rank.
        experts: Experts in all.
        topk: Experts of each token, distinct unless a file says otherwise.
        seed: Chooses the popular experts, and the tokens' choices.
        rank: This rank.
        ranks: All ranks.

    Returns:
        int64 [tokens, topk].

    Raises:
        UsageError: an unknown spec, topk > experts, or a file that does not fit.
    """
    if experts < 1 or not 1 <= topk <= experts:
        raise UsageError(f"topk is {topk}, must be 1 to experts ({experts})", value=topk, bound=experts)
    if tokens < 0 or not 0 <= rank < ranks:
        raise UsageError(f"tokens is {tokens}, rank is {rank} of {ranks}", value=(tokens, rank), bound=ranks)
    kind, _, argument = spec.partition(":")
    if kind == "file":
        recorded = _read(argument, experts, topk)
        rows = (rank * tokens + np.arange(tokens)) % len(recorded)
        return recorded[rows]
    shares = expert_shares(spec, experts=experts, topk=topk)
    popularity = np.random.default_rng((seed, 0)).permutation(experts)
    rng = np.random.default_rng((seed, 1, rank))
    return _draw(shares[popularity], tokens, topk, rng)


def expert_shares(spec: str, *, experts: int, topk: int) -> npt.NDArray[np.float64]:
    """The probability that a token chooses each expert: float64 [experts], descending, at most 1, in all `topk`."""
    kind, colon, argument = spec.partition(":")
    position = np.arange(experts, dtype=np.float64)
    if kind == "uniform" and not colon:
        weights = np.ones(experts)
    elif kind == "zipf":
        weights = (position + 1) ** -_number(spec, argument, _ZIPF_EXPONENT, low=0.0, high=10.0)
    elif kind == "hot":
        hot = int(_number(spec, argument, topk, low=1, high=experts))
        hot_sum = min(max(_HOT_PART, hot / experts) * topk, hot)
        cold_share = (topk - hot_sum) / max(experts - hot, 1)
        weights = np.where(position < hot, hot_sum / hot, cold_share)
    elif kind == "skew" and not colon:
        weights = _skew_multiples(experts, topk)
    else:
        raise UsageError(f"unknown routing {spec!r}: one of {SPECS}", value=spec)
    return _shares_of(weights, topk)


def load_imbalance(topk_idxs: Array | Sequence[Array], experts: int, groups: int | None = None) -> float:
    """The load of the most loaded over the mean load; 1 is perfect balance, and so is no load at all.

    Args:
        topk_idxs: Expert ids of one rank or of several; -1 counts for nobody.
        experts: Experts in all.
        groups: Divide the experts into so many equal groups, and compare those: the number of ranks gives the imbalance
            among ranks. None compares experts.
    """
    parts = [topk_idxs] if isinstance(topk_idxs, np.ndarray) else topk_idxs
    ids = np.concatenate([part.reshape(-1) for part in parts])
    load = np.bincount(ids[ids >= 0], minlength=experts).reshape(groups or experts, -1).sum(axis=1)
    return float(load.max() / load.mean()) if load.any() else 1.0


def _skew_multiples(experts: int, topk: int) -> npt.NDArray[np.float64]:
    """Loads in multiples of the mean: a power law from the hottest to the last above the mean, then a flat rest."""
    above = max(1, round(_SKEW_PART * experts))
    hottest = max(min(_SKEW_HOTTEST, _SKEW_MOST_TOKENS * experts / topk), 1.0)
    exponent = np.log(max(hottest / _SKEW_ABOVE_MEAN, 1.0)) / np.log(max(above, 2))
    loads = hottest * np.arange(1, above + 1) ** -exponent
    rest = max(experts - loads.sum(), 0.0) / max(experts - above, 1)
    return np.concatenate([loads, np.full(experts - above, rest)])


def _shares_of(weights: npt.NDArray[np.float64], topk: int) -> npt.NDArray[np.float64]:
    """Scale descending weights to a sum of `topk`; what exceeds 1 is 1, and its surplus goes to the others."""
    for full in range(topk + 1):
        shares = np.ones_like(weights)
        rest = weights[full:]
        if rest.size:
            # All weights may have gone to the full ones: then the rest share alike.
            rest = rest if rest.sum() > 0 else np.ones_like(rest)
            shares[full:] = rest * ((topk - full) / rest.sum())
            if shares[full] > 1:
                continue
        break
    return shares


def _draw(shares: npt.NDArray[np.float64], tokens: int, topk: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw `topk` distinct experts for each token, expert e with probability shares[e].

    Lay the shares end to end on a line of length topk, in an order of each token's own, and choose the experts in which
    the points u, u + 1, ..., u + topk - 1 fall: a share is at most 1, so no expert gets two.
    """
    lengths = _in_ticks(shares, topk)
    order = rng.permuted(np.tile(np.arange(shares.size), (tokens, 1)), axis=1)
    points_passed = (np.cumsum(lengths[order], axis=1) + rng.integers(_TICKS, size=(tokens, 1))) // _TICKS
    chosen = np.diff(points_passed, axis=1, prepend=0) > 0
    return rng.permuted(order[chosen].reshape(tokens, topk), axis=1)


def _in_ticks(shares: npt.NDArray[np.float64], topk: int) -> npt.NDArray[np.int64]:
    """Shares as integers that sum to exactly topk * _TICKS, so that every token gets exactly topk experts."""
    ticks = np.floor(shares * _TICKS).astype(np.int64)
    # Rounding down has lost less than one tick for each share below 1, and those have room for it.
    lost = topk * _TICKS - int(ticks.sum())
    ticks[np.flatnonzero(ticks < _TICKS)[:lost]] += 1
    return ticks


def _number(spec: str, argument: str, default: float, *, low: float, high: float) -> float:
    try:
        value = float(argument) if argument else default
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise UsageError(
            f"routing {spec!r}: must be a number from {low:g} to {high:g}", value=argument, bound=(low, high)
        )
    return value


def _read(path: str, experts: int, topk: int) -> npt.NDArray[np.int64]:
    """Read and check recorded expert ids: int64 [rows, topk]."""
    ids = _load(path)
    if ids.dtype.kind not in "iu" or ids.ndim < 2:
        raise UsageError(f"routing file {path}: need integers [..., n, topk], found {ids.dtype} {list(ids.shape)}")
    if ids.shape[-1] < topk:
        raise UsageError(
            f"routing file {path}: {ids.shape[-1]} columns, topk is {topk}", value=ids.shape[-1], bound=topk
        )
    rows = ids.reshape(-1, ids.shape[-1])[:, :topk]
    if not len(rows):
        raise UsageError(f"routing file {path}: no rows, shape {list(ids.shape)}", value=ids.shape)
    low, high = int(rows.min()), int(rows.max())
    if low < -1 or high >= experts:
        raise UsageError(
            f"routing file {path}: expert ids are {low} to {high}, must be -1 to {experts - 1}",
            value=(low, high),
            bound=experts,
        )
    return rows.astype(np.int64)


def _load(path: str) -> Array:
    if Path(path).suffix not in (".npy", ".npz"):
        raise UsageError(f"routing file {path!r}: must be .npy or .npz", value=path)
    try:
        with open(path, "rb") as file:  # np.load would leave it open where it fails
            loaded = np.load(file, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else _member(path, loaded)
    except OSError as error:
        raise UsageError(f"routing file {path}: {error.strerror or error}", value=path) from error
    except UsageError:
        raise
    except (ValueError, EOFError, BadZipFile) as error:
        raise UsageError(f"routing file {path}: not an array file ({error})", value=path) from error


def _member(path: str, archive: Any) -> Array:
    """The one array of an .npz, or the one that is named topk_idx."""
    names: list[str] = archive.files
    name = names[0] if len(names) == 1 else "topk_idx"
    if name not in names:
        found = ", ".join(names) or "none"
        raise UsageError(f"routing file {path}: need one array, or one named topk_idx; found {found}", value=names)
    ids: Array = archive[name]
    return ids
