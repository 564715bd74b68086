"""The arithmetic of ZeRO's cuts, from sizes alone: needs no engine, no processes, and not DeepSpeed.

Stages 1 and 2 put a group's parameters one after the other, pad the end and cut the whole in equal parts; stage 3 cuts
every parameter by itself. `shards` reads a live engine's tables with it, the planner foresees them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import gcd

#: What each rank's part of a flat group is a multiple of (`nccl_start_alignment_factor`), in elements.
ALIGNMENT = 2
#: ``zero_optimization.sub_group_size``: DeepSpeed's default.
SUB_GROUP_SIZE = 10**9


@dataclass(frozen=True)
class Span:
    """Consecutive elements that a rank holds: `start` to `start + length` of the group's parameter `number`.

    They lie at `offset` of the rank's tensor; where only counts matter, it is left at 0.
    """

    number: int
    start: int
    length: int
    offset: int = 0


def offsets_of(sizes: Sequence[int], gaps: Sequence[int] | None = None) -> list[int]:
    """Where each parameter begins in its flat group, and where the last one ends; `gaps` is the padding after each."""
    return list(accumulate((size + gap for size, gap in zip(sizes, gaps or [0] * len(sizes))), initial=0))


def gaps_for(sizes: Sequence[int], element_bytes: int) -> list[int]:
    """``zero_optimization.parameter_alignment`` (from 0.19): every parameter but the first begins at 16 bytes."""
    to, end, found = 16 // gcd(16, element_bytes), 0, []
    for size in sizes:
        found.append(-(end + size) % to)
        end += size + found[-1]
    return [*found[:-1], 0] if found else []


def round_robin(count: int, world: int) -> list[int]:
    """The order of a group's parameters under ``zero_optimization.round_robin_gradients``."""
    return [number for rank in range(min(world, count)) for number in range(rank, count, world)]


def part_of_flat(total: int, world: int) -> int:
    """Elements of each rank's part of a flat group of `total`, padding included."""
    return -(-total // (ALIGNMENT * world)) * ALIGNMENT


def in_part(sizes: Sequence[int], offsets: Sequence[int], begin: int, length: int) -> Iterator[Span]:
    """The part of each parameter that falls into elements `begin` to `begin + length` of their flat group."""
    for number in range(max(bisect_right(offsets, begin) - 1, 0), len(sizes)):
        if offsets[number] >= begin + length:
            return
        first, last = max(offsets[number], begin), min(offsets[number] + sizes[number], begin + length)
        if first < last:
            yield Span(number, first - offsets[number], last - first, first - begin)


def in_sub_group(sizes: Sequence[int], parts: Sequence[int], rank: int) -> Iterator[Span]:
    """Stage 3: each parameter cut in equal parts, the last ones padded; a rank's parts one after the other.

    Args:
        sizes: of the parameters of one sub-group.
        parts: elements of each rank's part of each parameter, padding included.
        rank: which part.
    """
    offset = 0
    for number, (size, part) in enumerate(zip(sizes, parts)):
        length = min(part, size - rank * part)
        if length > 0:
            yield Span(number, rank * part, length, offset)
        offset += part


def sub_groups(parts: Sequence[int], limit: int = SUB_GROUP_SIZE) -> list[list[int]]:
    """Stage 3: the numbers of a group's parameters, sub-group by sub-group; each is one call of the inner step."""
    if limit >= sum(parts):
        return [list(range(len(parts)))]
    found: list[list[int]] = [[]]
    held = 0
    for number, part in enumerate(parts):
        if held >= limit:
            found.append([])
            held = 0
        found[-1].append(number)
        held += part
    return found
