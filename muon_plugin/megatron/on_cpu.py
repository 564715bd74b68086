"""Megatron-Core on CPU tensors and gloo, for laptops and tests: call `install()` before megatron is imported.

Megatron-Core asks for CUDA by name; here every such request means the CPU. What stays on the CPU: the local layer
specs, `use_cpu_initialization`, no fused kernels. Not reached: Transformer Engine's layers, context and sequence
parallelism in a real forward, the "alltoall" dispatcher of MoE ("allgather" works).
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import typing
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    """Sends requests for a CUDA device to the CPU, and calls CPU tensors' types by CUDA's names (Megatron compares)."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        name = getattr(function, "__name__", "")
        if name == "cuda":
            return args[0]
        if name == "to":
            args = (args[0], *(_on_cpu(a) if isinstance(a, (str, torch.device)) else a for a in args[1:]))
        if name == "type" and len(args) == 1 and not kwargs:
            return function(*args).replace("torch.", "torch.cuda.", 1)
        return function(*args, **kwargs)


def _on_cpu(device: Any) -> Any:
    """The device, with CUDA's replaced; a bare number is a CUDA device."""
    if isinstance(device, int) and not isinstance(device, bool):
        return "cpu"
    return "cpu" if isinstance(device, (str, torch.device)) and str(device).startswith("cuda") else device


class _Stream:
    """Streams and events: on the CPU everything is in order already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, *args: Any) -> None: ...
    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None: ...


def install() -> None:
    """Makes CUDA mean the CPU in this process. Once, before megatron is imported."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron insists, for tensor parallelism
    if not hasattr(typing, "override"):  # emerging-optimizers is written for Python 3.12
        import typing_extensions

        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.Stream = torch.cuda.Event = _Stream  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda *_, **__: _Stream()  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: _Stream()  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[assignment, method-assign]
    _CudaMeansCpu().__enter__()
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils

    random.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()  # CUDA's generators
    random.initialize_rng_tracker()
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 uses the name without importing it
        moe_utils.te_general_gemm = None
    # Every rank that saves a checkpoint spawns a process for this queue, which imports the main program and Megatron
    # again. Without CUDA, which does not survive a fork, it can be forked.
    queue = functools.cache(lambda: multiprocessing.get_context("fork").Manager().Queue())
    name = "get_write_results_queue"
    name = name if hasattr(filesystem_async, name) else f"_{name}"  # 0.16.1
    setattr(filesystem_async, name, lambda mp_mode="fork": queue())
