"""Rounds of questions to all ranks, through a store: every rank answers in time or is named; nothing waits for ever."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

POLL = 0.02
#: Seconds beyond a round's time, for an answer that is under way.
GRACE = 3.0


class Stop(Exception):
    """Nothing more can be checked: the message says why; empty where rank 0 says it."""


class Rounds:
    """This rank's side of all rounds.

    Attributes:
        step: what this rank does in this round, which is said where it does not come to an end.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self.step = ""

    def ask(self, name: str, work: Callable[[], Any], seconds: float) -> list[dict[str, Any]]:
        """Runs `work` on every rank, in a thread that may never come back.

        Returns:
            On rank 0, for every rank {"value": ...}, {"error": its text}, {"late": its step} or {} for no answer; on
            the others, only their own.

        Raises:
            Stop: on ranks but 0, if rank 0 does not go on.
        """
        mine: dict[str, Any] = {}

        def run() -> None:
            try:
                answer = {"value": work()}
            except BaseException as error:  # SystemExit too, of an argument parser
                answer = {"error": f"{type(error).__name__}: {error}"}
            mine.update(answer)

        self.step = name
        until = time.monotonic() + seconds + GRACE
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(seconds)
        answer = dict(mine) or {"late": self.step}
        self.store.set(f"{name}/{self.rank}", json.dumps(answer))
        return self.collect(name, until - time.monotonic()) if self.rank == 0 else [answer]

    def collect(self, name: str, seconds: float) -> list[dict[str, Any]]:
        """What every rank set under `name`, waiting for this long; {} for those that did not."""
        until = time.monotonic() + seconds
        found: list[dict[str, Any]] = [{} for _ in range(self.world)]
        missing = set(range(self.world))
        while missing:
            for rank in sorted(missing):
                if self.store.check([f"{name}/{rank}"]):
                    found[rank] = json.loads(self.store.get(f"{name}/{rank}"))
                    missing.discard(rank)
            if time.monotonic() > until:
                break
            time.sleep(POLL)
        return found

    def tell(self, name: str, value: Any) -> None:
        """Rank 0 to all others."""
        self.store.set(f"{name}/told", json.dumps(value))

    def told(self, name: str, seconds: float) -> Any:
        """What rank 0 tells.

        Raises:
            Stop: if it does not within this time, or its store is gone.
        """
        until = time.monotonic() + seconds
        try:
            while not self.store.check([f"{name}/told"]):
                if time.monotonic() > until:
                    raise Stop(f"rank 0 did not answer within {seconds:.0f} s ({name}): see its node")
                time.sleep(POLL)
            return json.loads(self.store.get(f"{name}/told"))
        except RuntimeError as error:
            raise Stop(f"lost contact with rank 0 ({name}): {str(error).splitlines()[0]}") from error


def rendezvous(rank: int, world: int, host: str, port: int, seconds: float) -> Rounds:
    """To the store at the master's address, which a launcher or rank 0 keeps.

    Raises:
        Stop: with the address, if that is not possible within this time.
    """
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not keeps:
        _reach(host, port, seconds)
    try:
        store = dist.TCPStore(
            host, port, None, keeps, timeout=timedelta(seconds=max(seconds, 1)), wait_for_workers=False
        )
    except RuntimeError as error:
        verb = "open" if keeps else "talk to"
        raise Stop(f"cannot {verb} the store at {host}:{port} (MASTER_ADDR, MASTER_PORT): {_first(error)}") from error
    return Rounds(dist.PrefixStore("muon_plugin/preflight", store), rank, world)


def _reach(host: str, port: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, until - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() + 0.2 > until:
                raise Stop(
                    f"cannot reach the master at {host}:{port} within {seconds:.0f} s: {error}. Check MASTER_ADDR and "
                    "MASTER_PORT, name resolution and firewall on this node, and that rank 0 is up"
                ) from error
            time.sleep(0.2)


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0]
