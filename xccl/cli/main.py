"""The `xccl` command.

Exit status: 0 success; 1 wrong elements, a failed run or a broken machine; 2 a usage error, or something asked for that
does not fit; 130 interrupted. Errors of xccl are one line on standard error; a traceback means a bug.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from xccl._version import __version__
from xccl.cli import bench, calibrate, doctor, project, top, trace, validate
from xccl.cli.parsing import OneLineParser
from xccl.errors import CapacityError, UsageError, XcclError

_EXAMPLES = """\
examples:
  xccl bench moe --ranks 4 --tokens 16 --hidden 1024    run dispatch and combine here, and check them
  xccl project dispatch --ep 320 --tokens 128           what a dispatch would take on a SuperPod
  xccl COMMAND --help                                   the options of a command
"""
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Malformed arguments leave through SystemExit, as in argparse."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(
        prog="xccl",
        description="Emulate the communication of a CloudMatrix384 SuperPod.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"xccl {__version__}")
    commands = parser.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)
    bench.add_parser(commands.add_parser("bench", help="run a microbenchmark on emulated ranks", allow_abbrev=False))
    calibrate.add_parser(commands.add_parser("calibrate", help="measure or fit a machine", allow_abbrev=False))
    doctor.add_parser(commands.add_parser("doctor", help="check this machine, and clean up", allow_abbrev=False))
    project.add_parser(commands.add_parser("project", help="what it would cost on UB links", allow_abbrev=False))
    top.add_parser(commands.add_parser("top", help="live sessions: who waits for whom", allow_abbrev=False))
    trace.add_parser(commands.add_parser("trace", help="timeline of a benchmark, for Perfetto", allow_abbrev=False))
    validate.add_parser(commands.add_parser("validate", help="the model beside published figures", allow_abbrev=False))
    args = parser.parse_args(words)
    args.command = ["xccl", *words]
    try:
        status: int = args.run(args)
        sys.stdout.flush()  # here, where a closed pipe can still be caught
        return status
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader has gone: `xccl bench --list | head -1`
        _drop_output()
        return _BROKEN_PIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _drop_output()
        print(f"xccl {args.subcommand}: error: cannot write to standard output: {error.strerror}", file=sys.stderr)
        return 1
    except XcclError as error:
        message = " ".join(str(error).split())
        print(f"xccl {args.subcommand}: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError | CapacityError) else 1


def _drop_output() -> None:
    """What is still buffered goes nowhere: the interpreter's own flush at exit must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
