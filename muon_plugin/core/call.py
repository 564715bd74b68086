"""One call of the optimizer's step, as an engine will make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .layout import Shard, overlaps


@dataclass(frozen=True)
class Call:
    """One call of the optimizer's step, as the engine will make it.

    Attributes:
        group: the number of the parameter group.
        tensors: the group's "params" in that call. ZeRO-3 makes one call for each of a group's sub-groups, with one
            flat tensor each; elsewhere a group has one call with all its tensors.
        shards: this rank's part of each parameter.
        process_group: the ranks that together hold every element of every matrix; None is the default group.

    Raises:
        ValueError: for shards that are not in these tensors, or that share elements of one.
    """

    group: int
    tensors: tuple[Tensor, ...]
    shards: tuple[Shard, ...]
    process_group: Any = None

    @staticmethod
    def whole(group: int, tensors: Sequence[Tensor], names: Mapping[Tensor, str], process_group: Any) -> Call:
        """A call with whole parameters, of which each rank holds a replica."""
        shards = tuple(Shard.of_range(names[p], 0, p.numel(), p) for p in tensors)
        return Call(group, tuple(tensors), shards, process_group)

    def __post_init__(self) -> None:
        held: dict[Tensor, list[Shard]] = {tensor: [] for tensor in self.tensors}
        for shard in self.shards:
            if shard.tensor not in held:
                raise ValueError(f"{shard.parameter} is in a tensor that the engine's optimizer does not step")
            held[shard.tensor].append(shard)
        for shards in held.values():
            for one, other in overlaps(shard.local for shard in shards):
                names = {shard.local: shard.parameter for shard in shards}
                raise ValueError(
                    f"{names[one]} and {names[other]} lie in the same elements of one of the engine's tensors ({one} "
                    f"and {other}). Please report the engine's release and settings"
                )
