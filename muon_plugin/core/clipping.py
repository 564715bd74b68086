"""QK-Clip of one `Muon`: from the model's attention layers to what the halves do in each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import logits
from .call import Call
from .heads import QUERY
from .layout import Block, Partition, compose
from .qk_clip import AttentionLayer, Clip, QKClip, Rows, summary
from .qk_heads import Found, attention_layers


@dataclass(frozen=True)
class Clipping:
    """The layers that are clipped, and who keeps their logits.

    Attributes:
        setting: threshold and alpha.
        found: the attention of the model.
        maxima: the logits of this rank.
    """

    setting: QKClip
    found: Found
    maxima: logits.Maxima

    @classmethod
    def of(
        cls,
        setting: QKClip | None,
        model: nn.Module | None,
        shapes: Mapping[str, Sequence[int]],
        one_of_many: bool = False,
    ) -> Clipping | None:
        """None where QK-Clip is off, or nothing is trained.

        Args:
            setting: None where it is off.
            model: whose modules are watched from now on.
            shapes: name -> whole shape, of the parameters that are trained.
            one_of_many: whether this is one of several pipeline stages, which may have no attention.

        Raises:
            ValueError: where QK-Clip cannot work, with the reason.
        """
        if setting is None or not shapes:
            return None
        if model is None:
            raise ValueError("qk_clip needs the model, whose modules say which outputs are which head: pass model=")
        found = attention_layers(model, shapes)
        if not found.layers and one_of_many:
            return None
        if not found.layers:
            raise ValueError(
                "qk_clip: the model has no attention whose query and key projections are trained and known; leave it "
                "out"
            )
        maxima = logits.Maxima([(layer.name, layer.heads) for layer in found.layers])
        logits.watch(model, found.modules, found.left, maxima)
        return cls(setting, found, maxima)

    def renamed(self, names: Mapping[str, str]) -> Clipping:
        """With other names of the parameters."""
        return replace(self, found=replace(self.found, layers=tuple(o.renamed(names) for o in self.found.layers)))

    def clip(
        self,
        calls: Sequence[Call],
        members: Sequence[Sequence[str]],
        parameters: Mapping[str, Tensor],
        one_call: bool,
        device: torch.device | None = None,
    ) -> Clip:
        """What the halves need for these calls.

        Args:
            calls: those that the engine will make.
            members: for each parameter group, the names of its parameters.
            parameters: name -> the client's parameter.
            one_call: see `Clip`.
            device: where the model computes; by default that of the parameters.

        Raises:
            ValueError: where the layers are trained by several process groups, or are left out in part.
        """
        wanted = {name for layer in self.found.layers for name in layer.parameters}
        if lacking := sorted(wanted - set(parameters)):
            raise ValueError(
                f"qk_clip: {lacking[0]} was frozen when the engine was built, which leaves it out; allowed: query and "
                "key projections that are trained"
            )
        groups = [call.process_group for call in calls if wanted & set(members[call.group])]
        if any(group is not groups[0] for group in groups):
            raise ValueError("qk_clip: the attention layers are sharded over several process groups; leave it out")
        shards = [shard for call in calls for shard in call.shards]
        where = device or shards[0].tensor.device
        return Clip(self.setting, self.found.layers, self.maxima, shards, parameters, groups[0], where, one_call)

    def cut(self, partitions: Mapping[str, Partition], rank: int) -> None:
        """Tells `maxima` which heads this TP rank computes: those of which it holds the query.

        Raises:
            ValueError: where they are not one after the other, or there are none.
        """
        for number, layer in enumerate(self.found.layers):
            held = [head for head, rows in enumerate(_queries(layer)) if _holds(partitions, rank, rows)]
            if not held or held != list(range(held[0], held[-1] + 1)):
                raise ValueError(f"qk_clip: tensor parallelism leaves rank {rank} the heads {held} of {layer.name}")
            self.maxima.held[number] = held[0], len(held)

    @property
    def notes(self) -> tuple[str, ...]:
        return (summary(self.found.layers, self.setting), *self.found.notes)


def _queries(layer: AttentionLayer) -> list[Rows]:
    """The query of each head, in its weight; of latent attention the part without positions."""
    weight = next(rows.parameter for rows in layer.rows if rows.role == QUERY)
    return [rows for rows in layer.rows if rows.role == QUERY and rows.parameter == weight]


def _holds(partitions: Mapping[str, Partition], rank: int, rows: Rows) -> bool:
    partition = partitions.get(rows.parameter)
    if partition is None or len(partition.ranks) == 1:
        return True
    return any(compose(Block(rows.where, rows.where), Block(b.inside, b.local)) for b in partition.ranks[rank])
