"""What starting the optimizer costs one rank of thousands: seconds, bytes and memory. No other rank runs.

The rank's own code really runs: the model is routed, shards are published, the plan is made, the exchange lists what
this rank sends and receives, the state is created (on the meta device). What the other ranks would say in each
collective is known from the planned calls. The engine's own start is not in it.
"""

from __future__ import annotations

import gc
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core import holders, proof
from ..core.agreement import gather
from ..core.call import Call
from ..core.groups import Host
from ..core.layout import Matrix, by_parameter
from ..core.muon import Muon
from ..core.orthogonalize import NewtonSchulz
from ..core.process_groups import runs_of
from ..core.routing import Routing
from ..core.update import Update
from .calls import PlannedCall
from .counts import META, as_rank, shards_of


@dataclass
class Start:
    """What a start costs.

    Attributes:
        seconds: of one core.
        routing: of these, to decide about the parameters, which takes as long on one rank as on thousands.
        received: bytes that this rank receives in collectives. It sends as many, as they are rings.
        largest: of these, those of the largest collective.
        collectives: how many.
        memory: bytes at the most, beside what was there before.
    """

    seconds: float = 0.0
    routing: float = 0.0
    received: int = 0
    largest: int = 0
    collectives: int = 0
    memory: int = 0

    def add(self, received: int) -> None:
        self.received += received
        self.largest = max(self.largest, received)
        self.collectives += 1


@dataclass(frozen=True)
class Answers:
    """What all ranks give in one `holders.publish`.

    Attributes:
        most: the largest values of its two vectors.
        rows: of every rank.
    """

    most: tuple[Tensor, Tensor]
    rows: tuple[Tensor, ...]

    @staticmethod
    def of(call: PlannedCall, matrices: Sequence[Matrix]) -> Answers:
        """Where `matrices` are published."""
        names = list(by_parameter(matrices))
        if call.tp == 1 and (call.replicas or call.evenly):
            length_of = dict(_held(call, 0))
            lengths = torch.tensor([length_of.get(name, 0) for name in names])
            return Answers((lengths, torch.zeros_like(lengths)), (torch.empty(0, 5, dtype=torch.int64),) * call.ranks)
        length_of = {}
        for rank in range(call.dp):
            for name, length in _held(call, rank):
                length_of[name] = max(length_of.get(name, 0), length)
        lengths = torch.tensor([length_of.get(name, 0) for name in names])
        kept = [matrix for matrix in matrices if matrix.parameter in length_of]
        rows = tuple(holders.rows(kept, shards_of(call, rank, set(length_of))) for rank in range(call.ranks))
        return Answers((lengths, (lengths > 0).long()), rows)


def _held(call: PlannedCall, dp: int) -> Iterator[tuple[str, int]]:
    return ((call.parameters[span.number].name, span.length) for span in call.held(dp))


class _Others:
    """All other ranks, in the collectives of `agreement`."""

    def __init__(self, size: int, answers: Sequence[Answers], found: Start) -> None:
        self._size, self._found = size, found
        self._vectors = iter([vector for each in answers for vector in each.most])
        self._rows = iter([each.rows for each in answers])

    def all_gather_object(self, into: list[Any], value: Any, group: Any = None) -> None:
        """Where nothing is wrong, every rank says the same."""
        sent = pickle.dumps(value)
        into[:] = [pickle.loads(sent) for _ in into]
        self._found.add(len(into) * (8 + len(sent)))

    def largest(self, tensor: Tensor, group: Any) -> None:
        found = next(self._vectors)
        if bool((tensor > found).any()):
            raise ValueError("this rank holds more than the planned calls say")
        tensor.copy_(found)
        self._found.add(2 * tensor.nbytes)

    def gather_rows(self, rows: Tensor, group: Any) -> list[Tensor]:
        found = list(next(self._rows))
        if not torch.equal(found[dist.get_rank()], rows):
            raise ValueError("this rank holds other parts than the planned calls say")
        self._found.add(self._size * 8)
        padded = self._size * max(map(len, found)) * rows.shape[1] * rows.element_size()
        if padded:
            self._found.add(padded)
            torch.empty(padded, dtype=torch.uint8).fill_(1)  # what is received
        return found


@contextmanager
def _among(rank: int, size: int, answers: Sequence[Answers], found: Start) -> Iterator[None]:
    others = _Others(size, answers, found)
    with (
        as_rank(rank, size),
        mock.patch.object(dist, "all_gather_object", others.all_gather_object),
        mock.patch.object(holders, "largest", others.largest),
        mock.patch.object(holders, "gather_rows", others.gather_rows),
        mock.patch.object(holders, "wire_of", return_value=torch.device("cpu")),  # tensors on meta have no values
    ):
        yield


def _measured(found: Start, work: Callable[[], Any]) -> Any:
    gc.collect()
    before = _resident(reset=True)
    begin = time.process_time()
    result = work()
    found.seconds += time.process_time() - begin
    found.memory = max(found.memory, _resident() - before)
    return result


def _resident(reset: bool = False) -> int:
    """The most bytes of memory that this process has had, since the last `reset`."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        (kibibytes,) = (line.split()[1] for line in file if line.startswith("VmHWM"))
    return int(kibibytes) * 1024


def under_zero(calls: Sequence[PlannedCall], routing: Routing, rank: int, **settings: Any) -> tuple[Start, Muon]:
    """`Muon` built, and attached to these calls, as under DeepSpeed.

    Args:
        calls: of one pipeline stage: those of matrices before those of the rest.
        routing: of their parameters.
        rank: of all calls' ranks, which are the same.
        settings: Muon's.
    """
    whole = proof.whole(routing.shapes)
    answers = [Answers.of(call, routing.matrices if call.matrices else whole) for call in calls]
    parameters = [(name, nn.Parameter(torch.empty(shape, device=META))) for name, shape in routing.shapes.items()]
    found = Start()
    torch.optim.SGD([torch.zeros(1)], 0.1)  # with its first optimizer, torch imports its compiler

    def start() -> Muon:
        begin = time.process_time()
        muon = Muon(parameters, host=Host(), **settings)
        found.routing = time.process_time() - begin
        held = []
        for call in calls:
            shards = shards_of(call, rank, {p.name for p in call.parameters})
            tensors = tuple({id(shard.tensor): shard.tensor for shard in shards}.values())
            held.append(Call(int(not call.matrices), tensors, tuple(shards)))
        muon.attach(held, META)
        return muon

    with _among(rank, calls[0].ranks, answers, found):
        return found, _measured(found, start)


def under_megatron(
    calls: Sequence[PlannedCall], routing: Routing, rank: int, world: int, newton_schulz: NewtonSchulz
) -> tuple[Start, list[Update]]:
    """An `Update` and the proof for each of Megatron's optimizers, which hold matrices and the rest.

    And what `joint_groups` sends where tensor parallel ranks share matrices; making the groups is torch's.

    Args:
        calls: of one pipeline stage, a call for each optimizer.
        routing: of their parameters.
        rank: of the stage's ranks.
        world: ranks of all stages.
        newton_schulz: the iteration.
    """
    found, updates, muon = Start(), [], {matrix.parameter for matrix in routing.matrices}
    lacking = [runs_of(range(call.ranks)) for call in calls if call.tp > 1]  # consecutive ranks, as Megatron's are
    with _among(rank, world, (), found):
        _measured(found, lambda: gather(lacking, None))
    for call in calls:
        mine = call.position(rank)
        answers = [Answers.of(call, routing.matrices), Answers.of(call, proof.whole(routing.shapes))]

        def start(call: PlannedCall = call, mine: int = mine) -> Update:
            shards = shards_of(call, mine, {p.name for p in call.parameters})
            matrices = [shard for shard in shards if shard.parameter in muon]
            update = Update(routing.matrices, matrices, None, META, newton_schulz.on(META), lambda _: 0.5)
            tensors = tuple({id(shard.tensor): shard.tensor for shard in shards}.values())
            proof.held(Call(0, tensors, tuple(shards)), routing.shapes, META)
            return update

        with _among(mine, call.ranks, answers, found):
            updates.append(_measured(found, start))
    return found, updates
