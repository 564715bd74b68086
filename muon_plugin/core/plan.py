"""An owner for every matrix; what each rank computes and sends, in FLOPs and bytes. Needs no processes.

Every rank computes the same plan from the same index, without communication. Who holds a matrix is kept as `holders`
describes it: only what this rank sends and receives is ever written down part by part.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from .holders import Holders, Index, Share, holders
from .layout import Matrix, Strided

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
#: As many ranks, or fewer, are compared one by one.
FEW = 16


@dataclass(frozen=True)
class Route:
    """One matrix: who orthogonalizes it, who sends what there, who gets which part of the update.

    Attributes:
        owner: the rank that orthogonalizes it.
        held: the ranks that hold it, which get their parts of the update.
        round: in which it is sent; -1 where nothing has to be sent.
    """

    owner: int
    held: Holders
    round: int = -1

    @property
    def everywhere(self) -> bool:
        """Whether every rank holds all of it, so that the update is broadcast."""
        return self.held.share.everywhere

    @property
    def holders(self) -> tuple[tuple[int, tuple[Strided, ...]], ...]:
        """(rank, where inside the matrix), every replica. Derived for all ranks when it is asked for."""
        return tuple((rank, self.held.inside(rank)) for rank in self.held.ranks)

    @property
    def sources(self) -> Collection[int]:
        """The holders of which the owner uses what they have, itself among them if it is one: each element once."""
        if self.held.share.everywhere:
            return [self.owner]
        if self.held.share.distinct == len(self.held):
            return self.held.ranks
        first: dict[tuple[Strided, ...], int] = {}
        for rank in sorted(self.held.ranks, key=lambda rank: (rank != self.owner, rank)):
            first.setdefault(self.held.inside(rank), rank)
        return first.values()

    def is_source(self, rank: int) -> bool:
        """Whether a holder is one of `sources`."""
        return self.held.share.distinct == len(self.held) or rank in self.sources


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

    def describe(self, matrices: Sequence[Matrix]) -> list[str]:
        """One line a matrix, for comparing ranks."""
        return [f"{m.name}: owner {r.owner}, round {r.round}" for m, r in zip(matrices, self.routes)]


def make_plan(matrices: Sequence[Matrix], index: Index, flops: Callable[[int, int], int], scalars: int = 0) -> Plan:
    """Gives every matrix an owner: one that holds a piece of it wherever balance allows.

    Args:
        matrices: all matrices of one call of the optimizer.
        index: what every rank holds of them.
        flops: cost of orthogonalizing a rows x cols matrix.
        scalars: bf16 numbers that are sent with each update beside its elements.

    Raises:
        ValueError: for a matrix of which the ranks do not hold every element exactly once (replicas apart).
    """
    cost_of = {shape: flops(*shape) for shape in {(matrix.rows, matrix.cols) for matrix in matrices}}
    costs = [cost_of[matrix.rows, matrix.cols] for matrix in matrices]
    held = holders(matrices, index)
    owners = choose_owners(costs, held, index.world, scalars)
    routes = [Route(owner, of) for owner, of in zip(owners.of, held)]
    rounds = _schedule(matrices, routes)
    return Plan(tuple(routes), tuple(owners.load), tuple(_bytes_sent(routes, index.world, scalars)), rounds)


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


def choose_owners(costs: Sequence[int], held: Sequence[Holders], world: int, scalars: int) -> Owners:
    """Chooses the ranks that compute.

    Each attempt has a capacity, the load that no rank should exceed. Several are tried, from the best balance to the
    least communication. If none comes near the lower bound (the mean load, or the costliest matrix), one more gives
    each matrix to the least loaded rank, and a search between them fills ranks one by one (best fit). Of the best
    balanced attempts, the one that sends the fewest elements wins.

    Args:
        costs: of each matrix.
        held: who holds them.
        world: ranks of the group.
        scalars: bf16 numbers that are sent with each update.
    """
    bound = max(sum(costs) / world, max(costs, default=0))
    # Where every rank holds as much of every matrix, it does not matter who has room.
    slacks = SLACKS[:1] if all(of.share.evenly for of in held) else SLACKS
    tried = [_assign(costs, held, world, bound * slack) for slack in slacks]
    if min(owners.busiest for owners in tried) > bound * TOLERANCE:
        # Best fit puts two large matrices on a rank where a large one and two smaller ones would have filled it.
        tried.append(_assign(costs, held, world, 0))
    low, high = bound, float(min(owners.busiest for owners in tried))
    for _ in range(SEARCH if high > bound * TOLERANCE else 0):
        middle = (low + high) / 2
        tried.append(_assign(costs, held, world, middle, fill=True))
        low, high = (low, middle) if tried[-1].busiest <= middle else (middle, high)
    even = min(owners.busiest for owners in tried) * TOLERANCE
    return min(
        (owners for owners in tried if owners.busiest <= even),
        key=lambda owners: sum(_moved(of, owner, scalars) for of, owner in zip(held, owners.of)),
    )


def _moved(held: Holders, owner: int, scalars: int) -> int:
    """bf16 numbers sent in a step if `owner` owns a matrix: parts to it, and the update back."""
    return held.share.numel - held.elements(owner) + held.returned(owner, scalars)


class _Loads:
    """The cost of what each rank computes."""

    def __init__(self, world: int) -> None:
        self.of = [0] * world
        self._sorted = [(0, rank) for rank in range(world)]

    def add(self, rank: int, cost: int) -> None:
        del self._sorted[bisect_left(self._sorted, (self.of[rank], rank))]
        self.of[rank] += cost
        insort(self._sorted, (self.of[rank], rank))

    def least(self) -> int:
        return self._sorted[0][1]

    def fullest(self, most: int) -> int:
        """The last of the most loaded ranks with a load of at most `most`; the least loaded where there is none."""
        return self._sorted[max(bisect_right(self._sorted, (most, len(self.of))) - 1, 0)][1]

    def best(self, held: Holders, most: int) -> int | None:
        """Of the holders of a matrix with a load of at most `most`: the one that holds most, then the least loaded, the
        first. None where there is none, and where every rank of the group holds as much."""
        if held.share.evenly:
            return None
        first = held.first
        for alike in held.share.by_size:
            if len(alike) <= FEW:
                load, rank = min((self.of[first + rank], first + rank) for rank in alike)
                if load <= most:
                    return rank
            elif (found := self._least_of(first, held.share, alike[0], most)) is not None:
                return found
        return None

    def _least_of(self, first: int, share: Share, like: int, most: int) -> int | None:
        """Of the ranks that hold as much as rank `like` of a share: most ranks do, so one of the first is found."""
        size = share.sizes[like]
        for load, rank in self._sorted:
            if load > most:
                return None
            if share.sizes.get(rank - first) == size:
                return rank
        return None


def _assign(costs: Sequence[int], held: Sequence[Holders], world: int, capacity: float, fill: bool = False) -> Owners:
    """Longest first: the holder of most of it that still has room, else the least loaded rank.

    With `fill` it is the fullest rank that has room, which leaves larger holes for what comes (best fit).
    """
    of, loads = [0] * len(costs), _Loads(world)
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        most = math.floor(capacity) - costs[number]
        if fill:
            owner = loads.fullest(most)
        else:
            best = loads.best(held[number], most)
            owner = loads.least() if best is None else best
        loads.add(owner, costs[number])
        of[number] = owner
    return Owners(of, loads.of)


def _bytes_sent(routes: Sequence[Route], world: int, scalars: int) -> list[int]:
    """Bytes each rank sends in a step: parts to owners, and parts of the update to holders."""
    numbers = [0] * world
    alike = Counter[Holders]()
    for route in routes:
        held, owner = route.held, route.owner
        numbers[owner] += held.returned(owner, scalars)
        if held.share.distinct == len(held):  # every holder is a source
            alike[held] += 1
            numbers[owner] -= held.elements(owner)
        else:
            for rank in route.sources:
                numbers[rank] += held.elements(rank) if rank != owner else 0
    for held, count in alike.items():
        for rank in held.ranks:
            numbers[rank] += count * held.elements(rank)
    return [BYTES * number for number in numbers]


def travels(route: Route) -> bool:
    """Whether anything of the matrix is sent."""
    return len(route.held) > (route.held.elements(route.owner) > 0)


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
            routes[number] = Route(routes[number].owner, routes[number].held, done * rounds // total)
            done += matrices[number].numel
    return rounds
