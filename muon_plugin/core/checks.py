"""Checks of what a user set: which values are allowed, and which settings of an engine Muon cannot work with.

A check carries the words for what it allows, so that an error says the setting, its value, and what to write instead.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


def is_number(value: Any) -> bool:
    """A finite real number. A bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """A whole number, as an int. A bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_names(values: Any) -> bool:
    """Strings, none of them empty: the items of a list, or the keys of a mapping."""
    return all(isinstance(value, str) and value for value in values)


@dataclass(frozen=True)
class Check:
    """What a setting may be.

    Attributes:
        accepts: whether a value is allowed.
        allowed: the same in words.
    """

    accepts: Callable[[Any], bool]
    allowed: str


def at_least(low: float) -> Check:
    return Check(lambda value: is_number(value) and value >= low, f"a number >= {low}")


def above(low: float) -> Check:
    return Check(lambda value: is_number(value) and value > low, f"a number above {low}")


def in_range(low: float, high: float) -> Check:
    """low <= value < high."""
    return Check(lambda value: is_number(value) and low <= value < high, f"a number from {low} to below {high}")


def fraction() -> Check:
    return Check(lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1")


def whole(low: int, high: int) -> Check:
    """low <= value <= high."""
    return Check(lambda value: is_whole(value) and low <= value <= high, f"a whole number from {low} to {high}")


def one_of(names: Iterable[str]) -> Check:
    allowed = tuple(names)
    return Check(lambda value: isinstance(value, str) and value in allowed, ", ".join(allowed))


SWITCH = Check(lambda value: isinstance(value, bool), "true or false")
#: Exponential averages' two coefficients, as AdamW takes them.
BETAS = Check(
    lambda value: isinstance(value, (list, tuple)) and len(value) == 2 and all(map(in_range(0, 1).accepts, value)),
    "two numbers from 0 to below 1",
)
PATTERNS = Check(
    lambda value: isinstance(value, (list, tuple)) and is_names(value),
    'a list of name patterns, such as ["*.router.*"]',
)
PATTERN_TABLE = Check(
    lambda value: isinstance(value, Mapping) and is_names(value),
    'an object of name patterns, such as {"*.wqkv": [512, 256, 256]}',
)


def require(shown: str, value: Any, check: Check, hint: str = "") -> None:
    """Refuses a value that is not allowed.

    Args:
        shown: the setting and its value, as the user would write them: ``lr=-1``, ``--muon-momentum 1.5``.
        value: its value.
        check: what is allowed.
        hint: why the value may be there.

    Raises:
        ValueError: with all of these.
    """
    if check.accepts(value):
        return
    if not hint and isinstance(value, str) and "number" in check.allowed:
        hint = "a string where a number is wanted"
    raise ValueError(f"{shown} is not valid{f' ({hint})' if hint else ''}; allowed: {check.allowed}")


@dataclass(frozen=True)
class Refusal:
    """A setting of an engine with which Muon does not work.

    Attributes:
        setting: its name, as the user writes it.
        value: what it is set to; None for a flag that has no value.
        is_set: whether the user set it so.
        advice: what is supported instead, and why.
    """

    setting: str
    value: Any
    is_set: bool
    advice: str


def refuse(refusals: Iterable[Refusal]) -> None:
    """Refuses the first of these that is set.

    Raises:
        ValueError: with the setting, its value and what is supported.
    """
    for refusal in refusals:
        if refusal.is_set:
            shown = refusal.setting if refusal.value is None else f"{refusal.setting}={refusal.value!r}"
            raise ValueError(f"{shown} is not supported by muon_plugin's Muon; supported: {refusal.advice}")
