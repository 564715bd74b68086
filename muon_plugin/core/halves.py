"""The two halves of the optimizer: Newton-Schulz for matrices (`MuonHalf`), AdamW for everything else (`AdamWHalf`).

A half is a rule and the tensors that follow it: their new state, their step, what they take over from a checkpoint. The
optimizers that own parameter groups (`muon.Muon`, and those inside an engine) leave all of that to one `Halves`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .adamw import AdamWHalf
from .layout import Shard
from .measure import Measure
from .plan import Plan
from .update import Update

Groups = Sequence[MutableMapping[str, Any]]
State = MutableMapping[Tensor, Any]


@dataclass(frozen=True)
class Call:
    """One call of the optimizer's step, as the engine will make it.

    Attributes:
        group: the number of the parameter group.
        tensors: the group's "params" in that call. ZeRO-3 makes one call for each of a group's sub-groups, with one
            flat tensor each; elsewhere a group has one call with all its tensors.
        shards: this rank's part of each parameter.
        process_group: its ranks together hold every element of every matrix; None is the default group.
    """

    group: int
    tensors: tuple[Tensor, ...]
    shards: tuple[Shard, ...]
    process_group: Any = None


class MuonHalf:
    """The tensors that hold parts of matrices; `Update` has their step.

    Args:
        momentum: its name in the state; fp32, like the tensor in shape.
        options: what the parameter groups do not set: "momentum", "nesterov".
        offload: the momentum is kept in pinned CPU memory between steps.
        beside: further state of a new tensor; a "step" in it counts steps.
    """

    name = "Muon"

    def __init__(
        self,
        momentum: str = "momentum_buffer",
        options: Mapping[str, Any] | None = None,
        offload: bool = False,
        beside: Callable[[Tensor], dict[str, Any]] = lambda p: {},
    ) -> None:
        self.momentum, self.options, self.offload, self.beside = momentum, dict(options or {}), offload, beside
        self.updates: list[Update] = []
        self._update_of: dict[Tensor, Update] = {}

    def add(self, update: Update, tensors: Iterable[Tensor]) -> None:
        """An update to step, and all tensors of its call, also those in which this rank holds no part of a matrix."""
        self.updates.append(update)
        self._update_of |= dict.fromkeys(tensors, update)

    @property
    def tensors(self) -> Iterable[Tensor]:
        return self._update_of.keys()

    @property
    def plans(self) -> list[Plan]:
        return [update.plan for update in self.updates]

    def new_state(self, p: Tensor) -> dict[str, Any]:
        return {**self.beside(p), self.momentum: self._placed(torch.zeros_like(p, dtype=torch.float32))}

    def _placed(self, momentum: Tensor) -> Tensor:
        return momentum.cpu().pin_memory() if self.offload and momentum.device.type != "cpu" else momentum

    def adopt(self, p: Tensor, state: State, saved: Mapping[str, Any]) -> None:
        """Takes over a saved state as it was: torch casts state to the parameter's dtype, but momentum stays fp32.

        Raises:
            ValueError: if the momentum was not saved.
        """
        if self.momentum not in saved:
            raise ValueError(
                f"the checkpoint has no {self.momentum} for a tensor of shape {list(p.shape)} that holds matrices; it "
                f"has {sorted(saved)}. Load a checkpoint of this optimizer, or the weights alone"
            )
        # Only what a new state has: a checkpoint may hold more. A step is cloned, since an engine may share one.
        kept = {key: state[p][key].clone() for key in self.beside(p)}
        state[p] = {**kept, self.momentum: self._placed(saved[self.momentum].to(p.device, torch.float32, copy=True))}

    def step(self, groups: Groups, state: State, measure: Measure | None = None) -> None:
        """Steps the updates of these groups' tensors, and those of which this rank holds nothing. Collective."""
        group_of = {p: group for group in groups for p in group["params"] if p in self._update_of}
        called = {id(self._update_of[p]) for p in group_of}
        idle = {id(update) for update in self.updates} - {id(update) for update in self._update_of.values()}
        for update in self.updates:
            if id(update) not in called | idle:
                continue
            for p in update.tensors:
                if not state[p]:  # its tensor was on NVMe when the optimizer was attached
                    state[p] = self.new_state(p)
            update.step(
                [{**group_of[p], **self.options} for p in update.tensors],
                [state[p][self.momentum] for p in update.tensors],
                self.offload,
                None if measure is None else measure.update,
            )
        for p in group_of:
            if "step" in state[p]:
                state[p]["step"] += 1


class Halves:
    """Both halves of one optimizer. Every tensor is in exactly one.

    Attributes:
        measure: set for a step that is to be measured.
    """

    def __init__(self, muon: MuonHalf, rest: AdamWHalf) -> None:
        self.muon, self.adamw = muon, rest
        self._half_of: dict[Tensor, MuonHalf | AdamWHalf] = {p: half for half in (muon, rest) for p in half.tensors}
        self.measure: Measure | None = None

    def of(self, p: Tensor) -> MuonHalf | AdamWHalf:
        """The half that a tensor belongs to.

        Raises:
            RuntimeError: if it belongs to none: the engine handed over another tensor than the planned one.
        """
        try:
            return self._half_of[p]
        except KeyError:
            raise RuntimeError(
                f"a tensor of shape {list(p.shape)} in Muon's parameter groups is none of those that it planned for: "
                "an engine replaced them. Call muon_plugin.register() before the engine is built"
            ) from None

    def new_states(self, state: State) -> None:
        """Creates the state of every tensor, on every rank before the first step."""
        for p, half in self._half_of.items():
            if p.numel():  # elsewhere it lies on NVMe, and its state is made when it first comes from there
                state[p] = half.new_state(p)

    def step(self, groups: Groups, state: State) -> None:
        """Updates the tensors of these groups. Collective."""
        for group in groups:
            for p in group["params"]:
                self.of(p)
        with nullcontext() if self.measure is None else self.measure.step(groups, state, self.muon.momentum):
            self.muon.step(groups, state, self.measure)
            self.adamw.step(groups, state)

    def load(self, optimizer: Optimizer, state_dict: Mapping[str, Any], load: Callable[[Any], None]) -> None:
        """Restores the optimizer that owns the groups with `load`, torch's own; then each half adopts its state."""
        pairs = zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
        saved = {
            p: state_dict["state"].get(i, {})
            for mine, theirs in pairs
            for p, i in zip(mine["params"], theirs["params"])
        }
        load(state_dict)
        for group in optimizer.param_groups:
            rest = [p for p in group["params"] if self.of(p) is self.adamw]
            for p in group["params"]:
                if self.of(p) is self.muon and p.numel():
                    self.muon.adopt(p, optimizer.state, saved[p])
            if rest:
                self.adamw.adopt(group, rest, optimizer.state)

    def held(self) -> tuple[int, int]:
        """Elements on this rank: of matrices, and of the rest."""
        muon, rest = (sum(p.numel() for p in half.tensors) for half in (self.muon, self.adamw))
        return muon, rest
