"""Jobs for tests: a process a rank, as on nodes that share this machine, which may be killed or stopped."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ranks import ROOT


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(*folders: Path, **more: str) -> dict[str, str]:
    """What every process of a job sees; `folders` come first where modules are searched."""
    paths = [*map(str, folders), str(ROOT), str(ROOT / "tests")]
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | more


class Job:
    """`python ARGUMENTS` on each of `world` ranks, two a node.

    Args:
        folder: for logs.
        own: rank -> what is different in its environment.
        at: rank -> the folder that it runs in.
        ranks: those that start; all if not given.
    """

    def __init__(
        self,
        folder: Path,
        world: int,
        arguments: Sequence[str],
        own: dict[int, dict[str, str]] | None = None,
        at: dict[int, Path] | None = None,
        ranks: Sequence[int] | None = None,
        **shared: str,
    ) -> None:
        self.logs = [folder / f"log{rank}" for rank in range(world)]
        everywhere = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world), **shared}
        self.processes: dict[int, subprocess.Popen] = {}
        for rank in range(world) if ranks is None else ranks:
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "SLURMD_NODENAME": f"node{rank // 2}"}
            with open(self.logs[rank], "w") as log:
                self.processes[rank] = subprocess.Popen(
                    [sys.executable, *arguments],
                    env=environment() | everywhere | place | (own or {}).get(rank, {}),
                    cwd=(at or {}).get(rank),
                    stdout=log,
                    stderr=log,
                )

    def ends(self, *ranks: int) -> None:
        """Waits for these ranks, or for all, and leaves no process behind."""
        try:
            for rank in ranks or self.processes:
                self.processes[rank].wait(timeout=90)
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait()

    @property
    def codes(self) -> list[int]:
        return [process.returncode for process in self.processes.values()]

    def log(self, rank: int) -> str:
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""

    def all_logs(self) -> str:
        return "\n".join(f"--- rank {rank}\n{self.log(rank)}" for rank in range(len(self.logs)))
