"""The calls of the optimizer's step, and which elements each rank holds in them, from sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..core.layout import Matrix, Partition
from ..core.routing import Routing
from ..deepspeed import cuts
from ..deepspeed.cuts import Span


@dataclass(frozen=True)
class PlannedCall:
    """One call of the inner step on the ranks that share its matrices. Groups of ranks with equal shapes are one call.

    Attributes:
        label: its name in the table.
        parameters: for each parameter, how tensor parallelism partitions it.
        matrices: the matrices of these parameters, whole.
        dp: number of ranks over which each TP rank's parameters are sharded.
        held: DP rank -> the elements that it holds of a TP rank's parameters.
        tp: number of TP ranks that share the matrices.
        copies: number of groups of ranks that hold other parameters of equal shapes (expert parallelism).
        padded: elements of state on each rank, padding included; None where there is no padding.
        replicas: whether every rank holds everything (ZeRO stage 0, plain DDP).
        evenly: for ZeRO-3, the size of a rank's part of each parameter, padding included; otherwise empty.
        moment_bytes: of an element of each of AdamW's two moments.
    """

    label: str
    parameters: tuple[Partition, ...]
    matrices: tuple[Matrix, ...]
    dp: int
    held: Callable[[int], Iterable[Span]]
    tp: int = 1
    copies: int = 1
    padded: int | None = None
    replicas: bool = False
    evenly: tuple[int, ...] = ()
    moment_bytes: int = 4

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    @property
    def elements(self) -> int:
        """Of one TP rank."""
        return sum(numel(p) for p in self.parameters)

    def position(self, local: int) -> int:
        """The position of rank `local` of a pipeline stage within its group of ranks for this call."""
        return local % self.tp + self.tp * (local // (self.tp * self.copies) % self.dp)


@dataclass(frozen=True)
class StageModel:
    """The part of a model in pipeline stages that are alike up to the numbers of their layers.

    Attributes:
        numbers: which stages.
        parameters: of one of them, in the engine's order.
        routing: which of them are matrices.
    """

    numbers: tuple[int, ...]
    parameters: tuple[Partition, ...]
    routing: Routing


@dataclass(frozen=True)
class Stage:
    """Pipeline stages that are alike, for a number of ranks: which ones, the ranks of each, and the calls of a step."""

    numbers: tuple[int, ...]
    ranks: int
    calls: tuple[PlannedCall, ...]


@dataclass(frozen=True)
class Zero:
    """The settings of a DeepSpeed config that decide how ZeRO shards."""

    stage: int = 1
    sub_group_size: int = cuts.SUB_GROUP_SIZE
    round_robin: bool = False
    parameter_alignment: bool = False
    element_bytes: int = 2
    moment_bytes: int = 4


def numel(partition: Partition) -> int:
    """Elements that one TP rank holds."""
    return sum(block.local.numel for block in partition.ranks[0])


def zero_calls(
    label: str,
    parameters: Sequence[Partition],
    matrices: Sequence[Matrix],
    zero: Zero,
    dp: int,
    tp: int = 1,
    copies: int = 1,
) -> list[PlannedCall]:
    """The calls for one parameter group, cut as DeepSpeed's ZeRO cuts it (or not, in stage 0).

    Args:
        label: of the group.
        parameters: of the group, in order; all of them for Muon or all for AdamW.
        matrices: of these parameters; none for AdamW.
        zero: how to cut.
        dp, tp, copies: see `PlannedCall`.
    """
    everything = [Span(number, 0, numel(p)) for number, p in enumerate(parameters)]
    whole = PlannedCall(
        label,
        tuple(parameters),
        tuple(matrices),
        dp,
        held=lambda rank: everything,
        tp=tp,
        copies=copies,
        padded=sum(span.length for span in everything),
        replicas=True,
        moment_bytes=zero.moment_bytes,
    )
    if zero.stage == 0:
        return [whole]
    if zero.stage == 3:
        return list(_stage_3(whole, zero))
    return [_stages_1_and_2(whole, zero)]


def _stages_1_and_2(whole: PlannedCall, zero: Zero) -> PlannedCall:
    """The group's parameters one after the other, in equal parts."""
    order = cuts.round_robin(len(whole.parameters), whole.dp) if zero.round_robin else range(len(whole.parameters))
    parameters = tuple(whole.parameters[number] for number in order)
    sizes = [numel(p) for p in parameters]
    offsets = cuts.offsets_of(sizes, cuts.gaps_for(sizes, zero.element_bytes) if zero.parameter_alignment else None)
    part = cuts.part_of_flat(offsets[-1], whole.dp)

    def held(rank: int) -> Iterator[Span]:
        return cuts.in_part(sizes, offsets, rank * part, part)

    return replace(whole, parameters=parameters, held=held, padded=part, replicas=False)


def _stage_3(whole: PlannedCall, zero: Zero) -> Iterator[PlannedCall]:
    """Each parameter in equal parts; a call for each sub-group of parameters."""
    parts = [-(-numel(p) // whole.dp) for p in whole.parameters]
    groups = cuts.sub_groups(parts, zero.sub_group_size)
    for number, group in enumerate(groups):
        parameters, evenly = tuple(whole.parameters[i] for i in group), tuple(parts[i] for i in group)
        names = {p.name for p in parameters}
        yield replace(
            whole,
            label=f"{whole.label}, sub-group {number}" if len(groups) > 1 else whole.label,
            parameters=parameters,
            matrices=tuple(m for m in whole.matrices if m.parameter in names),
            held=partial(cuts.in_sub_group, [numel(p) for p in parameters], evenly),
            padded=sum(evenly),
            replicas=False,
            evenly=evenly,
        )
