"""Shards of each matrix to its owner, the orthogonalization, shards of the update back. Knows no engine.

Both ways bf16, point to point between ranks that share a matrix; where every rank holds the whole matrix (stage 0,
DDP), nothing is gathered and the update is broadcast. Matrices that travel go in rounds. While the shards of one round
are on the network, matrices that lie whole on their owner are orthogonalized::

    gather 0 | local | compute 0, send back 0 | local | compute 1, send back 1 | ... | local
               gather 1 flies ................. gather 2 flies .....

Shapes: a matrix is assembled as (rows, cols) in a batch (batch, rows, cols) of equal ones. A message is flat: the parts
of one or more matrices, each a (count, run) block of a `Strided`, one after the other in an order that both sides
derive from the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import world_of
from .layout import Matrix, Piece, Strided
from .orthogonalize import NewtonSchulz
from .phases import phase, waiting_for
from .plan import Plan, Route, travels

#: Elements of the matrices of one batch: bounds the iteration's working memory (about 5 times 2 bytes each).
BATCH_ELEMENTS = 32 * 2**20

#: Fills a (count, run) bf16 view with the direction (momentum, Nesterov) of these elements of a tensor.
Read = Callable[[int, Strided, Tensor], None]
#: Applies a (count, run) bf16 part of the update of a matrix, with the matrix's own scale where it has one.
Write = Callable[[int, Strided, int, Tensor, "Tensor | None"], None]


@dataclass(frozen=True)
class _InTensor:
    """Elements of one of this rank's tensors, by its number."""

    tensor: int
    local: Strided


@dataclass(frozen=True)
class _InMatrix:
    """Elements of a matrix, by its number."""

    matrix: int
    inside: tuple[Strided, ...]

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.inside)


@dataclass
class _Round:
    """What this rank does in one round: the matrices it computes, and for each peer the parts of the messages."""

    computed: list[int] = field(default_factory=list)
    gather_to: dict[int, list[_InTensor]] = field(default_factory=dict)
    gather_from: dict[int, list[_InMatrix]] = field(default_factory=dict)
    update_to: dict[int, list[_InMatrix]] = field(default_factory=dict)
    update_from: dict[int, list[int]] = field(default_factory=dict)  # matrices
    broadcast: dict[int, list[int]] = field(default_factory=dict)  # matrices, by their owner


@dataclass(frozen=True)
class _Computed:
    """The update of one matrix: flat, bf16, and its own fp32 scale where it has one (Eq. 6)."""

    flat: Tensor
    scale: Tensor | None

    def packed(self, inside: Iterable[Strided]) -> list[Tensor]:
        """Parts of it, flat, then the scale as two bf16 numbers."""
        parts = [part.view(self.flat).reshape(-1) for part in inside]
        return parts if self.scale is None else [*parts, self.scale.view(1).view(torch.bfloat16)]


@dataclass
class _Transfer:
    """Messages that were posted, one to and one from each peer.

    Attributes:
        works: (what to wait for, the peer of the default group; None where one piece of work is for all).
        received: by rank, filled once all works are done.
        sent: buffers that must outlive the sends.
    """

    works: list[tuple[Any, int | None]]
    received: dict[int, Tensor]
    sent: list[Tensor]

    def wait(self) -> dict[int, Tensor]:
        for work, peer in self.works:
            with waiting_for(peer):
                work.wait()
        self.sent.clear()
        return self.received


class Exchange:
    """Runs a plan on one rank.

    Args:
        matrices: all matrices of the call; a plan's routes stand in the same order.
        pieces: this rank's pieces of them.
        plan: the same on every rank.
        orthogonalize: (batch, rows, cols) bf16 to the same.
        group: the process group whose ranks the plan counts; None is the default one.
        device: where the matrices are assembled.
        normalize: the update's RMS is set to 1 by a scale that its owner computes and sends along (paper, Eq. 6).
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        pieces: Sequence[Piece],
        plan: Plan,
        orthogonalize: NewtonSchulz,
        group: Any,
        device: torch.device,
        normalize: bool = False,
    ) -> None:
        self.matrices, self.plan, self.group, self.device = matrices, plan, group, device
        self.orthogonalize, self.normalize = orthogonalize, normalize
        self._scalars = 2 * normalize  # bf16 numbers that follow each update
        self.rank, size = world_of(group)
        self._global = [dist.get_global_rank(group, r) if group is not None else r for r in range(size)]
        # gloo moves CPU memory only; every other backend moves the device's own.
        gloo = size > 1 and device.type != "cpu" and dist.get_backend(group) == "gloo"
        self._wire = torch.device("cpu") if gloo else device
        self._mine: dict[int, list[Piece]] = {}
        for piece in pieces:
            self._mine.setdefault(piece.matrix, []).append(piece)
        self._rounds = [_Round() for _ in range(plan.rounds)]
        local = []
        for number, route in enumerate(plan.routes):
            if travels(route):
                self._add(self._rounds[route.round], number, route)
            elif route.owner == self.rank:
                local.append(number)
        batches = self._batches(local)
        slots = plan.rounds + 1
        self._fillers = [batches[i * len(batches) // slots : (i + 1) * len(batches) // slots] for i in range(slots)]

    def _add(self, into: _Round, number: int, route: Route) -> None:
        me, owner = self.rank, route.owner
        if owner == me:
            into.computed.append(number)
        if route.everywhere:
            into.broadcast.setdefault(owner, []).append(number)
            return
        for rank, inside in route.sources:
            if rank == me != owner:
                into.gather_to.setdefault(owner, []).extend(self._held(number))
            elif rank != me == owner:
                into.gather_from.setdefault(rank, []).append(_InMatrix(number, inside))
        for rank, inside in route.holders:
            if rank == me != owner:
                into.update_from.setdefault(owner, []).append(number)
            elif rank != me == owner:
                into.update_to.setdefault(rank, []).append(_InMatrix(number, inside))

    def _held(self, number: int) -> list[_InTensor]:
        """What this rank holds of a matrix, in the order of the route's `inside`."""
        return [_InTensor(piece.tensor, block.local) for piece in self._mine.get(number, ()) for block in piece.blocks]

    def _batches(self, numbers: Iterable[int]) -> list[list[int]]:
        """Matrices of one shape together, up to BATCH_ELEMENTS."""
        batches: list[list[int]] = []
        shape: tuple[int, int] | None = None
        for number in sorted(numbers, key=lambda i: (self.matrices[i].rows, self.matrices[i].cols, i)):
            matrix = self.matrices[number]
            full = batches and (len(batches[-1]) + 1) * matrix.numel > BATCH_ELEMENTS
            if shape != (matrix.rows, matrix.cols) or full:
                batches.append([])
                shape = (matrix.rows, matrix.cols)
            batches[-1].append(number)
        return batches

    def run(self, read: Read, write: Write) -> None:
        """One step: every shard is read once, every part of the update is written once. Collective over the group."""
        gathering = self._gather(0, read)
        returning: list[_Transfer] = []
        for number, this in enumerate(self._rounds):
            arriving, gathering = gathering, self._gather(number + 1, read)  # the next round's fly meanwhile
            self._local(number, read, write)
            arrived = self._arrived(this, arriving)
            computed: dict[int, _Computed] = {}
            for batch in self._batches(this.computed):
                computed |= self._compute(batch, read, arrived)
            sent = self._return(number, computed)
            for matrix, update in computed.items():
                self._write_own(matrix, update, write)
            self._take_back(number - 1, returning, write)  # the updates of the round before, which flew until now
            returning = sent
        self._local(len(self._rounds), read, write)
        self._take_back(len(self._rounds) - 1, returning, write)

    def _local(self, slot: int, read: Read, write: Write) -> None:
        """Matrices that lie whole on this rank: one of `rounds` + 1 parts of them."""
        for batch in self._fillers[slot]:
            for matrix, update in self._compute(batch, read, {}).items():
                self._write_own(matrix, update, write)

    def _compute(
        self, batch: list[int], read: Read, arrived: dict[int, list[tuple[Strided, Tensor]]]
    ) -> dict[int, _Computed]:
        """Assembles the matrices of a batch and orthogonalizes them."""
        first = self.matrices[batch[0]]
        x = torch.empty(len(batch), first.rows, first.cols, dtype=torch.bfloat16, device=self.device)
        for slot, number in enumerate(batch):
            flat = x[slot].view(-1)
            for piece in self._mine.get(number, ()) if self._is_source(number) else ():
                for block in piece.blocks:
                    read(piece.tensor, block.local, block.inside.view(flat).view(block.local.count, block.local.run))
            for inside, part in arrived.get(number, ()):
                inside.view(flat).copy_(part.view(inside.count, inside.run))
        with phase("orthogonalize"):
            updates = [update.reshape(-1) for update in self.orthogonalize(x)]
        return {n: _Computed(u, _one_over_rms(u) if self.normalize else None) for n, u in zip(batch, updates)}

    def _is_source(self, number: int) -> bool:
        return any(rank == self.rank for rank, _ in self.plan.routes[number].sources)

    def _write_own(self, number: int, update: _Computed, write: Write) -> None:
        for piece in self._mine.get(number, ()):
            for block in piece.blocks:
                part = block.inside.view(update.flat).reshape(block.local.count, block.local.run)
                write(piece.tensor, block.local, number, part, update.scale)

    def _gather(self, number: int, read: Read) -> _Transfer:
        """Posts a round's messages to the owners."""
        if number >= len(self._rounds):
            return _Transfer([], {}, [])
        this, sends = self._rounds[number], {}
        for rank, held in this.gather_to.items():
            sizes = [part.local.numel for part in held]
            sends[rank] = self._buffer(sum(sizes), self.device)
            for part, into in zip(held, torch.split(sends[rank], sizes)):
                read(part.tensor, part.local, into.view(part.local.count, part.local.run))
        expected = {rank: sum(part.numel for part in parts) for rank, parts in this.gather_from.items()}
        return self._post(sends, expected, tag=2 * number)

    def _arrived(self, this: _Round, transfer: _Transfer) -> dict[int, list[tuple[Strided, Tensor]]]:
        """Waits for a round's messages: what came of each matrix, and where it belongs in it."""
        found: dict[int, list[tuple[Strided, Tensor]]] = {}
        for rank, buffer in transfer.wait().items():
            parts = [(part.matrix, inside) for part in this.gather_from[rank] for inside in part.inside]
            flats = torch.split(buffer.to(self.device), [inside.numel for _, inside in parts])
            for (matrix, inside), flat in zip(parts, flats):
                found.setdefault(matrix, []).append((inside, flat))
        return found

    def _return(self, number: int, computed: dict[int, _Computed]) -> list[_Transfer]:
        """Posts a round's updates to their holders: broadcasts, owner by owner, then the messages."""
        this = self._rounds[number]
        posted = [self._broadcast(owner, mine, computed) for owner, mine in sorted(this.broadcast.items())]
        sends = {
            rank: torch.cat([flat for part in parts for flat in computed[part.matrix].packed(part.inside)])
            for rank, parts in this.update_to.items()
        }
        expected = {
            rank: sum(part.local.numel for m in mine for part in self._held(m)) + self._scalars * len(mine)
            for rank, mine in this.update_from.items()
        }
        return [*posted, self._post(sends, expected, tag=2 * number + 1)]

    def _take_back(self, number: int, transfers: list[_Transfer], write: Write) -> None:
        """Waits for a round's updates from other ranks, the messages first, and applies them."""
        if not transfers:
            return
        *broadcasts, messages = transfers
        this = self._rounds[number]
        for rank, buffer in messages.wait().items():
            rest = buffer.to(self.device)
            for matrix in this.update_from[rank]:
                held = self._held(matrix)
                sizes = [part.local.numel for part in held]
                flat, scale, rest = self._unpacked(rest, sum(sizes))
                for part, update in zip(held, torch.split(flat, sizes)):
                    write(part.tensor, part.local, matrix, update.view(part.local.count, part.local.run), scale)
        for owner, broadcast in zip(sorted(this.broadcast), broadcasts):
            rest = broadcast.wait()[owner]
            if owner == self.rank:
                continue
            rest = rest.to(self.device)
            for matrix in this.broadcast[owner]:
                flat, scale, rest = self._unpacked(rest, self.matrices[matrix].numel)
                self._write_own(matrix, _Computed(flat, scale), write)

    def _unpacked(self, buffer: Tensor, size: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """(The first elements of a message, the scale that follows them, the rest of it)."""
        after = size + self._scalars
        # A copy: the scale's two numbers may lie at an odd place, where an fp32 view is refused.
        scale = buffer[size:after].clone().view(torch.float32)[0] if self._scalars else None
        return buffer[:size], scale, buffer[after:]

    def _broadcast(self, owner: int, numbers: list[int], computed: dict[int, _Computed]) -> _Transfer:
        """One owner's updates to all ranks; every rank holds these matrices whole."""
        sizes = [self.matrices[m].numel for m in numbers]
        if owner == self.rank:
            parts = [flat for m, size in zip(numbers, sizes) for flat in computed[m].packed([Strided(0, size)])]
            buffer = torch.cat(parts).to(self._wire)
        else:
            buffer = self._buffer(sum(sizes) + self._scalars * len(numbers), self._wire)
        work = dist.broadcast(buffer, self._global[owner], group=self.group, async_op=True)
        return _Transfer([(work, self._global[owner] if owner != self.rank else None)], {owner: buffer}, [])

    def _post(self, sends: dict[int, Tensor], sizes: dict[int, int], tag: int) -> _Transfer:
        """Posts one message to and from each peer."""
        received = {rank: self._buffer(size, self._wire) for rank, size in sorted(sizes.items())}
        sent = {rank: buffer.to(self._wire) for rank, buffer in sorted(sends.items())}
        ops = [dist.P2POp(dist.irecv, b, self._global[r], self.group, tag) for r, b in received.items()]
        ops += [dist.P2POp(dist.isend, b, self._global[r], self.group, tag) for r, b in sent.items()]
        works = dist.batch_isend_irecv(ops) if ops else []
        # NCCL has one piece of work for all; nobody waits for it here but the device.
        peers = [op.peer for op in ops] if len(works) == len(ops) else [None] * len(works)
        return _Transfer(list(zip(works, peers)), received, list(sent.values()))

    def _buffer(self, size: int, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=device)


def _one_over_rms(update: Tensor) -> Tensor:
    """1 / RMS of one matrix's update, an fp32 scalar; 0 for an update of zeros."""
    rms = update.float().square().mean().sqrt()
    return torch.where(rms > 0, 1 / rms, 0.0)
