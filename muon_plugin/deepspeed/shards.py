"""Where DeepSpeed's wrappers put the elements of each parameter on this rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.agreement import together
from ..core.halves import Call as Holding
from ..core.layout import Strided, cut_shards
from ..core.process_groups import joint_groups
from . import cuts as zero_cuts
from . import tensor_parallel

Names = Mapping[Tensor, str]


@dataclass(frozen=True)
class Span:
    """Elements `start` to `start + length` of this TP rank's flattened parameter, which lie at `offset` of a tensor."""

    parameter: Tensor
    start: int
    length: int
    tensor: Tensor
    offset: int


@dataclass(frozen=True)
class Call:
    """One call of the inner step: see `Holding`."""

    group: int
    tensors: tuple[Tensor, ...]
    spans: tuple[Span, ...]
    process_group: Any


def calls(engine: Any) -> list[Call]:
    """The calls of the inner step, as the engine's wrapper will make them.

    Raises:
        ValueError: for a wrapper that is not known, or spans that do not hold what they should.
    """
    wrapper = engine.optimizer
    kind = type(wrapper).__name__
    if isinstance(getattr(wrapper, "fp16_partitioned_groups_flat", None), list):
        return [_zero_3(wrapper, number) for number in range(len(wrapper.fp16_groups))]
    groups = engine.basic_optimizer.param_groups
    replicas = [_replicas(engine, group) for group in groups]
    if wrapper is engine.basic_optimizer:
        found = list(zip((_whole(zip(group["params"], group["params"])) for group in groups), replicas))
    elif kind == "FP16_UnfusedOptimizer":
        pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        found = list(zip((_whole(zip(low, master)) for low, master in pairs), replicas))
    elif kind == "DeepSpeedZeroOptimizer":
        parts = [_zero_1_and_2(wrapper, number) for number in range(len(wrapper.round_robin_bit16_groups))]
        found = list(zip(parts, wrapper.real_dp_process_group))
    elif kind == "BF16_Optimizer":
        found = list(
            zip([_bf16(wrapper, number) for number in range(len(wrapper.bf16_groups))], wrapper.real_dp_process_group)
        )
    else:
        raise ValueError(f"DeepSpeed built a {kind} around Muon; supported: ZeRO stages 0 to 3 in fp32, bf16, fp16")
    return [
        Call(number, tuple(group["params"]), tuple(spans), process_group)
        for number, (group, (spans, process_group)) in enumerate(zip(groups, found, strict=True))
    ]


def _replicas(engine: Any, group: Mapping[str, Any]) -> Any:
    """Without ZeRO: the ranks that hold the same parameters."""
    return engine.expert_data_parallel_group[group["name"]] if group.get("moe") else engine.seq_data_parallel_group


def holdings(found: Sequence[Call], names: Names, cuts: Mapping[str, tensor_parallel.Cut], tp: Any) -> list[Holding]:
    """The calls with the shards of whole parameters, and the ranks that share these. Collective.

    Every span is compared with the parameter it should hold, so a release that lays them out otherwise is an error
    here and not a wrong update later.

    Args:
        found: what `calls` found.
        names: parameter -> its name.
        cuts: name -> how tensor parallelism cuts it.
        tp: the TP group of this rank, or None.

    Raises:
        ValueError: for a span that does not hold what it should.
    """
    together(lambda: _compare(found, names))
    process_groups = [call.process_group for call in found]
    if tp is not None and dist.get_world_size(tp) > 1:
        process_groups = joint_groups([(group, tp) for group in process_groups])
    return [
        Holding(
            call.group,
            call.tensors,
            tuple(
                shard
                for span in call.spans
                for name in [names[span.parameter]]
                for shard in cut_shards(
                    name, cuts[name].places, span.start, span.start + span.length, span.tensor, span.offset
                )
            ),
            process_group,
        )
        for call, process_group in zip(found, process_groups)
    ]


def _whole(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Span]:
    """No ZeRO: every rank holds every parameter, or its fp32 copy, whole."""
    return [Span(p, 0, p.numel(), master, 0) for p, master in pairs]


def _zero_1_and_2(zero: Any, group: int) -> list[Span]:
    """A group's parameters one after the other (in round-robin order if that is on), padded, cut in equal parts."""
    # `parameter_alignment` (from 0.19) puts padding between parameters; before, there is none and no such table.
    gaps = getattr(zero, "round_robin_bit16_padding", None)
    rank = dist.get_rank(zero.real_dp_process_group[group])
    master = zero.single_partition_of_fp32_groups[group]
    begin = rank * int(zero.partition_size[group])
    return _partition(zero.round_robin_bit16_groups[group], gaps[group] if gaps else None, begin, master)


def _bf16(bf16: Any, group: int) -> list[Span]:
    """The bf16 wrapper with fp32 gradients: ZeRO-1's cut without padding between parameters."""
    rank = dist.get_rank(bf16.real_dp_process_group[group])
    master = bf16.fp32_groups_flat_partition[group]
    return _partition(bf16.bf16_groups[group], None, rank * master.numel(), master)


def _partition(parameters: Sequence[Tensor], gaps: Sequence[int] | None, begin: int, master: Tensor) -> list[Span]:
    """The part of each parameter that falls into [begin, begin + size of the fp32 partition)."""
    sizes = [p.numel() for p in parameters]
    found = zero_cuts.in_part(sizes, zero_cuts.offsets_of(sizes, gaps), begin, master.numel())
    return [Span(parameters[r.number], r.start, r.length, master, r.offset) for r in found]


def _zero_3(zero: Any, number: int) -> Call:
    """A sub-group: each parameter cut in equal parts, the last one padded; this rank's parts one after the other."""
    master = zero.fp32_partitioned_groups_flat[number]
    groups = getattr(zero, "sub_group_process_groups", None)  # from 0.19; before, there is one group for all
    group = groups[number] if groups else zero.dp_process_group
    parameters = zero.fp16_groups[number]
    sizes, parts = [p.ds_numel for p in parameters], [int(p.partition_numel()) for p in parameters]
    found = zero_cuts.in_sub_group(sizes, parts, dist.get_rank(group))
    spans = tuple(Span(parameters[r.number], r.start, r.length, master, r.offset) for r in found)
    return Call(zero.sub_group_to_group_id[number], (master,), spans, group)


def _compare(found: Sequence[Call], names: Names) -> None:
    for call in found:
        for span in call.spans:
            _compare_one(span, names[span.parameter])


def _compare_one(span: Span, name: str) -> None:
    cut_by_zero_3 = getattr(span.parameter, "ds_tensor", None)
    held = span.parameter if cut_by_zero_3 is None else cut_by_zero_3
    if not (span.tensor.numel() and held.numel()):
        return  # it lies on NVMe
    start = span.start if cut_by_zero_3 is None else 0
    where, local = Strided(start, span.length), Strided(span.offset, span.length)
    theirs, ours = where.view(held.detach().view(-1)), local.view(span.tensor.detach().view(-1))
    if not torch.allclose(ours.to(theirs.dtype), theirs.to(ours.device), rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            f"{span.length} elements of {name} from {span.start} on are not where DeepSpeed's tables say: muon_plugin "
            "does not know this release's layout. Please report the release and the config"
        )
