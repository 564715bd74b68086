"""Whether this rank runs, failed or finished, shared by its main thread and the watchdog's two threads."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace

from .verdict import FAILED, FINISHED, RUNNING


@dataclass(frozen=True)
class Fate:
    """This rank's status at one moment.

    Attributes:
        life: RUNNING, FAILED or FINISHED.
        error: of a rank that failed.
        order: of a rank that failed, once the store has counted it: 1 for the first.
        lost: why the store cannot be reached; empty while it can.
        since: time.monotonic() at which it failed or left.
    """

    life: str = RUNNING
    error: str = ""
    order: int = 0
    lost: str = ""
    since: float = field(default_factory=time.monotonic)


class State:
    """The fate of this rank, and the events that its threads wait for.

    Each transition replaces `fate` under a lock. Readers need none: `fate` is one reference, and the object behind it
    never changes. A rank may fail while its store gets lost: the later of the two transitions returns True, so that
    exactly one thread explains the failure without the store.

    Attributes:
        fate: the current status.
        left: set when training is over and there is nothing left to watch.
        changed: set to wake the thread that talks to the store.
        explained: set once the cause of this rank's failure was printed, or no other rank is the cause.
    """

    def __init__(self) -> None:
        self.fate = Fate()
        self.left, self.changed, self.explained = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()

    def fail(self, error: str) -> bool:
        """Records an uncaught error of the main thread. Returns whether the store was lost before."""
        with self._lock:
            self.fate = replace(self.fate, life=FAILED, error=error, since=time.monotonic())
            lost = bool(self.fate.lost)
        self.changed.set()
        return lost

    def lose_store(self, why: str) -> bool:
        """Records that the store cannot be reached. Returns whether this rank failed before."""
        with self._lock:
            self.fate = replace(self.fate, lost=why)
            return self.fate.life == FAILED

    def count(self, order: int) -> None:
        """Records this rank's place among the failures, as the store has counted it."""
        with self._lock:
            self.fate = replace(self.fate, order=order)

    def leave(self) -> None:
        """Records the end of training, or of a rank that failed. Only the first call counts."""
        with self._lock:
            if self.left.is_set():
                return
            life = FINISHED if self.fate.life == RUNNING else self.fate.life
            self.fate = replace(self.fate, life=life, since=time.monotonic())
            self.left.set()
        self.changed.set()
