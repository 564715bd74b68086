"""The plan's counts where every rank holds a part of everything (ZeRO-3, replicas), at thousands of ranks.

`plan.make_plan` writes down who holds what of every matrix: hundreds of millions of pieces there. These ranges follow
from two numbers, so here they are arithmetic on vectors; the owners and the counts are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ..layout import Matrix, Strided
from ..plan import BYTES, SLACKS, TOLERANCE
from .layouts import Call


class _Shares:
    """What each rank holds of a matrix: the first rank that holds any of it, and how many elements it and the next do."""

    def __init__(self, call: Call) -> None:
        part_of = {p.name: part for p, part in zip(call.parameters, call.evenly)}
        self.parts = [part_of.get(m.parameter, 0) for m in call.matrices]
        self.matrices, self.world, self.replicas = call.matrices, call.dp, call.replicas
        self._cut = cache(self._cut_once)

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        where, part = self.matrices[number].where, self.parts[number]
        if self.replicas:
            return 0, self._cut(Strided(0, self.matrices[number].numel), 0, self.world)
        first = where.start // part
        # Relative to the first rank's part, so that equal matrices of a batch share one vector.
        moved = Strided(where.start - first * part, where.run, where.stride, where.count)
        return first, self._cut(moved, part, (where.end - 1) // part - first + 1)

    def _cut_once(self, where: Strided, part: int, count: int) -> Tensor:
        if self.replicas:
            return torch.full((count,), where.numel)
        return torch.tensor([where.before(rank * part) for rank in range(count + 1)]).diff()


def counts(call: Call, flops: Callable[[int, int], int], scalars: int) -> tuple[list[int], list[int]]:
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
            own, everywhere, holders = _owned(shares, number, owner)
            moved += matrices[number].numel + everywhere - 2 * own + scalars * (holders - (own > 0))
        tried.append((int(load.max()), moved, owners, load))
    evenest = min(busiest for busiest, *_ in tried)
    _, _, owners, load = min((t for t in tried if t[0] <= evenest * TOLERANCE), key=lambda t: t[1])
    return load.tolist(), _sent(matrices, shares, owners, world, scalars)


def _owned(shares: _Shares, number: int, owner: int) -> tuple[int, int, int]:
    """(What the owner holds of the matrix, what all hold together, how many hold any of it)."""
    first, share = shares[number]
    own = int(share[owner - first]) if 0 <= owner - first < len(share) else 0
    return own, int(share.sum()), int((share > 0).sum())


def _assign(costs: Sequence[int], shares: _Shares, world: int, capacity: float) -> tuple[list[int], Tensor]:
    """`plan._assign`: the holder of most of a matrix that still has room, else the least loaded rank."""
    load = torch.zeros(world, dtype=torch.int64)
    owners = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost = costs[number]
        first, share = shares[number]
        mine = load[first : first + len(share)]
        evenly = len(share) == world and bool((share == share[0]).all())
        room = (share > 0) & (mine + cost <= capacity)
        if not evenly and bool(room.any()):
            most = torch.where(room, share, -1).max()
            owner = first + int(torch.where(room & (share == most), mine, torch.iinfo(torch.int64).max).argmin())
        else:
            owner = int(load.argmin())
        load[owner] += cost
        owners[number] = owner
    return owners, load


def _sent(
    matrices: Sequence[Matrix], shares: _Shares, owners: Sequence[int], world: int, scalars: int
) -> list[int]:
    sent = torch.zeros(world, dtype=torch.int64)
    for number, owner in enumerate(owners):
        first, share = shares[number]
        own, everywhere, holders = _owned(shares, number, owner)
        if not shares.replicas:
            sent[first : first + len(share)] += BYTES * share
            sent[owner] -= BYTES * own
        sent[owner] += BYTES * (everywhere - own + scalars * (holders - (own > 0)))
    return sent.tolist()
