"""The plan's counts at thousands of ranks, where every rank holds a part of everything (ZeRO-3, replicas).

`core.plan.make_plan` lists the pieces of every matrix on every rank, which here would be hundreds of millions. Each
range follows from the size of a rank's part and the rank, so this module computes them as vectors instead; the owners
and the counts are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from ..core.layout import Strided
from ..core.plan import BYTES, choose_owners
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
        evenly: every rank of the group holds the same.
    """

    of: list[int]
    vector: Tensor | None
    total: int
    holders: int
    evenly: bool


class _Shares:
    """(First rank that holds any of it, what it and the next hold) for each matrix, by its number."""

    def __init__(self, call: PlannedCall, scalars: int) -> None:
        part_of = {p.name: part for p, part in zip(call.parameters, call.evenly)}
        self.parts = [part_of.get(m.parameter, 0) for m in call.matrices]
        self.matrices, self.world, self.replicas, self.scalars = call.matrices, call.dp, call.replicas, scalars
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
        return _Share(of, vector, sum(of), sum(n > 0 for n in of), count == self.world and len(set(of)) == 1)

    def held_by(self, number: int, rank: int) -> int:
        first, share = self[number]
        return share.of[rank - first] if 0 <= rank - first < len(share.of) else 0

    def moved(self, number: int, owner: int) -> int:
        return self.matrices[number].numel - self.held_by(number, owner) + self.returned(number, owner)

    def returned(self, number: int, owner: int) -> int:
        """bf16 numbers that its owner sends: parts of the update, and its scale, to the other holders."""
        own, share = self.held_by(number, owner), self[number][1]
        return share.total - own + self.scalars * (share.holders - (own > 0))

    def best(self, number: int, load: Sequence[int], most: int) -> int | None:
        first, share = self[number]
        if share.evenly:
            return None
        mine = load[first : first + len(share.of)]
        if share.vector is None:
            room = [(-held, of_rank, first + i) for i, (held, of_rank) in enumerate(zip(share.of, mine)) if held]
            room = [entry for entry in room if entry[1] <= most]
            return min(room)[2] if room else None
        loads = torch.tensor(mine)
        has_room = (share.vector > 0) & (loads <= most)
        if not bool(has_room.any()):
            return None
        largest = torch.where(has_room, share.vector, -1).max()
        return first + int(torch.where(has_room & (share.vector == largest), loads, LAST).argmin())


def counts(call: PlannedCall, flops: Callable[[int, int], int], scalars: int) -> tuple[list[int], list[int]]:
    """FLOPs and bytes sent of each rank: those of `plan.make_plan`.

    Args:
        call: with `replicas` or `evenly`, without TP.
        flops: cost of a rows x cols matrix.
        scalars: bf16 numbers that travel with each update.
    """
    matrices, world = call.matrices, call.dp
    shares, costs = _Shares(call, scalars), [flops(m.rows, m.cols) for m in matrices]
    owners = choose_owners(costs, shares, world)
    return owners.load, _sent(shares, owners.of, world)


def _sent(shares: _Shares, owners: Sequence[int], world: int) -> list[int]:
    sent = torch.zeros(world, dtype=torch.int64)
    few = [0] * world
    for number, owner in enumerate(owners):
        first, share = shares[number]
        if share.vector is not None and not shares.replicas:
            sent[first : first + len(share.of)] += BYTES * share.vector
        elif not shares.replicas:
            for rank, held in enumerate(share.of, first):
                few[rank] += BYTES * held
        few[owner] += BYTES * shares.returned(number, owner)
        few[owner] -= 0 if shares.replicas else BYTES * shares.held_by(number, owner)
    return [a + b for a, b in zip(few, sent.tolist())]
