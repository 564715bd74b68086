"""What must be the same on every node, read from what is really imported, and which GPUs are there."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import muon_plugin

from .. import watchdog

#: Name in the table -> module.
ENGINES = {"deepspeed": "deepspeed", "megatron-core": "megatron.core", "transformers": "transformers"}


def source() -> tuple[str, str]:
    """(Digest of the package's Python files, its folder)."""
    folder = Path(muon_plugin.__file__).resolve().parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12], str(folder)


def versions(engines: bool) -> dict[str, str]:
    """Of this process; the engines are imported, which takes seconds, where `engines` asks for it."""
    digest, _ = source()
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "muon_plugin": f"{muon_plugin.__version__} ({digest})",
        watchdog.VARIABLE: os.environ.get(watchdog.VARIABLE, "-"),
    }
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    if engines:
        found |= {name: _version(module) for name, module in ENGINES.items()}
    return found


def _version(module: str) -> str:
    try:
        if importlib.util.find_spec(module) is None:
            return "-"
        return str(importlib.import_module(module).__version__)
    except ModuleNotFoundError as error:
        return "-" if module.startswith(error.name or " ") else f"fails ({error})"
    except Exception as error:  # an engine that cannot be imported here is a fact to report, whatever it raises
        return f"fails ({type(error).__name__}: {str(error).partition(chr(10))[0][:80]})"


def gpu(local_rank: int) -> dict[str, Any]:
    """This rank's GPU; empty without one."""
    if not torch.cuda.is_available():
        return {}
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise RuntimeError(f"local rank {local_rank} has no GPU of its own: this process sees {count}")
    torch.cuda.set_device(local_rank)
    properties = torch.cuda.get_device_properties(local_rank)
    free, total = torch.cuda.mem_get_info(local_rank)
    return {
        "name": properties.name,
        "driver": _driver(),
        "memory": total,
        "free": free,
        "id": str(getattr(properties, "uuid", local_rank)),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
