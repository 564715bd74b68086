"""How updates and directions travel between the ranks that share matrices. Knows neither formulas nor rounds.

What a rank sends in one direction of a round lies in one flat bf16 buffer, and what it receives in another: the parts
for each peer one after the other, in an order that both ranks derive from the plan. A `Leg` says what lies where. Where
most ranks share matrices with each other (ZeRO-3), one all-to-all exchanges the buffers; elsewhere messages go point to
point, between ranks that share a matrix or that own one for balance; and what every rank holds is broadcast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import world_of
from .layout import Strided
from .phases import waiting_for
from .plan import Route

#: Messages of a rank, to and from it, that are posted together: a thousand hang in NCCL 2.28 (PyTorch #174288).
MOST = 256
#: bf16 numbers that an fp32 scalar is sent as.
SCALAR = 2

#: Peer -> the number of a matrix -> which of its elements.
Contents = Mapping[int, Mapping[int, tuple[Strided, ...]]]


class Part(NamedTuple):
    """Elements of a matrix, and where they begin in a flat buffer. They lie there one after the other."""

    matrix: int
    inside: Strided
    start: int

    @property
    def at(self) -> Strided:
        return Strided(self.start, self.inside.run, self.inside.run, self.inside.count)


@dataclass(frozen=True)
class Side:
    """A buffer that a rank sends or receives.

    Attributes:
        sizes: peer -> how many numbers; in ascending order, in which they lie in the buffer.
        parts: what lies in it.
        scalars: (matrix, where its scalar begins), for updates that have one.
    """

    sizes: Mapping[int, int] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    scalars: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(contents: Contents, with_scalars: bool = False) -> Side:
        sizes, parts, scalars, end = {}, [], [], 0
        for peer in sorted(contents):
            begin = end
            for matrix, inside in contents[peer].items():
                for part in inside:
                    parts.append(Part(matrix, part, end))
                    end += part.numel
                if with_scalars:
                    scalars.append((matrix, end))
                    end += SCALAR
            sizes[peer] = end - begin
        return Side(sizes, tuple(parts), tuple(scalars))

    @property
    def numel(self) -> int:
        return sum(self.sizes.values())


@dataclass(frozen=True)
class Leg:
    """One direction of a round, on one rank.

    Attributes:
        sent, received: what this rank sends and receives.
        root: the rank that broadcasts what it sends; None where each peer gets its own part.
        to_all: whether all ranks exchange their buffers at once.
        reach: messages are posted together for so many distances between two ranks; see `Wire.post`.
    """

    sent: Side
    received: Side
    root: int | None = None
    to_all: bool = False
    reach: int = MOST // 2

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do for this rank."""
        return not (self.to_all or self.root is not None or self.sent.sizes or self.received.sizes)


def legs(routes: Sequence[tuple[int, Route]], rank: int, size: int, scalars: bool) -> tuple[Leg, list[Leg]]:
    """A round: its directions to the owners; its updates to the holders, and a broadcast for each owner.

    Args:
        routes: of the matrices that travel in this round, by their numbers.
        rank, size: of the group.
        scalars: whether each update has a scalar.
    """
    cut = [(number, route) for number, route in routes if not route.everywhere]
    # Of a matrix that lies on most ranks, nearly all of these are the owner's peers; and so it is with other owners.
    to_all = any(len(route.held) >= 3 and 2 * len(route.held) > size for _, route in cut)
    there, back = _Direction(), _Direction()
    for number, route in cut:
        owner = route.owner
        if rank == owner:
            sources = set(route.sources)
            for peer, inside in route.holders:
                if peer != rank:
                    back.send(peer, number, inside)
                    if peer in sources:
                        there.receive(peer, number, inside)
        elif inside := route.held.inside(rank):
            back.receive(owner, number, inside)
            if route.is_source(rank):
                there.send(owner, number, inside)
        if not to_all:
            there.meet(owner, route.sources)
            back.meet(owner, route.held.ranks)
    gather, update = there.leg(size, to_all, False), [back.leg(size, to_all, scalars)]
    for owner in sorted({route.owner for _, route in routes if route.everywhere}):
        # All hold the same elements.
        shared = {n: of.held.inside(rank) for n, of in routes if of.everywhere and of.owner == owner}
        all_of_it = Side.of({owner: shared}, scalars)
        mine = owner == rank
        update.append(Leg(all_of_it if mine else Side(), Side() if mine else all_of_it, root=owner))
    return gather, update


class _Direction:
    """Messages of one direction of a round: in detail those of this rank, and which others exchange any."""

    def __init__(self) -> None:
        self._sent: dict[int, dict[int, tuple[Strided, ...]]] = {}
        self._received: dict[int, dict[int, tuple[Strided, ...]]] = {}
        #: owner -> the ranks to which it sends, or from which it receives
        self._peers: dict[int, set[int]] = {}

    def send(self, peer: int, matrix: int, inside: tuple[Strided, ...]) -> None:
        self._sent.setdefault(peer, {})[matrix] = inside

    def receive(self, peer: int, matrix: int, inside: tuple[Strided, ...]) -> None:
        self._received.setdefault(peer, {})[matrix] = inside

    def meet(self, owner: int, ranks: Iterable[int]) -> None:
        self._peers.setdefault(owner, set()).update(ranks)

    def leg(self, size: int, to_all: bool, scalars: bool) -> Leg:
        ends = Counter[int]()
        for owner, peers in self._peers.items():
            others = peers - {owner}
            ends.update(others)
            ends[owner] += len(others)
        reach = size if max(ends.values(), default=0) <= MOST else MOST // 2
        return Leg(Side.of(self._sent, scalars), Side.of(self._received, scalars), to_all=to_all, reach=reach)


@dataclass
class Transfer:
    """A leg under way.

    Attributes:
        works: (handle, the global rank of the peer that it waits for, if it is a single one).
        sent: buffers that must outlive the sends.
        received: filled once all handles are done.
    """

    works: list[tuple[Any, int | None]]
    sent: list[Tensor]
    received: Tensor


class Wire:
    """The ranks of a process group, as seen by one of them.

    Args:
        group: None is the default one.
        device: where buffers are filled and read.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.size = world_of(group)
        self._global = [dist.get_global_rank(group, r) if group is not None else r for r in range(self.size)]
        # gloo moves CPU memory only; every other backend moves the device's own.
        gloo = self.size > 1 and device.type != "cpu" and dist.get_backend(group) == "gloo"
        #: where buffers are while they travel
        self.moves = torch.device("cpu") if gloo else device

    def post(self, leg: Leg, sent: Tensor, tag: int) -> Transfer:
        """Sends a filled buffer. Collective over the group where there is a root, or the leg is `to_all`."""
        sent = sent.to(self.moves)
        received = torch.empty(leg.received.numel, dtype=sent.dtype, device=self.moves)
        if leg.root is not None:
            mine = leg.root == self.rank
            root = self._global[leg.root]
            work = dist.broadcast(sent if mine else received, root, group=self.group, async_op=True)
            return Transfer([(work, None if mine else root)], [sent], received)
        if leg.to_all:
            come, go = ([side.sizes.get(rank, 0) for rank in range(self.size)] for side in (leg.received, leg.sent))
            work = dist.all_to_all_single(received, sent, come, go, group=self.group, async_op=True)
            return Transfer([(work, None)], [sent], received)
        return Transfer(self._point_to_point(leg, sent, received, tag), [sent], received)

    def _point_to_point(self, leg: Leg, sent: Tensor, received: Tensor, tag: int) -> list[tuple[Any, int | None]]:
        """Posts messages in batches by the distance from their sender to their receiver.

        Both see the same distance, so each batch of a rank waits only for the same and earlier batches of others.
        """
        found = []
        for op, side, buffer, sign in ((dist.irecv, leg.received, received, -1), (dist.isend, leg.sent, sent, 1)):
            for peer, part in zip(side.sizes, torch.split(buffer, list(side.sizes.values()))):
                distance = sign * (peer - self.rank) % self.size
                found.append(((distance - 1) // leg.reach, op, part, self._global[peer]))
        works: list[tuple[Any, int | None]] = []
        for _, batch in groupby(sorted(found, key=lambda each: each[0]), key=lambda each: each[0]):
            ops = [dist.P2POp(op, part, peer, self.group, tag) for _, op, part, peer in batch]
            handles = dist.batch_isend_irecv(ops)
            # NCCL returns one handle for all; only the device waits for it, not this process.
            works += zip(handles, [op.peer for op in ops] if len(handles) == len(ops) else [None] * len(handles))
        return works

    def arrived(self, transfer: Transfer) -> Tensor:
        """Waits for a leg: what was received."""
        for work, peer in transfer.works:
            with waiting_for(peer):
                work.wait()
        transfer.sent.clear()
        return transfer.received.to(self.device)

    def connect(self, legs: Iterable[Leg]) -> None:
        """Makes the connections between the peers of these legs, by one number each. Collective over the group.

        NCCL makes them at the first message, which in a job of many ranks takes longer than a watchdog of steps allows.
        """
        for leg in legs:
            if leg.root is None and not leg.idle:
                sent, received = (Side(dict.fromkeys(side.sizes, 1)) for side in (leg.sent, leg.received))
                short = replace(leg, sent=sent, received=received)
                self.arrived(self.post(short, torch.zeros(sent.numel, dtype=torch.bfloat16, device=self.device), 0))
