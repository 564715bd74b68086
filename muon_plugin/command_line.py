"""What the plugin's commands share: a parser that reports a bad argument in one line, and types of arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises instead of printing its usage: a command runs on many ranks, each of which would.

    Raises:
        ValueError: for a bad argument, in one line.
    """

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help tells what is allowed)")


def split_at_dashes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before the first ``--``, and those after it, which another program reads."""
    given = list(arguments)
    end = given.index("--") if "--" in given else len(given)
    return given[:end], given[end + 1 :]


def positive(text: str) -> int:
    """An argument's type: a whole number from 1 on."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; allowed: a whole number from 1 on")
    return int(text)


def positive_number(text: str) -> float:
    """An argument's type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; allowed: a number above 0")
    return value
