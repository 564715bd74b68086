"""What is counted at the operators that really run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@contextlib.contextmanager
def bytes_sent() -> Iterator[dict[str, int]]:
    """What this rank sends point to point, by broadcast and by all-to-all, filled in as it happens."""
    sent = {"p2p": 0, "broadcast": 0, "all_to_all": 0}
    p2p, broadcast, all_to_all = dist.batch_isend_irecv, dist.broadcast, dist.all_to_all_single

    def count_p2p(ops: Any) -> Any:
        sent["p2p"] += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return p2p(ops)

    def count_broadcast(tensor: Tensor, src: int, group: Any = None, **kwargs: Any) -> Any:
        if src == dist.get_rank():
            sent["broadcast"] += tensor.nbytes * (dist.get_world_size(group) - 1)
        return broadcast(tensor, src, group=group, **kwargs)

    def count_all_to_all(output: Tensor, tensor: Tensor, come: Any, go: Any, group: Any = None, **kwargs: Any) -> Any:
        sent["all_to_all"] += (tensor.numel() - go[dist.get_rank(group)]) * tensor.element_size()
        return all_to_all(output, tensor, come, go, group=group, **kwargs)

    dist.batch_isend_irecv, dist.broadcast, dist.all_to_all_single = count_p2p, count_broadcast, count_all_to_all
    try:
        yield sent
    finally:
        dist.batch_isend_irecv, dist.broadcast, dist.all_to_all_single = p2p, broadcast, all_to_all


class Products(TorchDispatchMode):
    """On which devices matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in ("mm", "bmm", "addmm", "baddbmm"):
            self.devices.add(args[-1].device.type)
        return func(*args, **(kwargs or {}))
