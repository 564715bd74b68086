"""QK-Clip: after the update, heads whose attention logits grew too large have their query and key weights shrunk.

Kimi K2 (arXiv 2507.20534, section 2.1). With m the largest logit of a head in the step, over all micro-batches and all
ranks, and gamma = threshold / m where m > threshold::

    W_query <- gamma^alpha W_query,   W_key <- gamma^(1 - alpha) W_key

so that the same inputs would give logits of gamma times their size. Where several query heads share a key head, the
group is scaled as one: m is the largest logit of its heads, all of its query heads are scaled by gamma^alpha and its
key head by gamma^(1 - alpha). In latent attention each head has a key of its own beside a rotary key that all heads
share: the shared key stays as it is, so the head's rotary query takes all of gamma.

Biases are rows of the projection like any other column of its weight, and are scaled with it: otherwise the logits
would not shrink by gamma. (Kimi K2 has none.) Momentum is not scaled.

Nothing here knows how the logits were found, or how the weights are sharded beyond `Shard`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .agreement import largest as reduce_to_largest
from .agreement import wire_of
from .checks import Check, above, is_number, require
from .heads import KEY, QUERY
from .layout import Block, Shard, Strided, compose
from .phases import phase

ROTARY = "rotary query"
ALPHA = Check(lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1")


@dataclass(frozen=True)
class QKClip:
    """The setting ``qk_clip``.

    Attributes:
        threshold: logits above it are clipped; Kimi K2 has 100.
        alpha: the query's share of the scaling; Kimi K2 has 0.5, a square root for query and key each.

    Raises:
        ValueError: with the key, its value and what is allowed.
    """

    threshold: float = 100.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        require(f"qk_clip.threshold={self.threshold!r}", self.threshold, above(0))
        require(f"qk_clip.alpha={self.alpha!r}", self.alpha, ALPHA)

    @classmethod
    def of(cls, given: Any) -> QKClip | None:
        """From what a user set: an object with some of these keys, or nothing."""
        if given is None or given is False or isinstance(given, QKClip):
            return given or None
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping):
            raise ValueError(
                f'qk_clip={given!r} is not valid; allowed: an object such as {{"threshold": 100}}, with {known}'
            )
        for key in given:
            if key not in known:
                raise ValueError(f"qk_clip.{key}={given[key]!r} is not a setting; allowed: {', '.join(known)}")
        return cls(**given)

    def factor(self, role: str, logit: float) -> float:
        """What weights of that role are multiplied by: 1.0 where the logit is not above the threshold.

        Also where it is infinite or no number: nothing is known of the head then.
        """
        if not (math.isfinite(logit) and logit > self.threshold):
            return 1.0
        gamma = self.threshold / logit
        return float(gamma ** {QUERY: self.alpha, KEY: 1 - self.alpha, ROTARY: 1.0}[role])


@dataclass(frozen=True)
class Rows:
    """The part of a parameter that is one head's query or key.

    Attributes:
        parameter: its name.
        where: in the whole parameter, flattened.
        role: `QUERY`, `KEY`, `ROTARY`.
        first, heads: the query heads by whose largest logit it is scaled: those that share a key head.
    """

    parameter: str
    where: Strided
    role: str
    first: int
    heads: int = 1


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer, whole, whatever part of it a rank holds.

    Attributes:
        name: for the log.
        heads: how many query heads it has.
        rows: what is scaled, query heads in their order.
    """

    name: str
    heads: int
    rows: tuple[Rows, ...]

    @property
    def parameters(self) -> set[str]:
        return {rows.parameter for rows in self.rows}

    def renamed(self, names: Mapping[str, str]) -> AttentionLayer:
        """With other names of the parameters."""
        return replace(self, rows=tuple(replace(r, parameter=names[r.parameter]) for r in self.rows))

    def clipped(self, setting: QKClip, logits: Sequence[float]) -> int:
        """How many query heads are scaled, given the largest logit of each."""
        groups = {(rows.first, rows.heads) for rows in self.rows}
        return sum(heads for first, heads in groups if setting.factor(KEY, max(logits[first : first + heads])) != 1.0)


class Source(Protocol):
    """Who knows the logits of this rank since the last step: `logits.Maxima`, or an engine's attention."""

    def read(self) -> Tensor:
        """fp32, the largest logit of each query head, one layer after the other; -inf where this rank knows none."""

    def reset(self) -> None:
        """Forgets them."""


class Clip:
    """QK-Clip of the layers that a rank's process group trains.

    A step of an engine may call the inner optimizer several times. The maxima are reduced in the first call, once for
    all layers; each call scales what its tensors hold; `reset` ends the step, also one that was skipped.

    Args:
        setting: threshold and alpha.
        layers: the same on all ranks of `group`, in the same order.
        source: of the logits.
        shards: of whole parameters, that this rank holds.
        parameters: name -> the client's parameter. A layer with a frozen one is not clipped.
        group: all ranks that hold parts or replicas of the layers, or see other inputs or heads of them.
        device: where the model computes: what the group's backend sends lies there, also from a rank whose source has
            seen nothing.
        one_call: whether each call is a step of its own, which `apply` ends. Otherwise the engine calls `reset`.

    Attributes:
        last: (layer's name, its largest logit, number of clipped heads), of the last step in which there were logits.
    """

    def __init__(
        self,
        setting: QKClip,
        layers: Sequence[AttentionLayer],
        source: Source,
        shards: Iterable[Shard],
        parameters: Mapping[str, Tensor],
        group: Any,
        device: torch.device,
        one_call: bool = False,
    ) -> None:
        self.setting, self.layers, self._source, self._group = setting, tuple(layers), source, group
        self._device = device
        self._one_call = one_call
        self.last: list[tuple[str, float, int]] = []
        self._largest: list[list[float]] | None = None
        self._parameters = [[parameters[name] for name in sorted(layer.parameters)] for layer in layers]
        self._pieces = pieces(layers, shards)
        self._all_seen = False

    def begin(self) -> None:
        """Before the update: the largest logits over all ranks, if this is the step's first call. Collective.

        Raises:
            RuntimeError: on every rank, where no rank has seen any logit since the last step.
        """
        if self._largest is not None:
            return
        values = torch.nan_to_num(self._source.read(), nan=math.inf, posinf=math.inf, neginf=-math.inf)
        values = values.to(wire_of(self._group, self._device))
        with phase("exchange"):
            reduce_to_largest(values, self._group)
        flat, found, begin = values.tolist(), [], 0
        for layer in self.layers:
            found.append(flat[begin : begin + layer.heads])
            begin += layer.heads
        self._check_seen(found)
        self._largest = found
        self.last = [
            (layer.name, max(of_layer), layer.clipped(self.setting, of_layer) if self._trained(number) else 0)
            for number, (layer, of_layer) in enumerate(zip(self.layers, found))
        ]

    def _check_seen(self, found: Sequence[Sequence[float]]) -> None:
        """In silence, nothing would ever be clipped."""
        unseen = [layer.name for layer, of_layer in zip(self.layers, found) if max(of_layer) == -math.inf]
        if len(unseen) == len(self.layers):
            raise RuntimeError(
                f"qk_clip: no attention logits were seen since the last step, in none of {len(unseen)} layers "
                f"({unseen[0]}, ...). They are seen in forward passes in training mode with gradients enabled, through "
                "the attention functions of transformers, or where the model calls muon_plugin.record_logits"
            )
        if unseen and not self._all_seen:
            warnings.warn(
                f"qk_clip: no attention logits were seen in the first step of {len(unseen)} layers, which are not "
                f"clipped as long as there are none: {', '.join(unseen[:3])}{', ...' * (len(unseen) > 3)}",
                stacklevel=2,
            )
        self._all_seen = True  # or said

    def _trained(self, number: int) -> bool:
        return all(p.requires_grad for p in self._parameters[number])

    @torch.no_grad()
    def apply(self, tensors: Iterable[Tensor]) -> None:
        """After the update: scales the heads above the threshold in these tensors."""
        largest = self._largest
        if largest is not None and any(count for _, _, count in self.last):
            with phase("apply"):
                for p in tensors:
                    for number, rows, local in self._pieces.get(p, ()):
                        logit = max(largest[number][rows.first : rows.first + rows.heads])
                        factor = self.setting.factor(rows.role, logit)
                        if factor != 1.0 and self._trained(number):
                            local.view(p.view(-1)).mul_(factor)
        if self._one_call:
            self.reset()

    def reset(self) -> None:
        """Ends a step of the engine, made or skipped: the logits before it are those of other weights."""
        self._largest = None
        self._source.reset()


def pieces(layers: Sequence[AttentionLayer], shards: Iterable[Shard]) -> dict[Tensor, list[tuple[int, Rows, Strided]]]:
    """Tensor -> (number of the layer, rows, where they lie in the tensor), of what these shards hold of the layers."""
    wanted: dict[str, list[tuple[int, Rows]]] = {}
    for number, layer in enumerate(layers):
        for rows in layer.rows:
            wanted.setdefault(rows.parameter, []).append((number, rows))
    found: dict[Tensor, list[tuple[int, Rows, Strided]]] = {}
    for shard in shards:
        held = Block(shard.local, shard.where)
        for number, rows in wanted.get(shard.parameter, ()):
            for block in compose(held, Block(rows.where, Strided(0, rows.where.numel))):
                found.setdefault(shard.tensor, []).append((number, rows, block.local))
    return found


def summary(layers: Sequence[AttentionLayer], setting: QKClip) -> str:
    """A note for the start-up table."""
    heads = sum(layer.heads for layer in layers)
    return (
        f"QK-Clip at {setting.threshold:g} (alpha {setting.alpha:g}): {len(layers)} attention "
        f"layer{'s' * (len(layers) != 1)}, {heads} heads"
    )
