"""`xccl calibrate`: measure this machine as a profile, or fit a profile to published figures."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Final

from xccl._version import __version__
from xccl.cli.parsing import whole_number
from xccl.errors import UsageError

_HOST: Final = "host"


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
    print(f"# {'parameter':<24} {'profile':>9}    {'fitted':>9}")
    for parameter in machine.free:
        print(f"  {parameter.name:<24} {parameter.value:>9.4g} -> {values[parameter.name]:>9.4g}")
    print(f"# {'op':>9} {'ep':>4} {'published':>9} {'model':>8} {'error':>7}   times in us")
    for item in compare(fitted):
        row = item.row
        print(f"  {row.operation:>9} {row.ep:>4} {row.latency_us:>9.1f} {item.model_us:>8.1f} {item.error:>+7.1%}")
    if args.output:
        _write(Path(args.output), profile_text(fitted))
    return 0


# -- this machine -----------------------------------------------------------------------------------------------------


def _calibrate_host(args: argparse.Namespace) -> int:
    from xccl.cli.environment import usable_cores
    from xccl.cli.host_profile import host_machine
    from xccl.cli.host_run import measure_host, print_check, print_noise
    from xccl.model.machine import host_path, profile_text

    path = Path(args.output) if args.output else host_path()
    _require_writable(path)
    cores = usable_cores()
    primitives, checks = measure_host(args.rounds, primitives=True, check=args.check)
    machine = host_machine({name: figure.mid_us for name, figure in primitives.items()}, cores)
    _write(path, profile_text(machine))
    print(f"# xccl {__version__} calibrate: this machine, 2 ranks, medians of {args.rounds} rounds")
    for parameter in machine.parameters.values():
        if parameter.source.startswith("measured"):
            curve = "".join(f" {value:.3g}@{int(n_bytes) >> 10}K" for n_bytes, value in parameter.curve)
            print(f"  {parameter.name:<28} {curve or f' {parameter.value:.4g}'}")
    print(f"# {path}")
    print_noise(primitives)
    if cores < 2:
        print("# the ranks share one core: figures are those of ranks that take turns")
    if args.check:
        print_check(machine, checks)
    return 0


def _require_writable(path: Path) -> None:
    """Before anything is measured: UsageError if the profile could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: it is a directory, or not yours to write", value=str(path))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
