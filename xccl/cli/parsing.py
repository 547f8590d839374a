"""How the command line reads sizes, counts and times, and says what is wrong with them in one line."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, Final, NoReturn

from xccl.errors import UsageError

_SIZE: Final = re.compile(r"(\d+)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)
_EXPONENT_OF: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line (argparse adds the whole usage), with exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is not known here, where the command is known, rather than in the parser of all commands."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            hint = did_you_mean(unknown[0].partition("=")[0], options)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed, unknown


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """What to append to the refusal of a word: the name it resembles, if there is one."""
    found = get_close_matches(word, names, n=1, cutoff=0.7)
    return f"; did you mean {found[0]}?" if found else ""


def require_operation(op: str | None, names: Iterable[str]) -> str:
    """The operation, if there is one of that name.

    Raises:
        UsageError: there is none, or none was given.
    """
    names = list(names)
    if op is None:
        raise UsageError(f"no operation given: one of {', '.join(names)}")
    if op not in names:
        raise UsageError(f"unknown operation {op!r}: one of {', '.join(names)}{did_you_mean(op, names)}", value=op)
    return op


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


def given(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """By option, the values of those that were not left alone.

    Args:
        parser: which has the defaults.
        args: what was parsed.
        names: attributes of `args`.
    """
    changed = [name for name in names if getattr(args, name) != parser.get_default(name)]
    return {_OPTION_OF.get(name, "--" + name.replace("_", "-")): getattr(args, name) for name in changed}


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
    for option, value in given(parser, args, names).items():
        raise UsageError(f"{option} {why}", value=value)
