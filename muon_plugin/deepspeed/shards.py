"""Where DeepSpeed's wrappers put the elements of each parameter on this rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..layout import Shard
from ..optimizer import Holding

Names = Mapping[Tensor, str]


def holdings(engine: Any, names: Names) -> list[Holding]:
    """For each call of the inner step, this rank's shards as the engine's wrapper laid them out.

    Every shard is compared with the parameter it should hold, so a release that lays them out otherwise is an error
    here and not a wrong update later.

    Raises:
        ValueError: for a wrapper that is not known, or shards that do not hold what they should.
    """
    wrapper = engine.optimizer
    kind = type(wrapper).__name__
    if wrapper is engine.basic_optimizer:
        found = [_whole(zip(group["params"], group["params"]), names) for group in wrapper.param_groups]
        groups = [engine.seq_data_parallel_group] * len(found)
    elif kind == "FP16_UnfusedOptimizer":
        pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        found = [_whole(zip(low, master), names) for low, master in pairs]
        groups = [engine.seq_data_parallel_group] * len(found)
    elif isinstance(getattr(wrapper, "fp16_partitioned_groups_flat", None), list):  # ZeRO-3, and MiCS
        return [_zero_3(wrapper, number, names) for number in range(len(wrapper.fp16_groups))]
    elif kind == "DeepSpeedZeroOptimizer":
        found = [_zero_1_and_2(wrapper, i, names) for i in range(len(wrapper.round_robin_bit16_groups))]
        groups = wrapper.real_dp_process_group
    elif kind == "BF16_Optimizer":
        found = [_bf16(wrapper, i, names) for i in range(len(wrapper.bf16_groups))]
        groups = wrapper.real_dp_process_group
    else:
        raise ValueError(f"DeepSpeed built a {kind} around Muon; supported: ZeRO stages 0, 1 and 2 in fp32, bf16, fp16")
    parameters = {name: p for p, name in names.items()}
    for shards in found:
        for shard in shards:
            _compare(shard, shard.where.view(parameters[shard.parameter].detach().view(-1)))
    calls = zip(engine.basic_optimizer.param_groups, found, groups, strict=True)
    return [
        Holding(number, tuple(param_group["params"]), tuple(shards), group)
        for number, (param_group, shards, group) in enumerate(calls)
    ]


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape before ZeRO-3 cut the parameter: afterwards, and under ``zero.Init`` from the start, it looks empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _whole(pairs: Iterator[tuple[Tensor, Tensor]], names: Names) -> list[Shard]:
    """No ZeRO: every rank holds every parameter, or its fp32 copy, whole."""
    return [Shard.of_range(names[p], 0, p.numel(), master) for p, master in pairs]


def _zero_1_and_2(zero: Any, group: int, names: Names) -> list[Shard]:
    """A group's parameters one after the other (in round-robin order if that is on), padded, cut in equal parts."""
    parameters = zero.round_robin_bit16_groups[group]
    # `parameter_alignment` (from 0.19) puts padding between parameters; before, there is none and no such table.
    gaps = getattr(zero, "round_robin_bit16_padding", None)
    spans = [p.numel() + gap for p, gap in zip(parameters, gaps[group] if gaps else [0] * len(parameters))]
    offsets = list(accumulate(spans, initial=0))
    rank = torch.distributed.get_rank(zero.real_dp_process_group[group])
    master = zero.single_partition_of_fp32_groups[group]
    return _partition(parameters, offsets, rank * int(zero.partition_size[group]), master, names)


def _bf16(bf16: Any, group: int, names: Names) -> list[Shard]:
    """The bf16 wrapper with fp32 gradients: ZeRO-1's cut without padding between parameters."""
    parameters = bf16.bf16_groups[group]
    offsets = list(accumulate((p.numel() for p in parameters), initial=0))
    rank = torch.distributed.get_rank(bf16.real_dp_process_group[group])
    master = bf16.fp32_groups_flat_partition[group]
    return _partition(parameters, offsets, rank * master.numel(), master, names)


def _partition(
    parameters: Sequence[Tensor], offsets: Sequence[int], begin: int, master: Tensor, names: Names
) -> list[Shard]:
    """The part of each parameter that falls into [begin, begin + size of the fp32 partition)."""
    found = []
    for p, offset in zip(parameters, offsets):
        first, last = max(offset, begin), min(offset + p.numel(), begin + master.numel())
        if first < last:
            found.append(Shard.of_range(names[p], first - offset, last - first, master, first - begin))
    return found


def _zero_3(zero: Any, number: int, names: Names) -> Holding:
    """A sub-group: each parameter cut in equal parts, the last one padded; this rank's parts one after the other."""
    master, group = zero.fp32_partitioned_groups_flat[number], zero.sub_group_process_groups[number]
    rank = torch.distributed.get_rank(group)
    found, offset = [], 0
    for p in zero.fp16_groups[number]:
        part = int(p.partition_numel())
        length = min(part, p.ds_numel - rank * part)
        if length > 0:
            shard = Shard.of_range(names[p], rank * part, length, master, offset)
            if master.numel() and p.ds_tensor.numel():  # neither lies on NVMe
                _compare(shard, p.ds_tensor.detach().view(-1)[:length])
            found.append(shard)
        offset += part
    return Holding(zero.sub_group_to_group_id[number], (master,), tuple(found), group)


def _compare(shard: Shard, theirs: Tensor) -> None:
    ours = shard.local.view(shard.tensor.detach().view(-1)).view(-1)
    theirs = theirs.view(-1)
    if not torch.allclose(ours.to(theirs.dtype), theirs.to(ours.device), rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            f"{shard.where.numel} elements of {shard.parameter} from {shard.where.start} on are not where DeepSpeed's "
            "tables say: muon_plugin does not know this release's layout. Please report the release and the config"
        )
