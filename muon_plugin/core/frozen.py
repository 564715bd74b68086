"""Which parameters are frozen in a step: those whose `requires_grad` is False then, as the client sees them.

torch skips a parameter without a gradient. An engine that shards parameters hands over zeros for it instead, often in
one flat tensor with others; so what must stay is told by the parameters themselves, and by where their elements lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .layout import Shard, Strided, merged

#: Key of a parameter group: the positions of tensors that have been frozen from the start on. They have no state.
FROZEN = "frozen"


@dataclass(frozen=True)
class Frozen:
    """What one step leaves as it is: weights, momentum and AdamW's state of these parameters.

    Attributes:
        names: of the frozen parameters.
        rest: for each tensor that holds parts of them, the elements that are trained; none where all are frozen.
    """

    names: frozenset[str] = frozenset()
    rest: Mapping[Tensor, tuple[Strided, ...]] = field(default_factory=dict)

    def trained(self, p: Tensor) -> tuple[Strided, ...]:
        """The elements of a tensor that are trained in this step."""
        return self.rest.get(p, (Strided(0, p.numel()),)) if self.rest else (Strided(0, p.numel()),)


#: The usual step.
NONE = Frozen()


class Watch:
    """Looks which parameters are frozen: a loop in Python, nothing on the device and no communication.

    Args:
        shards: of all calls.
        parameters: name -> the client's parameter, of which these are shards.
    """

    def __init__(self, shards: Iterable[Shard] = (), parameters: Mapping[str, Tensor] | None = None) -> None:
        self._parameters = dict(parameters or {})
        #: tensor -> the parameters of which it holds parts, and where
        self._held: dict[Tensor, dict[str, list[Strided]]] = {}
        for shard in shards:
            self._held.setdefault(shard.tensor, {}).setdefault(shard.parameter, []).append(shard.local)
        self._objects = {p: [self._parameters[name] for name in held] for p, held in self._held.items()}

    def look(self, tensors: Iterable[Tensor]) -> Frozen:
        """What is frozen now among the parameters that these tensors hold."""
        objects = self._objects
        found = {p: None for p in tensors for parameter in objects.get(p, ()) if not parameter.requires_grad}
        if not found:
            return NONE
        names: set[str] = set()
        rest: dict[Tensor, tuple[Strided, ...]] = {}
        for p in found:
            frozen = {name for name in self._held[p] if not self._parameters[name].requires_grad}
            names |= frozen
            trained = (part for name, parts in self._held[p].items() if name not in frozen for part in parts)
            rest[p] = merged(trained)
        return Frozen(frozenset(names), rest)
