"""Measures this machine, and compares measured dispatch and combine with what its profile predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from xccl.cli.host_samples import Figure, Samples, figures

if TYPE_CHECKING:
    from xccl.comm.communicator import Communicator
    from xccl.model.machine import Machine

#: What the model must predict, by the pull protocol on 2 ranks: tokens of a rank, and their elements, bfloat16.
_TOKENS: Final = (8, 32, 128)
_HIDDEN: Final = (2048, 7168)
_QUANT: Final = ("none", "int8")
_EXPERTS: Final = 32
_TOP_K: Final = 8
#: The relative error that the model claims for each of them, and for their mean.
_EACH: Final = 0.25
_MEAN: Final = 0.12
_TIMEOUT_S: Final = 1800.0


def measure_host(rounds: int, *, primitives: bool, check: bool) -> tuple[dict[str, Figure], dict[str, Figure]]:
    """Rounds of primitives, and between them dispatch and combine, both as far as they are asked for."""
    from xccl.runtime import launch

    reports = launch(_measure, 2, args=(rounds, primitives, check), timeout_s=_TIMEOUT_S)
    by_kind = zip(*reports, strict=True)
    found = [figures(of_ranks) for of_ranks in by_kind]
    return found[0], found[1]


def _measure(comm: Communicator, rounds: int, primitives: bool, check: bool) -> tuple[list[Samples], list[Samples]]:
    """What one rank runs."""
    from xccl.cli.host_measure import HostMeter, pin
    from xccl.cli.host_moe import HostMoe

    pin(comm.rank)
    meter = HostMeter(comm) if primitives else None
    shapes = [(hidden, quant, tokens) for hidden in _HIDDEN for quant in _QUANT for tokens in _TOKENS]
    operations = [HostMoe(comm, *shape, experts=_EXPERTS, top_k=_TOP_K) for shape in shapes] if check else []
    of_primitives, of_operations = [], []
    for _ in range(rounds):
        of_primitives.append(meter.round() if meter else {})
        of_operations.append({name: times for one in operations for name, times in one.round().items()})
    return of_primitives, of_operations


def print_noise(found: Mapping[str, Figure]) -> None:
    """How much the figures of a run are worth."""
    spreads = sorted(figure.spread for figure in found.values())
    undisturbed = sum(figure.undisturbed for figure in found.values()) / len(found)
    print(f"# rounds differ by {spreads[len(spreads) // 2]:.1%} (median); {undisturbed:.0%} of samples undisturbed")


def print_check(machine: Machine, found: Mapping[str, Figure]) -> bool:
    """Measured dispatch and combine beside what the profile predicts; is it within its bounds?"""
    from xccl.cli.host_moe import describe
    from xccl.model.project import project

    titles = f"{'op':>9} {'quant':>5} {'tokens':>6} {'hidden':>6} {'measured':>9} {'noise':>6} {'undisturbed':>11}"
    print(f"# {titles} {'predicted':>9} {'error':>7}  (p50, us)")
    errors: list[float] = []
    for name, figure in found.items():
        operation, quant, tokens, hidden = name.split()
        described = describe(operation, int(hidden), quant, int(tokens), experts=_EXPERTS, top_k=_TOP_K)
        predicted_us = project(described, machine).time_us
        errors.append(abs(predicted_us / figure.p50_us - 1))
        measured = f"{figure.p50_us:>9.1f} {figure.spread:>6.1%} {figure.undisturbed:>11.0%}"
        shown = f"{measured} {predicted_us:>9.1f} {predicted_us / figure.p50_us - 1:>+7.1%}"
        print(f"  {operation:>9} {quant:>5} {tokens:>6} {hidden:>6} {shown}")
    print_noise(found)
    worst, mean = max(errors), sum(errors) / len(errors)
    is_good = worst <= _EACH and mean <= _MEAN
    bounds = f"worst {worst:.1%} (bound {_EACH:.0%}), mean {mean:.1%} (bound {_MEAN:.0%})"
    print(f"# {bounds}: {'ok' if is_good else 'OUTSIDE'}")
    return is_good
