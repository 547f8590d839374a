"""`python -m bench.peers`: xccl beside the libraries that users would pick instead."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

from bench.peers.collectives import FLOAT_BYTES, REDUCTIONS
from bench.peers.moe import TOPK
from bench.peers.names import PEERS
from bench.peers.run import Plan, run, write_json
from bench.peers.session import NotThereError, require
from bench.peers.table import OPERATIONS, size_name
from bench.peers.work import Cell
from xccl.cli.parsing import OneLineParser, parse_bytes, whole_number

_THERE = "there"


def main() -> int:
    """Measure, print, and write JSON if asked; exit status 1 after wrong results or failures, 2 with no peer there."""
    parser = _parser()
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    cells = [
        (operation, replace(cell, hidden=args.hidden, experts=args.experts))
        for operation in OPERATIONS
        if operation.op in args.only
        for cell in operation.cells(args.ranks, args.sizes)
        if operation.ways(cell, args.way)
    ]
    problem = next(filter(None, (_problem(cell) for _, cell in cells)), None if cells else "no such cells")
    if problem:
        parser.error(problem)
    if args.list:
        for operation, cell in cells:
            print(f"{operation.op:12} {cell.ranks} ranks  {size_name(cell):>10}  {operation.title}")
        for peer, what in PEERS.items():
            print(f"{peer:16} {what}: {_state(peer)}")
        return 0
    missing = [_state(peer) for peer in args.peer if _state(peer) != _THERE]
    if len(missing) == len(args.peer):
        print("\n".join(missing), file=sys.stderr)
        return 2
    plan = Plan(cells, args.peer, 60 * args.minutes, tuple(args.way), say=lambda line: print(line, flush=True))
    results = run(plan)
    if args.json is not None:
        write_json(args.json, results, plan.versions, sys.argv[1:])
    entries = [entry for result in results for entry in result.entries.values()]
    return 1 if any(entry.wrong or entry.reason.startswith("failed") for entry in entries) else 0


def _problem(cell: Cell) -> str | None:
    """Why a cell is not one that all libraries have."""
    if cell.op in REDUCTIONS and cell.size % FLOAT_BYTES:
        return f"--sizes has {cell.size}: {cell.op} is of float32, {FLOAT_BYTES} bytes each"
    if cell.op == "moe" and (cell.experts % cell.ranks or cell.experts < TOPK):
        return f"--experts is {cell.experts}: it must be a multiple of the ranks ({cell.ranks}), and {TOPK} or more"
    return None


def _leave(number: int, _: object) -> None:
    """End sessions on the way out."""
    sys.exit(128 + number)


def _state(peer: str) -> str:
    try:
        require(peer)
    except NotThereError as error:
        return str(error)
    return _THERE


def _parser() -> argparse.ArgumentParser:
    ops = [operation.op for operation in OPERATIONS]
    ways = list(dict.fromkeys(way.ours for operation in OPERATIONS for way in operation.comparisons if way.ours))
    parser = OneLineParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=ops, default=ops, metavar="OP", help=f"of {', '.join(ops)}")
    parser.add_argument("--peer", nargs="+", choices=tuple(PEERS), default=list(PEERS), help="those beside xccl")
    parser.add_argument("--ranks", nargs="+", type=whole_number(1), default=[2, 4, 8], help="(default: 2 4 8)")
    parser.add_argument("--sizes", nargs="+", type=parse_bytes, default=[], metavar="SIZE",
                        help="bytes, such as 64K, or tokens; other than those of the table")  # fmt: skip
    parser.add_argument("--way", nargs="+", choices=ways, default=[], help="of xccl (default: all)")
    parser.add_argument("--hidden", type=whole_number(1), default=Cell.hidden, help=f"of MoE (default: {Cell.hidden})")
    parser.add_argument(
        "--experts", type=whole_number(1), default=Cell.experts, help=f"of MoE (default: {Cell.experts})"
    )
    parser.add_argument("--minutes", type=float, default=13.0, help="time for all of it (default: 13)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, those of each turn included")
    parser.add_argument("--list", action="store_true", help="list the cells, and which libraries are there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
