"""Names of nodes and ranks in messages, and whether a rank's process still exists."""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import time
from collections.abc import Iterable, Mapping

#: (host, port) on which a rank's process listens.
Address = tuple[str, int]


def node_name() -> str:
    """Slurm's name of this node, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def named(ranks: Iterable[int]) -> str:
    """``rank 3``, or ``ranks 0-2, 5``."""
    numbers = sorted(ranks)
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
    return f"rank{'s' * (len(numbers) > 1)} {text}"


def listen_towards(address: Address) -> socket.socket:
    """A listening socket on the interface that leads to `address`. The kernel answers for it while the process exists.

    Raises:
        OSError: if nothing answers at `address` within 30 seconds.
    """
    with socket.create_connection(address, timeout=30) as route:
        listener = socket.create_server((route.getsockname()[0], 0), family=route.family, backlog=1024)
    listener.setblocking(False)
    os.register_at_fork(after_in_child=listener.close)  # a data loader's worker must not answer for a dead rank
    return listener


def accept_all(listener: socket.socket) -> None:
    """Accepts and closes pending connections, since a full backlog would refuse more."""
    with contextlib.suppress(OSError):
        while True:
            listener.accept()[0].close()


def alive(addresses: Mapping[int, Address], timeout: float = 3.0) -> dict[int, bool | None]:
    """Whether the process that listens at each address exists; None if its node does not respond within `timeout`.

    The kernel answers, not the process: one whose Python code hangs still counts as alive.
    """
    found: dict[int, bool | None] = dict.fromkeys(addresses)
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for key, (host, port) in addresses.items():
            with contextlib.suppress(OSError):
                family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
                caller = stack.enter_context(socket.socket(family))
                caller.setblocking(False)
                caller.connect_ex((host, port))
                selector.register(caller, selectors.EVENT_WRITE, key)
        until = time.monotonic() + timeout
        while selector.get_map() and (left := until - time.monotonic()) > 0:
            for event, _ in selector.select(left):
                caller, key = event.fileobj, event.data  # type: ignore[assignment]
                error = caller.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                found[key] = {0: True, errno.ECONNREFUSED: False, errno.ECONNRESET: False}.get(error)
                selector.unregister(caller)
    return found
