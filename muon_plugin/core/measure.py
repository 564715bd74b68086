"""The sizes a user watches: of updates, weights, momentum and gradients, by parameter group, over all ranks.

Costs nothing but in the steps that ask for it; there, a pass over this rank's shards and one small all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import gather, world_of
from .layout import Shard
from .report import label

if TYPE_CHECKING:
    from .muon import Muon

WHAT = ("update", "weight", "momentum", "gradient")
#: Elements at a time: bounds the working memory.
CHUNK = 2**24


class Measure:
    """Sums of squares of one step, each element of the model counted once.

    Building one is collective over the world, and so is `result`. Between them the optimizer makes its step with
    ``optimizer.measure`` set to it.

    Args:
        muon: attached to its tensors.
        elsewhere: parameters of this rank that other ranks count: tied weights that several pipeline stages hold.
    """

    def __init__(self, muon: Muon, elsewhere: Iterable[str] = ()) -> None:
        self._muon = muon
        self._shards: dict[Tensor, tuple[str, Sequence[Shard]]] = {}
        self._once: dict[str, float] = {}
        counts: dict[str, float] = {}
        for holding in muon.holdings:
            name = label(muon.param_groups[holding.group], muon.param_groups)
            self._shards[holding.tensors[0]] = name, holding.shards
            self._once |= _shares(holding.shards, muon.routing.shapes, holding.process_group)
            self._once |= dict.fromkeys(elsewhere, 0.0)
            counts[name] = counts.get(name, 0.0) + sum(s.where.numel * self._once[s.parameter] for s in holding.shards)
        self.groups = sorted(set().union(*gather(sorted(counts), None)))
        self._counts = [sum(each) for each in zip(*gather([counts.get(name, 0.0) for name in self.groups], None))]
        self.clear()

    def clear(self) -> None:
        """Before the next step that is measured."""
        self._sums: dict[tuple[str, str], Tensor] = {}
        #: whether a step was made: an overflow skips it
        self.stepped = False

    @contextmanager
    def step(self, called: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """Around the optimizer's step for these parameter groups."""
        self.stepped = True
        for shard, name in self._of(called):
            if shard.tensor.grad is not None:
                self._add(name, "gradient", shard, shard.tensor.grad)
        yield
        for group in called:
            for shard, name in self._of([group]):
                state = self._muon.state[shard.tensor]
                self._add(name, "weight", shard, shard.tensor)
                self._add(name, "momentum", shard, state[self._muon.momentum_name if group["use_muon"] else "exp_avg"])
                for values in _adamw_update(shard, state, group) if "exp_avg_sq" in state else ():
                    self._sum(name, "update", values, self._once[shard.parameter])

    def _of(self, called: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Shard, str]]:
        for group in called:
            name, shards = self._shards[group["params"][0]]
            yield from ((shard, name) for shard in shards)

    def update(self, first: Tensor, parameter: str, update: Tensor) -> None:
        """A part of a scaled update, fp32, as it is applied but for the learning rate."""
        self._sum(self._shards[first][0], "update", update, self._once[parameter])

    def result(self, device: torch.device) -> dict[str, float]:
        """``update_rms/GROUP``, ``weight_rms/GROUP``, ``momentum_norm/GROUP`` and ``gradient_norm`` (of all groups).

        The update is that of Eq. 4 without learning rate and weight decay; AdamW's is m / (sqrt(v) + eps), both
        corrected for their bias. The gradient is the one that the optimizer got, clipped where the engine clips.

        Args:
            device: where the backend of the default process group wants its tensors.
        """
        zero = torch.zeros((), dtype=torch.float64)
        sums = torch.stack([self._sums.get((name, what), zero).to(device) for name in self.groups for what in WHAT])
        if world_of(None)[1] > 1:
            dist.all_reduce(sums)
        found, gradient = {}, 0.0
        for name, count, of_group in zip(self.groups, self._counts, sums.view(-1, len(WHAT)).tolist()):
            square = dict(zip(WHAT, of_group))
            found[f"update_rms/{name}"] = math.sqrt(square["update"] / max(count, 1))
            found[f"weight_rms/{name}"] = math.sqrt(square["weight"] / max(count, 1))
            found[f"momentum_norm/{name}"] = math.sqrt(square["momentum"])
            gradient += square["gradient"]
        return found | {"gradient_norm": math.sqrt(gradient)}

    def _add(self, name: str, what: str, shard: Shard, tensor: Tensor) -> None:
        for values in _parts(shard, tensor):
            self._sum(name, what, values, self._once[shard.parameter])

    def _sum(self, name: str, what: str, values: Tensor, share: float) -> None:
        square = torch.linalg.vector_norm(values, dtype=torch.float32).double().square() * share
        known = self._sums.get((name, what))
        self._sums[name, what] = square if known is None else known + square.to(known.device)


def _shares(shards: Iterable[Shard], shapes: Mapping[str, Sequence[int]], process_group: Any) -> dict[str, float]:
    """Parameter -> what one element counts for on this rank: one over the ranks that hold it."""
    held: dict[str, int] = {}
    for shard in shards:
        held[shard.parameter] = held.get(shard.parameter, 0) + shard.where.numel
    everyone = gather(held, process_group)
    return {name: math.prod(shapes[name]) / sum(of_rank.get(name, 0) for of_rank in everyone) for name in held}


def _parts(shard: Shard, tensor: Tensor) -> Iterable[Tensor]:
    whole = shard.local.view(tensor.detach().reshape(-1))
    return whole.split(max(1, CHUNK // whole.shape[1])) if whole.shape[0] > 1 else whole.view(-1).split(CHUNK)


def _adamw_update(shard: Shard, state: Mapping[str, Any], group: Mapping[str, Any]) -> Iterable[Tensor]:
    step = float(state["step"] if "step" in state else group["step"])
    one, two = (1 - beta**step for beta in group["betas"])
    for first, second in zip(_parts(shard, state["exp_avg"]), _parts(shard, state["exp_avg_sq"])):
        yield (first.float() / one) / ((second.float() / two).sqrt() + group["eps"])
