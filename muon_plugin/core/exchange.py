"""Pieces to their matrix's owner, the orthogonalization, the update's pieces back. Knows no engine.

Both ways bf16, point to point between ranks that share a matrix; where every rank holds the whole matrix (stage 0,
DDP), nothing is gathered and the update is broadcast. While the pieces of one round fly, matrices that lie whole on
their owner are orthogonalized::

    gather 0 | local | compute 0, send back 0 | local | compute 1, send back 1 | ... | local
               gather 1 flies ................. gather 2 flies .....
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


@dataclass
class _Round:
    """What this rank does in one round. Messages are lists of parts in an order both sides derive alike."""

    computed: list[int] = field(default_factory=list)
    gather_to: dict[int, list[tuple[int, Strided]]] = field(default_factory=dict)  # rank -> (tensor, local)
    gather_from: dict[int, list[tuple[int, Strided]]] = field(default_factory=dict)  # rank -> (matrix, inside)
    update_to: dict[int, list[tuple[int, list[Strided]]]] = field(default_factory=dict)  # rank -> matrix, inside
    update_from: dict[int, list[int]] = field(default_factory=dict)  # rank -> matrices
    broadcast: dict[int, list[int]] = field(default_factory=dict)  # rank -> matrices


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
                into.gather_to.setdefault(owner, []).extend(self._blocks(number))
            elif rank != me == owner:
                into.gather_from.setdefault(rank, []).extend((number, part) for part in inside)
        for rank, inside in route.holders:
            if rank == me != owner:
                into.update_from.setdefault(owner, []).append(number)
            elif rank != me == owner:
                into.update_to.setdefault(rank, []).append((number, list(inside)))

    def _blocks(self, number: int) -> list[tuple[int, Strided]]:
        return [(piece.tensor, block.local) for piece in self._mine.get(number, ()) for block in piece.blocks]

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
        """One step: every piece is read once, every piece of the update written once. Collective over the group."""
        following = self._gather(0, read)
        returning: Callable[[], None] = _nothing
        for number, this in enumerate(self._rounds):
            arriving, following = following, self._gather(number + 1, read)
            self._local(number, read, write)
            arrived = arriving()
            updates: dict[int, tuple[Tensor, Tensor | None]] = {}
            for batch in self._batches(this.computed):
                updates.update(self._compute(batch, read, arrived))
            sent = self._return(number, updates, write)
            for matrix, (update, scale) in updates.items():
                self._write_own(matrix, update, scale, write)
            returning()
            returning = sent
        self._local(len(self._rounds), read, write)
        returning()

    def _local(self, slot: int, read: Read, write: Write) -> None:
        for batch in self._fillers[slot]:
            for matrix, (update, scale) in self._compute(batch, read, {}).items():
                self._write_own(matrix, update, scale, write)

    def _compute(
        self, batch: list[int], read: Read, arrived: dict[int, list[tuple[Strided, Tensor]]]
    ) -> dict[int, tuple[Tensor, Tensor | None]]:
        """Puts the matrices of a batch together and orthogonalizes them: number -> flat update, its scale."""
        first = self.matrices[batch[0]]
        x = torch.empty(len(batch), first.rows, first.cols, dtype=torch.bfloat16, device=self.device)
        sourced = {number for number in batch if self._is_source(number)}
        for slot, number in enumerate(batch):
            flat = x[slot].view(-1)
            for piece in self._mine.get(number, ()) if number in sourced else ():
                for block in piece.blocks:
                    read(piece.tensor, block.local, block.inside.view(flat).view(block.local.count, block.local.run))
            for inside, part in arrived.get(number, ()):
                inside.view(flat).copy_(part.view(inside.count, inside.run))
        with phase("orthogonalize"):
            updates = [update.reshape(-1) for update in self.orthogonalize(x)]
        scales = [_one_over_rms(update) if self.normalize else None for update in updates]
        return {number: (update, scale) for number, update, scale in zip(batch, updates, scales)}

    def _is_source(self, number: int) -> bool:
        return any(rank == self.rank for rank, _ in self.plan.routes[number].sources)

    def _write_own(self, number: int, update: Tensor, scale: Tensor | None, write: Write) -> None:
        for piece in self._mine.get(number, ()):
            for block in piece.blocks:
                part = block.inside.view(update).reshape(block.local.count, block.local.run)
                write(piece.tensor, block.local, number, part, scale)

    def _gather(self, number: int, read: Read) -> Callable[[], dict[int, list[tuple[Strided, Tensor]]]]:
        """Starts a round's way to the owners; the result waits and says what arrived of each matrix."""
        if number >= len(self._rounds):
            return dict
        this = self._rounds[number]
        sends = {}
        for rank, blocks in this.gather_to.items():
            buffer = self._buffer(sum(local.numel for _, local in blocks), self.device)
            for (tensor, local), part in zip(blocks, torch.split(buffer, [local.numel for _, local in blocks])):
                read(tensor, local, part.view(local.count, local.run))
            sends[rank] = buffer
        sizes = {rank: sum(inside.numel for _, inside in parts) for rank, parts in this.gather_from.items()}
        wait = self._transfer(sends, sizes, tag=2 * number)

        def arrived() -> dict[int, list[tuple[Strided, Tensor]]]:
            found: dict[int, list[tuple[Strided, Tensor]]] = {}
            for rank, buffer in wait().items():
                parts = this.gather_from[rank]
                for (matrix, inside), part in zip(parts, torch.split(buffer, [inside.numel for _, inside in parts])):
                    found.setdefault(matrix, []).append((inside, part))
            return found

        return arrived

    def _return(
        self, number: int, updates: dict[int, tuple[Tensor, Tensor | None]], write: Write
    ) -> Callable[[], None]:
        """Starts the way back of a round's updates; the result waits and writes what comes to this rank."""
        this = self._rounds[number]
        waits = [self._broadcast(source, mine, updates, write) for source, mine in sorted(this.broadcast.items())]
        sends = {
            rank: torch.cat([flat for m, inside in parts for flat in _packed(*updates[m], inside)])
            for rank, parts in this.update_to.items()
        }
        extra = 2 * self.normalize
        sizes = {
            rank: sum(local.numel for m in mine for _, local in self._blocks(m)) + extra * len(mine)
            for rank, mine in this.update_from.items()
        }
        wait = self._transfer(sends, sizes, tag=2 * number + 1)

        def finish() -> None:
            for rank, buffer in wait().items():
                for matrix in this.update_from[rank]:
                    blocks = self._blocks(matrix)
                    size = sum(local.numel for _, local in blocks)
                    flat, buffer = buffer[:size], buffer[size:]
                    scale, buffer = (_unpack_scale(buffer), buffer[extra:]) if extra else (None, buffer)
                    for (tensor, local), part in zip(blocks, torch.split(flat, [local.numel for _, local in blocks])):
                        write(tensor, local, matrix, part.view(local.count, local.run), scale)
            for done in waits:
                done()

        return finish

    def _broadcast(
        self, source: int, numbers: list[int], updates: dict[int, tuple[Tensor, Tensor | None]], write: Write
    ) -> Callable[[], None]:
        """One owner's updates to all ranks; every rank holds these matrices whole."""
        extra = 2 * self.normalize
        sizes = [self.matrices[m].numel + extra for m in numbers]
        if source == self.rank:
            whole = [[Strided(0, self.matrices[m].numel)] for m in numbers]
            parts = [flat for m, inside in zip(numbers, whole) for flat in _packed(*updates[m], inside)]
            buffer = torch.cat(parts).to(self._wire)
        else:
            buffer = self._buffer(sum(sizes), self._wire)
        work = dist.broadcast(buffer, self._global[source], group=self.group, async_op=True)

        def finish() -> None:
            with waiting_for(self._global[source] if source != self.rank else None):
                work.wait()
            if source == self.rank:
                return
            for matrix, flat in zip(numbers, torch.split(buffer.to(self.device), sizes)):
                scale = _unpack_scale(flat[-extra:]) if extra else None
                self._write_own(matrix, flat[: self.matrices[matrix].numel], scale, write)

        return finish

    def _transfer(self, sends: dict[int, Tensor], sizes: dict[int, int], tag: int) -> Callable[[], dict[int, Tensor]]:
        """Posts one message to and from each peer; the result waits and gives what came, by rank."""
        received = {rank: self._buffer(size, self._wire) for rank, size in sorted(sizes.items())}
        sent = {rank: buffer.to(self._wire) for rank, buffer in sorted(sends.items())}
        ops = [dist.P2POp(dist.irecv, b, self._global[r], self.group, tag) for r, b in received.items()]
        ops += [dist.P2POp(dist.isend, b, self._global[r], self.group, tag) for r, b in sent.items()]
        works = dist.batch_isend_irecv(ops) if ops else []
        # NCCL has one piece of work for all; nobody waits for it here but the device.
        peers = [op.peer for op in ops] if len(works) == len(ops) else [None] * len(works)

        def wait() -> dict[int, Tensor]:
            for work, peer in zip(works, peers):
                with waiting_for(peer):
                    work.wait()
            sent.clear()  # held until here: the buffers must outlive the sends
            return {rank: buffer.to(self.device) for rank, buffer in received.items()}

        return wait

    def _buffer(self, size: int, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=device)


def _nothing() -> None:
    pass


def _one_over_rms(update: Tensor) -> Tensor:
    """1 / RMS of one matrix's update, an fp32 scalar; 0 for an update of zeros."""
    rms = update.float().square().mean().sqrt()
    return torch.where(rms > 0, 1 / rms, 0.0)


def _packed(update: Tensor, scale: Tensor | None, inside: Sequence[Strided]) -> list[Tensor]:
    """Parts of a flat update, flat, then its fp32 scale as two bf16 numbers where it has one."""
    parts = [part.view(update).reshape(-1) for part in inside]
    return parts if scale is None else [*parts, scale.view(1).view(torch.bfloat16)]


def _unpack_scale(two: Tensor) -> Tensor:
    # A copy: the two numbers may lie at an odd place, where an fp32 view is refused.
    return two[:2].clone().view(torch.float32)[0]
