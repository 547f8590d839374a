"""`xccl validate`: published figures beside the model's, with the bounds that the model claims."""

from __future__ import annotations

import argparse
from typing import Final

from xccl._version import __version__

#: What the model claims for the rows that it is calibrated on.
_EACH: Final = 0.04
_MEAN: Final = 0.02


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.description = (
        "Compare the model with published figures. Exit status: 1 if a row is off by more than 4%, or their mean by "
        "more than 2%."
    )
    parser.add_argument("--machine", default="cm384", help="profile (default: cm384)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from xccl.model.calibrate import compare
    from xccl.model.machine import load_machine
    from xccl.model.published import published_rows

    machine = load_machine(args.machine)
    rows = compare(machine)
    left_out = machine.calibration.get("leave_one_out", [None] * len(rows))
    print(f"# xccl {__version__} validate: {machine.title}")
    print(f"# {'source':>14} {'op':>9} {'ep':>4} {'published':>10} {'model':>8} {'error':>7} {'left out':>9}")
    for item, without in zip(rows, left_out, strict=True):
        row = item.row
        times = f"{row.latency_us:>10.1f} {item.model_us:>8.1f} {item.error:>+7.1%}"
        print(f"  {row.source:>14} {row.operation:>9} {row.ep:>4} {times} {without or 0.0:>+9.1%}")
    errors = [abs(item.error) for item in rows]
    worst, mean = max(errors), sum(errors) / len(errors)
    is_good = worst <= _EACH and mean <= _MEAN
    others = len(published_rows()) - len(rows)
    verdict = "ok" if is_good else "OUTSIDE"
    print(f"# worst {worst:.1%} (bound {_EACH:.0%}), mean {mean:.1%} (bound {_MEAN:.0%}): {verdict}")
    print("# left out: the row as predicted from a fit on all the others")
    print(f"# {others} rows of other machines have no model yet")
    return 0 if is_good else 1
