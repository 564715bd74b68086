"""Where this rank is in the optimizer's step.

Whoever looks for a hung rank reads `current`; timers hear of every change; a profiler sees the phases by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.autograd import profiler
from torch.profiler import record_function

OUTSIDE = "forward and backward"
#: In the order of a step. They do not add up to what a step takes without them: one flies while another computes.
PHASES = ("momentum", "exchange", "orthogonalize", "apply", "adamw")

#: Called with the phase that is left and the one that is entered.
Listener = Callable[[str, str], None]


@dataclass
class Current:
    """Attributes: optimizer steps begun by this process; the phase it is in; since when (time.monotonic); the rank of
    the default group whose message it waits for, if it does."""

    step: int = 0
    name: str = OUTSIDE
    peer: int | None = None
    since: float = field(default_factory=time.monotonic)


current = Current()
_listeners: list[Listener] = []
_starters: list[Callable[[Any, bool], None]] = []


def at_start(starter: Callable[[Any, bool], None]) -> None:
    """`starter` is called by every optimizer that is about to plan, with the arguments of `start`. Registered once."""
    if starter not in _starters:
        _starters.append(starter)


def start(ranks: Any, steps: bool = True) -> None:
    """Before an optimizer plans. Collective over `ranks`, as every starter may be.

    Args:
        ranks: all that train with this optimizer: a process group, None or a `Grid`.
        steps: whether `current` will count steps on this rank: a pipeline stage may have no matrix.
    """
    for starter in _starters:
        starter(ranks, steps)


class phase:
    """``with phase(name)``: this rank is in it, one of `PHASES`; a phase inside another interrupts it.

    A class, since a step of many pieces has a thousand phases: without listeners and profiler each costs a microsecond.
    """

    __slots__ = ("_before", "_name", "_seen")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._before = current.name
        self._seen = record_function(f"muon {self._name}") if profiler._is_profiler_enabled else None
        if self._seen is not None:
            self._seen.__enter__()  # type: ignore[no-untyped-call]
        _change(self._name)

    def __exit__(self, *error: Any) -> None:
        _change(self._before)
        if self._seen is not None:
            self._seen.__exit__(*error)


@contextmanager
def waiting_for(rank: int | None) -> Iterator[None]:
    """This rank waits for a message of, or to, that rank of the default group."""
    current.peer = rank
    try:
        yield
    finally:
        current.peer = None


@contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """`listener` is told of every change meanwhile."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def _change(name: str) -> None:
    left, current.name, current.since = current.name, name, time.monotonic()
    for listener in _listeners:
        listener(left, name)
