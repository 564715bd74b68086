"""The plan's counts where every rank holds a part of everything (ZeRO-3, replicas), at thousands of ranks.

`plan.make_plan` writes down who holds what of every matrix: hundreds of millions of pieces there. These ranges follow
from two numbers, so here they are arithmetic on vectors; the owners and the counts are the same.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from ..core.layout import Strided
from ..core.plan import BYTES, SLACKS, TOLERANCE
from .calls import PlannedCall

#: From so many ranks on, a matrix is looked at with vectors.
LARGE = 256
LAST = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class _Share:
    """What consecutive ranks hold of a matrix.

    Attributes:
        of: elements by rank, from the first rank that holds any.
        vector: the same, where they are many.
        total, holders: elements over all ranks; how many ranks hold any.
        evenly: all of them hold the same.
    """

    of: list[int]
    vector: Tensor | None
    total: int
    holders: int
    evenly: bool


class _Shares:
    """(First rank that holds any of it, what it and the next hold) for each matrix, by its number."""

    def __init__(self, call: PlannedCall) -> None:
        part_of = {p.name: part for p, part in zip(call.parameters, call.evenly)}
        self.parts = [part_of.get(m.parameter, 0) for m in call.matrices]
        self.matrices, self.world, self.replicas = call.matrices, call.dp, call.replicas
        self._cut = cache(self._cut_once)

    def __getitem__(self, number: int) -> tuple[int, _Share]:
        where, part = self.matrices[number].where, self.parts[number]
        if self.replicas:
            return 0, self._cut(Strided(0, where.numel), 0, self.world)
        first = where.start // part
        # Relative to the first rank's part, so that equal matrices share what is found.
        moved = Strided(where.start - first * part, where.run, where.stride, where.count)
        return first, self._cut(moved, part, (where.end - 1) // part - first + 1)

    def _cut_once(self, where: Strided, part: int, count: int) -> _Share:
        if self.replicas:
            of = [where.numel] * count
        else:
            ends = [where.before(rank * part) for rank in range(count + 1)]
            of = [after - before for before, after in pairwise(ends)]
        vector = torch.tensor(of) if count >= LARGE else None
        return _Share(of, vector, sum(of), sum(n > 0 for n in of), len(set(of)) == 1)


def counts(call: PlannedCall, flops: Callable[[int, int], int], scalars: int) -> tuple[list[int], list[int]]:
    """FLOPs and bytes sent of each rank: those of `plan.make_plan`.

    Args:
        call: with `replicas` or `evenly`, without TP.
        flops: cost of a rows x cols matrix.
        scalars: bf16 numbers that travel with each update.
    """
    matrices, world = call.matrices, call.dp
    shares, costs = _Shares(call), [flops(m.rows, m.cols) for m in matrices]
    bound = max(sum(costs) / world, max(costs))
    tried = []
    for slack in SLACKS:
        owners, load = _assign(costs, shares, world, bound * slack)
        moved = 0
        for number, owner in enumerate(owners):
            share, own = _owned(shares, number, owner)
            moved += matrices[number].numel + share.total - 2 * own + scalars * (share.holders - (own > 0))
        tried.append((max(load), moved, owners, load))
    evenest = min(busiest for busiest, *_ in tried)
    _, _, owners, load = min((t for t in tried if t[0] <= evenest * TOLERANCE), key=lambda t: t[1])
    return load, _sent(shares, owners, world, scalars)


def _owned(shares: _Shares, number: int, owner: int) -> tuple[_Share, int]:
    """(What the ranks hold of a matrix, what its owner does)."""
    first, share = shares[number]
    return share, share.of[owner - first] if 0 <= owner - first < len(share.of) else 0


def _assign(costs: Sequence[int], shares: _Shares, world: int, capacity: float) -> tuple[list[int], list[int]]:
    """`plan._assign`: the holder of most of a matrix that still has room, else the least loaded rank."""
    load = [0] * world
    heap = [(0, rank) for rank in range(world)]
    owners = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost = costs[number]
        first, share = shares[number]
        evenly = share.evenly and len(share.of) == world
        owner = None if evenly else _best(first, share, load, math.floor(capacity) - cost)
        if owner is None:
            while heap[0][0] != load[heap[0][1]]:
                heapq.heapreplace(heap, (load[heap[0][1]], heap[0][1]))
            owner = heap[0][1]
        load[owner] += cost
        owners[number] = owner
    return owners, load


def _best(first: int, share: _Share, load: Sequence[int], most: int) -> int | None:
    """Of the holders with at most so much load, the one that holds most; then the least loaded; then the first."""
    mine = load[first : first + len(share.of)]
    if share.vector is None:
        room = [(-held, of_rank, first + i) for i, (held, of_rank) in enumerate(zip(share.of, mine)) if held]
        room = [entry for entry in room if entry[1] <= most]
        return min(room)[2] if room else None
    loads = torch.tensor(mine)
    room_mask = (share.vector > 0) & (loads <= most)
    if not bool(room_mask.any()):
        return None
    largest = torch.where(room_mask, share.vector, -1).max()
    return first + int(torch.where(room_mask & (share.vector == largest), loads, LAST).argmin())


def _sent(shares: _Shares, owners: Sequence[int], world: int, scalars: int) -> list[int]:
    sent = torch.zeros(world, dtype=torch.int64)
    few = [0] * world
    for number, owner in enumerate(owners):
        first = shares[number][0]
        share, own = _owned(shares, number, owner)
        if share.vector is not None and not shares.replicas:
            sent[first : first + len(share.of)] += BYTES * share.vector
        elif not shares.replicas:
            for rank, held in enumerate(share.of, first):
                few[rank] += BYTES * held
        few[owner] += BYTES * (share.total - own + scalars * (share.holders - (own > 0)))
        few[owner] -= 0 if shares.replicas else BYTES * own
    return [a + b for a, b in zip(few, sent.tolist())]
