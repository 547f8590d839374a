"""`xccl validate`: published figures beside the model's, with the bounds that the model claims."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from xccl._version import __version__

if TYPE_CHECKING:
    from xccl.model.machine import Machine

#: By machine: the relative error that the model claims for each row that it is calibrated on, and for their mean.
_BOUNDS: Final = {"cm384": (0.04, 0.02), "h800-rdma": (0.05, 0.05)}
_LEFT_OUT: Final = 0.08
#: This machine has no published figures: its own are measured.
_HOST: Final = "host"
_HOST_ROUNDS: Final = 3


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.description = (
        "Compare the model with published figures, or with --machine host the profile of this machine with dispatch "
        "and combine as they are measured now. Exit status: 1 if the model is outside the bounds that it claims, which "
        "are printed."
    )
    parser.add_argument(
        "--machine", choices=(*_BOUNDS, _HOST), help="one profile (default: all that have published figures)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from xccl.model.machine import load_machine
    from xccl.model.ranges import claims

    if args.machine == _HOST:
        return 0 if _host(load_machine(_HOST)) else 1
    is_good = True
    for name in (args.machine,) if args.machine else _BOUNDS:
        machine = load_machine(name)
        print(f"# xccl {__version__} validate: {machine.title}; modelled times in us, nothing was run")
        is_good &= _rows(machine)
        if name == "cm384":
            print("# known ranges, which nothing is fitted to")
            for claim in claims(machine):
                verdict = "ok" if claim.holds else "OUTSIDE"
                where = f"{claim.low:g} to {claim.high:g}"
                print(f"  {claim.text:<70} {claim.value:>7.2f}  ({where} {claim.unit}): {verdict}")
                is_good &= claim.holds
    return 0 if is_good else 1


def _host(machine: Machine) -> bool:
    """Measure and compare; is the profile within its bounds?"""
    from xccl.cli.host_run import measure_host, print_check

    print(f"# xccl {__version__} validate: {machine.title}; measured times beside modelled ones", flush=True)
    _, found = measure_host(_HOST_ROUNDS, primitives=False, check=True)
    return print_check(machine, found)


def _rows(machine: Machine) -> bool:
    """Print the rows of a machine; is it within its bounds?"""
    from xccl.model.calibrate import compare

    rows = compare(machine)
    left_out = machine.calibration.get("leave_one_out")
    print(f"# {'source':>14} {'op':>9} {'ep':>4} {'published':>10} {'model':>8} {'error':>7} {'left out':>9}")
    for item, without in zip(rows, left_out or [None] * len(rows), strict=True):
        row = item.row
        times = f"{row.latency_us:>10.1f} {item.model_us:>8.1f} {item.error:>+7.1%}"
        text = f"{'-':>9}" if without is None else f"{without:>+9.1%}"
        print(f"  {row.source:>14} {row.operation:>9} {row.ep:>4} {times} {text}")
    each, mean = _BOUNDS[machine.name]
    errors = [abs(item.error) for item in rows]
    worst, average = max(errors), sum(errors) / len(errors)
    is_good = worst <= each and average <= mean
    text = f"# worst {worst:.1%} (bound {each:.0%}), mean {average:.1%} (bound {mean:.0%})"
    if left_out:
        farthest = max(map(abs, left_out))
        is_good &= farthest <= _LEFT_OUT
        text += f", left out {farthest:.1%} (bound {_LEFT_OUT:.0%}: the row predicted from a fit on all the others)"
    print(f"{text}: {'ok' if is_good else 'OUTSIDE'}")
    return is_good
