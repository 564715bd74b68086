"""Who holds what: the calls of the optimizer's step and the ranges that each rank holds, from sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from ..core.layout import Matrix
from ..deepspeed import cuts
from ..megatron.routing import Parameter

#: (number of the parameter, start, end): elements of the TP rank's flattened part of it.
Held = tuple[int, int, int]


@dataclass(frozen=True)
class Call:
    """One call of the inner step on the ranks that share its matrices. Ranks that hold equal shapes are one Call.

    Attributes:
        label: what it steps.
        parameters: as a TP rank holds them.
        matrices: those that are cut from them, whole.
        dp: how many ranks cut each TP rank's parameters between them.
        held: what each of these holds.
        tp: TP ranks that share the matrices.
        copies: as many groups of ranks hold other parameters of equal shapes (expert parallelism).
        padded: elements of state on each rank, where padding adds to what it holds.
        replicas: every rank holds everything (ZeRO stage 0, plain DDP).
        evenly: stage 3: elements of each rank's part of each parameter.
    """

    label: str
    parameters: tuple[Parameter, ...]
    matrices: tuple[Matrix, ...]
    dp: int
    held: Callable[[int], Iterable[Held]]
    tp: int = 1
    copies: int = 1
    padded: int | None = None
    replicas: bool = False
    evenly: tuple[int, ...] = ()

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    @property
    def elements(self) -> int:
        """Of one TP rank."""
        return sum(numel(p) for p in self.parameters)

    def position(self, local: int) -> int:
        """Where the rank `local` of a pipeline stage stands among the ranks of its group of this call."""
        return local % self.tp + self.tp * (local // (self.tp * self.copies) % self.dp)


@dataclass(frozen=True)
class Stage:
    """Pipeline stages that are alike: which ones, the ranks of each, and the calls of a step."""

    numbers: tuple[int, ...]
    ranks: int
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed config decides the cut."""

    stage: int = 1
    sub_group_size: int = cuts.SUB_GROUP_SIZE
    round_robin: bool = False
    parameter_alignment: bool = False
    element_bytes: int = 2


def numel(parameter: Parameter) -> int:
    """Elements that one TP rank holds."""
    return parameter.batch * parameter.rows * parameter.cols


def zero_calls(
    label: str,
    parameters: Sequence[Parameter],
    matrices: Sequence[Matrix],
    zero: Zero,
    dp: int,
    tp: int = 1,
    copies: int = 1,
) -> Iterator[Call]:
    """The calls for one parameter group, cut as DeepSpeed's ZeRO cuts it (or not, in stage 0).

    Args:
        label: of the group.
        parameters: of the group, in order; all of them for Muon or all for AdamW.
        matrices: of these parameters; none for AdamW.
        zero: how to cut.
        dp, tp, copies: see `Call`.
    """
    if zero.stage == 3:
        parts = [-(-numel(p) // dp) for p in parameters]
        groups = cuts.sub_groups(parts, zero.sub_group_size)
        for number, group in enumerate(groups):
            mine, of_mine = tuple(parameters[i] for i in group), tuple(parts[i] for i in group)
            names = {p.name for p in mine}
            yield Call(
                f"{label}, sub-group {number}" if len(groups) > 1 else label,
                mine,
                tuple(m for m in matrices if m.parameter in names),
                dp,
                partial(_stage_3, [numel(p) for p in mine], of_mine),
                tp,
                copies,
                sum(of_mine),
                evenly=of_mine,
            )
        return
    if zero.round_robin and zero.stage > 0:
        parameters = [parameters[i] for i in cuts.round_robin(len(parameters), dp)]
    sizes = [numel(p) for p in parameters]
    if zero.stage == 0:
        held: Callable[[int], Iterable[Held]] = partial(_stage_0, [(i, 0, size) for i, size in enumerate(sizes)])
        padded = sum(sizes)
    else:
        gaps = cuts.gaps_for(sizes, zero.element_bytes) if zero.parameter_alignment else None
        offsets = cuts.offsets_of(sizes, gaps)
        padded = cuts.part_of_flat(offsets[-1], dp)
        held = partial(_stages_1_and_2, sizes, offsets, padded)
    yield Call(label, tuple(parameters), tuple(matrices), dp, held, tp, copies, padded, replicas=zero.stage == 0)


def _stage_0(everything: Sequence[Held], rank: int) -> Sequence[Held]:
    return everything


def _stage_3(sizes: Sequence[int], parts: Sequence[int], rank: int) -> Iterator[Held]:
    return ((r.number, r.start, r.start + r.length) for r in cuts.in_sub_group(sizes, parts, rank))


def _stages_1_and_2(sizes: Sequence[int], offsets: Sequence[int], part: int, rank: int) -> Iterator[Held]:
    return ((r.number, r.start, r.start + r.length) for r in cuts.in_part(sizes, offsets, rank * part, part))
