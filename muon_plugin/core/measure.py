"""Monitoring: norms of updates, weights, momentum and gradients by parameter group, over all ranks.

Only steps that are measured pay for it, with one pass over this rank's shards and one small all-reduce.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .agreement import add_up, gather, largest, wire_of
from .frozen import Frozen
from .layout import Shard
from .phases import PHASES, heard
from .qk_clip import Clip

T = TypeVar("T")
WHAT = ("update", "weight", "momentum", "gradient", "elements")
#: Elements at a time: bounds the working memory.
CHUNK = 2**24


@dataclass(frozen=True)
class Part:
    """Shards of this rank whose squares are summed under one label.

    Attributes:
        label: used in the names of the metrics: ``update_rms/LABEL``.
        shards: of this rank; there may be none.
        process_group: the ranks that together hold every element of these parameters.
        copies: number of such groups that hold replicas of these parameters.
    """

    label: str
    shards: Sequence[Shard]
    process_group: Any
    copies: int = 1


class Measure:
    """Sums of squares of one step, each element of the model that is trained in it counted once.

    Building one is collective over `ranks`, and so is `result`. Between them the optimizer makes its step with the
    ``measure`` of its `Halves` set to it.

    Args:
        parts: all shards of this rank.
        shapes: the whole shape of each parameter, by name.
        elsewhere: parameters of this rank that other ranks count, such as tied weights on several pipeline stages.
        ranks: those that hold the model between them: a process group, None or a `Grid`.
        device: on which the optimizer computes.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        shapes: Mapping[str, Sequence[int]],
        elsewhere: Iterable[str],
        ranks: Any,
        device: torch.device,
    ) -> None:
        self.ranks = ranks
        self._shards: dict[Tensor, list[Shard]] = {}
        #: by parameter: its label, and the weight of one of its elements on this rank (1 / number of replicas)
        self._label: dict[str, str] = {}
        self._once: dict[str, float] = {}
        self._copies = max((part.copies for part in parts), default=1)
        for part in parts:
            shares = {name: share / part.copies for name, share in _shares(part, shapes, device).items()}
            self._once |= shares | {name: 0.0 for name in elsewhere if name in shares}
            for shard in part.shards:
                self._shards.setdefault(shard.tensor, []).append(shard)
                self._label[shard.parameter] = part.label
        self.groups = sorted(set().union(*gather(sorted(set(self._label.values())), ranks)))
        self.clear()

    def clear(self) -> None:
        """Resets the sums; called before each measured step."""
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._zero_gradients = 0.0
        #: whether a step was made: an overflow skips it
        self.stepped = False

    @contextmanager
    def step(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, Mapping[str, Any]],
        momentum: str,
        frozen: Frozen,
    ) -> Iterator[None]:
        """Around the optimizer's step for these parameter groups; `momentum` is its name in the state of matrices."""
        self.stepped = True
        for shard, _ in self._of(groups, frozen):
            count = torch.tensor(shard.where.numel * self._once[shard.parameter], dtype=torch.float64)
            self._add_to(shard.parameter, "elements", count)
            if shard.tensor.grad is not None:
                self._add("gradient", shard, shard.tensor.grad)
        yield
        for shard, group in self._of(groups, frozen):
            own = state[shard.tensor]
            self._add("weight", shard, shard.tensor)
            of_matrix = momentum in own and "exp_avg_sq" not in own
            self._add("momentum", shard, own[momentum if of_matrix else "exp_avg"])
            for values in () if of_matrix else _update(shard, own, group):
                self._sum("update", shard.parameter, values)

    def _of(self, groups: Sequence[Mapping[str, Any]], frozen: Frozen) -> Iterator[tuple[Shard, Mapping[str, Any]]]:
        for group in groups:
            for p in group["params"]:
                for shard in self._shards.get(p, ()):
                    if shard.parameter not in frozen.names:
                        yield shard, group

    def update(self, parameter: str, update: Tensor) -> None:
        """Adds an fp32 part of a scaled update, before the learning rate is applied."""
        self._sum("update", parameter, update)

    def zero_gradients(self, matrices: int, ranks: int) -> None:
        """Adds matrices whose whole gradient is zero, which each of so many ranks adds."""
        self._zero_gradients += matrices / ranks / self._copies

    def result(self, device: torch.device) -> dict[str, float]:
        """``update_rms/GROUP``, ``weight_rms/GROUP``, ``momentum_norm/GROUP``; ``gradient_norm`` (of all groups);
        ``zero_gradient_matrices``, the number of matrices that are not frozen and whose gradient is zero.

        The update is that of Eq. 4 without learning rate and weight decay; AdamW's is m / (sqrt(v) + eps), both
        corrected for their bias; Lion's is a sign. The gradient is the one that the optimizer got, clipped where the
        engine clips.

        Args:
            device: on which the optimizer computes.
        """
        zero = torch.zeros((), dtype=torch.float64)
        wire = wire_of(self.ranks, device)
        sums = [self._sums.get((name, what), zero).to(wire) for name in self.groups for what in WHAT]
        everything = torch.stack([*sums, zero.to(wire) + self._zero_gradients])
        add_up(everything, self.ranks)
        *values, without = everything.tolist()
        found, gradient = {}, 0.0
        for number, name in enumerate(self.groups):
            square = dict(zip(WHAT, values[number * len(WHAT) :]))
            count = max(square["elements"], 1)
            found[f"update_rms/{name}"] = math.sqrt(square["update"] / count)
            found[f"weight_rms/{name}"] = math.sqrt(square["weight"] / count)
            found[f"momentum_norm/{name}"] = math.sqrt(square["momentum"])
            gradient += square["gradient"]
        return found | {"gradient_norm": math.sqrt(gradient), "zero_gradient_matrices": round(without)}

    def _add(self, what: str, shard: Shard, tensor: Tensor) -> None:
        for values in _parts(shard, tensor):
            self._sum(what, shard.parameter, values)

    def _sum(self, what: str, parameter: str, values: Tensor) -> None:
        square = torch.linalg.vector_norm(values, dtype=torch.float32).double().square() * self._once[parameter]
        self._add_to(parameter, what, square)

    def _add_to(self, parameter: str, what: str, amount: Tensor) -> None:
        key = self._label[parameter], what
        known = self._sums.get(key)
        self._sums[key] = amount if known is None else known + amount.to(known.device)


class Clock:
    """Times the phases of a step. It synchronizes the device, so it is used only in measured steps.

    Args:
        device: synchronized at each change of phase.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: float | None = None
        self._at = 0.0
        self._seconds: dict[str, float] = {}

    def begin(self) -> None:
        """Starts the clock; called at the end of the step before the measured one."""
        self._began, self._seconds = self._now(), {}

    def changed(self, left: str, entered: str) -> None:
        """A `phases.Listener`."""
        now = self._now()
        if left in PHASES:
            self._seconds[left] = self._seconds.get(left, 0.0) + now - self._at
        self._at = now

    def shares(self) -> dict[str, float]:
        """``optimizer_share`` and ``exchange_share`` of the time since `begin`; empty without it."""
        if self._began is None:
            return {}
        whole, self._began = self._now() - self._began, None
        return {
            "optimizer_share": sum(self._seconds.values()) / whole,
            "exchange_share": self._seconds.get("exchange", 0.0) / whole,
        }

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


class Measured(Protocol):
    """What can be told to measure its next step: a `Halves`."""

    measure: Measure | None
    clip: Clip | None


class Heads:
    """What QK-Clip saw and did in a step, over all pipeline stages. Building one is collective, and so is `result`.

    Args:
        clips: those of this rank.
        ranks: all that train with the optimizer.
    """

    def __init__(self, clips: Sequence[Clip], ranks: Any) -> None:
        self._clips, self._ranks = clips, ranks
        mine = [layer.name for clip in clips for layer in clip.layers]
        self._names = list(dict.fromkeys(name for names in gather(mine, ranks) for name in names))

    def result(self, device: torch.device) -> dict[str, float]:
        """``max_logit/LAYER`` (without layers that had none) and ``clipped_heads``; nothing where QK-Clip is off."""
        if not self._names:
            return {}
        seen = {name: (logit, float(count)) for clip in self._clips for name, logit, count in clip.last}
        none = (-math.inf, 0.0)
        values = torch.tensor([seen.get(name, none) for name in self._names], dtype=torch.float64)
        values = values.to(wire_of(self._ranks, device))
        largest(values, self._ranks)
        pairs = list(zip(self._names, values.tolist()))
        logits = {f"max_logit/{name}": logit for name, (logit, _) in pairs if logit != -math.inf}
        return logits | {"clipped_heads": sum(count for _, (_, count) in pairs)}


class Monitor:
    """Measures the steps that an engine's own monitors log. Every method is collective over the optimizer's ranks.

    Args:
        halves: those of all inner optimizers that one step of the engine updates.
        make: constructs the `Measure`; called at the first measured step.
        device: on which the optimizer computes.
    """

    def __init__(self, halves: Sequence[Measured], make: Callable[[], Measure], device: torch.device) -> None:
        self._halves, self._make, self._device = halves, make, device
        self._measure: Measure | None = None
        self._heads: Heads | None = None
        #: `Clock.begin` is for the engine to call, at the end of the step before the one that is measured
        self.clock = Clock(device)

    def step(self, take: Callable[[], T]) -> tuple[T, dict[str, float]]:
        """Calls `take`, the step; returns its result and the metrics, which are empty if an overflow skipped it."""
        self._measure = self._measure or self._make()
        clips = list({id(each.clip): each.clip for each in self._halves if each.clip is not None}.values())
        self._heads = self._heads or Heads(clips, self._measure.ranks)
        self._measure.clear()
        for halves in self._halves:
            halves.measure = self._measure
        try:
            with heard(self.clock.changed):
                made = take()
        finally:
            for halves in self._halves:
                halves.measure = None
        shares = self.clock.shares()
        if not self._measure.stepped:
            return made, {}
        return made, self._measure.result(self._device) | shares | self._heads.result(self._device)


def _shares(part: Part, shapes: Mapping[str, Sequence[int]], device: torch.device) -> dict[str, float]:
    """Parameter -> the weight of one of its elements on this rank: 1 / number of ranks that hold it. Collective."""
    held = dict.fromkeys(shapes, 0)
    for shard in part.shards:
        held[shard.parameter] += shard.where.numel
    totals = torch.tensor(list(held.values()), dtype=torch.int64).to(wire_of(part.process_group, device))
    add_up(totals, part.process_group)
    return {name: math.prod(shapes[name]) / total for name, total in zip(held, totals.tolist()) if held[name]}


def _parts(shard: Shard, tensor: Tensor) -> Iterable[Tensor]:
    whole = shard.local.view(tensor.detach().reshape(-1))
    if whole.shape[0] == 1:
        return torch.split(whole.view(-1), CHUNK)
    return torch.split(whole, max(1, CHUNK // whole.shape[1]))


def _update(shard: Shard, state: Mapping[str, Any], group: Mapping[str, Any]) -> Iterable[Tensor]:
    """What AdamW, or Lion, made of an element's gradients."""
    if "exp_avg_sq" not in state:
        if shard.tensor.grad is not None:  # without any gradient so far Lion's sign is 0
            for moment, grad in zip(_parts(shard, state["exp_avg"]), _parts(shard, shard.tensor.grad)):
                yield ((moment != 0) | (grad != 0)).float()
        return
    step = float(state["step"] if "step" in state else group["step"])
    one, two = (1 - beta**step for beta in group["betas"])
    for first, second in zip(_parts(shard, state["exp_avg"]), _parts(shard, state["exp_avg_sq"])):
        yield (first.float() / one) / ((second.float() / two).sqrt() + group["eps"])
