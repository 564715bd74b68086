"""Bytes counted at the collectives that really run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor


@contextlib.contextmanager
def bytes_sent() -> Iterator[dict[str, int]]:
    """What this rank sends point to point and by broadcast, filled in as it happens."""
    sent = {"p2p": 0, "broadcast": 0}
    p2p, broadcast = dist.batch_isend_irecv, dist.broadcast

    def count_p2p(ops: Any) -> Any:
        sent["p2p"] += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return p2p(ops)

    def count_broadcast(tensor: Tensor, src: int, group: Any = None, **kwargs: Any) -> Any:
        if src == dist.get_rank():
            sent["broadcast"] += tensor.nbytes * (dist.get_world_size(group) - 1)
        return broadcast(tensor, src, group=group, **kwargs)

    dist.batch_isend_irecv, dist.broadcast = count_p2p, count_broadcast
    try:
        yield sent
    finally:
        dist.batch_isend_irecv, dist.broadcast = p2p, broadcast
