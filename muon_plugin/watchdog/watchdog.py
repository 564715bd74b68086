"""Terminates a hung job and prints the rank, node, step and phase, so that Slurm can requeue it.

    MUON_WATCHDOG=300         seconds without progress after which a rank counts as hung
    MUON_WATCHDOG=300,7200    and the limit while all ranks are outside the optimizer (default: 12 times the first)

The first limit must be longer than any step of the optimizer, the second longer than any evaluation or save. On every
rank a thread publishes heartbeats that say where the main thread is (`phases.current`). A rank that makes no progress
reads the heartbeats of all ranks, asks the kernels of silent ranks whether their processes are alive, and calls
`verdict.judge`. If that finds a hang, all ranks print the message, write torch's flight recorder to a file and exit
with code 75; the responsible ranks and the rank that found the hang also print the stack trace of their main thread. A
rank that fails with an error also prints which rank died, failed or exited before it. Without MUON_WATCHDOG nothing
runs. Only ranks that train with the optimizer are watched: others may evaluate, serve, or train another model.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ..core.agreement import agree, gather, ranks_of, world_of
from ..core.phases import OUTSIDE, current
from .heartbeats import Heartbeats
from .nodes import named, node_name
from .process import dump_flight_recorder, main_stack, main_thread, say
from .state import State
from .verdict import FAILED, Standing, cause_of, judge

VARIABLE = "MUON_WATCHDOG"
#: Of a process that the watchdog ends: EX_TEMPFAIL of sysexits.h, "try again later".
EXIT_CODE = 75

_running: _Watchdog | None = None
_started = 0


def start(ranks: Any = None, steps: bool = True) -> None:
    """Starts the watchdog of these ranks if MUON_WATCHDOG is set and theirs is not running. Collective over `ranks`.

    Args:
        ranks: all that train with the optimizer: a process group, None (the default group) or a `Grid`.
        steps: whether this rank counts steps; one that does not is not watched.

    Raises:
        ValueError: on every rank, for a value that is not allowed, or that is not the same everywhere.
    """
    global _running, _started
    value = os.environ.get(VARIABLE, "")
    agree(VARIABLE, [repr(value)], "Set it to the same value on all nodes", ranks)
    patience = limits(value)
    if patience is None or world_of(ranks)[1] == 1:
        return
    running = _running.ranks if _running is not None and _running.watching else []
    everyone = list(zip(ranks_of(ranks), gather((steps, running, _started), ranks), strict=True))
    watched = [rank for rank, (counts, *_) in everyone if counts]
    others = [theirs for _, (counts, theirs, _) in everyone if counts and theirs != watched]
    if not others or len(watched) < 2:
        return
    if any(others):
        if world_of(ranks)[0] == 0:
            theirs = named(next(filter(None, others)))
            say(f"{named(watched)} are not watched: another optimizer's {theirs} are, and a process watches one set")
        return
    _started = 1 + max(number for _, (*_, number) in everyone)  # with the first rank, a name that no other set has
    if steps:
        _running = _Watchdog(*patience, watched, f"muon_plugin/watchdog/{_started}/{watched[0]}")


def stop() -> None:
    """Tells the other ranks that this one has finished training. Called automatically when Python exits."""
    if _running is not None:
        _running.finish()


def limits(value: str) -> tuple[float, float] | None:
    """Parses MUON_WATCHDOG: seconds without progress, and the same outside the optimizer; None if it is empty.

    Args:
        value: such as ``"300"``, or ``"300,7200"`` with a limit outside the optimizer; seconds.

    Returns:
        Both limits in seconds; the second is 12 times the first where it is not given.

    Raises:
        ValueError: for a value that is not allowed.

    Examples:
        >>> from muon_plugin.watchdog import limits
        >>> limits("300"), limits("300,7200"), limits("")
        ((300.0, 3600.0), (300.0, 7200.0), None)
    """
    if not value:
        return None
    try:
        patience, *rest = (float(part) for part in value.split(","))
        longer = rest[0] if rest else 12 * patience
        good = len(rest) < 2 and 0 < patience <= longer < float("inf")
    except ValueError:
        good = False
    if not good:
        raise ValueError(
            f"{VARIABLE}={value!r}; allowed: seconds without progress, above 0, such as 300; or with a longer limit "
            "outside the optimizer, such as 300,7200. Unset it to run without a watchdog"
        )
    return patience, longer


class _Watchdog:
    """Watches the main thread from two others.

    One talks to the store (`_talk`): it publishes heartbeats, compares the ranks when this one makes no progress, and
    publishes a verdict. The store may block it. The other (`_watch`) never waits for the store: it ends the process
    once there is a verdict, or when the store stops responding.
    """

    def __init__(self, patience: float, longer: float, ranks: list[int], prefix: str) -> None:
        self.patience, self.longer, self.ranks = patience, longer, ranks
        self.rank, self.world = world_of(None)
        self.node = node_name()
        self.beat = min(2.0, patience / 30)
        self.hearts = Heartbeats(self.rank, ranks, prefix, self.beat)
        self.state = State()
        self._pid = os.getpid()
        self._excepthook, sys.excepthook = sys.excepthook, self._failed
        atexit.register(self.finish)
        self._threads = [
            threading.Thread(target=target, name=f"muon_plugin watchdog {target.__name__}", daemon=True)
            for target in (self._talk, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def watching(self) -> bool:
        return not self.state.left.is_set()

    # In the main thread.

    def finish(self) -> None:
        """At exit, after training or after an error."""
        if os.getpid() != self._pid:
            return  # a child that was forked
        self.state.leave()
        for thread in self._threads:
            thread.join(5)
        if self.hearts.serves:  # the others must read it before the store is gone
            time.sleep(max(0.0, self.state.fate.since + 3 * self.beat - time.monotonic()))

    def _failed(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._excepthook(kind, error, trace)
        if os.getpid() == self._pid and self.watching:
            if self.state.fail(f"{kind.__name__}: {error}".partition("\n")[0][:200]):
                self._explain(self.hearts.host())
            self.state.explained.wait(10)

    # In the thread that talks to the store.

    def _talk(self) -> None:
        try:
            if self.hearts.connect(self.state.left):
                self._beats()
        except Exception as error:  # the store's host may be dead: `_watch` handles that
            if self.state.lose_store(str(error).partition("\n")[0] or repr(error)):
                self._explain(self.hearts.host())

    def _beats(self) -> None:
        """Publishes a heartbeat and acts on it, again and again, until it has published that this rank has left."""
        looked = time.monotonic()
        while True:
            self._count_failure()
            self.hearts.publish(self._me())
            if not self.watching:
                return
            if self.state.fate.order and not self.state.explained.is_set():
                self._explain_to_all()
            elif self._stands(looked):
                looked = time.monotonic()
                self._compare()
            if not dist.is_initialized():
                self.state.leave()
            self.state.changed.wait(self.beat)
            self.state.changed.clear()

    def _count_failure(self) -> None:
        fate = self.state.fate
        if fate.life == FAILED and not fate.order:
            self.state.count(self.hearts.count_failure())

    def _stands(self, looked: float) -> bool:
        """Whether this rank has made no progress for some time, and last looked at the others some time ago."""
        every = max(self.patience / 8, len(self.ranks) ** 2 / 1e6)  # the store reads at most a million states a second
        now = time.monotonic()
        return now - current.since > self.patience / 2 and now - looked > every

    def _compare(self) -> None:
        """Reads where the other ranks are, and publishes a verdict if there is a reason to end the job."""
        verdict = judge(self._me(), self.hearts.others(), self.world, self.patience, self.longer)
        if verdict is not None:
            self.hearts.decide({"text": verdict.text, "to_blame": verdict.blamed, "judge": self.rank})

    def _explain_to_all(self) -> None:
        """The first failed rank asks all ranks whether they are alive; later ones repeat the cause that it found."""
        first = self.state.fate.order == 1
        told = "" if first else self.hearts.cause(seconds=5)
        if told:
            say(f"why rank {self.rank} failed: {told}")
            self.state.explained.set()
        else:
            text = self._explain(self.hearts.others(ask_all=first))
            if first:
                self.hearts.tell_cause(text)

    # In the thread that does not wait for the store.

    def _watch(self) -> None:
        while not self.state.left.wait(self.beat):
            self.hearts.answer()
            if self.hearts.verdict:
                self._end(**self.hearts.verdict)
            me = self._me()
            self._end_if_failed_for_long(me)
            self._end_if_the_store_is_silent(me)

    def _end_if_failed_for_long(self, me: Standing) -> None:
        """For a rank whose process survives its error (a thread keeps it alive): the others would wait for it."""
        if me.life == FAILED and time.monotonic() - self.state.fate.since > 10 + self.patience:
            self._end(f"rank {self.rank} of {self.world} ({self.node}) failed but did not exit: {me.error}")

    def _end_if_the_store_is_silent(self, me: Standing) -> None:
        """For a rank that makes no progress and cannot ask why: the store's host is down, hung or unreachable."""
        lost, silent = self.state.fate.lost, time.monotonic() - self.hearts.heard
        if me.seconds > self.patience and (silent > self.patience or (lost and silent > 3 * self.beat)):
            verdict = judge(me, self.hearts.host(), self.world, self.patience, self.longer)
            if verdict is not None:
                why = f" ({lost})" if lost else ""
                self._end(f"no response for {silent:.0f} s from {self.hearts.keeper()}{why}; {verdict.text}")

    # In any of them.

    def _me(self) -> Standing:
        peer, seconds = current.peer, time.monotonic() - current.since
        at, waits = main_thread() if seconds > self.patience / 2 else ("", False)
        fate = self.state.fate
        return Standing(
            rank=self.rank,
            node=self.node,
            step=current.step,
            phase=current.name if peer is None else f"{current.name} with rank {peer}",
            outside=current.name == OUTSIDE,
            seconds=seconds,
            life=fate.life,
            error=fate.error,
            order=fate.order,
            at=at,
            waits=waits,
        )

    def _explain(self, others: list[Standing]) -> str:
        """Prints why this rank failed, if another rank is the cause."""
        cause = None if self.hearts.verdict else cause_of(self._me(), others, self.world)  # that says it
        if cause is not None:
            say(f"why rank {self.rank} failed: {cause.text}")
        self.state.explained.set()
        return cause.text if cause else ""

    def _end(self, text: str, to_blame: tuple[int, ...] = (), judge: int | None = None) -> None:
        say(f"{text}. Rank {self.rank} ({self.node}) exits with code {EXIT_CODE}")
        if judge is None or self.rank in (judge, *to_blame):
            say(f"stack trace of the main thread of rank {self.rank}:\n{main_stack()}")
        dump = threading.Thread(target=dump_flight_recorder, args=(self.rank,), daemon=True)
        dump.start()
        dump.join(10)  # it may block on a lock that the hung thread holds
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        time.sleep(3 * self.beat)  # the others must read the verdict before the store is gone
        os._exit(EXIT_CODE)
