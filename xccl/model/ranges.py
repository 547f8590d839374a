"""What is known of the real machine beyond the figures that the model is calibrated on: ranges, never fitted.

They are read off plots and sentences (XDS §3.1 and §3.2). Each is a claim that the model must agree with; `xccl
validate` prints them, and tests hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from .machine import Machine
from .project import describe_moe, describe_send, project

_KIB = 1 << 10
#: Sizes of XDS's plot of send/receive, KiB.
_PLOTTED_KIB = (36, 72, 144, 288, 576)
_SMALL, _LARGE = (4, 8, 16), (64, 80, 96, 128)


@dataclass(frozen=True)
class Claim:
    """Something known, and what the model makes of it.

    Attributes:
        text: the claim.
        value: the model's figure.
        low: least figure that agrees.
        high: largest one.
        unit: of all three.
    """

    text: str
    value: float
    low: float
    high: float
    unit: str

    @property
    def holds(self) -> bool:
        """Does the model agree?"""
        return self.low <= self.value <= self.high


def claims(machine: Machine) -> list[Claim]:
    """All claims on CloudMatrix384, with the figures of this machine."""
    return [*_send_claims(machine), *_pull_claims(machine)]


def _send_claims(machine: Machine) -> Iterator[Claim]:
    def send_us(n_bytes: int, lanes: int) -> float:
        return project(describe_send(machine, n_bytes=n_bytes, lanes=lanes), machine).time_us

    sizes = [*(size * _KIB for size in _PLOTTED_KIB), _KIB * _KIB - 1]
    yield Claim("send/receive below 1 MB, 2 lanes (XDS §3.1)", max(send_us(n, 2) for n in sizes), 0, 20, "us")
    large = 9216 * _KIB
    speedup = send_us(large, 2) / send_us(large, 48)
    yield Claim("send/receive of 9216 KB, 48 lanes over 2 (XDS §3.1)", speedup, 2.5, 3.5, "times faster")
    gain = max(send_us(n, 24) / send_us(n, 48) - 1 for n in (*sizes, large))
    yield Claim("send/receive, 48 lanes over 24 (UBEP, STRATA)", 100 * gain, -5, 5, "% faster")


def _pull_claims(machine: Machine) -> Iterator[Claim]:
    def pull_us(operation: str, tokens: int) -> float:
        return project(describe_moe(operation, ranks=128, tokens=tokens, protocol="pull"), machine).time_us

    tokens = (*_SMALL, 32, *_LARGE)
    dispatch, combine = ({t: pull_us(operation, t) for t in tokens} for operation in ("dispatch", "combine"))
    small = min(dispatch[t] / combine[t] for t in _SMALL)
    yield Claim("pull dispatch over combine, EP128, batch 4 to 16 (XDS §3.2)", small, 1.0, 3.0, "times as long")
    large = max(dispatch[t] / combine[t] for t in _LARGE)
    yield Claim("pull dispatch over combine, EP128, batch 64 to 128 (XDS §3.2)", large, 0.3, 1.0, "times as long")
    both = [*dispatch.values(), *combine.values()]
    yield Claim("shortest pull dispatch or combine, EP128, batch 4 to 128 (XDS §3.2)", min(both), 15, 160, "us")
    yield Claim("longest one", max(both), 15, 160, "us")
    steps = [by[b] / by[a] for by in (dispatch, combine) for a, b in pairwise(tokens)]
    yield Claim("least growth with the batch of the next size", min(steps), 1.0, 2.0, "times as long")
