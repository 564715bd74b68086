"""An owner for every matrix; what each rank computes and sends, in FLOPs and bytes. Needs no processes.

Every rank computes the same plan from the same index, without talking.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .layout import Index, Matrix, Strided

#: A piece on the way is bf16.
BYTES = 2
#: Capacities tried, as multiples of the lower bound on the busiest rank's load, from even to staying where they lie.
SLACKS = (1.0, 1.02, 1.05, 1.1, 1.25, 2.0)
#: Among the plans within this factor of the evenest one, the one that moves the fewest bytes is taken.
TOLERANCE = 1.02
#: Where none of these is within TOLERANCE of the bound, so many capacities between are tried, filling ranks one by one.
SEARCH = 6
#: Elements of travelling matrices that one rank holds in a round (2 bytes each, twice): bounds buffers, gives overlap.
ROUND_ELEMENTS = 64 * 2**20
ROUNDS = 4


@dataclass(frozen=True)
class Route:
    """One matrix: who orthogonalizes it, who sends what there, who gets which part of the update.

    Attributes:
        owner: the rank that orthogonalizes it.
        sources: (rank, where inside the matrix), each element once.
        holders: (rank, where inside the matrix), every replica.
        everywhere: every rank holds all of it, so the update is broadcast.
        round: when it travels; -1 where nothing travels.
    """

    owner: int
    sources: tuple[tuple[int, tuple[Strided, ...]], ...]
    holders: tuple[tuple[int, tuple[Strided, ...]], ...]
    everywhere: bool
    round: int = -1


@dataclass(frozen=True)
class Plan:
    """The routes of all matrices, and what they cost each rank in one step."""

    routes: tuple[Route, ...]
    flops: tuple[int, ...]
    bytes_sent: tuple[int, ...]
    rounds: int

    @property
    def balance(self) -> float:
        """The busiest rank's FLOPs over the mean."""
        return max(self.flops) * len(self.flops) / max(sum(self.flops), 1)


def make_plan(matrices: Sequence[Matrix], index: Index, flops: Callable[[int, int], int], scalars: int = 0) -> Plan:
    """Gives every matrix an owner: one that holds a piece of it wherever balance allows.

    Args:
        matrices: all matrices of one call of the optimizer.
        index: for each rank its pieces, as (matrix, where inside it).
        flops: cost of orthogonalizing a rows x cols matrix.
        scalars: bf16 numbers that travel with each update beside its elements.

    Raises:
        ValueError: where the ranks' pieces do not cover a matrix exactly once (replicas apart).
    """
    world = len(index)
    held: list[dict[int, tuple[Strided, ...]]] = [{} for _ in matrices]
    for rank, pieces in enumerate(index):
        for number, inside in pieces:
            held[number][rank] = held[number].get(rank, ()) + inside
    costs = [flops(matrix.rows, matrix.cols) for matrix in matrices]
    owners = choose_owners(costs, [matrix.numel for matrix in matrices], _Pieces(held, world), world, scalars)
    routes = [_route(matrix, owner, held[i], world) for i, (matrix, owner) in enumerate(zip(matrices, owners.of))]
    routes, rounds = _schedule(matrices, routes)
    return Plan(tuple(routes), tuple(owners.load), tuple(_bytes_sent(routes, world, scalars)), rounds)


class Holders(Protocol):
    """Who holds how many elements of each matrix: a run's published pieces, or arithmetic for thousands of ranks."""

    def held_by(self, number: int, rank: int) -> int:
        """Elements of matrix `number` that a rank holds."""

    def totals(self, number: int) -> tuple[int, int]:
        """Elements that all ranks hold together, replicas included; how many ranks hold any."""

    def evenly(self, number: int) -> bool:
        """Whether every rank of the group holds the same number of elements, so that none is a better place."""

    def best(self, number: int, load: Sequence[int], most: int) -> int | None:
        """Of the holders with a load of at most `most`: the one that holds most, then the least loaded, the first."""


@dataclass(frozen=True)
class Owners:
    """A rank for every matrix.

    Attributes:
        of: the owner of each matrix.
        load: what each rank then computes, in the unit of the costs.
        moved: elements that travel in a step, both ways.
    """

    of: list[int]
    load: list[int]
    moved: int

    @property
    def busiest(self) -> int:
        return max(self.load)


def choose_owners(
    costs: Sequence[int], numels: Sequence[int], holders: Holders, world: int, scalars: int = 0
) -> Owners:
    """The one way in which owners are chosen: by a run's plan, and by the planner at any size.

    Every choice is made within a capacity, the load that no rank should pass. Several are tried, from even to staying
    where the elements lie; if none comes near the bound (the mean, or the costliest matrix), a search between them
    fills ranks one by one (best fit). Of the nearly most even ones, the one that moves the fewest elements is taken.

    Args:
        costs, numels: of each matrix.
        holders: who holds them.
        world: ranks of the group.
        scalars: bf16 numbers that travel with each update beside its elements.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    bound = max(sum(costs) / world, max(costs, default=0))

    def within(capacity: float, fill: bool = False) -> Owners:
        of, load = _assign(order, costs, holders, world, capacity, fill)
        moved = 0
        for number, owner in enumerate(of):
            own, (everywhere, count) = holders.held_by(number, owner), holders.totals(number)
            moved += numels[number] + everywhere - 2 * own + scalars * (count - (own > 0))
        return Owners(of, load, moved)

    tried = [within(bound * slack) for slack in SLACKS]
    low, high = bound, float(min(owners.busiest for owners in tried))
    for _ in range(SEARCH if high > bound * TOLERANCE else 0):
        middle = (low + high) / 2
        tried.append(within(middle, fill=True))
        low, high = (low, middle) if tried[-1].busiest <= middle else (middle, high)
    evenest = min(owners.busiest for owners in tried)
    return min((owners for owners in tried if owners.busiest <= evenest * TOLERANCE), key=lambda owners: owners.moved)


def _assign(
    order: Sequence[int], costs: Sequence[int], holders: Holders, world: int, capacity: float, fill: bool
) -> tuple[list[int], list[int]]:
    """Owners and load. Longest first: the holder of most of it that still has room, else the least loaded rank.

    With `fill` it is the fullest rank that has room, which leaves larger holes for what comes (best fit).
    """
    load = [0] * world
    by_load = [(0, rank) for rank in range(world)]  # sorted
    of = [0] * len(costs)
    for number in order:
        cost, most = costs[number], math.floor(capacity) - costs[number]
        owner = None if fill or holders.evenly(number) else holders.best(number, load, most)
        if owner is None:
            fullest = max(bisect_right(by_load, (most, world)) - 1, 0)
            owner = by_load[fullest if fill else 0][1]
        del by_load[bisect_left(by_load, (load[owner], owner))]
        load[owner] += cost
        insort(by_load, (load[owner], owner))
        of[number] = owner
    return of, load


class _Pieces:
    """`Holders` of a real run: the pieces that the ranks published."""

    def __init__(self, held: Sequence[Mapping[int, Sequence[Strided]]], world: int) -> None:
        self._world = world
        self._sizes = [{rank: sum(s.numel for s in inside) for rank, inside in ranks.items()} for ranks in held]

    def held_by(self, number: int, rank: int) -> int:
        return self._sizes[number].get(rank, 0)

    def totals(self, number: int) -> tuple[int, int]:
        return sum(self._sizes[number].values()), len(self._sizes[number])

    def evenly(self, number: int) -> bool:
        return len(self._sizes[number]) == self._world and len(set(self._sizes[number].values())) == 1

    def best(self, number: int, load: Sequence[int], most: int) -> int | None:
        sizes = self._sizes[number]
        room = [rank for rank in sizes if load[rank] <= most]
        return min(room, key=lambda rank: (-sizes[rank], load[rank], rank)) if room else None


def _route(matrix: Matrix, owner: int, held: dict[int, tuple[Strided, ...]], world: int) -> Route:
    sources: dict[tuple[Strided, ...], int] = {}
    for rank in sorted(held, key=lambda r: (r != owner, r)):
        sources.setdefault(held[rank], rank)
    covered = sum(s.numel for inside in sources for s in inside)
    if covered != matrix.numel:
        raise ValueError(
            f"the ranks hold {covered} of the {matrix.numel} elements of {matrix.name}: the layout that was read from "
            "the engine is not the one it uses. Please report the engine's release and settings"
        )
    everywhere = len(held) == world and len(sources) == 1
    holders = tuple((rank, held[rank]) for rank in sorted(held))
    return Route(owner, tuple((rank, inside) for inside, rank in sources.items()), holders, everywhere)


def _sum_by_rank(world: int, amounts: Iterable[tuple[int, int]]) -> list[int]:
    total = [0] * world
    for rank, amount in amounts:
        total[rank] += amount
    return total


def _bytes_sent(routes: Sequence[Route], world: int, scalars: int) -> list[int]:
    """Bytes each rank sends in a step: pieces to owners, and parts of the update to holders."""

    def amounts() -> Iterator[tuple[int, int]]:
        for route in routes:
            for rank, inside in route.sources:
                if rank != route.owner:
                    yield rank, BYTES * sum(s.numel for s in inside)
            for rank, inside in route.holders:
                if rank != route.owner:
                    yield route.owner, BYTES * (sum(s.numel for s in inside) + scalars)

    return _sum_by_rank(world, amounts())


def travels(route: Route) -> bool:
    return any(rank != route.owner for rank, _ in (*route.sources, *route.holders))


def _schedule(matrices: Sequence[Matrix], routes: list[Route]) -> tuple[list[Route], int]:
    """Numbers the rounds in which travelling matrices go, so that one round flies while another is computed."""
    of_owner: dict[int, list[int]] = {}
    for number, route in enumerate(routes):
        if travels(route):
            of_owner.setdefault(route.owner, []).append(number)
    if not of_owner:
        return routes, 0
    # A rank holds its own matrices of a round, and, where updates are broadcast, those of all owners.
    loads = [sum(matrices[i].numel for i in mine) for mine in of_owner.values()]
    most = sum(loads) if any(route.everywhere for route in routes) else max(loads)
    rounds = max(-(-most // ROUND_ELEMENTS), min(ROUNDS, max(len(mine) for mine in of_owner.values())))
    scheduled = list(routes)
    for mine in of_owner.values():
        mine.sort(key=lambda i: (matrices[i].rows, matrices[i].cols, i))  # equal shapes together: one batch
        total, done = sum(matrices[i].numel for i in mine), 0
        for number in mine:
            scheduled[number] = replace(routes[number], round=done * rounds // total)
            done += matrices[number].numel
    return scheduled, rounds
