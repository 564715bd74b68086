"""The plan as it is defined: every part of every matrix on every rank in lists, looked at one by one.

`core.plan` has to find the same without writing all of it down. This is slow, and compared with it in tests.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from muon_plugin.core.holders import Pieces
from muon_plugin.core.layout import Matrix, Strided
from muon_plugin.core.messages import MOST, Leg, Side
from muon_plugin.core.plan import ROUND_ELEMENTS, ROUNDS, SEARCH, SLACKS, TOLERANCE, WORTHWHILE

Held = dict[int, tuple[Strided, ...]]


@dataclass(frozen=True)
class Listed:
    """Of each matrix: its owner and its round, which ranks hold it where, which of them send; of each rank: FLOPs and
    bytes."""

    owners: list[int]
    rounds: list[int]
    holders: list[Held]
    sources: list[set[int]]
    everywhere: list[bool]
    flops: list[int]
    bytes_sent: list[int]


def plan_by_lists(
    matrices: Sequence[Matrix], lists: Sequence[Pieces], flops: Callable[[int, int], int], scalars: int = 0
) -> Listed:
    """Of the pieces of every rank, which make up every matrix."""
    world = len(lists)
    held: list[Held] = [{} for _ in matrices]
    for rank, pieces in enumerate(lists):
        for number, inside in pieces:
            held[number][rank] = held[number].get(rank, ()) + inside
    costs = [flops(m.rows, m.cols) for m in matrices]
    sizes = [{rank: sum(part.numel for part in inside) for rank, inside in of.items()} for of in held]
    owners, load = _owners(matrices, costs, sizes, world, scalars)
    sources = [_sources(owner, of) for owner, of in zip(owners, held)]
    everywhere = [len(of) == world and len(sent) == 1 for of, sent in zip(held, sources)]
    sent = [0] * world
    for owner, of, some in zip(owners, sizes, sources):
        for rank, size in of.items():
            if rank != owner:
                sent[owner] += 2 * (size + scalars)
                sent[rank] += 2 * size * (rank in some)
    rounds = _rounds(matrices, owners, held, everywhere)
    return Listed(owners, rounds, held, sources, everywhere, load, sent)


def _owners(
    matrices: Sequence[Matrix], costs: Sequence[int], sizes: Sequence[dict[int, int]], world: int, scalars: int
) -> tuple[list[int], list[int]]:
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))

    def assigned(capacity: float, fill: bool = False) -> tuple[list[int], list[int]]:
        of, load = [0] * len(costs), [0] * world
        by_load = [(0, rank) for rank in range(world)]
        for number in order:
            most, mine = math.floor(capacity) - costs[number], sizes[number]
            evenly = len(mine) == world and len(set(mine.values())) == 1
            room = [] if fill or evenly else [rank for rank in mine if load[rank] <= most]
            owner = min(room, key=lambda rank: (-mine[rank], load[rank], rank), default=None)
            if owner is None:
                owner = by_load[max(bisect_right(by_load, (most, world)) - 1, 0) if fill else 0][1]
            del by_load[bisect_left(by_load, (load[owner], owner))]
            load[owner] += costs[number]
            insort(by_load, (load[owner], owner))
            of[number] = owner
        return of, load

    def moved(of: Sequence[int]) -> int:
        found = 0
        for matrix, owner, mine in zip(matrices, of, sizes):
            own = mine.get(owner, 0)
            found += matrix.numel - own + sum(mine.values()) - own + scalars * (len(mine) - (own > 0))
        return found

    bound = max(sum(costs) / world, max(costs, default=0))
    tried = [assigned(bound * slack) for slack in SLACKS]
    if min(max(load) for _, load in tried) > bound * TOLERANCE:
        tried.append(assigned(0))
    low, high = bound, float(min(max(load) for _, load in tried))
    for _ in range(SEARCH if high > bound * TOLERANCE else 0):
        middle = (low + high) / 2
        tried.append(assigned(middle, fill=True))
        low, high = (low, middle) if max(tried[-1][1]) <= middle else (middle, high)
    even = min(max(load) for _, load in tried) * TOLERANCE
    return min((each for each in tried if max(each[1]) <= even), key=lambda each: moved(each[0]))


def _sources(owner: int, held: Held) -> set[int]:
    first: dict[tuple[Strided, ...], int] = {}
    for rank in sorted(held, key=lambda r: (r != owner, r)):
        first.setdefault(held[rank], rank)
    return set(first.values())


def _rounds(
    matrices: Sequence[Matrix], owners: Sequence[int], held: Sequence[Held], everywhere: Sequence[bool]
) -> list[int]:
    rounds, of_owner = [-1] * len(matrices), dict[int, list[int]]()
    for number in sorted(range(len(matrices)), key=lambda i: (matrices[i].rows, matrices[i].cols, i)):
        if any(rank != owners[number] for rank in held[number]):
            of_owner.setdefault(owners[number], []).append(number)
    loads = {owner: sum(matrices[i].numel for i in mine) for owner, mine in of_owner.items()}
    most = sum(loads.values()) if any(everywhere) else max(loads.values(), default=0)
    count = min(ROUNDS, max(map(len, of_owner.values()), default=0))
    if not any(everywhere):
        count = min(count, -(-most // WORTHWHILE))
    count = max(count, -(-most // ROUND_ELEMENTS))
    for owner, mine in of_owner.items():
        done = 0
        for number in mine:
            rounds[number] = done * count // loads[owner]
            done += matrices[number].numel
    return rounds


def legs_by_lists(plan: Listed, numbers: Sequence[int], rank: int, size: int, scalars: bool) -> tuple[Leg, list[Leg]]:
    """What a rank sends and receives of these matrices, from the messages of all ranks."""
    cut = [number for number in numbers if not plan.everywhere[number]]
    to_all = any(len(plan.holders[n]) >= 3 and 2 * len(plan.holders[n]) > size for n in cut)
    there, back = [], []
    for n in cut:
        owner = plan.owners[n]
        for other in sorted(plan.holders[n]):
            if other != owner:
                back.append((n, owner, other))
                there += [(n, other, owner)] * (other in plan.sources[n])

    def leg(messages: Sequence[tuple[int, int, int]], with_scalars: bool) -> Leg:
        sent: dict[int, Held] = {}
        received: dict[int, Held] = {}
        for n, sender, receiver in messages:
            inside = plan.holders[n][sender if sender != plan.owners[n] else receiver]
            if sender == rank:
                sent.setdefault(receiver, {})[n] = inside
            if receiver == rank:
                received.setdefault(sender, {})[n] = inside
        pairs = set() if to_all else {(sender, receiver) for _, sender, receiver in messages}
        busiest = max(Counter(end for pair in pairs for end in pair).values(), default=0)
        reach = size if busiest <= MOST else MOST // 2
        return Leg(Side.of(sent, with_scalars), Side.of(received, with_scalars), to_all=to_all, reach=reach)

    update = [leg(back, scalars)]
    for owner in sorted({plan.owners[n] for n in numbers if plan.everywhere[n]}):
        shared = {n: plan.holders[n][0] for n in numbers if plan.everywhere[n] and plan.owners[n] == owner}
        side = Side.of({owner: shared}, scalars)
        update.append(Leg(side if rank == owner else Side(), Side() if rank == owner else side, root=owner))
    return leg(there, False), update
