"""`xccl calibrate`: measure this machine as a profile, or fit a profile to published figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xccl._version import __version__
from xccl.cli.parsing import whole_number
from xccl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xccl.cli.host_samples import Figure, Samples
    from xccl.comm.communicator import Communicator
    from xccl.model.machine import Machine

_HOST: Final = "host"
_TIMEOUT_S: Final = 600.0
#: With --check: what the model must predict.
_TOKENS: Final = (8, 32, 128)
_HIDDEN: Final = (2048, 7168)
_EXPERTS: Final = 32
_TOP_K: Final = 8


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.description = (
        "host: measure put, get, copies, sums, quantisation and signals on this machine with two ranks, and write "
        "them as a profile, on which `xccl project --machine host` and `xccl calibrate host --check` predict dispatch "
        "and combine. Any other profile: fit its free figures to the published ones, and print what they would be."
    )
    parser.add_argument("machine", metavar="MACHINE", help="host, cm384 or h800-rdma")
    parser.add_argument("-o", "--output", metavar="FILE", help="the profile (default for host: in the user's cache)")
    parser.add_argument("--rounds", type=whole_number(1), default=5, metavar="N", help="of measurements (default: 5)")
    parser.add_argument("--check", action="store_true", help="host: measure dispatch and combine, too, and compare")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    return _calibrate_host(args) if args.machine == _HOST else _fit(args)


# -- published figures ------------------------------------------------------------------------------------------------


def _fit(args: argparse.Namespace) -> int:
    from xccl.model.calibrate import IMPLEMENTATION_OF, compare, fit
    from xccl.model.machine import load_machine, profile_text
    from xccl.model.published import published_rows

    if args.check:
        raise UsageError("--check is for host; xccl validate compares a profile with published figures")
    if args.machine not in IMPLEMENTATION_OF:
        known = ", ".join([_HOST, *IMPLEMENTATION_OF])
        raise UsageError(f"there are no published figures of {args.machine!r}: one of {known}", value=args.machine)
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise UsageError("fitting needs SciPy: pip install scipy") from None
    machine = load_machine(args.machine)
    values = fit(machine, published_rows(IMPLEMENTATION_OF[args.machine]))
    fitted = machine.with_values(values)
    print(f"# xccl {__version__} calibrate: {machine.title}, on {IMPLEMENTATION_OF[args.machine]}")
    for parameter in machine.free:
        print(f"  {parameter.name:<24} {parameter.value:>9.4g} -> {values[parameter.name]:>9.4g}")
    for item in compare(fitted):
        row = item.row
        print(f"  {row.operation:>9} {row.ep:>4} {row.latency_us:>8.1f} {item.model_us:>8.1f} {item.error:>+7.1%}")
    if args.output:
        _write(Path(args.output), profile_text(fitted))
    return 0


# -- this machine -----------------------------------------------------------------------------------------------------


def _calibrate_host(args: argparse.Namespace) -> int:
    from xccl.cli.host_profile import host_machine
    from xccl.cli.host_samples import figures
    from xccl.model.machine import host_path, profile_text
    from xccl.runtime import launch

    reports = launch(_measure, 2, args=(args.rounds, args.check), timeout_s=_TIMEOUT_S)
    primitives = figures([of_rank for of_rank, _ in reports])
    machine = host_machine({name: figure.mid_us for name, figure in primitives.items()})
    path = Path(args.output) if args.output else host_path()
    _write(path, profile_text(machine))
    print(f"# xccl {__version__} calibrate: this machine, 2 ranks, medians of {args.rounds} rounds")
    for parameter in machine.parameters.values():
        if parameter.source.startswith("measured"):
            curve = "".join(f" {value:.3g}@{int(n_bytes) >> 10}K" for n_bytes, value in parameter.curve)
            print(f"  {parameter.name:<28} {curve or f' {parameter.value:.4g}'}")
    print(f"# {path}")
    _print_noise(primitives)
    if args.check:
        _print_check(machine, figures([of_rank for _, of_rank in reports]))
    sys.stdout.flush()
    return 0


def _measure(comm: Communicator, rounds: int, check: bool) -> tuple[list[Samples], list[Samples]]:
    """What one rank runs: rounds of primitives, and between them dispatch and combine, if they are to be checked."""
    from xccl.cli.host_measure import HostMeter, pin
    from xccl.cli.host_moe import HostMoe

    pin(comm.rank)
    meter = HostMeter(comm)
    meter.round()  # pages are touched, kernels and caches warm
    shapes = [(hidden, quant, tokens) for hidden in _HIDDEN for quant in ("none", "int8") for tokens in _TOKENS]
    operations = [HostMoe(comm, *shape, experts=_EXPERTS, top_k=_TOP_K) for shape in shapes] if check else []
    primitives, checks = [], []
    for _ in range(rounds):
        primitives.append(meter.round())
        checks.append({name: times for one in operations for name, times in one.round().items()})
    return primitives, checks


def _print_noise(found: Mapping[str, Figure]) -> None:
    spreads = sorted(figure.spread for figure in found.values())
    undisturbed = sum(figure.undisturbed for figure in found.values()) / len(found)
    print(f"# rounds differ by {spreads[len(spreads) // 2]:.1%} (median); {undisturbed:.0%} of samples undisturbed")


def _print_check(machine: Machine, found: Mapping[str, Figure]) -> None:
    """Measured dispatch and combine beside what the primitives predict; the slowest rank counts."""
    from xccl.cli.host_moe import describe
    from xccl.model.project import project

    titles = f"{'op':>9} {'quant':>5} {'tokens':>6} {'hidden':>6} {'measured':>9} {'noise':>6} {'predicted':>9}"
    print(f"# {titles} {'error':>7}  (p50, us)")
    errors: list[float] = []
    for name, figure in found.items():
        operation, quant, tokens, hidden = name.split()
        described = describe(operation, int(hidden), quant, int(tokens), experts=_EXPERTS, top_k=_TOP_K)
        predicted_us = project(described, machine).time_us
        errors.append(predicted_us / figure.p50_us - 1)
        figures = f"{figure.p50_us:>9.1f} {figure.spread:>6.1%} {predicted_us:>9.1f} {errors[-1]:>+7.1%}"
        print(f"  {operation:>9} {quant:>5} {tokens:>6} {hidden:>6} {figures}")
    _print_noise(found)
    sizes = [abs(error) for error in errors]
    print(f"# worst {max(sizes):.1%}, mean {sum(sizes) / len(sizes):.1%}")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
