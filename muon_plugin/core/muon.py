"""Muon for the matrices of a model, AdamW for the rest: one ``torch.optim.Optimizer`` for whole or cut tensors.

Here are the parameter groups, the state and its checkpoints; `update` has the formulas and the step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import adamw, report
from .agreement import agree, together, world_of
from .layout import Shard
from .measure import Measure
from .phases import phase
from .plan import Plan
from .routing import Routing, route
from .settings import Settings, scale_for
from .update import Update


@dataclass(frozen=True)
class Holding:
    """One call of the step, as the engine will make it: the tensors it hands over and the shards in them.

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


class Muon(Optimizer):
    """Muon as in "Muon is Scalable for LLM Training" (arXiv 2502.16982); see the module for the formulas.

    Args:
        params: ``model.named_parameters()``, or parameter groups whose ``"params"`` are (name, parameter) pairs. Names
            decide which parameters are embeddings or heads, so they are needed.
        model: the module itself, if at hand: module types and ``model.config`` then help to tell embeddings and fused
            projections.
        process_group: ranks that hold replicas of the parameters (plain DDP), or an engine's ranks of one pipeline
            stage; the default group where there is one. Each matrix is orthogonalized once among them.
        engine: used by the engine hooks: the optimizer waits for `attach`, and its step does nothing until then.
        shapes: used by the engine hooks: the whole shape of each parameter that the engine has cut, by name.
        **settings: see `muon_plugin.settings.Settings`: lr, weight_decay, momentum, ...

    State, created on every rank before the first step: ``momentum_buffer`` (its name under DeepSpeed is Adam's,
    ``exp_avg``; fp32 in the engines, like the parameter
    alone) for tensors with matrices; ``step``, ``exp_avg``, ``exp_avg_sq`` for the rest.

    Raises:
        ValueError: for a bad setting or parameter, with what is allowed; on every rank, if any rank has one.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        model: nn.Module | None = None,
        process_group: Any = None,
        engine: str | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        **settings: Any,
    ) -> None:
        #: the engine that it belongs to, or None
        self.engine = engine
        self._complete = self._ready = False
        #: the first tensor of a group with matrices -> its update
        self._updates: dict[Tensor, Update] = {}
        #: what `attach` was given
        self.holdings: tuple[Holding, ...] = ()
        self._adamw: Optimizer | None = None
        self._adamw_name = "none"
        #: (group of ranks that should be replicas, checked at the first step), without an engine
        self._replicas: tuple[Any] | None = None
        #: set for a step that is to be measured
        self.measure: Measure | None = None

        def prepare() -> tuple[Settings, list[dict[str, Any]], Routing, dict[Tensor, str]]:
            checked = Settings.from_dict(settings)
            groups = _named_groups(params)
            whole = {name: _shape(name, p) for group in groups for name, p in group["params"]} | dict(shapes or {})
            routing = route(whole, model=model, exclude=checked.exclude, split=checked.split)
            one_of_many = engine is not None and process_group is not None  # a stage of a pipeline
            if not routing.matrices and not checked.exclude and not one_of_many:
                raise ValueError(
                    f"none of the {len(whole)} parameters is a matrix of a hidden layer, nothing is left for Muon: "
                    f"{dict(list(routing.adamw.items())[:5])}. Give whole, unflattened parameters, or use AdamW"
                )
            names = {p: name for group in groups for name, p in group["params"]}
            return checked, _halves(groups, routing, checked), routing, names

        # One rank's bad setting is every rank's error, and a model that differs is found before anything is exchanged.
        self.settings, groups, self.routing, names = together(prepare, process_group)
        agree(
            "the model or the settings of Muon",
            [*self.routing.describe(), repr(self.settings)],
            "Build the same model from the same configuration on every rank",
            process_group,
        )
        super().__init__(groups, {"lr": self.settings.lr, "weight_decay": self.settings.weight_decay})
        self._complete = True
        for group, members in zip(self.param_groups, groups):
            group["layout"] = _layout_digest([names[p] for p in members["params"]], self.routing.shapes)
        if engine is None:
            self.attach([_whole(i, group["params"], names, process_group) for i, group in enumerate(self.param_groups)])
            self._replicas = (process_group,)

    def attach(self, holdings: Sequence[Holding], device: torch.device | None = None) -> None:
        """Takes the tensors of every call to come, creates the state, and plans. Collective.

        Args:
            holdings: one for each call, in the order of the calls.
            device: where matrices are orthogonalized: where their tensors are, if not given.
        """
        self.detach()
        self.holdings = tuple(holdings)
        rest: list[Holding] = []
        for holding in holdings:
            if not self.param_groups[holding.group]["use_muon"]:
                rest.append(holding)
            else:
                self._updates[holding.tensors[0]] = Update(
                    self.routing.matrices,
                    holding.shards,
                    holding.process_group,
                    device or holding.tensors[0].device,
                    self.settings.newton_schulz,
                    lambda m: scale_for(self.settings.adjust_lr_fn, *m.out_in),
                    normalize=self.settings.adjust_lr_fn == "update_norm",
                )
                for p in holding.tensors:
                    if p.numel():  # elsewhere it lies on NVMe, and its state is made when it first comes from there
                        self.state[p] = self._new_momentum(p)
        if rest:
            self._attach_adamw(rest, holdings[0].process_group)
        self._ready = True

    def _attach_adamw(self, holdings: Sequence[Holding], process_group: Any) -> None:
        calls = [{**self.param_groups[holding.group], "params": list(holding.tensors)} for holding in holdings]
        self._adamw, self._adamw_name = together(lambda: adamw.build(calls, self.settings.adamw), process_group)
        advice = "Install the same packages on every rank, or set adamw"
        agree("the AdamW to use", [self._adamw_name], advice, process_group)
        for holding in holdings:
            self.param_groups[holding.group].update(adamw.own_options(self._adamw))
            for p in holding.tensors:
                if p.numel():
                    self.state[p] = adamw.new_state(self._adamw, p)

    @property
    def momentum_name(self) -> str:
        """Its name in the state: DeepSpeed moves, reshards and converts what has Adam's names."""
        return "momentum_buffer" if self.engine is None else "exp_avg"

    def _new_momentum(self, p: Tensor) -> dict[str, Tensor]:
        return {self.momentum_name: torch.zeros_like(p, dtype=torch.float32)}

    def detach(self) -> None:
        """Lets go of the tensors: until `attach`, a step does nothing. For an engine that takes over the optimizer."""
        self.state.clear()
        self.holdings = ()
        self._updates, self._ready, self._replicas = {}, False, None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the tensors of ``self.param_groups`` (engines may call it for one group at a time). Collective."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._ready:
            return loss  # DeepSpeed steps once on zeros while it builds its wrapper: that must change nothing
        called = [group for group in self.param_groups if group["params"]]
        if any(group["use_muon"] and group["params"][0] not in self._updates for group in called):
            raise RuntimeError(
                "the tensors of Muon's parameter groups are not those that it planned for: an engine replaced them. "
                "Call muon_plugin.register() before the engine is built"
            )
        if self._replicas is not None:
            self._check_replicas()
        with nullcontext() if self.measure is None else self.measure.step(called):
            self._step(called)
        return loss

    def _step(self, called: Sequence[dict[str, Any]]) -> None:
        for group in called:
            if group["use_muon"]:
                first = group["params"][0]
                update = self._updates[first]
                for p in update.tensors:
                    if not self.state[p]:
                        self.state[p] = self._new_momentum(p)
                momenta = [self.state[p][self.momentum_name] for p in update.tensors]
                measured = None if self.measure is None else partial(self.measure.update, first)
                update.step([group] * len(update.tensors), momenta, measured=measured)
        rest = [group for group in called if not group["use_muon"]]
        if rest and self._adamw is not None:
            self._adamw.state, self._adamw.param_groups = self.state, rest
            with phase("adamw"):
                self._adamw.step()

    def _check_replicas(self) -> None:
        """Once, at the first step (DDP may make the replicas later): ranks with models of their own mix updates."""
        (group,), self._replicas = self._replicas or (None,), None
        if world_of(group)[1] > 1:
            tensors = [p for g in self.param_groups for p in g["params"]]
            sums = [[t.double().sum().item() for t in (p, p.grad) if t is not None] for p in tensors]
            agree(
                "the weights or the gradients",
                [f"sums of weights and gradients {values}" for values in sums],
                "Without an engine, all ranks must hold replicas (DistributedDataParallel). For a model of its own on "
                "each rank, pass process_group=torch.distributed.new_group([rank]) made for each rank",
                group,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is built.

        Raises:
            RuntimeError: afterwards: the plan is made once, for all parameters.
        """
        if self._complete:
            raise RuntimeError("Muon plans once, for all parameters: build a new Muon with the added parameter group")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state that was saved with the same routing.

        Raises:
            ValueError: if the saved groups were routed otherwise (another `exclude`, another optimizer).
        """
        saved, current = state_dict["param_groups"], self.param_groups
        self.check_saved(saved)
        momenta = {
            p: state_dict["state"][i][self.momentum_name]
            for g, saved_group in zip(current, saved)
            for p, i in zip(g["params"], saved_group["params"])
            if g["use_muon"]
        }
        super().load_state_dict(state_dict)
        for p, momentum in momenta.items():  # torch casts state to the parameter's type; momentum stays fp32
            self.state[p] = {self.momentum_name: momentum.to(p.device, torch.float32, copy=True)}
        for group in self.param_groups:
            if self._adamw is not None and not group["use_muon"]:
                adamw.adopt(self._adamw, group, group["params"], self.state)

    def check_saved(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Refuses the parameter groups of another optimizer, or of another routing.

        Raises:
            ValueError: with what to do instead.
        """
        ways = [[(g.get("name"), g.get("layout")) for g in groups] for groups in (saved, self.param_groups)]
        if ways[0] == ways[1]:
            return
        if not any(layout for _, layout in ways[0]):
            what = "was saved by another optimizer than muon_plugin's Muon"
        else:
            what = f"has parameter groups {ways[0]}, this run has {ways[1]} (name, digest of the parameters in order)"
        advice = {
            None: "load the weights alone",
            "deepspeed": "python -m muon_plugin.deepspeed.convert makes a universal checkpoint, from which a run takes "
            "over what has the same meaning; or load the weights alone (load_module_only=True)",
        }[self.engine]
        raise ValueError(
            f"the checkpoint's optimizer {what}: load it with the model and the settings it was saved with (exclude, "
            f"parameter groups), or {advice}"
        )

    def set_step(self, holding: Holding, step: float) -> None:
        """Tells AdamW how many steps the moments of these tensors have behind them."""
        if self._adamw is not None:
            for p in holding.tensors:
                self.state[p]["step"] = step
            adamw.adopt(self._adamw, self.param_groups[holding.group], holding.tensors, self.state)

    @property
    def plans(self) -> list[Plan]:
        """One plan for each call with matrices, in order."""
        return [update.plan for update in self._updates.values()]

    def summary(self) -> str:
        """The start-up table: what goes to Muon and to AdamW, the plan's balance, bytes and memory."""
        held_muon = sum(p.numel() for p, state in self.state.items() if "exp_avg_sq" not in state)
        held_adamw = sum(p.numel() for p, state in self.state.items() if "exp_avg_sq" in state)
        options = report.options(self.settings, self.param_groups)
        plans: dict[str, list[Plan]] = {}  # experts are shared by other ranks than the dense layers
        for holding in self.holdings:
            group = self.param_groups[holding.group]
            if group["use_muon"]:
                label = group["name"] if group.get("moe") else "dense layers"
                plans.setdefault(label, []).append(self._updates[holding.tensors[0]].plan)
        return report.table(self.routing, options, self._adamw_name, plans, held_muon, held_adamw)


def _whole(group: int, tensors: Sequence[Tensor], names: Mapping[Tensor, str], process_group: Any) -> Holding:
    shards = tuple(Shard.of_range(names[p], 0, p.numel(), p) for p in tensors)
    return Holding(group, tuple(tensors), shards, process_group)


def _named_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """The client's parameter groups, their "params" as (name, parameter) pairs, frozen parameters left out."""
    given = list(params)
    if not given:
        raise ValueError("params is empty: Muon needs model.named_parameters(), or parameter groups of such pairs")
    groups = [dict(item) for item in given] if isinstance(given[0], dict) else [{"params": given}]
    seen: set[Tensor] = set()
    for group in groups:
        pairs = list(group.get("params", ()))
        for pair in pairs:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
                raise ValueError(
                    f"params holds a {type(pair).__name__} without a name; allowed: (name, parameter) pairs such as "
                    "model.named_parameters(), whose names tell embeddings and heads from matrices"
                )
        group["params"] = [(name, p) for name, p in pairs if p.requires_grad]
        for name, p in group["params"]:
            if p in seen:
                raise ValueError(f"parameter {name} is in params twice; allowed: each parameter once")
            seen.add(p)
    if not seen:
        raise ValueError("params holds no trainable parameter (requires_grad is false for all of them)")
    return groups


def _shape(name: str, p: Tensor) -> tuple[int, ...]:
    if p.is_complex() or not p.is_floating_point() or p.is_sparse:
        raise ValueError(f"parameter {name} is {p.dtype}, {p.layout}; allowed: dense real floating-point parameters")
    if type(p.data).__name__ == "DTensor":
        raise ValueError(f"parameter {name} is a DTensor; allowed: whole tensors (one process, plain DDP) or an engine")
    if not p.is_contiguous():
        raise ValueError(f"parameter {name} is not contiguous (strides {p.stride()}); allowed: contiguous parameters")
    return tuple(p.shape)


def _layout_digest(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Which parameters a group holds, in order: ZeRO keeps a group as one flat tensor that does not say."""
    lines = "\n".join(f"{name} {list(shapes[name])}" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _halves(groups: list[dict[str, Any]], routing: Routing, settings: Settings) -> list[dict[str, Any]]:
    """Each client group as a group of matrices and one of the rest.

    Groups with equal options are merged: balance and overlap hold within a group, since ZeRO steps group by group.
    The order depends on the model alone, not on the world size: DeepSpeed resumes flat groups by position.
    """
    merged: dict[str, dict[str, Any]] = {}
    for group in groups:
        given = {key: value for key, value in group.items() if key != "params"}
        for muon in (True, False):
            members = [p for name, p in group["params"] if (name not in routing.adamw) is muon]
            options = settings.of_group(given, muon)
            label = "-".join([*([given["name"]] if "name" in given else []), "muon" if muon else "adamw"])
            if given.get("moe"):
                label = given["name"]  # DeepSpeed's name of an expert parallel group
            key = repr((label, options))
            if members:
                into = merged.setdefault(key, {"params": [], "use_muon": muon, "name": label, **options})
                into["params"] += members
    return list(merged.values())
