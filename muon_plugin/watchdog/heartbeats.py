"""Heartbeats: each rank publishes its phase in a shared TCPStore, and checks whether the others' processes are alive.

Used by the watchdog's own thread, over a connection of its own: on the main thread's connection, a blocked call would
block the main thread too.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from . import nodes
from .verdict import CUT_OFF, GONE, RUNNING, Standing


class Heartbeats:
    """Publishes the heartbeats of one rank and reads those of the others.

    Args:
        rank: in the default group.
        ranks: all that are watched, numbered likewise; ascending.
        prefix: of the keys in the store; the same on every rank.
        beat: seconds between heartbeats.

    Attributes:
        heard: time.monotonic() of the store's last response.
        verdict: the verdict that a rank has published to end the job; empty until then.
        published: number of heartbeats that this rank has published.
        address: of the store.
        serves: this process hosts the store.
    """

    def __init__(self, rank: int, ranks: Sequence[int], prefix: str, beat: float) -> None:
        self.rank, self.ranks, self.prefix, self.beat = rank, ranks, prefix, beat
        self.heard = time.monotonic()
        self.verdict: dict[str, Any] = {}
        self.published = 0
        self.address: nodes.Address | None = None
        # Held, since a store of rank 0's must outlive the process group.
        self._default = dist.distributed_c10d._get_default_store()
        self._tcp = _tcp_store(self._default)
        self._host = ranks[0] if self._tcp is None else 0
        launched = self._tcp is not None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.serves = rank == self._host and not launched
        self._listener: Any = None
        self._store: Any = None
        self._first: dict[str, Any] = {}
        #: rank -> the number of its last heartbeat, and when this rank first read it
        self._seen: dict[int, tuple[int, float]] = {}

    def connect(self, done: threading.Event) -> bool:
        """Connects to the default store, or to one that the first rank opens if that is no TCPStore.

        Returns:
            Whether it is connected; False if `done` was set before.

        Raises:
            RuntimeError, OSError: if the host cannot be reached.
        """
        if self._tcp is not None:
            self.address = self._tcp.host, self._tcp.port
        elif self.rank == self._host:
            self._own = dist.TCPStore(socket.gethostname(), 0, None, True, wait_for_workers=False)
            self.address = self._own.host, self._own.port
            self._default.set(self.prefix, json.dumps(self.address))
        elif self._comes(self._default, self.prefix, done):
            host, port = json.loads(self._default.get(self.prefix))
            self.address = host, port
        else:
            return False
        client = dist.TCPStore(*self.address, None, False, timeout=timedelta(seconds=60), wait_for_workers=False)
        self._store = dist.PrefixStore(self.prefix, client)
        self._listener = nodes.listen_towards(self.address)
        if self.rank == self.ranks[0]:
            keys = [*map(str, {*self.ranks, self._host}), "verdict"]
            self._store.multi_set(keys, ["{}"] * len(keys))
            self._store.set("ready", "1")
        return self._comes(self._store, "ready", done)

    def _comes(self, store: Any, key: str, done: threading.Event) -> bool:
        pause = 0.05  # grows: a rank that dies in its first seconds must be known to the others
        while not store.check([key]):
            self.heard = time.monotonic()
            if done.wait(pause):
                return False
            pause = min(2 * pause, self.beat)
        return True

    def answer(self) -> None:
        """Accepts pending connections of ranks that ask whether this process is alive; the kernel has answered them."""
        if self._listener is not None:
            nodes.accept_all(self._listener)

    def publish(self, me: Standing) -> None:
        """Publishes one heartbeat, and reads the verdict and that of the store's host, if it is watched.

        Raises:
            RuntimeError: if the store is gone.
        """
        more = {"signs": self.published + 1, "time": time.time(), "listens": self._listener.getsockname()[:2]}
        self._store.set(str(self.rank), json.dumps(asdict(me) | more))
        self.published += 1
        first, verdict = map(json.loads, self._store.multi_get([str(self._host), "verdict"]))
        self._first, self.verdict = first or self._first, verdict or self.verdict
        self.heard = time.monotonic()

    def count_failure(self) -> int:
        """Counts this rank's failure; how many ranks have failed, this one included."""
        return self._store.add("failures", 1)

    def tell_cause(self, text: str) -> None:
        """Publishes why the first rank failed; an empty text if no other rank is the cause."""
        self._store.set("cause", text)

    def cause(self, seconds: float) -> str:
        """What the first failed rank published as the cause; empty if it publishes nothing within these seconds."""
        until = time.monotonic() + seconds
        while not self._store.check(["cause"]):
            if time.monotonic() > until:
                return ""
            time.sleep(self.beat)
        return self._store.get("cause").decode()

    def decide(self, verdict: dict[str, Any]) -> None:
        """Publishes the verdict, unless another rank has published one."""
        self.verdict = json.loads(self._store.compare_set("verdict", "{}", json.dumps(verdict)))

    def others(self, ask_all: bool = False) -> list[Standing]:
        """All ranks that have published; those without a new heartbeat, or all, are asked whether they are alive."""
        now = time.monotonic()
        found, listens = {}, {}
        for rank, value in zip(self.ranks, self._store.multi_get([*map(str, self.ranks)])):
            state = json.loads(value)
            if rank == self.rank or not state:
                continue
            if self._seen.get(rank, (0, 0.0))[0] != state["signs"]:
                self._seen[rank] = state["signs"], now
            silent = now - self._seen[rank][1]
            silent = silent if silent > 3 * self.beat else 0.0
            found[rank] = _standing(state, silent)
            if found[rank].life == RUNNING and (silent or ask_all):
                listens[rank] = state["listens"]
        return _asked(found, listens, {rank: now - self._seen[rank][1] for rank in found}, 10 * self.beat)

    def keeper(self) -> str:
        """The store and its host, for a message."""
        if self.address is None:
            return f"the store that rank {self._host} opens"
        launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        whose = f"{'the launcher of ' * launched}rank {self._host} ({self._first.get('node', 'node unknown')})"
        return f"the store at {self.address[0]}:{self.address[1]}, hosted by {whose}"

    def host(self) -> list[Standing]:
        """The rank that hosts the store, if it finished, failed or died, as far as can be told without the store.

        Nothing while it runs, or if it is not watched.
        """
        if self.rank == self._host or not self._first:
            return []
        silent = time.monotonic() - self.heard
        first = _standing(self._first, silent)
        listens = {self._host: self._first["listens"]} if first.life == RUNNING else {}
        known = _asked({self._host: first}, listens, {self._host: silent}, 0)
        return [r for r in known if r.life != RUNNING]


def _tcp_store(store: Any) -> dist.TCPStore | None:
    """The store under its prefixes, if it is one that other processes can connect to by its address."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store if isinstance(store, dist.TCPStore) else None


def _standing(state: dict[str, Any], silent: float) -> Standing:
    known = Standing(**{key: value for key, value in state.items() if key in Standing.__dataclass_fields__})
    if silent:
        # For display, from the clocks of two nodes; decisions use the time measured on this node alone.
        shown = max(silent, time.time() - state["time"])
        known = replace(known, seconds=known.seconds + silent, silent=shown)
    return known


def _asked(
    found: dict[int, Standing], listens: dict[int, Any], silent: dict[int, float], enough: float
) -> list[Standing]:
    """Checks ranks for liveness. An unresponsive node may be busy: CUT_OFF only after `enough` silent seconds."""
    for rank, lives in nodes.alive({rank: (host, port) for rank, (host, port) in listens.items()}).items():
        if lives is False:
            found[rank] = replace(found[rank], life=GONE)
        elif lives is None and silent[rank] > enough:
            found[rank] = replace(found[rank], life=CUT_OFF)
    return list(found.values())
