"""CPU or CUDA: what the engines' benchmarks have to know of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

#: In the environment, since the ranks' processes and the sizes of the models depend on it.
DEVICE = os.environ.get("BENCHMARK_DEVICE", "cpu")


def on(device: str) -> None:
    """Starts the script again where it was read for another device."""
    if device != DEVICE:
        os.environ["BENCHMARK_DEVICE"] = device
        os.execv(sys.executable, [sys.executable, *sys.argv])


def result(name: str) -> Path:
    """Where the Markdown of a benchmark goes."""
    return Path(__file__).parent / "results" / f"{name}{'' if DEVICE == 'cpu' else '_gpu'}.md"


def machine() -> str:
    return f"{os.cpu_count()} CPU cores" if DEVICE == "cpu" else torch.cuda.get_device_name()


def finish() -> None:
    """Waits for what the device has to do."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def shown(seconds: float) -> str:
    return f"{seconds:.3f} s" if DEVICE == "cpu" else f"{seconds * 1e3:.1f} ms"
