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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _device

__all__ = ["install"]

#: What takes the `device` of the tensor that it makes: functions of torch, beside those that torch itself lists.
_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")
#: And methods of tensors.
_NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


def _send_requests_for_cuda_to_the_cpu() -> None:
    """Replaces the functions that take a device.

    A `TorchFunctionMode` would find them by itself, but it costs 3 us in every call of torch and every read of a
    tensor's attribute: a quarter of the time of small models.
    """
    functions = {function.__name__ for function in _device._device_constructors()}
    for name in (*functions, *_LIKE):
        if hasattr(torch, name):
            setattr(torch, name, _making(getattr(torch, name)))
    for name in _NEW:
        setattr(torch.Tensor, name, _making(getattr(torch.Tensor, name)))
    to, kind, context = torch.Tensor.to, torch.Tensor.type, _device.DeviceContext.__init__

    @functools.wraps(to)
    def to_cpu(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return to(self, *(_on_cpu(a) if isinstance(a, (str, torch.device)) else a for a in args), **kwargs)

    @functools.wraps(kind)
    def type_on_cuda(self: Tensor, *args: Any, **kwargs: Any) -> Any:  # Megatron compares it with CUDA's names
        found = kind(self, *args, **kwargs)
        return found if args or kwargs else found.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to, torch.Tensor.type = to_cpu, type_on_cuda  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    _device.DeviceContext.__init__ = lambda self, device: context(self, _on_cpu(device))  # type: ignore[method-assign]


def _making(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, for which a CUDA device is the CPU."""

    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return function(*args, **kwargs)

    return make


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
    """Makes CUDA mean the CPU in this process. Once, before megatron is imported.

    Raises:
        ImportError: if Megatron-Core is not installed.
    """
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
    _send_requests_for_cuda_to_the_cpu()
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
