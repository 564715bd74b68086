"""What all pytest workers of one run of the tests share: a folder, and values that are computed once."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

_FOLDER, _CONTROLLER = "MUON_TESTS_FOLDER", "MUON_TESTS_CONTROLLER"


def begin() -> None:
    """Makes the folder; called in the process that pytest-xdist's workers inherit their environment from."""
    os.environ[_FOLDER] = tempfile.mkdtemp(prefix="muon")  # a short path: Unix sockets lie in it
    os.environ[_CONTROLLER] = str(os.getpid())


def end() -> None:
    """Removes the folder, which ends what was started for this run of the tests."""
    shutil.rmtree(os.environ.pop(_FOLDER), ignore_errors=True)


def folder() -> Path:
    return Path(os.environ[_FOLDER])


def ended() -> bool:
    """Whether this run of the tests is over, or its first process has died."""
    return not folder().exists() or not Path("/proc", os.environ[_CONTROLLER]).exists()


def free_port() -> int:
    """A port on which nobody listens and that no other test of this run is given.

    Below those that the kernel gives to outgoing connections: so it stays free until the test's process listens there.
    """
    first, last = 10_000, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    file = folder() / "port"
    with FileLock(f"{file}.lock"):
        port = int(file.read_text()) if file.exists() else random.randrange(first, last)
        while True:
            port = port + 1 if port + 1 < last else first
            with socket.socket() as listener, suppress(OSError):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("127.0.0.1", port))
                break
        file.write_text(str(port))
    return port


def once(key: str, compute: Callable[[], Any]) -> Any:
    """`compute()`, or what another worker or test of this run has computed under the same `key`."""
    file = folder() / f"once-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            value = compute()
            torch.save(value, f"{file}.part")
            os.rename(f"{file}.part", file)
        return torch.load(file, weights_only=False)
