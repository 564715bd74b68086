"""Sends shards of each matrix to its owner, orthogonalizes it there, and sends the update back. Knows no engine.

Both directions use bf16 messages. Where every rank holds the whole matrix (stage 0, DDP), nothing is gathered and the
update is broadcast. Matrices that have to be sent are grouped in rounds. While the messages of one round are in flight,
matrices that are whole on their owner are orthogonalized::

    gather 0 | local | compute 0, send back 0 | local | compute 1, send back 1 | ... | local
               gather 1 in flight ............ gather 2 in flight ..

Several exchanges can run in turns (`in_turns`): while the messages of one are in flight, another computes.

Shapes: a matrix is assembled as (rows, cols) in a batch (batch, rows, cols) of equal ones. Messages and updates are
flat (`messages`); what this rank's tensors have of a flat buffer are `Run`s, which are found once. Where an update has
a scale of its own (paper, Eq. 6), its owner computes it in fp32 and sends it along.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .elementwise import Run, copy
from .layout import Block, Matrix, Piece, Strided
from .messages import SCALAR, Leg, Part, Transfer, Wire, legs
from .orthogonalize import NewtonSchulz
from .phases import phase
from .plan import Plan, Route, travels

#: Elements of the matrices of one batch: bounds the iteration's working memory (about 5 times 2 bytes each).
BATCH_ELEMENTS = 32 * 2**20

#: Goes on at each `next`, to where it would wait for messages.
Turns = Iterator[None]
#: (runs, buffer): fills runs of a flat bf16 buffer with their directions (momentum, Nesterov).
Read = Callable[[Sequence[Run], Tensor], None]
#: (runs, buffer, factors): applies the updates in runs of a flat bf16 buffer; times the fp32 factors of the matrices,
#: by their numbers, where updates have one.
Write = Callable[[Sequence[Run], Tensor, "Mapping[int, Tensor] | None"], None]


@dataclass(frozen=True)
class _Round:
    """What this rank does in one round.

    Attributes:
        gather: directions, to the owners of matrices.
        read: what of its tensors it sends.
        computed: the matrices that it orthogonalizes once these messages have arrived.
        update: updates, from the owners.
        written: for each of these legs, what of its tensors it receives.
        local: batches of matrices that are whole on this rank, orthogonalized while messages are in flight.
    """

    gather: Leg | None = None
    read: tuple[Run, ...] = ()
    computed: tuple[int, ...] = ()
    update: tuple[Leg, ...] = ()
    written: tuple[tuple[Run, ...], ...] = ()
    local: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class _Updates:
    """Of the matrices of a batch.

    Attributes:
        each: by number, flat.
        whole: all of them as one flat tensor, where they were computed as one.
        factors: the scale of each that is normalized.
    """

    each: Mapping[int, Tensor]
    whole: Tensor | None
    factors: Mapping[int, Tensor] | None


def in_turns(running: Iterable[Turns]) -> Turns:
    """Advances several in turns, until all have ended."""
    left = list(running)
    while left:
        left = [each for each in left if next(each, left) is None]
        yield


def ended(turns: Turns) -> None:
    """Runs it to its end."""
    for _ in turns:
        pass


class Exchange:
    """Runs a plan on one rank. Constructing one is collective over the group.

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
        self.matrices, self.device, self.wire = matrices, device, Wire(group, device)
        self.orthogonalize, self.normalize = orthogonalize, normalize
        # By matrix: (the number of a tensor, a block of it), in the order of this rank's parts in the routes.
        self.held: dict[int, list[tuple[int, Block]]] = defaultdict(list)
        for piece in pieces:
            self.held[piece.matrix] += [(piece.tensor, block) for block in piece.blocks]
        #: by batch; equal in every step
        self._found: dict[tuple[int, ...], tuple[tuple[Run, ...], tuple[Run, ...]]] = {}
        of_round: list[list[tuple[int, Route]]] = [[] for _ in range(plan.rounds)]
        local = []
        for number, route in enumerate(plan.routes):
            if travels(route):
                of_round[route.round].append((number, route))
            elif route.owner == self.wire.rank:
                local.append(number)
        self._rounds = [self._round(routes) for routes in of_round] + [_Round()]  # in the last one nothing is sent
        batches, slots = self._batches(local), len(self._rounds)
        for i, this in enumerate(self._rounds):
            some = batches[i * len(batches) // slots : (i + 1) * len(batches) // slots]
            self._rounds[i] = replace(this, local=tuple(some))
        computed = [*local, *(number for this in self._rounds for number in this.computed)]
        read = sum(run.at.numel for this in self._rounds for run in this.read)
        read += sum(block.local.numel for number in computed for _, block in self.held[number])
        #: whether a step reads each element of this rank's pieces: replicas of a matrix are read on its owner
        self.reads_all = read == sum(block.local.numel for parts in self.held.values() for _, block in parts)
        self.wire.connect(leg for this in self._rounds for leg in (this.gather, *this.update) if leg is not None)

    def _round(self, routes: Sequence[tuple[int, Route]]) -> _Round:
        gather, update = legs(routes, self.wire.rank, self.wire.size, self.normalize)
        return _Round(
            gather,
            tuple(self._joined(self._runs(gather.sent.parts))),
            tuple(number for number, route in routes if route.owner == self.wire.rank),
            tuple(update),
            tuple(tuple(self._joined(self._runs(leg.received.parts), written=True)) for leg in update),
        )

    def _batches(self, numbers: Iterable[int]) -> list[tuple[int, ...]]:
        """Matrices of one shape together, up to BATCH_ELEMENTS. `numbers` ascend."""

        def shape(number: int) -> tuple[int, int]:
            return self.matrices[number].rows, self.matrices[number].cols

        batches: list[tuple[int, ...]] = []
        for (rows, cols), same in groupby(sorted(numbers, key=shape), shape):
            alike, most = tuple(same), max(BATCH_ELEMENTS // max(rows * cols, 1), 1)
            batches += [alike[i : i + most] for i in range(0, len(alike), most)]
        return batches

    def run(self, read: Read, write: Write) -> Turns:
        """One step: every shard is read once, every part of the update is written once. Collective over the group.

        A message is posted in an earlier turn than the one that waits for it. So exchanges of several groups that all
        ranks run in the same order never wait for each other in a circle.
        """
        gathering = self._gather(0, read)
        yield
        returning: list[tuple[Leg, tuple[Run, ...], Transfer]] = []
        for number, this in enumerate(self._rounds):
            arriving, gathering = gathering, self._gather(number + 1, read)  # the next round's are in flight meanwhile
            for batch in this.local:
                self._write_own(self._compute(batch, read), write)
            yield
            directions = None if arriving is None else self.wire.arrived(arriving)
            computed = [self._compute(batch, read, this.gather, directions) for batch in self._batches(this.computed)]
            sent = self._return(number, computed)
            for updates in computed:
                self._write_own(updates, write)
            for leg, runs, transfer in returning:  # of the round before
                arrived = self.wire.arrived(transfer)
                if runs:
                    write(runs, arrived, self._factors(leg, arrived))
            returning = sent

    def _gather(self, number: int, read: Read) -> Transfer | None:
        """Posts a round's directions to the owners."""
        this = self._rounds[number] if number < len(self._rounds) else _Round()
        if this.gather is None or this.gather.idle:
            return None
        sent = torch.empty(this.gather.sent.numel, dtype=torch.bfloat16, device=self.device)
        read(this.read, sent)
        return self.wire.post(this.gather, sent, tag=2 * number)

    def _return(self, number: int, computed: Iterable[_Updates]) -> list[tuple[Leg, tuple[Run, ...], Transfer]]:
        """Posts a round's updates to their holders."""
        updates = {number: update for of in computed for number, update in of.each.items()}
        factors = {number: factor for of in computed for number, factor in (of.factors or {}).items()}
        posted = []
        for leg, runs in zip(self._rounds[number].update, self._rounds[number].written):
            if not leg.idle:
                sent = torch.empty(leg.sent.numel, dtype=torch.bfloat16, device=self.device)
                copy((part.at.view(sent), part.inside.view(updates[part.matrix])) for part in leg.sent.parts)
                for matrix, start in leg.sent.scalars:
                    sent[start : start + SCALAR].copy_(factors[matrix].view(1).view(torch.bfloat16))
                posted.append((leg, runs, self.wire.post(leg, sent, tag=2 * number + 1)))
        return posted

    def _factors(self, leg: Leg, received: Tensor) -> dict[int, Tensor] | None:
        """The scales that came with updates."""
        if not self.normalize:
            return None
        # A copy: two bf16 numbers may not be aligned for an fp32 view.
        return {n: received[at : at + SCALAR].clone().view(torch.float32)[0] for n, at in leg.received.scalars}

    def _compute(
        self, batch: tuple[int, ...], read: Read, leg: Leg | None = None, directions: Tensor | None = None
    ) -> _Updates:
        """Assembles the matrices of a batch from what this rank holds and what arrived; their updates."""
        first = self.matrices[batch[0]]
        x = torch.empty(len(batch), first.rows, first.cols, dtype=torch.bfloat16, device=self.device)
        read(self._runs_of(batch)[0], x.view(-1))
        if leg is not None and directions is not None:
            flats = dict(zip(batch, x.view(len(batch), -1)))
            arrived = [part for part in leg.received.parts if part.matrix in flats]
            copy((part.inside.view(flats[part.matrix]), part.at.view(directions)) for part in arrived)
        with phase("orthogonalize"):
            found = self.orthogonalize(x)
        whole = found.reshape(-1) if isinstance(found, Tensor) else None
        each = [update.reshape(-1) for update in found] if whole is None else list(whole.view(len(batch), -1))
        factors = {n: _one_over_rms(u) for n, u in zip(batch, each)} if self.normalize else None
        return _Updates(dict(zip(batch, each)), whole, factors)

    def _write_own(self, updates: _Updates, write: Write) -> None:
        """Applies to what this rank holds of a batch that it orthogonalized."""
        batch = tuple(updates.each)
        runs, whole = self._runs_of(batch)[1], updates.whole
        if whole is None and len(runs) == sum(len(self.held[number]) for number in batch):
            for number, update in updates.each.items():
                write(self._runs_of((number,))[1], update, updates.factors)
        elif runs:
            write(runs, torch.cat(list(updates.each.values())) if whole is None else whole, updates.factors)

    def _runs(self, parts: Iterable[Part]) -> Iterator[Run]:
        """What this rank holds of the parts of a buffer, which are in the order of `held` for each matrix."""
        seen = Counter[int]()
        for part in parts:
            tensor, block = self.held[part.matrix][seen[part.matrix]]
            seen[part.matrix] += 1
            yield Run(part.matrix, tensor, block.local, part.at)

    def _runs_of(self, batch: tuple[int, ...]) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
        """What this rank holds of a flat batch: as it is read, and as it is written."""
        if batch not in self._found:
            numel = self.matrices[batch[0]].numel
            found = [
                Run(number, tensor, block.local, block.inside._replace(start=block.inside.start + place * numel))
                for place, number in enumerate(batch)
                for tensor, block in self.held[number]
            ]
            self._found[batch] = tuple(self._joined(found)), tuple(self._joined(found, written=True))
        return self._found[batch]

    def _joined(self, runs: Iterable[Run], written: bool = False) -> list[Run]:
        """The same in few runs: hundreds of heads would be hundreds of kernels. Neighbours become one run, then those
        that are equally far apart."""
        for apart in (False, True):
            runs = self._joined_once(runs, written, apart)
        return list(runs)

    def _joined_once(self, runs: Iterable[Run], written: bool, apart: bool) -> list[Run]:
        found: list[Run] = []
        for run in runs:
            last = found[-1] if found else None
            if last is not None and last.tensor == run.tensor and run.local.count == run.at.count == 1:
                local = _continued(last.local, run.local, apart)
                at = None if local is None else _continued(last.at, run.at, apart)
                alike = at is not None and (not written or self._written_alike(last.matrix, run.matrix))
                if local is not None and at is not None and alike:
                    found[-1] = Run(last.matrix, last.tensor, local, at)
                    continue
            found.append(run)
        return found

    def _written_alike(self, a: int, b: int) -> bool:
        """Whether both matrices are of one parameter and have one scale."""
        one, other = self.matrices[a], self.matrices[b]
        same = one.parameter == other.parameter and one.out_in == other.out_in
        return a == b or (same and not self.normalize)


def _continued(a: Strided, b: Strided, apart: bool) -> Strided | None:
    """Both as one: a single run, or with `apart` runs of one length; None where they are not. `b` is a single run."""
    if not apart:
        return Strided(a.start, a.run + b.run) if a.count == 1 and a.start + a.run == b.start else None
    if a.run != b.run:
        return None
    stride = a.stride if a.count > 1 else b.start - a.start
    fits = b.run <= stride and b.start == a.start + a.count * stride
    return Strided(a.start, a.run, stride, a.count + 1) if fits else None


def _one_over_rms(update: Tensor) -> Tensor:
    """1 / RMS of one matrix's update, an fp32 scalar; 0 for an update of zeros."""
    rms = update.float().square().mean().sqrt()
    return torch.where(rms > 0, 1 / rms, 0.0)
