"""Process groups over gloo that take CUDA tensors: for ranks that share one GPU, which NCCL refuses.

gloo copies CUDA tensors through memory of the CPU in most collectives by itself. In some it hands a device pointer to a
socket instead: the coalesced all-gather that Megatron posts, send and receive. So all of them are staged here alike:
tensors are copied to the CPU, gloo runs on the copies, and what it wrote is copied back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

#: Methods of a process group that take tensors, under the names of torch 2.6 to 2.14.
COLLECTIVES = (
    *("broadcast", "allreduce", "allreduce_coalesced", "allreduce_sparse", "reduce"),
    *("allgather", "allgather_coalesced", "_allgather_base", "all_gather_single"),
    *("allgather_into_tensor_coalesced", "all_gather_single_coalesced", "gather", "scatter"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single"),
    *("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"),
    *("alltoall", "alltoall_base", "all_to_all_single"),
)
POINT_TO_POINT = ("send", "recv", "recv_anysource")

Pairs = list[tuple[Tensor, Tensor]]


class _PointToPoint:
    """A message in flight; what was received is copied to the device when it is waited for."""

    def __init__(self, work: Any, received: Pairs) -> None:
        self.work, self.received = work, received

    def wait(self, *args: Any) -> bool:
        done = self.work.wait(*args)
        _copy_back(self.received)
        return bool(done)

    def is_completed(self) -> bool:
        return bool(self.work.is_completed())


def install(staged: Callable[[Tensor], bool] = lambda tensor: tensor.is_cuda) -> None:
    """From now on, every process group of this process stages the tensors for which `staged` is true."""
    for name in (*COLLECTIVES, *POINT_TO_POINT):
        original = getattr(dist.ProcessGroup, name, None)  # torch releases name them differently
        if original is not None:
            setattr(dist.ProcessGroup, name, _staged(original, name, staged))


def _staged(original: Any, name: str, staged: Callable[[Tensor], bool]) -> Any:
    @functools.wraps(original)
    def method(group: Any, *args: Any, **kwargs: Any) -> Any:
        pairs: Pairs = []

        def on_cpu(value: Any) -> Any:
            if isinstance(value, Tensor) and staged(value):
                # In contiguous memory, which gloo wants; a copy too where it already lies on the CPU.
                pairs.append((value, value.detach().to("cpu", copy=True).contiguous()))
                return pairs[-1][1]
            return [on_cpu(item) for item in value] if isinstance(value, (list, tuple)) else value

        written = on_cpu(args[0])  # in each of these methods: what it writes, alone or first
        outputs = [] if name == "send" else list(pairs)  # inputs may lie in the same memory, as ZeRO-3's do
        work = original(group, written, *map(on_cpu, args[1:]), **{key: on_cpu(v) for key, v in kwargs.items()})
        if not pairs:
            return work
        if name in POINT_TO_POINT:  # waiting here would wait for a peer that waits for us
            return _PointToPoint(work, outputs)
        work.wait()
        _copy_back(outputs)
        return work

    return method


def _copy_back(pairs: Pairs) -> None:
    for tensor, copy in pairs:
        tensor.detach().copy_(copy)
