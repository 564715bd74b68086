"""Sends shards of each matrix to its owner, orthogonalizes it there, and sends the update back. Knows no engine.

Both directions use bf16 messages, point to point between ranks that share a matrix. Where every rank holds the whole
matrix (stage 0, DDP), nothing is gathered and the update is broadcast. Matrices that have to be sent are grouped in
rounds. While the messages of one round are in flight, matrices that are whole on their owner are orthogonalized::

    gather 0 | local | compute 0, send back 0 | local | compute 1, send back 1 | ... | local
               gather 1 in flight ............ gather 2 in flight ..

Shapes: a matrix is assembled as (rows, cols) in a batch (batch, rows, cols) of equal ones. A message is flat: the parts
of one or more matrices, each a (count, run) block of a `Strided`, one after the other in an order that both sides
derive from the plan (`_Parts`). An update is flat too; where it has a scale of its own (paper, Eq. 6), the two bf16
numbers behind the last element are the bits of that fp32 scale, and it is sent along as one more part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import world_of
from .layout import Block, Matrix, Piece, Strided
from .orthogonalize import NewtonSchulz
from .phases import phase, waiting_for
from .plan import Plan, Route, travels

#: Elements of the matrices of one batch: bounds the iteration's working memory (about 5 times 2 bytes each).
BATCH_ELEMENTS = 32 * 2**20
#: Stands for the receiver of a broadcast.
EVERYONE = -1

#: (tensor number, elements of the tensor, view): fills the (count, run) bf16 view with their direction (momentum,
#: Nesterov).
Read = Callable[[int, Strided, Tensor], None]
#: (tensor number, elements of the tensor, matrix number, update, scale): applies the (count, run) bf16 part of the
#: matrix's update, times its fp32 scale where it has one.
Write = Callable[[int, Strided, int, Tensor, "Tensor | None"], None]

#: What a message holds, in this order: the number of a matrix -> which of its elements.
_Parts = dict[int, tuple[Strided, ...]]
#: By (sender, receiver): those that this rank sends or receives.
_Messages = dict[tuple[int, int], _Parts]
#: Parts of one matrix: its number, which of its elements, and for each part a (count, run) view of a message or update.
_Views = tuple[int, Sequence[Strided], Sequence[Tensor]]
#: For each matrix what was received: (which of its elements, their values).
_Arrived = dict[int, list[tuple[Strided, Tensor]]]
#: Writes one matrix's parts into the views of a message.
_Fill = Callable[[int, Sequence[Strided], Sequence[Tensor]], None]


@dataclass
class _Round:
    """What this rank does in one round.

    Attributes:
        gather: messages to the owners of matrices.
        computed: the matrices that it orthogonalizes once these messages have arrived.
        update: messages from the owners.
        local: batches of matrices that are whole on this rank, orthogonalized while messages are in flight.
    """

    gather: _Messages = field(default_factory=lambda: defaultdict(dict))
    computed: list[int] = field(default_factory=list)
    update: _Messages = field(default_factory=lambda: defaultdict(dict))
    local: list[list[int]] = field(default_factory=list)


@dataclass
class _Transfer:
    """Messages that were posted together: one to and one from each peer, or a broadcast.

    Attributes:
        works: (work handle, its peer's global rank; None where one handle covers all messages).
        sent: buffers that must outlive the sends.
        received: (a message for this rank, filled once all works are done; what it holds).
    """

    works: list[tuple[Any, int | None]]
    sent: list[Tensor]
    received: list[tuple[Tensor, _Parts]]


@dataclass(frozen=True)
class _Run:
    """What this rank holds of one parameter's matrices of a batch, as far as it lies evenly in both.

    Attributes:
        matrix: the number of the first of these matrices; all have its scale.
        tensor: the number of a tensor.
        local: where in the tensor.
        inside: the same elements in the flat batch.
    """

    matrix: int
    tensor: int
    local: Strided
    inside: Strided


class Exchange:
    """Runs a plan on one rank.

    Args:
        matrices: all matrices of the call; the plan's routes are in the same order.
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
        self.matrices, self.group, self.device = matrices, group, device
        self.orthogonalize, self.normalize = orthogonalize, normalize
        self.rank, size = world_of(group)
        self._global = [dist.get_global_rank(group, r) if group is not None else r for r in range(size)]
        # gloo moves CPU memory only; every other backend moves the device's own.
        gloo = size > 1 and device.type != "cpu" and dist.get_backend(group) == "gloo"
        self.wire = torch.device("cpu") if gloo else device
        # By matrix: (the number of a tensor, a block of it), in the order of this rank's parts in the routes.
        self.held: dict[int, list[tuple[int, Block]]] = defaultdict(list)
        for piece in pieces:
            self.held[piece.matrix] += [(piece.tensor, block) for block in piece.blocks]
        #: by batch; equal in every step
        self._runs: dict[tuple[int, ...], list[_Run]] = {}
        self._rounds = [_Round() for _ in range(plan.rounds + 1)]  # in the last one nothing is sent
        local = []
        for number, route in enumerate(plan.routes):
            if travels(route):
                self._add(self._rounds[route.round], number, route)
            elif route.owner == self.rank:
                local.append(number)
        batches, slots = self._batches(local), len(self._rounds)
        for i, this in enumerate(self._rounds):
            this.local = batches[i * len(batches) // slots : (i + 1) * len(batches) // slots]

    def _add(self, into: _Round, number: int, route: Route) -> None:
        owner = route.owner
        if owner == self.rank:
            into.computed.append(number)
        for rank, inside in route.sources:
            if rank != owner and self.rank in (rank, owner):
                into.gather[rank, owner][number] = inside
        for rank, inside in route.holders:
            if rank != owner and self.rank in (rank, owner):
                # Where it is broadcast, `inside` is the same for all of them.
                into.update[owner, EVERYONE if route.everywhere else rank][number] = self._with_scale(number, inside)

    def _with_scale(self, number: int, inside: Iterable[Strided]) -> tuple[Strided, ...]:
        """Parts of an update, its scale among them where it has one."""
        return (*inside, Strided(self.matrices[number].numel, 2)) if self.normalize else tuple(inside)

    def _batches(self, numbers: Iterable[int]) -> list[list[int]]:
        """Matrices of one shape together, up to BATCH_ELEMENTS. `numbers` ascend."""

        def shape(number: int) -> tuple[int, int]:
            return self.matrices[number].rows, self.matrices[number].cols

        batches: list[list[int]] = []
        for (rows, cols), same in groupby(sorted(numbers, key=shape), shape):
            alike, most = list(same), max(BATCH_ELEMENTS // max(rows * cols, 1), 1)
            batches += [alike[i : i + most] for i in range(0, len(alike), most)]
        return batches

    def run(self, read: Read, write: Write) -> None:
        """One step: every shard is read once, every part of the update is written once. Collective over the group."""
        gathering = self._gather(0, read)
        returning: list[_Transfer] = []
        for number, this in enumerate(self._rounds):
            arriving, gathering = gathering, self._gather(number + 1, read)  # the next round's are in flight meanwhile
            for batch in this.local:
                self._write_own(batch, self._compute(batch, read, {}), write)
            arrived: _Arrived = defaultdict(list)
            for matrix, inside, views in self._arrived(arriving):
                arrived[matrix] += zip(inside, views)
            updates: dict[int, Tensor] = {}
            computed = self._batches(this.computed)
            for batch in computed:
                updates |= self._compute(batch, read, arrived)
            sent = self._return(number, updates)
            for batch in computed:
                self._write_own(batch, updates, write)
            self._write(self._arrived(returning), write)  # the updates of the round before
            returning = sent

    def _gather(self, number: int, read: Read) -> list[_Transfer]:
        """Posts a round's messages to the owners."""
        messages = self._rounds[number].gather if number < len(self._rounds) else {}
        return self._post(messages, lambda matrix, _, views: self._read(matrix, views, read), tag=2 * number)

    def _return(self, number: int, updates: Mapping[int, Tensor]) -> list[_Transfer]:
        """Posts a round's updates to their holders."""

        def fill(matrix: int, inside: Sequence[Strided], views: Sequence[Tensor]) -> None:
            for part, view in zip(inside, views):
                view.copy_(part.view(updates[matrix]))

        return self._post(self._rounds[number].update, fill, tag=2 * number + 1)

    def _compute(self, batch: list[int], read: Read, arrived: _Arrived) -> dict[int, Tensor]:
        """Assembles the matrices of a batch from what this rank holds and what arrived; their updates."""
        first = self.matrices[batch[0]]
        x = torch.empty(len(batch), first.rows, first.cols, dtype=torch.bfloat16, device=self.device)
        for run in self._runs_of(batch):
            read(run.tensor, run.local, run.inside.view(x.view(-1)))
        for number, flat in zip(batch, x.view(len(batch), -1)):
            for part, view in arrived.get(number, ()):
                part.view(flat).copy_(view)
        with phase("orthogonalize"):
            updates = [update.reshape(-1) for update in self.orthogonalize(x)]
        if self.normalize:
            updates = [torch.cat([u, _one_over_rms(u).view(1).view(torch.bfloat16)]) for u in updates]
        return dict(zip(batch, updates))

    def _read(self, number: int, views: Iterable[Tensor], read: Read) -> None:
        """Fills in what this rank holds of a matrix."""
        for (tensor, block), view in zip(self.held[number], views):
            read(tensor, block.local, view)

    def _runs_of(self, batch: Sequence[int]) -> list[_Run]:
        """What this rank holds of a batch, in few runs: hundreds of heads would be hundreds of kernels to read."""
        key = tuple(batch)
        if key not in self._runs:
            first, found = self.matrices[batch[0]].numel, []
            for place, number in enumerate(batch):
                for tensor, block in self.held[number]:
                    inside = replace(block.inside, start=block.inside.start + place * first)
                    found.append(_Run(number, tensor, block.local, inside))
            self._runs[key] = self._joined(self._joined(found), apart=True)
        return self._runs[key]

    def _joined(self, runs: Iterable[_Run], apart: bool = False) -> list[_Run]:
        """Neighbours of one parameter as one run where they follow each other; or where all are equally far `apart`."""
        found: list[_Run] = []
        for run in runs:
            last = found[-1] if found else run
            same = found and last.tensor == run.tensor and run.local.count == run.inside.count == 1
            if same and self.matrices[last.matrix].parameter == self.matrices[run.matrix].parameter:
                local, inside = (
                    _continued(a, b, apart) for a, b in ((last.local, run.local), (last.inside, run.inside))
                )
                if local is not None and inside is not None:
                    found[-1] = replace(last, local=local, inside=inside)
                    continue
            found.append(run)
        return found

    def _write_own(self, batch: Sequence[int], updates: Mapping[int, Tensor], write: Write) -> None:
        """Applies to what this rank holds of a batch that it orthogonalized."""
        runs = self._runs_of(batch)
        if self.normalize or len(runs) == sum(len(self.held[number]) for number in batch):
            self._write(self._own({number: updates[number] for number in batch}), write)
            return
        flat = torch.cat([updates[number] for number in batch])
        for run in runs:
            write(run.tensor, run.local, run.matrix, run.inside.view(flat), None)

    def _own(self, updates: Mapping[int, Tensor]) -> Iterator[_Views]:
        """What this rank holds of the matrices that it orthogonalized."""
        for number, update in updates.items():
            inside = self._with_scale(number, [block.inside for _, block in self.held[number]])
            yield number, inside, [part.view(update) for part in inside]

    def _write(self, updates: Iterable[_Views], write: Write) -> None:
        """Applies this rank's parts of updates."""
        for number, _, views in updates:
            # A copy: the scale's two bf16 numbers may not be aligned for an fp32 view.
            scale = views[-1].clone().view(torch.float32)[0, 0] if self.normalize else None
            for (tensor, block), view in zip(self.held[number], views):
                write(tensor, block.local, number, view, scale)

    def _post(self, messages: _Messages, fill: _Fill, tag: int) -> list[_Transfer]:
        """Fills this rank's messages and posts all: broadcasts, sender by sender, then those from and to each peer.

        Returns:
            in the order in which they are waited for: the messages of the peers, the broadcasts.
        """
        receives, sends, received, broadcasts = [], [], [], []
        for (sender, receiver), parts in sorted(messages.items()):
            mine = sender == self.rank
            size = sum(part.numel for inside in parts.values() for part in inside)
            buffer = torch.empty(size, dtype=torch.bfloat16, device=self.device if mine else self.wire)
            if mine:
                for of_matrix in _views(buffer, parts):
                    fill(*of_matrix)
                buffer = buffer.to(self.wire)
            arriving = [] if mine else [(buffer, parts)]
            if receiver == EVERYONE:
                work = dist.broadcast(buffer, self._global[sender], group=self.group, async_op=True)
                broadcasts.append(_Transfer([(work, None if mine else self._global[sender])], [buffer], arriving))
            elif mine:
                sends.append(dist.P2POp(dist.isend, buffer, self._global[receiver], self.group, tag))
            else:
                receives.append(dist.P2POp(dist.irecv, buffer, self._global[sender], self.group, tag))
                received += arriving
        ops = [*receives, *sends]
        works = dist.batch_isend_irecv(ops) if ops else []
        # NCCL returns one handle for all; only the device waits for it, not this process.
        peers = [op.peer for op in ops] if len(works) == len(ops) else [None] * len(works)
        return [_Transfer(list(zip(works, peers)), [op.tensor for op in sends], received), *broadcasts]

    def _arrived(self, transfers: Iterable[_Transfer]) -> Iterator[_Views]:
        """Waits for messages, transfer by transfer."""
        for transfer in transfers:
            for work, peer in transfer.works:
                with waiting_for(peer):
                    work.wait()
            transfer.sent.clear()
            for message, parts in transfer.received:
                yield from _views(message.to(self.device), parts)


def _continued(a: Strided, b: Strided, apart: bool) -> Strided | None:
    """Both as one: a single run, or with `apart` runs of one length; None where they are not. `b` is a single run."""
    if not apart:
        return Strided(a.start, a.run + b.run) if a.count == 1 and a.end == b.start else None
    stride = a.stride if a.count > 1 else b.start - a.start
    fits = a.run == b.run <= stride and b.start == a.start + a.count * stride
    return Strided(a.start, a.run, stride, a.count + 1) if fits else None


def _views(message: Tensor, parts: _Parts) -> Iterator[_Views]:
    """Cuts a message into its parts, matrix by matrix."""
    flats = iter(torch.split(message, [part.numel for inside in parts.values() for part in inside]))
    for number, inside in parts.items():
        yield number, inside, [next(flats).view(part.count, part.run) for part in inside]


def _one_over_rms(update: Tensor) -> Tensor:
    """1 / RMS of one matrix's update, an fp32 scalar; 0 for an update of zeros."""
    rms = update.float().square().mean().sqrt()
    return torch.where(rms > 0, 1 / rms, 0.0)
