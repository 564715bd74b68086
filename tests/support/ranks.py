"""Real processes over gloo for tests: pools of ranks that run one function after another."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, session
from tests.support.forks import Engine, Server

TIMEOUT = int(os.environ.get("RANKS_TIMEOUT", "400"))  # seconds; a hang must end a test, not the suite


class RankError(AssertionError):
    """A rank raised: `errors` holds (type name, message) by rank, None where a rank did not raise."""

    def __init__(self, errors: list[tuple[str, str] | None], text: str) -> None:
        super().__init__(text)
        self.errors = errors


def release(version: str, engine: str = "megatron-core") -> Path:
    """The folder of a Megatron-Core, or of another `engine`, or a path.

    `make test` installs "deepspeed" too, with `FULL=1` "torch-releases"; tests of one that is not there are skipped.
    """
    if Path(version).is_absolute():
        return Path(version)
    variable, package = engine.upper().replace("-", "_"), engine.split("-")[0]
    folder = Path(os.environ.get(variable, ROOT / ".venv" / engine)) / version
    if not (folder / package).is_dir():
        if os.environ.get("REQUIRE_RELEASES"):
            raise FileNotFoundError(f"{folder}: run make test, which installs the releases there")
        pytest.skip(f"{engine} {version} is not in {folder} (make test installs it)")
    return folder


def client_libraries(package: str = "trl") -> Path:
    """The folder of a library that trains with an engine (`make test` installs them; else tests are skipped).

    That of "trl" has all of `forks.CLIENTS`.
    """
    if sys.version_info < (3, 11):
        pytest.skip("TRL needs Python 3.11")
    name = {
        "trl": "clients",
        "llamafactory": "clients-llamafactory",
        "swift": "clients-ms_swift",
        "megatron/bridge": "clients-megatron_bridge",
        "verl": "clients-verl",
    }[package]
    folder = Path(os.environ.get("CLIENTS", ROOT / ".venv")) / name
    if not (folder / package).is_dir():
        if os.environ.get("REQUIRE_RELEASES"):
            raise FileNotFoundError(f"{folder}: run make test, which installs {package} there")
        pytest.skip(f"{package} is not in {folder} (make test installs it)")
    return folder


class Ranks:
    """`size` processes with torch.distributed initialized; `run` calls a module-level function on each."""

    def __init__(
        self,
        size: int,
        megatron: str | None = None,
        deepspeed: str | None = None,
        device: str = "cpu",
        group: bool = True,
        clients: bool = False,
        beside: str | None = None,
    ) -> None:
        """With `megatron`, the processes see that release of Megatron-Core; `deepspeed` likewise.

        With `clients` they have imported the libraries that train with DeepSpeed. They find packages in `beside`, too.

        Without `group`, torch.distributed is not initialized.

        On the `device` "cuda" each has a GPU of its own over NCCL, where there are enough; else they share, over gloo.
        """
        engine = Engine(
            str(release(megatron)) if megatron is not None else None,
            str(release(deepspeed, "deepspeed")) if deepspeed is not None else None,
            device,
            str(client_libraries()) if clients else None,
            beside,
            loop=beside is None and not os.path.isabs(megatron or ""),  # not in a patched tree, which few tests use
        )
        self.size, self._server = size, Server.of(engine)
        store = os.path.join(tempfile.mkdtemp(dir=session.folder()), "store") if group else ""
        pids, self._pipes = self._server.fork(size, store)
        self._end = weakref.finalize(self, self._server.kill, pids)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """`function(rank, *args, **kwargs)` on every rank: its results, by rank.

        Raises:
            RankError: if any rank raised, or none answered in time.
        """
        message = pickle.dumps((function, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        answers = [self._answer(rank) for rank in range(self.size)]
        if any(not good for good, *_ in answers):
            texts = [f"rank {rank}:\n{answer[2]}" for rank, answer in enumerate(answers) if not answer[0]]
            raise RankError([None if answer[0] else answer[1] for answer in answers], "\n".join(texts))
        return [answer[1] for answer in answers]

    def _answer(self, rank: int) -> Any:
        if not self._pipes[rank].poll(TIMEOUT):
            why = f"did not answer in {TIMEOUT} s: a hang"
        else:
            try:
                return pickle.loads(self._pipes[rank].recv_bytes())
            except EOFError:
                why = f"died; {self._server.log} ends in\n{self._server.log.read_text()[-3000:]}"
        self.close()
        raise RankError([None] * self.size, f"rank {rank} of {self.size} {why}")

    @property
    def alive(self) -> bool:
        return self._end.alive

    def close(self) -> None:
        """Ends the ranks and what they have started."""
        self._end()
        for pipe in self._pipes:
            pipe.close()
