"""What all ranks of an optimizer must share before training starts: the same facts, and each other's errors.

A rank that raises alone leaves the others waiting in the next collective. These helpers make every rank raise. The
ranks are those of a process group, of the default group (None), or of a `Grid`; `joined` finds out which.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
#: The largest int64.
INT64 = 2**63 - 1
#: Elements of which `checksum` takes the bits at a time: it needs three int64 for each.
CHUNK = 2**22


@dataclass(frozen=True)
class Grid:
    """Ranks that a grid of process groups spans (data by tensor parallel, for example), which have no group together.

    Attributes:
        groups: those of this rank, one along each dimension.
        ranks: all ranks of the grid, numbered in the default group; ascending.
    """

    groups: tuple[Any, ...]
    ranks: tuple[int, ...]


def joined(groups: Sequence[Any]) -> Any:
    """The ranks that can be reached through these process groups of this rank. Collective over those ranks.

    Args:
        groups: one along each dimension of a grid, such as data and tensor parallel; the same dimensions on every rank.
            A dimension that lies within the ones before it is ignored.

    Returns:
        None for all ranks of the default group, one of `groups` that has them all, or a `Grid`.

    Raises:
        ValueError: if the groups do not span a grid.
    """
    ranks, along = {dist.get_rank()}, list(groups[:1])
    for group in groups:
        reached = set().union(*gather(ranks, group))
        if len(reached) > len(ranks):
            along = [group] if dist.get_world_size(group) == len(reached) else [*along, group]
        ranks = reached
    if len(ranks) == dist.get_world_size():
        return None
    if len(along) == 1:
        return along[0]
    sizes = [dist.get_world_size(group) for group in along]
    if math.prod(sizes) != len(ranks):
        raise ValueError(
            f"the process groups of rank {dist.get_rank()} have {sizes} ranks and reach ranks {sorted(ranks)}; allowed "
            "for a part of the world: groups that span a grid, such as data parallel x model parallel"
        )
    return Grid(tuple(along), tuple(sorted(ranks)))


def ranks_of(group: Any) -> Sequence[int]:
    """The ranks of `group`, numbered in the default group; [0] where torch.distributed does not run."""
    if isinstance(group, Grid):
        return group.ranks
    if not (dist.is_available() and dist.is_initialized()):
        return [0]
    return range(dist.get_world_size()) if group is None else dist.get_process_group_ranks(group)


def world_of(group: Any) -> tuple[int, int]:
    """(rank, size) in `group`; (0, 1) where torch.distributed does not run. None is the default group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    if isinstance(group, Grid):
        return group.ranks.index(dist.get_rank()), len(group.ranks)
    return dist.get_rank(group), dist.get_world_size(group)


def gather(value: Any, group: Any) -> list[Any]:
    """`value` of every rank, by rank."""
    if isinstance(group, Grid):
        found = {dist.get_rank(): value}
        for along in group.groups:
            found = {rank: of_rank for part in gather(found, along) for rank, of_rank in part.items()}
        return [found[rank] for rank in group.ranks]
    _, size = world_of(group)
    values = [value] * size
    if size > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def gather_rows(rows: Tensor, group: Any) -> list[Tensor]:
    """The rows of every rank, by rank, sent as tensors and not as objects. On the CPU.

    Args:
        rows: (any number, width), on a device that the backend sends.
        group: a process group, or None; not a `Grid`.
    """
    _, size = world_of(group)
    if size == 1:
        return [rows.cpu()]
    counts = torch.empty(size, dtype=torch.int64, device=rows.device)
    dist.all_gather_into_tensor(counts, torch.tensor([len(rows)], dtype=torch.int64, device=rows.device), group=group)
    most = int(counts.max())
    if not most:
        return [rows.cpu()] * size
    padded = rows.new_zeros(most, rows.shape[1])
    padded[: len(rows)] = rows
    found = rows.new_empty(size * most, rows.shape[1])
    dist.all_gather_into_tensor(found, padded, group=group)
    return [of_rank[:count] for of_rank, count in zip(torch.split(found.cpu(), most), counts.tolist())]


def add_up(tensor: Tensor, group: Any) -> None:
    """Replaces `tensor` by its sum over all ranks."""
    if world_of(group)[1] > 1:
        for along in group.groups if isinstance(group, Grid) else [group]:
            dist.all_reduce(tensor, group=along)


def largest(tensor: Tensor, group: Any) -> None:
    """Replaces each element of `tensor` by its largest value over all ranks."""
    if world_of(group)[1] > 1:
        for along in group.groups if isinstance(group, Grid) else [group]:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=along)


def wire_of(group: Any, device: torch.device) -> torch.device:
    """The device of tensors that the backend of `group` sends, where the parameters are on `device`."""
    if world_of(group)[1] == 1:
        return device
    backend = dist.get_backend(group.groups[0] if isinstance(group, Grid) else group)
    return torch.device("cpu") if backend == "gloo" else device


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
    if not _any(error is not None, group):
        return result  # type: ignore[return-value]
    errors = gather(None if error is None else str(error), group)
    if error is not None:
        raise error
    rank, message = next(told for told in zip(ranks_of(group), errors, strict=True) if told[1] is not None)
    raise ValueError(f"rank {rank} of {world_of(None)[1]} failed: {message}")


def _any(here: bool, group: Any) -> bool:
    """Whether it is so on any rank."""
    if world_of(group)[1] == 1:
        return here
    flag = torch.tensor([int(here)], dtype=torch.int64, device=_wire(group))
    largest(flag, group)
    return bool(flag.item())


def _same(fact: str | None, group: Any) -> bool:
    """Whether all ranks that have the fact have the same one, by 126 bits of its digest.

    They have if its smallest value is its largest: one message, where objects take two that are many times as slow.
    """
    if world_of(group)[1] == 1:
        return True
    sent = [-1] * 4  # less than what any rank sends that has the fact
    if fact is not None:
        digest = int(_digest([fact]), 16)
        words = [digest & INT64, digest >> 63 & INT64]
        sent = [*words, *(INT64 - word for word in words)]
    found = torch.tensor(sent, dtype=torch.int64, device=_wire(group))
    largest(found, group)
    high, low = found[:2].tolist(), [INT64 - n for n in found[2:].tolist()]
    return high == low or -1 in high


def _wire(group: Any) -> torch.device:
    """The device of numbers that the backend of `group` sends."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return wire_of(group, accelerator or torch.device("cpu"))


def agree(what: str, lines: Sequence[str], advice: str, group: Any = None) -> None:
    """Checks that `lines` are the same on every rank, sending digests, and a single line where they differ.

    Raises:
        ValueError: on every rank, with the first line in which ranks differ, of the first rank and of one that differs.
    """

    def alike(count: int) -> bool:
        """Whether so many first lines are."""
        return _same(_digest(lines[:count]), group)

    if _same(f"{len(lines)} {_digest(lines)}", group):
        return
    counts = gather(len(lines), group)
    same, differing = 0, min(counts)
    if alike(differing):
        found = [f"{count} entries" for count in counts]
    else:
        while differing - same > 1:  # all lines of thousands of ranks would be gigabytes
            middle = (same + differing) // 2
            same, differing = (middle, differing) if alike(middle) else (same, middle)
        found = gather(lines[same], group)
    first, *rest = zip(ranks_of(group), found, strict=True)
    rank, other = next((rank, other) for rank, other in rest if other != first[1])
    raise ValueError(
        f"the ranks disagree about {what}: rank {first[0]} has {first[1]}, rank {rank} has {other}. {advice}"
    )


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def alike(what: str, fact: str | None, advice: str, group: Any = None) -> None:
    """Checks that a fact is the same on every rank; None where a rank has none.

    Raises:
        ValueError: on every rank, with the ranks of each.
    """
    if _same(fact, group):  # the facts of thousands of ranks are megabytes
        return
    found: dict[str, list[int]] = {}
    for rank, of_rank in zip(ranks_of(group), gather(fact, group), strict=True):
        if of_rank is not None:
            found.setdefault(of_rank, []).append(rank)
    each = (f"{of_rank} on {_few(ranks)}" for of_rank, ranks in found.items())
    raise ValueError(f"the ranks disagree about {what}: {' / '.join(each)}. {advice}")


def _few(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    return f"rank{'s' * (len(ranks) > 1)} {listed}"


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
