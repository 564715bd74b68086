"""Where Megatron's DistributedOptimizer put the elements of each parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from ..core.layout import Shard, cut_shards, lies_in
from .routing import Parameter, is_expert


def masters(optimizer: Any) -> Iterator[tuple[Any, Tensor | None, Tensor]]:
    """(Model parameter, this rank's part of it, what the inner optimizer updates) of a DistributedOptimizer.

    What it updates is the part itself if that is fp32, else an fp32 copy: the main parameter. Megatron gives most
    quantized parameters (``--fp8-param-gather``) no part, as they cannot be viewed: it quantizes the main parameter
    into the parameter after the step.
    """
    for models, parts, mains in (
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups, optimizer.shard_fp32_groups),
        (optimizer.model_float16_groups, optimizer.shard_float16_groups, optimizer.shard_fp32_from_float16_groups),
    ):
        for of_group in zip(models, parts, mains, strict=True):
            yield from zip(*of_group, strict=True)


def shards(optimizer: Any, parameters: Mapping[int, Parameter], tp_rank: int, expert_tp_rank: int) -> list[Shard]:
    """This rank's shards of the parameters of one DistributedOptimizer, each found in its parameter's memory.

    Args:
        optimizer: Megatron's DistributedOptimizer.
        parameters: id of a model parameter -> what it is.
        tp_rank, expert_tp_rank: this rank in the TP groups of the dense layers and of the experts.

    Raises:
        ValueError: where a shard does not lie where Megatron's tables say.
    """
    found = []
    for model, part, master in masters(optimizer):
        held, parameter = optimizer._get_model_param_range_map(model)["param"], parameters[id(model)]
        linked = part is master or model.main_param is master
        fits = held.end - held.start == master.numel() and 0 <= held.start <= held.end <= model.numel()
        # Megatron's own quantization goes by the same range, and nothing can be checked of the parameter's memory.
        there = is_float8tensor(model) or (
            part is not None and part.numel() == master.numel() and lies_in(part, model, held.start)
        )
        if not (linked and fits and there):
            raise ValueError(
                f"elements {held.start} to {held.end} of {parameter.name} are not where Megatron's tables say: "
                "the shard layout of this release is not supported. Please report the release and the arguments"
            )
        rank = expert_tp_rank if is_expert(parameter.name) else tp_rank
        shard = Shard.of_range(parameter.name, held.start, master.numel(), master)
        found += cut_shards(parameter.partition, rank, shard)
    return found


def has_fp8_weights(chunks: Iterable[Any]) -> bool:
    """Whether Megatron quantizes parameters of these model chunks: the same on every rank of a stage."""
    return any(is_float8tensor(p) for chunk in chunks for p in chunk.parameters())


def names(parameters: Iterable[Parameter]) -> dict[int, Parameter]:
    return {id(p.tensor): p for p in parameters}
