"""`python -m bench.peers`: xccl beside the libraries that users would pick instead."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from bench.peers.run import Plan, run, write_json
from bench.peers.session import NotThereError, require
from bench.peers.table import OPERATIONS, PEERS, size_name


def main() -> int:
    """Measure, print, and write JSON if asked; exit status 1 if a result was wrong or a library failed."""
    args = _parser().parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    chosen = [operation for operation in OPERATIONS if operation.op in args.only]
    cells = [(operation, cell) for operation in chosen for cell in operation.cells() if cell.ranks in args.ranks]
    if args.list:
        for operation, cell in cells:
            print(f"{operation.op:12} {cell.ranks} ranks  {size_name(cell):>10}  {operation.title}")
        for peer, what in PEERS.items():
            print(f"{peer:16} {what}: {_state(peer)}")
        return 0
    plan = Plan(cells, args.peer, 60 * args.minutes, tuple(args.way), say=lambda line: print(line, flush=True))
    results = run(plan)
    if args.json is not None:
        write_json(args.json, results, plan.versions, sys.argv[1:])
    entries = [entry for result in results for entry in result.entries.values()]
    return 1 if any(entry.wrong or entry.reason.startswith("failed") for entry in entries) else 0


def _leave(number: int, _: object) -> None:
    """End sessions on the way out."""
    sys.exit(128 + number)


def _state(peer: str) -> str:
    try:
        require(peer)
    except NotThereError as error:
        return str(error)
    return "there"


def _parser() -> argparse.ArgumentParser:
    ops, ways = [operation.op for operation in OPERATIONS], [c.ours for c in OPERATIONS[-1].comparisons]
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=ops, default=ops, metavar="OP", help=f"of {', '.join(ops)}")
    parser.add_argument("--peer", nargs="+", choices=tuple(PEERS), default=list(PEERS), help="those beside xccl")
    parser.add_argument("--ranks", nargs="+", type=int, choices=(2, 4, 8), default=[2, 4, 8])
    parser.add_argument("--way", nargs="+", choices=ways, default=[], help="of xccl's MoE (default: all)")
    parser.add_argument("--minutes", type=float, default=11.0, help="time for all of it (default: 11)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, those of each turn included")
    parser.add_argument("--list", action="store_true", help="list the cells, and which libraries are there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
