"""Real processes over gloo for tests: pools of ranks that live for the session and run one function after another."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = int(os.environ.get("RANKS_TIMEOUT", "400"))  # seconds; a hang must end a test, not the suite


class RankError(AssertionError):
    """A rank raised: `errors` holds (type name, message) by rank, None where a rank did not raise."""

    def __init__(self, errors: list[tuple[str, str] | None], text: str) -> None:
        super().__init__(text)
        self.errors = errors


def release(version: str, engine: str = "megatron-core") -> Path:
    """The folder of a Megatron-Core or a "deepspeed" (`make test` installs them; else tests are skipped), or a path."""
    if Path(version).is_absolute():
        return Path(version)
    variable, package = engine.upper().replace("-", "_"), engine.split("-")[0]
    folder = Path(os.environ.get(variable, ROOT / ".venv" / engine)) / version
    if not (folder / package).is_dir():
        if os.environ.get("REQUIRE_RELEASES"):
            raise FileNotFoundError(f"{folder}: run make test, which installs the releases there")
        pytest.skip(f"{engine} {version} is not in {folder} (make test installs it)")
    return folder


class Ranks:
    """`size` processes with torch.distributed initialized; `run` calls a module-level function on each."""

    def __init__(
        self, size: int, megatron: str | None = None, deepspeed: str | None = None, device: str = "cpu"
    ) -> None:
        """With `megatron`, the processes see that release of Megatron-Core; `deepspeed` likewise.

        On the `device` "cuda" each has a GPU of its own over NCCL, where there are enough; else they share, over gloo.
        """
        folders = [release(megatron)] if megatron is not None else []
        folders += [release(deepspeed, "deepspeed")] if deepspeed is not None else []
        context = multiprocessing.get_context("spawn")
        self.size = size
        store = os.path.join(tempfile.mkdtemp(), "store")
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (there, rank, size, store, folders, megatron is not None, device)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """`function(rank, *args, **kwargs)` on every rank: its results, by rank.

        Raises:
            RankError: if any rank raised, or none answered in time.
        """
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT):
                self.close()
                raise RankError([None] * self.size, f"rank {rank} of {self.size} did not answer in {TIMEOUT} s: a hang")
            answers.append(pipe.recv())
        if any(not good for good, *_ in answers):
            texts = [f"rank {rank}:\n{answer[2]}" for rank, answer in enumerate(answers) if not answer[0]]
            raise RankError([None if answer[0] else answer[1] for answer in answers], "\n".join(texts))
        return [answer[1] for answer in answers]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it started: Megatron writes from further processes
            process.kill()
            process.join()


def _serve(pipe: Any, rank: int, size: int, store: str, folders: list[Path], megatron: bool, device: str) -> None:
    os.setsid()  # a process group of its own, for `Ranks.close`
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "LOCAL_WORLD_SIZE": str(size),
        "DS_ACCELERATOR": device,
        "OMP_NUM_THREADS": "1",
    }
    sys.path[:0] = [str(folder) for folder in folders]
    import torch
    import torch.distributed as dist

    try:  # compiled at start otherwise, for inference alone; a build that is killed leaves a lock on which others wait
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    except ImportError:
        pass
    if megatron:
        sys.path.insert(1, str(ROOT))
        from muon_plugin.megatron import on_cpu

        warnings.simplefilter("ignore")
        # Megatron writes checkpoints from processes of its own, which daemons may not have.
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        if device == "cpu":
            on_cpu.install()
        logging.getLogger("megatron").setLevel("ERROR")
    torch.set_num_threads(1)
    backend = "gloo"
    if device == "cuda":
        backend = "nccl" if torch.cuda.device_count() >= size else backend
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(rank, *args, **kwargs))
        except BaseException as error:
            answer = (False, (type(error).__name__, str(error)), traceback.format_exc())
        pipe.send(answer)
