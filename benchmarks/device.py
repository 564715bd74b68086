"""CPU or CUDA: what the benchmarks have to know of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

#: In the environment of a script that was started again for another device: what the functions below take by default.
DEVICE = os.environ.get("BENCHMARK_DEVICE", "cpu")


def on(device: str) -> None:
    """Starts the script again where it was read for another device."""
    if device != DEVICE:
        os.environ["BENCHMARK_DEVICE"] = device
        os.execv(sys.executable, [sys.executable, *sys.argv])


def result(name: str, device: str = DEVICE) -> Path:
    """Where the Markdown of a benchmark goes."""
    return Path(__file__).parent / "results" / f"{name}{'' if device == 'cpu' else '_gpu'}.md"


def machine(device: str = DEVICE) -> str:
    return f"{os.cpu_count()} CPU cores" if device == "cpu" else torch.cuda.get_device_name()


def finish() -> None:
    """Waits for what the GPU has to do, where this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def shown(seconds: float, device: str = DEVICE) -> str:
    return f"{seconds:.3f} s" if device == "cpu" else f"{seconds * 1e3:.1f} ms"
