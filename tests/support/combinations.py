"""Which combinations of parameters a run of the tests takes: all with FULL=1, else a covering array."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, cycle, product
from typing import Any, TypeVar

FULL = bool(os.environ.get("FULL"))
Case = TypeVar("Case")


def covering(
    *parameters: Sequence[Any],
    strength: int = 2,
    valid: Callable[..., bool] = lambda *_: True,
    full: bool = FULL,
) -> list[tuple[Any, ...]]:
    """Combinations of one value of each parameter in which any values of any `strength` parameters meet.

    An error that depends on at most `strength` parameters is found as surely as by all combinations. Built greedily:
    the next combination is the first of those that show most of what has not been seen yet.

    Args:
        parameters: the values of each.
        valid: whether a combination exists. Values that meet in no valid combination need not meet.
        full: all valid combinations instead.
    """
    everything = [case for case in product(*map(range, map(len, parameters))) if valid(*_values(parameters, case))]
    if full:
        return [_values(parameters, case) for case in everything]
    shown = {case: frozenset(combinations(enumerate(case), strength)) for case in everything}
    unseen = frozenset[Any]().union(*shown.values())
    chosen = []
    while unseen:
        chosen.append(max(everything, key=lambda case: len(shown[case] & unseen)))
        unseen -= shown[chosen[-1]]
    return [_values(parameters, case) for case in sorted(chosen)]


def _values(parameters: Sequence[Sequence[Any]], case: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(values[i] for values, i in zip(parameters, case))


def some(cases: Iterable[Case], count: int, full: bool = FULL) -> list[Case]:
    """So many of the cases, evenly spaced from the first to the last; with `full`, all of them."""
    every = list(cases)
    if full or count >= len(every):
        return every
    return [every[i * (len(every) - 1) // max(count - 1, 1)] for i in range(count)]


def in_turn(parameter: Sequence[Any], cases: Iterable[Case], full: bool = FULL) -> list[tuple[Any, Case]]:
    """Every case with one value of the parameter, which take turns; with `full`, with each."""
    if full:
        return [(value, case) for value in parameter for case in cases]
    return sorted(zip(cycle(parameter), cases), key=lambda pair: parameter.index(pair[0]))
