"""Ends a job that stands still, with a message that names the rank and the phase, so that Slurm can requeue it.

    MUON_WATCHDOG=300         seconds without progress after which a standstill is looked into
    MUON_WATCHDOG=300,7200    and the same where all ranks stand at one place outside the optimizer (12 times the first)

The first must be longer than any step of the optimizer, the second than any evaluation or save. On every rank a thread
publishes where the main thread is (`phases.current`). A rank without progress reads where all ranks are, asks the
kernels of silent ranks whether their processes live, and lets `verdict.judge` decide. Then all ranks print the message,
those to blame and the one that judged also the Python stack of their main thread, torch's flight recorder goes to a
file, and all end with exit code 75. A rank that fails with an error says in addition which rank died, failed or left
before it. Nothing runs where MUON_WATCHDOG is not set.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import tempfile
import threading
import time
import traceback
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from ..core.agreement import agree, world_of
from ..core.phases import OUTSIDE, current
from .heartbeats import Heartbeats
from .nodes import node_name
from .verdict import FAILED, FINISHED, RUNNING, Standing, Verdict, cause_of, judge

VARIABLE = "MUON_WATCHDOG"
#: Of a process that the watchdog ends: EX_TEMPFAIL of sysexits.h, "try again later".
EXIT_CODE = 75

_running: _Watchdog | None = None
_started = 0


def start(process_group: Any = None) -> None:
    """Watches this process, if MUON_WATCHDOG asks for it and nobody does so yet. Collective over `process_group`.

    Raises:
        ValueError: on every rank, for a value that is not allowed, or that is not the same everywhere.
    """
    global _running, _started
    value = os.environ.get(VARIABLE, "")
    agree(VARIABLE, [repr(value)], "Set it alike on all nodes", process_group)
    patience = limits(value)
    if patience is None or world_of(None)[1] == 1 or (_running is not None and _running.watching):
        return
    _started += 1
    _running = _Watchdog(*patience, f"muon_plugin/watchdog/{_started}")


def stop() -> None:
    """Tells the others that this rank has ended its training. At Python's end that happens by itself."""
    if _running is not None:
        _running.finish()


def limits(value: str) -> tuple[float, float] | None:
    """Of a value of MUON_WATCHDOG: seconds without progress, and outside the optimizer; None for no watchdog.

    Raises:
        ValueError: for a value that is not allowed.
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
            f"{VARIABLE}={value!r}: allowed: seconds without progress, above 0, such as 300; or with a longer limit "
            "outside the optimizer, such as 300,7200. Unset it for no watchdog"
        )
    return patience, longer


class _Watchdog:
    """Two threads: one talks to the store and judges; one waits for the verdict, and for a store that is silent."""

    def __init__(self, patience: float, longer: float, prefix: str) -> None:
        self.patience, self.longer = patience, longer
        self.rank, self.world = world_of(None)
        self.node = node_name()
        self.beat = min(2.0, patience / 30)
        self.hearts = Heartbeats(self.rank, self.world, prefix, self.beat)
        self._pid = os.getpid()
        self._done, self._wake, self._explained = threading.Event(), threading.Event(), threading.Event()
        self._life, self._error, self._order, self._lost = RUNNING, "", 0, ""
        self._ended = 0.0  # when it finished or failed
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
        return not self._done.is_set()

    def finish(self) -> None:
        """The clean end of this rank, or the end after an error."""
        if os.getpid() != self._pid:
            return  # a child that was forked
        self._leave()
        for thread in self._threads:
            thread.join(5)
        if self.hearts.serves:  # the others must read it before the store is gone
            time.sleep(max(0.0, self._ended + 3 * self.beat - time.monotonic()))

    def _leave(self) -> None:
        if self.watching:
            self._life = FINISHED if self._life == RUNNING else self._life
            self._ended = time.monotonic()
            self._done.set()
            self._wake.set()

    def _failed(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._excepthook(kind, error, trace)
        if os.getpid() == self._pid and self.watching:
            self._error = f"{kind.__name__}: {error}".partition("\n")[0][:200]
            self._ended = time.monotonic()
            self._life = FAILED
            self._wake.set()
            if self._lost:
                self._explain(self.hearts.rank_0())
            self._explained.wait(10)

    def _me(self) -> Standing:
        peer, seconds = current.peer, time.monotonic() - current.since
        at, waits = _main_thread() if seconds > self.patience / 2 else ("", False)
        return Standing(
            rank=self.rank,
            node=self.node,
            step=current.step,
            phase=current.name if peer is None else f"{current.name} with rank {peer}",
            outside=current.name == OUTSIDE,
            seconds=seconds,
            life=self._life,
            error=self._error,
            order=self._order,
            at=at,
            waits=waits,
        )

    def _talk(self) -> None:
        try:
            if self.hearts.connect(self._done):
                self._beats()
        except Exception as error:  # the store's host may be dead: `_watch` deals with it
            self._lost = str(error).partition("\n")[0] or repr(error)
            if self._life == FAILED:
                self._explain(self.hearts.rank_0())

    def _beats(self) -> None:
        looked = time.monotonic()
        every = max(self.patience / 8, self.world**2 / 1e6)  # the store reads at most a million states a second
        while True:
            if self._life == FAILED and not self._order:
                self._order = self.hearts.count_failure()
            self.hearts.publish(self._me())
            if not self.watching:
                return
            now = time.monotonic()
            if self._order and not self._explained.is_set():
                self._explain_to_all()
            elif now - current.since > self.patience / 2 and now - looked > every:
                looked = now
                verdict = judge(self._me(), self.hearts.others(), self.world, self.patience, self.longer)
                if verdict is not None:
                    self.hearts.decide({"text": verdict.text, "to_blame": verdict.blamed, "judge": self.rank})
            if not dist.is_initialized():
                self._leave()
            self._wake.wait(self.beat)
            self._wake.clear()

    def _explain_to_all(self) -> None:
        """The first that failed asks all ranks whether they live; those that fail after it repeat what it found."""
        told = self.hearts.cause(seconds=5) if self._order > 1 else ""
        if told:
            _print(f"why rank {self.rank} failed: {told}")
            self._explained.set()
        else:
            text = self._explain(self.hearts.others(ask_all=self._order == 1))
            if self._order == 1:
                self.hearts.tell_cause(text)

    def _explain(self, others: list[Standing]) -> str:
        cause = None if self.hearts.verdict else cause_of(self._me(), others, self.world)  # one word is enough
        if cause is not None:
            _print(f"why rank {self.rank} failed: {cause.text}")
        self._explained.set()
        return cause.text if cause else ""

    def _watch(self) -> None:
        while not self._done.wait(self.beat):
            self.hearts.answer()
            if self.hearts.verdict:
                self._end(**self.hearts.verdict)
            me, silent = self._me(), time.monotonic() - self.hearts.heard
            if me.life == FAILED and time.monotonic() - self._ended > 10 + self.patience:
                self._end(f"rank {self.rank} of {self.world} ({self.node}) failed and does not end: {me.error}")
            if me.seconds > self.patience and (silent > self.patience or (self._lost and silent > 3 * self.beat)):
                verdict = judge(me, self.hearts.rank_0(), self.world, self.patience, self.longer)
                if verdict is not None:
                    self._end(self._without_store(verdict, silent))

    def _without_store(self, verdict: Verdict, silent: float) -> str:
        why = f" ({self._lost})" if self._lost else ""
        return f"no word for {silent:.0f} s from {self.hearts.keeper()}{why}; {verdict.text}"

    def _end(self, text: str, to_blame: tuple[int, ...] = (), judge: int | None = None) -> None:
        _print(f"{text}. Rank {self.rank} ({self.node}) ends with exit code {EXIT_CODE}")
        if judge is None or self.rank in (judge, *to_blame):
            frame = sys._current_frames().get(threading.main_thread().ident or 0)
            stack = "".join(traceback.format_stack(frame)).rstrip()
            _print(f"the main thread of rank {self.rank} is here:\n{stack}")
        dump = threading.Thread(target=_dump_flight_recorder, args=(self.rank,), daemon=True)
        dump.start()
        dump.join(10)  # it may wait for a lock of what hangs
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        time.sleep(3 * self.beat)  # the others must read the verdict before the store is gone
        os._exit(EXIT_CODE)


def _main_thread() -> tuple[str, bool]:
    """Where its Python is, and whether that is in a collective. (One that waits for a GPU does not show it.)"""
    stack = traceback.extract_stack(sys._current_frames().get(threading.main_thread().ident or 0))
    if not stack:
        return "", False
    last = stack[-1]
    waits = last.name == "wait" or any(frame.filename.endswith("distributed_c10d.py") for frame in stack)
    return f"{os.path.basename(last.filename)}:{last.lineno} in {last.name}", waits


def _print(text: str) -> None:
    with contextlib.suppress(Exception):  # whatever happened to stderr, the process must end
        print(f"muon_plugin watchdog: {text}", file=sys.stderr, flush=True)


def _dump_flight_recorder(rank: int) -> None:
    """Where torch itself would put it, for its ``torchfrtrace``."""
    native: Any = torch._C._distributed_c10d
    variables = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    prefix = next(
        filter(None, map(os.environ.get, variables)), f"{tempfile.gettempdir()}/nccl_trace_{os.getpid()}_rank_"
    )
    with contextlib.suppress(Exception):
        dump = getattr(native, "_dump_nccl_trace", None) or native._dump_fr_trace
        trace = dump()
        with open(f"{prefix}{rank}", "wb") as file:
            file.write(trace)
        _print(f"torch's flight recorder of rank {rank} is in {prefix}{rank}")
