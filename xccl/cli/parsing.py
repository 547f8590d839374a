"""How the command line reads sizes, counts and times, and says what is wrong with them in one line."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable
from typing import Final, NoReturn

from xccl.errors import UsageError

_SIZE: Final = re.compile(r"(\d+)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)
_EXPONENT_OF: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line (argparse adds the whole usage), with exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def parse_bytes(text: str) -> int:
    """Bytes of 8, 64K, 4M, 1G; the units are powers of 1024, and may be written KB or KiB."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8, 64K, 4M or 1G")
    unit_bytes: int = 1024 ** _EXPONENT_OF[match[2].upper()]
    return int(match[1]) * unit_bytes


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser of integers from `low` to `high`."""
    bounds = f"at least {low}" if high is None else f"from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{value} must be {bounds}")
        return value

    return parse


def int_list(low: int, high: int | None = None) -> Callable[[str], tuple[int, ...]]:
    """A parser of integers from `low` to `high`, separated by commas."""
    parse_one = whole_number(low, high)

    def parse(text: str) -> tuple[int, ...]:
        return tuple(parse_one(part) for part in text.split(","))

    return parse


def parse_int_list(text: str) -> tuple[int, ...]:
    """Natural numbers, separated by commas."""
    return int_list(0)(text)


def parse_seconds(text: str) -> float:
    """A positive, finite number of seconds."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} must be a number of seconds above 0")
    return value


#: Options that are not named like what they set.
_OPTION_OF: Final = {"check": "--no-check", "timeout_s": "--timeout"}


def refuse_given(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Refuse options that would change nothing, rather than let somebody believe that they did.

    Args:
        parser: which has the defaults.
        args: what was parsed.
        names: attributes of `args` that must have been left alone.
        why: goes on after the option's name.

    Raises:
        UsageError: one of them has another value than its default.
    """
    for name in names:
        value = getattr(args, name)
        if value != parser.get_default(name):
            option = _OPTION_OF.get(name, "--" + name.replace("_", "-"))
            raise UsageError(f"{option} {why}", value=value)
