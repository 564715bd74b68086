"""The two halves of the optimizer: Newton-Schulz for matrices (`MuonHalf`), AdamW for everything else (`AdamWHalf`).

A half is an update rule with the tensors that it updates. It creates their state, steps them and restores them from a
checkpoint. The optimizers that own parameter groups (`muon.Muon`, and those inside an engine) delegate all of this to
one `Halves`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .adamw import AdamWHalf
from .call import Call
from .exchange import Turns, in_turns
from .frozen import FROZEN, NONE, Frozen, Watch
from .measure import Measure
from .plan import Plan
from .proof import FirstStep
from .qk_clip import Clip
from .update import Update

Groups = Sequence[MutableMapping[str, Any]]
State = MutableMapping[Tensor, Any]


class MuonHalf:
    """The tensors that hold parts of matrices; `Update` has their step.

    Args:
        momentum: name of the momentum in the state, of the tensor's shape.
        options: values of "momentum" and "nesterov", where the parameter groups do not have them.
        offload: whether the momentum is kept in pinned CPU memory between steps.
        beside: returns further state for a new tensor; a "step" in it is incremented by each step.
        dtype: of the momentum between steps: fp32, or bf16, which is rounded stochastically (`rounding`) and has a
            "step" in the state.

    Attributes:
        bytes_each: state of an element.
    """

    name = "Muon"

    def __init__(
        self,
        momentum: str = "momentum_buffer",
        options: Mapping[str, Any] | None = None,
        offload: bool = False,
        beside: Callable[[Tensor], dict[str, Any]] = lambda p: {},
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.momentum, self.options, self.offload, self.dtype = momentum, dict(options or {}), offload, dtype
        self._beside = beside
        self.bytes_each = dtype.itemsize
        self.updates: list[Update] = []
        self._update_of: dict[Tensor, Update | None] = {}

    def add(self, update: Update, tensors: Iterable[Tensor]) -> None:
        """Adds an update with all tensors of its call, including those that hold no part of a matrix on this rank."""
        self.updates.append(update)
        self._update_of |= dict.fromkeys(tensors, update)

    def wait(self, tensors: Iterable[Tensor]) -> None:
        """Tensors of frozen parameters, which are in no plan, and get one once they are unfrozen."""
        self._update_of |= dict.fromkeys(tensors)

    def clear(self) -> None:
        """Drops all tensors and updates; their state is kept."""
        self.updates, self._update_of = [], {}

    @property
    def tensors(self) -> Iterable[Tensor]:
        return self._update_of.keys()

    @property
    def plans(self) -> list[Plan]:
        return [update.plan for update in self.updates]

    def beside(self, p: Tensor) -> dict[str, Any]:
        """The state of a new tensor but its momentum."""
        counted = {"step": torch.tensor(0.0)} if self.dtype != torch.float32 else {}
        return counted | self._beside(p)

    def new_state(self, p: Tensor) -> dict[str, Any]:
        return {**self.beside(p), self.momentum: self._placed(torch.zeros_like(p, dtype=self.dtype))}

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
        """Restores saved state in its own dtype: torch's own `load_state_dict` casts it to the parameter's."""
        # Only the keys of a new state: a checkpoint may hold more, or lack the count. `step` is cloned, as engines may
        # share one tensor.
        kept = {key: torch.as_tensor(state[p].get(key, new)).clone() for key, new in self.beside(p).items()}
        state[p] = {**kept, self.momentum: self._placed(saved[self.momentum].to(p.device, self.dtype, copy=True))}

    def turns(
        self,
        groups: Groups,
        state: State,
        frozen: Frozen = NONE,
        measure: Measure | None = None,
        applied: Callable[[Tensor, str, int], None] | None = None,
    ) -> Turns:
        """Steps the updates of these groups' tensors, and those in which this rank has no tensors. Collective.

        Args:
            groups: parameter groups; tensors of the other half are passed over.
            state: of the optimizer.
            frozen: what stays as it is.
            measure, applied: see `Update.turns`.
        """
        group_of = {p: group for group in groups for p in group["params"] if self._update_of.get(p) is not None}
        called = {id(self._update_of[p]) for p in group_of}
        idle = {id(update) for update in self.updates} - {id(update) for update in self._update_of.values()}
        running = []
        for update in self.updates:
            if id(update) not in called | idle:
                continue
            for p in update.tensors:
                if not state[p]:  # the tensor was on NVMe when the optimizer was attached
                    state[p] = self.new_state(p)
            step = update.turns(
                [self._options(group_of[p], state[p]) for p in update.tensors],
                [state[p][self.momentum] for p in update.tensors],
                self.offload,
                frozen,
                measure,
                applied,
            )
            running.append(step)
        yield from in_turns(running)
        for p in group_of:
            if "step" in state[p]:
                state[p]["step"] += 1

    def _options(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
        counted = {"step": int(state["step"])} if self.dtype != torch.float32 else {}
        return {**group, **self.options, **counted}


class Halves:
    """Both halves of one optimizer. Every tensor belongs to exactly one of them.

    Args:
        muon, rest: the halves.
        calls: those that the engine will make.
        parameters: name -> the client's parameter, for all that these calls hold.
        left_out: the same for parameters that the engine will never train, because they were frozen when it was built.
        advice: what to do about these: the end of an error.

    Attributes:
        outside: frozen parameters that were given to no optimizer; a warning follows if they are unfrozen.
        waiting: tensors that have been frozen since the optimizer was built. They have no state, and no plan.
        measure: set during a step that is measured, otherwise None.
        first_step: set until the first step has been proven.
        clip: QK-Clip, where it is on and these tensors hold heads.
    """

    def __init__(
        self,
        muon: MuonHalf | None = None,
        rest: AdamWHalf | None = None,
        calls: Sequence[Call] = (),
        parameters: Mapping[str, Tensor] | None = None,
        left_out: Mapping[str, Tensor] | None = None,
        advice: str = "",
    ) -> None:
        self.muon, self.adamw = muon or MuonHalf(), rest or AdamWHalf()
        halves = (self.muon, self.adamw)
        self._half_of: dict[Tensor, MuonHalf | AdamWHalf] = {p: half for half in halves for p in half.tensors}
        self._watch = Watch((shard for call in calls for shard in call.shards), parameters)
        self._left_out, self._advice = dict(left_out or {}), advice
        self.outside: Mapping[str, Tensor] = {}
        self.waiting: set[Tensor] = set()
        self.measure: Measure | None = None
        self.first_step: FirstStep | None = None
        self.clip: Clip | None = None

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
        """Creates the state of every tensor that lacks it, on every rank before the first step."""
        for p, half in self._half_of.items():
            # An empty tensor is on NVMe; its state is created in the first step.
            if p.numel() and p not in self.waiting and not state.get(p):
                state[p] = half.new_state(p)

    def turns(self, groups: Groups, state: State) -> Turns:
        """Updates the tensors of these groups, except for parameters that are frozen now. Collective.

        A generator: several optimizers may be stepped in turns (`exchange.in_turns`).

        Raises:
            RuntimeError: for a parameter that requires gradients, and that the engine does not train.
        """
        self.check_left_out()
        tensors = [p for group in groups for p in group["params"]]
        for p in tensors:
            self.of(p)
        frozen = self._watch.look(tensors)
        proof = self.first_step
        if proof is not None:
            proof.begin(tensors, frozen)
        measure = self.measure
        if self.clip is not None:
            self.clip.begin()
        with nullcontext() if measure is None else measure.step(groups, state, self.muon.momentum, frozen):
            yield from self.muon.turns(groups, state, frozen, measure, proof.applied if proof else None)
            stepped = self.adamw.step(groups, state, frozen)
            if self.clip is not None:
                self.clip.apply(tensors)
        if proof is not None:
            proof.stepped(stepped)
            if proof.end():
                self.first_step = None

    def check_left_out(self) -> None:
        """Refuses to go on without a parameter that requires gradients, and that the engine does not train.

        Raises:
            RuntimeError: with its name and what to do.
        """
        for name, p in self._left_out.items():
            if p.requires_grad:
                raise RuntimeError(
                    f"parameter {name} requires gradients now, was frozen when the optimizer was built, and would not "
                    f"be trained: {self._advice}"
                )
        if any(p.requires_grad for p in self.outside.values()):
            names = [name for name, p in self.outside.items() if p.requires_grad]
            self.outside = {}  # once
            warnings.warn(
                f"{len(names)} parameters require gradients now, were given to no optimizer and are not trained: "
                f"{', '.join(names[:3])}{', ...' * (len(names) > 3)}",
                stacklevel=2,
            )

    def load(
        self,
        optimizer: Optimizer,
        state_dict: Mapping[str, Any],
        load: Callable[[Any], None],
    ) -> None:
        """Loads a state dict into the optimizer with `load`, torch's own; then each half restores its own state.

        Args:
            optimizer: the optimizer that has these halves.
            state_dict: as torch's optimizers save it.
            load: loads it. What was frozen in the saved run, from its start on, has no state there, and gets a new one.
        """
        pairs = list(zip(optimizer.param_groups, state_dict["param_groups"], strict=True))
        saved = {
            p: state_dict["state"].get(i, {})
            for mine, theirs in pairs
            for p, i in zip(mine["params"], theirs["params"])
        }
        fresh = {mine["params"][at] for mine, theirs in pairs for at in theirs.get(FROZEN, ())}
        matrices = [p for p in saved if self.of(p) is self.muon and p.numel() and p not in fresh]
        for p in matrices:
            self.muon.check(p, saved[p])  # before anything is changed
        load(state_dict)
        for p in matrices:
            self.muon.adopt(p, optimizer.state, saved[p])
        for group in optimizer.param_groups:
            if rest := [p for p in group["params"] if self.of(p) is self.adamw and p not in fresh]:
                self.adamw.adopt(group, rest, optimizer.state, saved)
        self.new_states(optimizer.state)

    def held(self) -> tuple[int, int]:
        """Number of elements on this rank that have state: of matrices, of the rest."""
        muon, rest = (sum(p.numel() for p in half.tensors if p not in self.waiting) for half in (self.muon, self.adamw))
        return muon, rest
