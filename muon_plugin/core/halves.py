"""The two halves of the optimizer: Newton-Schulz for matrices (`MuonHalf`), AdamW for everything else (`AdamWHalf`).

A half is an update rule with the tensors that it updates. It creates their state, steps them and restores them from a
checkpoint. The optimizers that own parameter groups (`muon.Muon`, and those inside an engine) delegate all of this to
one `Halves`.
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
        process_group: the ranks that together hold every element of every matrix; None is the default group.
    """

    group: int
    tensors: tuple[Tensor, ...]
    shards: tuple[Shard, ...]
    process_group: Any = None


class MuonHalf:
    """The tensors that hold parts of matrices; `Update` has their step.

    Args:
        momentum: name of the momentum in the state: fp32, of the tensor's shape.
        options: values of "momentum" and "nesterov", where the parameter groups do not have them.
        offload: whether the momentum is kept in pinned CPU memory between steps.
        beside: returns further state for a new tensor; a "step" in it is incremented by each step.
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
        """Adds an update with all tensors of its call, including those that hold no part of a matrix on this rank."""
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

    def check(self, p: Tensor, saved: Mapping[str, Any]) -> None:
        """Whether `adopt` can restore this state.

        Raises:
            ValueError: if the checkpoint has no momentum for this tensor.
        """
        if self.momentum not in saved:
            raise ValueError(
                f"the checkpoint has no {self.momentum} for a tensor of shape {list(p.shape)} that holds matrices; it "
                f"has {sorted(saved)}. Load a checkpoint that this optimizer saved, or only the weights"
            )

    def adopt(self, p: Tensor, state: State, saved: Mapping[str, Any]) -> None:
        """Restores saved state in fp32: torch's own `load_state_dict` casts it to the parameter's dtype."""
        # Only the keys of a new state: a checkpoint may hold more. `step` is cloned, as engines may share one tensor.
        kept = {key: state[p][key].clone() for key in self.beside(p)}
        state[p] = {**kept, self.momentum: self._placed(saved[self.momentum].to(p.device, torch.float32, copy=True))}

    def step(self, groups: Groups, state: State, measure: Measure | None = None) -> None:
        """Steps the updates of these groups' tensors, and those in which this rank has no tensors. Collective."""
        group_of = {p: group for group in groups for p in group["params"] if p in self._update_of}
        called = {id(self._update_of[p]) for p in group_of}
        idle = {id(update) for update in self.updates} - {id(update) for update in self._update_of.values()}
        for update in self.updates:
            if id(update) not in called | idle:
                continue
            for p in update.tensors:
                if not state[p]:  # the tensor was on NVMe when the optimizer was attached
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
    """Both halves of one optimizer. Every tensor belongs to exactly one of them.

    Attributes:
        measure: set during a step that is measured, otherwise None.
    """

    def __init__(self, muon: MuonHalf, rest: AdamWHalf) -> None:
        self.muon, self.adamw = muon, rest
        self._half_of: dict[Tensor, MuonHalf | AdamWHalf] = {p: half for half in (muon, rest) for p in half.tensors}
        self.measure: Measure | None = None

    def of(self, p: Tensor) -> MuonHalf | AdamWHalf:
        """The half that a tensor belongs to.

        Raises:
            RuntimeError: if it belongs to neither, because an engine replaced the tensors after planning.
        """
        try:
            return self._half_of[p]
        except KeyError:
            raise RuntimeError(
                f"Muon's parameter groups hold a tensor of shape {list(p.shape)} that is not in its plan: an engine "
                "has replaced the parameters. Call muon_plugin.register() before the engine is built"
            ) from None

    def new_states(self, state: State) -> None:
        """Creates the state of every tensor that has none, on every rank before the first step."""
        for p, half in self._half_of.items():
            if p.numel() and not state.get(p):  # an empty tensor is on NVMe; its state is created in the first step
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
        """Loads a state dict into the optimizer with `load`, torch's own; then each half restores its own state."""
        pairs = zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
        saved = {
            p: state_dict["state"].get(i, {})
            for mine, theirs in pairs
            for p, i in zip(mine["params"], theirs["params"])
        }
        matrices = [p for p in saved if self.of(p) is self.muon and p.numel()]
        for p in matrices:
            self.muon.check(p, saved[p])  # before anything is changed
        load(state_dict)
        for p in matrices:
            self.muon.adopt(p, optimizer.state, saved[p])
        for group in optimizer.param_groups:
            if rest := [p for p in group["params"] if self.of(p) is self.adamw]:
                self.adamw.adopt(group, rest, optimizer.state)

    def held(self) -> tuple[int, int]:
        """Number of elements on this rank: of matrices, of the rest."""
        muon, rest = (sum(p.numel() for p in half.tensors) for half in (self.muon, self.adamw))
        return muon, rest
