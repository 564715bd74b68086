"""An owner for every matrix; what each rank computes and sends, in FLOPs and bytes. Needs no processes.

Every rank computes the same plan from the same index, without talking.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

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
    sizes = [{rank: sum(s.numel for s in inside) for rank, inside in ranks.items()} for ranks in held]
    held_in_all = [sum(of_ranks.values()) for of_ranks in sizes]
    bound = max(sum(costs) / world, max(costs, default=0))

    def attempt(capacity: float, fill: bool = False) -> tuple[int, int, list[int], list[int]]:
        owners = _assign(costs, sizes, world, capacity, fill)
        load = _sum_by_rank(world, zip(owners, costs))
        moved = sum(
            matrix.numel + everywhere - 2 * of_ranks.get(owner, 0) + scalars * (len(of_ranks) - (owner in of_ranks))
            for matrix, owner, of_ranks, everywhere in zip(matrices, owners, sizes, held_in_all)
        )
        return max(load), moved, owners, load

    tried = [attempt(bound * slack) for slack in SLACKS]
    evenest = min(busiest for busiest, *_ in tried)
    low, high = bound, float(evenest)
    for _ in range(SEARCH if evenest > bound * TOLERANCE else 0):
        tried.append(attempt((low + high) / 2, fill=True))
        low, high = (low, (low + high) / 2) if tried[-1][0] <= (low + high) / 2 else ((low + high) / 2, high)
    evenest = min(busiest for busiest, *_ in tried)
    _, _, owners, load = min((t for t in tried if t[0] <= evenest * TOLERANCE), key=lambda t: t[1])
    routes = [_route(matrix, owner, held[i], world) for i, (matrix, owner) in enumerate(zip(matrices, owners))]
    routes, rounds = _schedule(matrices, routes)
    return Plan(tuple(routes), tuple(load), tuple(_bytes_sent(routes, world, scalars)), rounds)


def _assign(
    costs: list[int], sizes: list[dict[int, int]], world: int, capacity: float, fill: bool = False
) -> list[int]:
    """Longest first: the holder of most of it that still has room, else the least loaded rank.

    With `fill` it is the fullest rank that has room, which leaves larger holes for what comes (best fit).
    """
    load = [0] * world
    by_load = [(0, rank) for rank in range(world)]
    owners = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, holders = costs[number], sizes[number]
        evenly = len(holders) == world and len(set(holders.values())) == 1  # no rank is a better place than another
        room = [] if evenly or fill else [r for r in holders if load[r] + cost <= capacity]
        if room:
            owner = min(room, key=lambda r: (-holders[r], load[r], r))
        else:
            owner = by_load[max(bisect_right(by_load, (capacity - cost, world)) - 1, 0) if fill else 0][1]
        del by_load[bisect_left(by_load, (load[owner], owner))]
        load[owner] += cost
        insort(by_load, (load[owner], owner))
        owners[number] = owner
    return owners


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
