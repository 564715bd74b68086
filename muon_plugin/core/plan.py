"""An owner for every matrix; what each rank computes and sends, in FLOPs and bytes. Needs no processes.

Every rank computes the same plan from the same index, without communication.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .layout import Index, Matrix, Strided, check_once

#: Bytes per element of a message (bf16).
BYTES = 2
#: Capacities tried (the load that no rank should exceed), as multiples of the lower bound on the busiest rank's load:
#: from the best balance to the least communication.
SLACKS = (1.0, 1.02, 1.05, 1.1, 1.25, 2.0)
#: Among the plans within this factor of the best balanced one, the one that sends the fewest bytes is chosen.
TOLERANCE = 1.02
#: If none of these is within TOLERANCE of the bound, this many capacities in between are tried (best fit).
SEARCH = 6
#: Elements of the matrices sent in a round that one rank holds (2 bytes each, twice): bounds the buffers.
ROUND_ELEMENTS = 64 * 2**20
#: Rounds to overlap, where each of them gathers so many elements: smaller ones cost more in latency than they hide, and
#: have fewer matrices of one shape at a time. Broadcasts overlap with what their owner computes for the next one.
ROUNDS, WORTHWHILE = 4, 16 * 2**20


@dataclass(frozen=True)
class Route:
    """One matrix: who orthogonalizes it, who sends what there, who gets which part of the update.

    Attributes:
        owner: the rank that orthogonalizes it.
        sources: (rank, where inside the matrix), each element once.
        holders: (rank, where inside the matrix), every replica.
        everywhere: every rank holds all of it, so the update is broadcast.
        round: in which it is sent; -1 where nothing has to be sent.
    """

    owner: int
    sources: tuple[tuple[int, tuple[Strided, ...]], ...]
    holders: tuple[tuple[int, tuple[Strided, ...]], ...]
    everywhere: bool
    round: int = -1


@dataclass(frozen=True)
class Plan:
    """The routes of all matrices, and the FLOPs and bytes sent of each rank in one step."""

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
        scalars: bf16 numbers that are sent with each update beside its elements.

    Raises:
        ValueError: where the ranks' pieces do not cover a matrix exactly once (replicas apart).
    """
    world = len(index)
    held: list[dict[int, tuple[Strided, ...]]] = [{} for _ in matrices]
    for rank, pieces in enumerate(index):
        for number, inside in pieces:
            held[number][rank] = held[number].get(rank, ()) + inside
    sizes = [{rank: sum(s.numel for s in inside) for rank, inside in ranks.items()} for ranks in held]
    costs = [flops(matrix.rows, matrix.cols) for matrix in matrices]
    owners = choose_owners(costs, _Pieces(matrices, sizes, world, scalars), world)
    routes = [_route(matrix, owner, ranks, world) for matrix, owner, ranks in zip(matrices, owners.of, held)]
    rounds = _schedule(matrices, routes)
    return Plan(tuple(routes), tuple(owners.load), tuple(_bytes_sent(routes, world, scalars)), rounds)


class Holders(Protocol):
    """Who holds how much of each matrix: a run's published pieces, or arithmetic for thousands of ranks."""

    def best(self, number: int, load: Sequence[int], most: int) -> int | None:
        """Of the holders of matrix `number` with a load of at most `most`: the one that holds most, then the least
        loaded, the first. None where there is none, and where every rank of the group holds the same."""

    def moved(self, number: int, owner: int) -> int:
        """bf16 numbers sent in a step if `owner` owns matrix `number`: pieces to it, and the update back."""


@dataclass(frozen=True)
class Owners:
    """A rank for every matrix.

    Attributes:
        of: the owner of each matrix.
        load: the cost of each rank's matrices, in the unit of the costs.
    """

    of: list[int]
    load: list[int]

    @property
    def busiest(self) -> int:
        return max(self.load)


def choose_owners(costs: Sequence[int], holders: Holders, world: int) -> Owners:
    """Chooses owners, for the plan of a run and for the planner at any size.

    Each attempt has a capacity, the load that no rank should exceed. Several are tried, from the best balance to the
    least communication. If none comes near the lower bound (the mean load, or the costliest matrix), a search between
    them fills ranks one by one (best fit). Of the best balanced attempts, the one that sends the fewest elements wins.

    Args:
        costs: of each matrix.
        holders: who holds them.
        world: ranks of the group.
    """
    bound = max(sum(costs) / world, max(costs, default=0))
    tried = [_assign(costs, holders, world, bound * slack) for slack in SLACKS]
    low, high = bound, float(min(owners.busiest for owners in tried))
    for _ in range(SEARCH if high > bound * TOLERANCE else 0):
        middle = (low + high) / 2
        tried.append(_assign(costs, holders, world, middle, fill=True))
        low, high = (low, middle) if tried[-1].busiest <= middle else (middle, high)
    even = min(owners.busiest for owners in tried) * TOLERANCE
    return min(
        (owners for owners in tried if owners.busiest <= even),
        key=lambda owners: sum(holders.moved(number, owner) for number, owner in enumerate(owners.of)),
    )


def _assign(costs: Sequence[int], holders: Holders, world: int, capacity: float, fill: bool = False) -> Owners:
    """Longest first: the holder of most of it that still has room, else the least loaded rank.

    With `fill` it is the fullest rank that has room, which leaves larger holes for what comes (best fit).
    """
    of, load = [0] * len(costs), [0] * world
    by_load = [(0, rank) for rank in range(world)]  # sorted
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        most = math.floor(capacity) - costs[number]
        owner = None if fill else holders.best(number, load, most)
        if owner is None:
            fullest = max(bisect_right(by_load, (most, world)) - 1, 0)
            owner = by_load[fullest if fill else 0][1]
        del by_load[bisect_left(by_load, (load[owner], owner))]
        load[owner] += costs[number]
        insort(by_load, (load[owner], owner))
        of[number] = owner
    return Owners(of, load)


class _Pieces:
    """`Holders` of a real run: the sizes, by rank, of the pieces that the ranks published of each matrix."""

    def __init__(self, matrices: Sequence[Matrix], sizes: Sequence[dict[int, int]], world: int, scalars: int) -> None:
        self._sizes, self._scalars = sizes, scalars
        # What is sent if the owner holds nothing of the matrix: its elements there, its update to all holders.
        self._moved = [m.numel + sum(of.values()) + scalars * len(of) for m, of in zip(matrices, sizes)]
        self._evenly = [len(of) == world and len(set(of.values())) == 1 for of in sizes]

    def best(self, number: int, load: Sequence[int], most: int) -> int | None:
        sizes = self._sizes[number]
        room = [] if self._evenly[number] else [rank for rank in sizes if load[rank] <= most]
        return min(room, key=lambda rank: (-sizes[rank], load[rank], rank), default=None)

    def moved(self, number: int, owner: int) -> int:
        own = self._sizes[number].get(owner)
        return self._moved[number] - (2 * own + self._scalars if own else 0)


def _route(matrix: Matrix, owner: int, held: dict[int, tuple[Strided, ...]], world: int) -> Route:
    sources: dict[tuple[Strided, ...], int] = {}
    for rank in sorted(held, key=lambda r: (r != owner, r)):
        sources.setdefault(held[rank], rank)
    check_once(matrix.name, matrix.numel, [part for inside in sources for part in inside])
    everywhere = len(held) == world and len(sources) == 1
    senders = tuple((rank, inside) for inside, rank in sources.items())
    return Route(owner, senders, tuple(sorted(held.items())), everywhere)


def _bytes_sent(routes: Sequence[Route], world: int, scalars: int) -> list[int]:
    """Bytes each rank sends in a step: pieces to owners, and parts of the update to holders."""
    sent = [0] * world
    for route in routes:
        for rank, inside in route.sources:
            if rank != route.owner:
                sent[rank] += BYTES * sum(s.numel for s in inside)
        for rank, inside in route.holders:
            if rank != route.owner:
                sent[route.owner] += BYTES * (sum(s.numel for s in inside) + scalars)
    return sent


def travels(route: Route) -> bool:
    return any(rank != route.owner for rank, _ in route.holders)


def _schedule(matrices: Sequence[Matrix], routes: list[Route]) -> int:
    """Numbers the rounds in which matrices are sent, so that one round is in flight while another is computed.

    Returns:
        how many rounds there are.
    """
    of_owner: dict[int, list[int]] = {}
    # Equal shapes together: one batch.
    for number in sorted(range(len(routes)), key=lambda i: (matrices[i].rows, matrices[i].cols, i)):
        if travels(routes[number]):
            of_owner.setdefault(routes[number].owner, []).append(number)
    # A rank holds its own matrices of a round, and, where updates are broadcast, those of all owners.
    loads = [sum(matrices[i].numel for i in mine) for mine in of_owner.values()]
    broadcast = any(route.everywhere for route in routes)
    most = sum(loads) if broadcast else max(loads, default=0)
    rounds = min(ROUNDS, max(map(len, of_owner.values()), default=0))
    if not broadcast:
        rounds = min(rounds, -(-most // WORTHWHILE))
    rounds = max(rounds, -(-most // ROUND_ELEMENTS))
    for mine, total in zip(of_owner.values(), loads):
        done = 0
        for number in mine:
            routes[number] = replace(routes[number], round=done * rounds // total)
            done += matrices[number].numel
    return rounds
