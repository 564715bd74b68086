"""A fork server: one process for each engine and release that imports them once and forks ranks from then on.

    python -m tests.support.forks SOCKET ENGINE

`import torch`, an engine and what it imports at its first step take 6 to 14 s of a core, a fork some milliseconds. The
server is shared by all pytest workers of a run. It starts no threads, which would not survive a fork: process groups,
and whatever computes, live in its children alone. The children belong to the worker that asked for them: they die with
its connection, at the latest with the server.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import io
import json
import logging
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock

from tests.support import ROOT, session

#: What DeepSpeed imports when a model is handed to it, 2 to 3 s of a core, and our engine.
DEEPSPEED = (
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "muon_plugin.deepspeed.engine",
)
#: What Megatron's optimizer and `register` import, most of a second, and our engine.
MEGATRON = (
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.post_training.modelopt",
    "muon_plugin.megatron.engine",
)
#: Its training loop, which only source trees and the wheel of 0.19 have, and the tokenizers that each run asks for.
MEGATRON_TRAINING = ("megatron.training.training", "megatron.core.tokenizers.text")
#: Libraries that train with DeepSpeed or with an optimizer alone: 9 s of a core.
CLIENTS = (
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "trl.trainer.grpo_trainer",
    "lightning.pytorch",
)
#: What is imported at the first step of any optimizer, and by the test files.
COMMON = ("torch._dynamo", "torch.utils.flop_counter", "muon_plugin.watchdog", "pytest", "tests.support.integers")
MESSAGE = 2**17  # bytes; the largest requests hold all environment variables


@dataclass(frozen=True)
class Engine:
    """What ranks import.

    Args:
        megatron: the folder of a Megatron-Core, or None.
        deepspeed: the folder of a DeepSpeed, or None for the installed one.
        device: "cpu" or "cuda".
        clients: the folder of the libraries in `CLIENTS`, or None.
        beside: a folder of further packages, which are found after all others, or None.
        loop: with Megatron-Core, whether ranks run its training loop or DeepSpeed, too.
    """

    megatron: str | None = None
    deepspeed: str | None = None
    device: str = "cpu"
    clients: str | None = None
    beside: str | None = None
    loop: bool = True

    def prepare(self) -> None:
        """Imports all that ranks will need, and starts no thread."""
        sys.path[:0] = [folder for folder in (self.megatron, self.deepspeed, self.clients) if folder]
        sys.path += [self.beside] if self.beside else []
        if self.clients:
            os.environ |= {"HF_HUB_OFFLINE": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}  # Arrow's own has a thread
        import torch

        torch.set_num_threads(1)
        # On CUDA "auto" takes DeepSpeed's AdamW where DeepSpeed is imported, which a run under Megatron does not do.
        with suppress(ImportError):
            if self.megatron and (self.device == "cuda" or not self.loop):
                raise ImportError
            import deepspeed

            # Compiled at start otherwise, for inference alone; a killed build leaves a lock on which others wait.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            # CPUs without fp16 instructions compute it in software: slow, but the same numbers. DeepSpeed says no.
            deepspeed.get_accelerator().is_fp16_supported = lambda: True
            _import(DEEPSPEED)
            if not self.megatron:
                _import(["transformers"])  # by DeepSpeed's pipelines, at their first batch
        for name in CLIENTS if self.clients else ():
            importlib.import_module(name)
        if self.megatron:
            from muon_plugin.megatron import on_cpu

            warnings.simplefilter("ignore")
            if self.device == "cpu":
                on_cpu.install()
                on_cpu.install = lambda: None  # twice would be once too often
            logging.getLogger("megatron").setLevel("ERROR")
            import megatron.core.models.gpt
            import megatron.core.optimizer  # noqa: F401

            _import(MEGATRON)
            if self.loop and importlib.util.find_spec("megatron.training"):
                _import(MEGATRON_TRAINING)
        for name in COMMON:
            importlib.import_module(name)


def _import(names: Sequence[str]) -> None:
    """Those of them that this release has."""
    for name in names:
        with suppress(ImportError):
            importlib.import_module(name)


INSTALLED = Engine()


@dataclass(frozen=True)
class Program:
    """A Python program in a child: the arguments of Python, all environment variables, the folder it runs in."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str

    def enter(self, log: int) -> None:
        """Makes this process look like one that was just started for the program."""
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)

    def run(self) -> None:
        """As the last thing that Python does here: errors, exit codes and what runs at exit are as in any program."""
        if self.arguments[0] == "-m":
            sys.argv = self.arguments[1:]
            sys.path.insert(0, self.folder)
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = self.arguments
            sys.path.insert(0, str(Path(sys.argv[0]).parent))
            runpy.run_path(sys.argv[0], run_name="__main__")


# In the process that runs tests.


class Server:
    """This process's connection to the server of an engine, which the first to need it starts."""

    @staticmethod
    @cache
    def of(engine: Engine) -> Server:
        return Server(engine)

    def __init__(self, engine: Engine) -> None:
        text = json.dumps(asdict(engine))
        name = session.folder() / sha256(text.encode()).hexdigest()[:8]
        self.log = name.with_suffix(".log")
        with FileLock(name.with_suffix(".lock")):
            self._socket = self._connected(str(name), text)

    def _connected(self, address: str, engine: str) -> socket.socket:
        started: subprocess.Popen | None = None
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.connect(address)
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
            if started is None:
                started = self._started(address, engine)
            elif started.poll() is not None:
                raise RuntimeError(f"the fork server of {engine} did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)

    def _started(self, address: str, engine: str) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": json.loads(engine)["device"]}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "tests.support.forks", address, engine]
        with self.log.open("a") as log:
            return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def fork(self, size: int, store: str) -> tuple[list[int], list[Connection]]:
        """`size` ranks that meet in the file `store`, if it is named: their process ids, and a pipe to each."""
        pipes = [Pipe() for _ in range(size)]
        socket.send_fds(self._socket, [pickle.dumps(("fork", store))], [there.fileno() for _, there in pipes])
        pids = self._answer()
        for _, there in pipes:
            there.close()
        return pids, [here for here, _ in pipes]

    def run(self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path | None, log: int) -> int:
        """`python arguments` in `folder`, printing into the open file `log`: its process id."""
        program = Program(list(arguments), dict(environment), str(folder or Path.cwd()))
        socket.send_fds(self._socket, [pickle.dumps(("run", program))], [log])
        return self._answer()[0]

    def kill(self, pids: list[int]) -> None:
        """Ends these children, with what they have started, and waits for them."""
        with suppress(ConnectionError):
            self._socket.send(pickle.dumps(("kill", pids)))
            self._answer()

    def _answer(self) -> Any:
        message = self._socket.recv(MESSAGE)
        if not message:
            raise ConnectionError(f"the fork server has died:\n{self.log.read_text()[-3000:]}")
        return pickle.loads(message)


# In the server.


@dataclass
class Workers:
    """The connections of pytest's workers, and the children that each has asked for."""

    listener: socket.socket
    engine: Engine
    children: dict[socket.socket, set[int]] = field(default_factory=dict)

    def serve(self) -> Program | None:
        """Answers until the run of the tests is over. In a child that is to run a program it returns that."""
        while not session.ended():
            for ready in select.select([self.listener, *self.children], [], [], 1.0)[0]:
                if ready is self.listener:
                    self.children[self.listener.accept()[0]] = set()
                    continue
                message, fds, *_ = socket.recv_fds(ready, MESSAGE, 64)
                if not message:  # the worker has ended
                    _kill(self.children.pop(ready))
                    ready.close()
                    continue
                program = self._answer(ready, pickle.loads(message), fds)
                if program is not None:
                    return program
        for pids in self.children.values():
            _kill(pids)
        return None

    def _answer(self, asking: socket.socket, request: tuple[str, Any], fds: list[int]) -> Program | None:
        what, argument = request
        pids: list[int] = []
        if what == "kill":
            _kill(argument)
            self.children[asking] -= set(argument)
        for rank, fd in enumerate(fds):
            pids.append(os.fork())
            if pids[-1] == 0:
                self._become_child([other for other in fds if other != fd])
                if what == "run":
                    argument.enter(fd)
                    return argument
                _serve_rank(Connection(fd), rank, len(fds), argument, self.engine)
        for fd in fds:
            os.close(fd)
        self.children[asking] |= set(pids)
        with suppress(ConnectionError):
            asking.send(pickle.dumps(pids))
        return None

    def _become_child(self, others: list[int]) -> None:
        os.setsid()  # a process group of its own, for `_kill`
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive the server
        for connection in (self.listener, *self.children):
            connection.close()
        for fd in others:
            os.close(fd)


def serve(address: str, engine: Engine) -> Program | None:
    """Imports what children need and answers requests for them; see `Workers.serve`."""
    if engine.device == "cpu":
        engine.prepare()  # CUDA does not survive a fork: there each rank imports for itself
    gc.collect()
    gc.freeze()  # else the first collection in each child would copy all pages
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        return Workers(listener, engine).serve()


def _kill(pids: Any) -> None:
    """Children are waited for here alone: until then their ids stay theirs."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # with what it started: Megatron writes from further processes
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


# In a rank.


def _serve_rank(pipe: Connection, rank: int, size: int, store: str, engine: Engine) -> NoReturn:
    try:
        _rank(pipe, rank, size, store, engine)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _rank(pipe: Connection, rank: int, size: int, store: str, engine: Engine) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "LOCAL_WORLD_SIZE": str(size),
    }
    if engine.device == "cuda":
        engine.prepare()
    import torch.distributed as dist

    backend = "gloo"
    if engine.device == "cuda":
        backend = _on_a_gpu(rank, size)
    if store:
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, args, kwargs = pickle.loads(message)
            answer = _pickled((True, function(rank, *args, **kwargs)))
        except BaseException as error:
            answer = pickle.dumps((False, (type(error).__name__, str(error)), traceback.format_exc()))
        pipe.send_bytes(answer)


def _on_a_gpu(rank: int, size: int) -> str:
    """Takes a GPU, of its own or together with others; the backend with which the ranks talk to each other."""
    import torch

    from tests.support import staged

    gpus = torch.cuda.device_count()
    os.environ["LOCAL_RANK"] = str(rank % gpus)  # DeepSpeed takes it for the number of the device
    torch.cuda.set_device(rank % gpus)
    if gpus >= size:
        return "nccl"
    staged.install()
    return "gloo"


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Tensors as bytes: `torch.save` costs ten times as much, and Megatron's own ways to pickle them are not there
        in the process of the tests."""
        import torch

        if not isinstance(value, torch.Tensor):
            return NotImplemented
        flat = value.detach().cpu().contiguous().view(-1)
        return _tensor, (flat.view(torch.uint8).numpy().tobytes(), value.dtype, tuple(value.shape))


def _tensor(raw: bytes, dtype: Any, shape: tuple[int, ...]) -> Any:
    import torch

    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


if __name__ == "__main__":
    # Children unpickle what pytest's process pickled: names of this module must be found under its own name there.
    from tests.support import forks

    program = forks.serve(sys.argv[1], forks.Engine(**json.loads(sys.argv[2])))
    if program is not None:
        program.run()
