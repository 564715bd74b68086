"""Finds this rank's shards in DeepSpeed's optimizer wrappers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from ..core.call import Call
from ..core.layout import Partition, Shard, cut_shards, lies_in
from ..core.process_groups import joint_groups
from . import cuts
from .host import whole_shape

Names = Mapping[Tensor, str]


class Zero12(Protocol):
    """Attributes used of the wrapper of ZeRO stages 1 and 2 (`DeepSpeedZeroOptimizer`), each by parameter group."""

    round_robin_bit16_groups: Sequence[Sequence[Tensor]]
    bit16_groups_flat: Sequence[Tensor]
    parallel_partitioned_bit16_groups: Sequence[Sequence[Tensor]]
    single_partition_of_fp32_groups: Sequence[Tensor]
    partition_size: Sequence[int]
    real_dp_process_group: Sequence[Any]


class Bf16(Protocol):
    """Attributes used of the wrapper of bf16 with fp32 gradients (`BF16_Optimizer`), each by parameter group."""

    bf16_groups: Sequence[Sequence[Tensor]]
    bf16_groups_flat: Sequence[Tensor]
    bf16_partitioned_groups: Sequence[Sequence[Tensor]]
    fp32_groups_flat_partition: Sequence[Tensor]
    real_dp_process_group: Sequence[Any]


class Zero3(Protocol):
    """Attributes used of the wrapper of ZeRO stage 3 (`DeepSpeedZeroOptimizer_Stage3`), each by sub-group."""

    fp16_groups: Sequence[Sequence[Any]]
    fp16_partitioned_groups_flat: Sequence[Tensor | None]
    fp32_partitioned_groups_flat: Sequence[Tensor]
    sub_group_to_group_id: Mapping[int, int]
    dp_process_group: Any


def calls(engine: Any, names: Names) -> list[Call]:
    """The calls of the inner step that the engine's wrapper will make.

    Their shards and process groups cover only this TP rank's part of each parameter; `holdings` extends them to the
    whole parameter.

    Where DeepSpeed's tables say that a parameter lies is compared with where it lies in memory, so that a release with
    another layout raises an error here and does not cause a wrong update later.

    Args:
        engine: DeepSpeed's, with its wrapper built.
        names: parameter -> its name.

    Raises:
        ValueError: for an unsupported wrapper, one that holds other parameters, or a parameter that does not lie where
            its tables say.
    """
    wrapper = engine.optimizer
    kind = type(wrapper).__name__
    _check_count(engine, names)
    if isinstance(getattr(wrapper, "fp16_partitioned_groups_flat", None), list):
        return [_zero_3(wrapper, number, names) for number in range(len(wrapper.fp16_groups))]
    groups = engine.basic_optimizer.param_groups
    numbers = range(len(groups))
    if wrapper is engine.basic_optimizer:
        held = [_whole(zip(group["params"], group["params"]), names) for group in groups]
    elif kind == "FP16_UnfusedOptimizer":
        pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        held = [_whole(zip(low, master, strict=True), names) for low, master in pairs]
    elif kind == "DeepSpeedZeroOptimizer":
        held = [_zero_1_and_2(wrapper, number, names) for number in numbers]
    elif kind == "BF16_Optimizer":
        held = [_bf16(wrapper, number, names) for number in numbers]
    else:
        raise ValueError(f"DeepSpeed built a {kind} around Muon; supported: ZeRO stages 0 to 3 in fp32, bf16, fp16")
    process_groups = getattr(wrapper, "real_dp_process_group", None) or [_replicas(engine, group) for group in groups]
    return [
        Call(number, tuple(group["params"]), tuple(shards), process_group)
        for number, group, shards, process_group in zip(numbers, groups, held, process_groups, strict=True)
    ]


def _check_count(engine: Any, names: Names) -> None:
    """Compares the parameters of which Muon knows with those that the engine's wrapper has, one by one.

    Raises:
        ValueError: with both numbers of elements, for the first that only one of them has, or that is there twice.
    """
    attributes = ("bit16_groups", "bf16_groups", "fp16_groups")
    groups = next((found for name in attributes if (found := getattr(engine.optimizer, name, None)) is not None), None)
    if groups is None:
        groups = [group["params"] for group in engine.basic_optimizer.param_groups]
    theirs = [p for group in groups for p in group]
    ours = [p for p in names if _numel(p)]  # DeepSpeed leaves out empty ones
    differing = [p for p, count in Counter([*theirs, *ours]).items() if count != 2 and _numel(p)]
    if differing:
        counts = [sum(map(_numel, parameters)) for parameters in (theirs, ours)]
        raise ValueError(
            f"DeepSpeed's optimizer holds {counts[0]:,} elements, Muon's table {counts[1]:,}; "
            f"{names.get(differing[0], 'a parameter without a name')} {list(whole_shape(differing[0]))} is not once in "
            "both. Please report the release and the config"
        )


def _numel(p: Any) -> int:
    """Of the parameter before ZeRO-3 cut it."""
    return int(getattr(p, "ds_numel", p.numel()))


def _replicas(engine: Any, group: Mapping[str, Any]) -> Any:
    """Without ZeRO: the ranks that hold the same parameters."""
    return engine.expert_data_parallel_group[group["name"]] if group.get("moe") else engine.seq_data_parallel_group


def holdings(found: Sequence[Call], partitions: Mapping[str, Partition], tp: Any, ranks: Any) -> list[Call]:
    """The same calls with shards of whole parameters, and the ranks over which these are sharded. Collective.

    Args:
        found: what `calls` found.
        partitions: name -> how tensor parallelism partitions the parameter.
        tp: the TP group of this rank, or None.
        ranks: all of the engine.
    """
    process_groups = [call.process_group for call in found]
    if tp is not None and dist.get_world_size(tp) > 1:
        process_groups = joint_groups([(group, tp) for group in process_groups], ranks)
    rank = 0 if tp is None else dist.get_rank(tp)

    def whole(shards: Iterable[Shard]) -> tuple[Shard, ...]:
        return tuple(whole for shard in shards for whole in cut_shards(partitions[shard.parameter], rank, shard))

    return [
        replace(call, shards=whole(call.shards), process_group=process_group)
        for call, process_group in zip(found, process_groups)
    ]


def _whole(pairs: Iterable[tuple[Tensor, Tensor]], names: Names) -> list[Shard]:
    """No ZeRO: every rank holds every parameter, or its fp32 copy, whole."""
    return [Shard.of_range(names[p], 0, p.numel(), master) for p, master in pairs]


def _zero_1_and_2(zero: Zero12, group: int, names: Names) -> list[Shard]:
    """A group's parameters one after the other (in round-robin order if that is on), padded, cut in equal parts."""
    # `parameter_alignment` (from 0.19) puts padding between parameters; before, there is none and no such table.
    gaps = getattr(zero, "round_robin_bit16_padding", None)
    rank = dist.get_rank(zero.real_dp_process_group[group])
    flat = _Flat(
        zero.round_robin_bit16_groups[group],
        gaps[group] if gaps else None,
        zero.bit16_groups_flat[group],
        zero.parallel_partitioned_bit16_groups[group][rank],
        rank * int(zero.partition_size[group]),
        zero.single_partition_of_fp32_groups[group],
    )
    return flat.shards(names)


def _bf16(bf16: Bf16, group: int, names: Names) -> list[Shard]:
    """The bf16 wrapper with fp32 gradients: ZeRO-1's cut without padding between parameters."""
    rank = dist.get_rank(bf16.real_dp_process_group[group])
    master = bf16.fp32_groups_flat_partition[group]
    flat = _Flat(
        bf16.bf16_groups[group],
        None,
        bf16.bf16_groups_flat[group],
        bf16.bf16_partitioned_groups[group][rank],
        rank * master.numel(),
        master,
    )
    return flat.shards(names)


@dataclass(frozen=True)
class _Flat:
    """A flat group of stages 1 and 2.

    Attributes:
        parameters, gaps: in the order in which they lie in it, and the padding after each.
        whole: the tensor of which the parameters are views.
        part: this rank's part of it, from `begin` on, of which `master` is a copy in fp32.
    """

    parameters: Sequence[Tensor]
    gaps: Sequence[int] | None
    whole: Tensor
    part: Tensor
    begin: int
    master: Tensor

    def shards(self, names: Names) -> list[Shard]:
        """The part of each parameter that falls into this rank's part."""
        sizes = [p.numel() for p in self.parameters]
        offsets = cuts.offsets_of(sizes, self.gaps)
        for p, offset in zip(self.parameters, offsets):
            _require(lies_in(p, self.whole, offset), names[p])
        same = self.part.numel() == self.master.numel() and lies_in(self.part, self.whole, self.begin)
        _require(same, f"this rank's part of the group of {names[self.parameters[0]]}")
        spans = cuts.in_part(sizes, offsets, self.begin, self.master.numel())
        return _shards(spans, self.parameters, self.master, names)


def _shards(spans: Iterable[cuts.Span], parameters: Sequence[Tensor], master: Tensor, names: Names) -> list[Shard]:
    return [Shard.of_range(names[parameters[s.number]], s.start, s.length, master, s.offset) for s in spans]


def _zero_3(zero: Zero3, number: int, names: Names) -> Call:
    """A sub-group: each parameter cut in equal parts, the last one padded; this rank's parts one after the other."""
    master = zero.fp32_partitioned_groups_flat[number]
    groups = getattr(zero, "sub_group_process_groups", None)  # from 0.19; before, there is one group for all
    group = groups[number] if groups else zero.dp_process_group
    parameters = zero.fp16_groups[number]
    sizes, parts = [p.ds_numel for p in parameters], [int(p.partition_numel()) for p in parameters]
    flat = zero.fp16_partitioned_groups_flat[number]  # `master` is a copy of it in fp32; None if it is on NVMe
    if flat is not None:
        for p, offset in zip(parameters, cuts.offsets_of(parts)):
            _require(lies_in(p.ds_tensor, flat, offset), names[p])
        _require(master.numel() in (flat.numel(), 0), names[parameters[0]])  # empty: on NVMe
    spans = cuts.in_sub_group(sizes, parts, dist.get_rank(group))
    shards = _shards(spans, parameters, master, names)
    return Call(zero.sub_group_to_group_id[number], (master,), tuple(shards), group)


def _require(lies: bool, what: str) -> None:
    if not lies:
        raise ValueError(
            f"{what} is not where DeepSpeed's tables say: the shard layout of this release is not supported. Please "
            "report the release and the config"
        )
