"""Jobs for tests: a process a rank, as on nodes that share this machine, which may be killed or stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.support import ROOT
from tests.support.forks import INSTALLED, Engine, Server
from tests.support.session import free_port

TIMEOUT = 300  # seconds; a hang must end a test, not the suite


def environment(*folders: Path, **more: str) -> dict[str, str]:
    """What every process that a test starts sees; `folders` come first where modules are searched."""
    paths = [*map(str, folders), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | more


class Process:
    """A program in a child of a fork server, with the face of a subprocess.Popen. Nobody reaps it before `close`."""

    def __init__(
        self,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        log: IO[str],
        folder: Path | None = None,
        engine: Engine = INSTALLED,
    ) -> None:
        self._server = Server.of(engine)
        self.arguments, self.pid = arguments, self._server.run(arguments, variables, folder, log.fileno())
        self.returncode: int | None = None
        self._end = weakref.finalize(self, self._server.kill, [self.pid])

    def poll(self) -> int | None:
        if self.returncode is None:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            if fields[0] == "Z":
                self.returncode = os.waitstatus_to_exitcode(int(fields[-1]))
        return self.returncode

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.arguments, timeout)
            time.sleep(0.01)
        return self.returncode or 0

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends it with all that it has started."""
        if self._end.alive:
            self.kill()
            self.wait(timeout=60)
            self._end()


class Job:
    """`python ARGUMENTS` on each of `world` ranks, two a node.

    Args:
        folder: for logs.
        own: rank -> what is different in its environment.
        at: rank -> the folder that it runs in.
        ranks: those that start; all if not given.
        engine: what the processes have imported when they start.
    """

    def __init__(
        self,
        folder: Path,
        world: int,
        arguments: Sequence[str],
        own: dict[int, dict[str, str]] | None = None,
        at: dict[int, Path] | None = None,
        ranks: Sequence[int] | None = None,
        engine: Engine = INSTALLED,
        **shared: str,
    ) -> None:
        self.logs = [folder / f"log{rank}" for rank in range(world)]
        everywhere = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world), **shared}
        self.processes: dict[int, Process | subprocess.Popen] = {}
        for rank in range(world) if ranks is None else ranks:
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "SLURMD_NODENAME": f"node{rank // 2}"}
            variables = environment() | everywhere | place | (own or {}).get(rank, {})
            where = (at or {}).get(rank)
            with open(self.logs[rank], "w") as log:
                if "PYTHONPATH" in (own or {}).get(rank, {}):  # another plugin than the fork server has imported
                    command = [sys.executable, *arguments]
                    self.processes[rank] = subprocess.Popen(command, env=variables, cwd=where, stdout=log, stderr=log)
                else:
                    self.processes[rank] = Process(arguments, variables, log, where, engine)

    def ends(self, *ranks: int) -> None:
        """Waits for these ranks, or for all, and leaves no process behind."""
        try:
            for rank in ranks or self.processes:
                self.processes[rank].wait(timeout=TIMEOUT)
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait(timeout=60)
                if isinstance(process, Process):
                    process.close()

    @property
    def codes(self) -> list[int]:
        return [process.returncode for process in self.processes.values()]

    def log(self, rank: int) -> str:
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""

    def all_logs(self) -> str:
        return "\n".join(f"--- rank {rank}\n{self.log(rank)}" for rank in range(len(self.logs)))
