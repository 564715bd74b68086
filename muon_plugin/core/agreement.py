"""What all ranks must share before training starts: the same facts, and each other's errors.

A rank that raises alone leaves the others waiting in the next collective. These helpers make every rank raise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
#: Elements of which `checksum` takes the bits at a time: it needs three int64 for each.
CHUNK = 2**22


def world_of(group: Any) -> tuple[int, int]:
    """(rank, size) in `group`; (0, 1) where torch.distributed does not run. None is the default group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gather(value: Any, group: Any) -> list[Any]:
    """`value` of every rank, by rank."""
    _, size = world_of(group)
    values = [value] * size
    if size > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def together(work: Callable[[], T], group: Any = None) -> T:
    """Runs `work` on every rank; where it fails on any, every rank raises.

    Raises:
        Exception: on the failing ranks their own error; on the others a ValueError that names the first failing rank.
    """
    error: Exception | None = None
    result = None
    try:
        result = work()
    except Exception as caught:  # whatever it is: a rank that raises alone leaves the others hanging
        error = caught
    errors = gather(None if error is None else str(error), group)
    if error is not None:
        raise error
    failed = [(rank, message) for rank, message in enumerate(errors) if message is not None]
    if failed:
        raise ValueError(f"rank {failed[0][0]} of {len(errors)} failed: {failed[0][1]}")
    return result  # type: ignore[return-value]


def agree(what: str, lines: list[str], advice: str, group: Any = None) -> None:
    """Checks that `lines` are the same on every rank, sending only a digest unless they differ.

    Raises:
        ValueError: on every rank, with the first line in which a rank differs from rank 0.
    """
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if len(set(gather(digest, group))) == 1:
        return
    everyone = gather(lines, group)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            at = next((i for i, (a, b) in enumerate(zip(everyone[0], other)) if a != b), None)
            if at is None:
                difference = f"rank 0 has {len(everyone[0])} entries, rank {rank} has {len(other)}"
            else:
                difference = f"rank 0 has {everyone[0][at]}, rank {rank} has {other[at]}"
            raise ValueError(f"the ranks disagree about {what}: {difference}. {advice}")


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """64 bits of all of a tensor's bits, in their order: the same on every device, and also of NaN.

    (A sum of the values is NaN if one of them is, whatever the others are, and does not depend on their order.)
    """
    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    words = tensor.detach().reshape(-1).view(widths[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for first in range(0, words.numel(), CHUNK):
        mixed = words[first : first + CHUNK].long()
        mixed += torch.arange(first + 1, first + 1 + mixed.numel(), device=tensor.device) * 0x9E3779B97F4A7C1  # odd
        mixed ^= mixed >> 29
        mixed *= 0x3F58476D1CE4E5B9  # odd; int64 wraps around, as a hash should
        mixed ^= mixed >> 32
        total += mixed.sum()
    return int(total)
