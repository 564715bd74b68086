"""Muon for the matrices of a model, AdamW for the rest: one ``torch.optim.Optimizer`` for whole or sharded tensors.

This module defines the optimizer's parameter groups, their checks and their checkpoints. `halves` decides how each
tensor is updated, and `update` implements the step of the matrices.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import adamw, phases, report
from .adamw import AdamWHalf
from .agreement import agree, checksum, together, world_of
from .groups import (
    Halved,
    Host,
    check_parameter,
    layout_digest,
    named_groups,
    no_engine,
    notes_on,
    parameter_groups,
)
from .halves import Call, Halves, MuonHalf
from .layout import Shard
from .plan import Plan
from .routing import Routing, route
from .saved import OWN_KEYS, as_ours, check_halves, difference, same_groups
from .settings import Settings, scale_for
from .update import Update

#: What the table says where Muon has nothing to do.
NO_MATRIX = "no parameter is a matrix of a hidden layer: AdamW trains all of them"
NOTHING = "no parameter requires gradients: nothing is trained"


class Muon(Optimizer):
    r"""Muon as in "Muon is Scalable for LLM Training" (arXiv 2502.16982), with AdamW for all other parameters.

    For every matrix W (A x B) with gradient G, learning rate eta, weight decay lambda and momentum mu::

        M <- M + (1 - mu) (G - M)                         momentum, fp32 (Eq. 1, as an exponential average)
        D  = G + mu (M - G)                               Nesterov; without it D = M
        O  = NewtonSchulz(D)                              bf16, about U V^T of D's SVD (Eq. 2)
        W <- W (1 - eta lambda) - eta s(A, B) O           s = 0.2 sqrt(max(A, B)) (Eqs. 3 and 4)

    Newton-Schulz normalizes its input, so the exponential average gives what Eq. 1's sum would. With s(A, B), the
    learning rate and weight decay tuned for AdamW carry over. Embeddings, the LM head, norms and biases are trained by
    AdamW with the same learning rate and weight decay.

    Args:
        params: ``model.named_parameters()``, or parameter groups whose ``"params"`` are (name, parameter) pairs. Names
            are required, because they decide which parameters are embeddings or heads. Parameters are dense,
            contiguous and of a real floating-point dtype; frozen ones are ignored.
        model: the module itself, if available: module types and ``model.config`` then help to recognize embeddings
            and fused projections.
        process_group: the ranks that hold replicas of the parameters (plain DDP), by default those of the default
            group; under an engine, all ranks that train with it. Each matrix is orthogonalized on one of these ranks.
        stage: passed by an engine's hooks: the ranks of `process_group` that hold this pipeline stage, if there are
            several stages.
        host: passed by an engine's hooks: the optimizer then waits for `attach`, and `step` does nothing until then.
        shapes: passed by an engine's hooks: the whole shape of each parameter that the engine has sharded, by name.
        **settings: see `muon_plugin.core.settings.Settings`: lr, weight_decay, momentum, ...

    State, created on every rank before the first step: for tensors that hold matrices ``momentum_buffer``, fp32 and of
    the tensor's shape (under an engine the `host` names it); for the rest ``step``, ``exp_avg`` and ``exp_avg_sq``.

    Raises:
        ValueError: for an invalid setting or parameter, with the allowed values; on every rank, if any rank has one.

    Example::

        optimizer = muon_plugin.Muon(model.named_parameters(), lr=4.2e-4, weight_decay=0.1)
        loss.backward()
        optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        model: nn.Module | None = None,
        process_group: Any = None,
        stage: Any = None,
        host: Host | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        **settings: Any,
    ) -> None:
        self.host = host or no_engine()
        #: whether an engine decides which tensors are stepped
        self._in_engine = host is not None
        self._complete = False
        #: empty until the optimizer is attached to its tensors
        self.halves = Halves(MuonHalf(), AdamWHalf())
        #: what `attach` was given
        self.calls: tuple[Call, ...] = ()
        self.process_group = process_group
        #: whether to check at the first step that the ranks of `process_group` hold replicas
        self._check_replicas = False
        #: for groups that are added later
        self._model = model if host is None else None
        alike = process_group if stage is None else stage

        def prepare() -> tuple[Settings, list[dict[str, Any]], Routing, dict[Tensor, str]]:
            checked = Settings.from_dict(settings)
            groups = named_groups(params)
            names = {p: name for group in groups for name, p in group["params"]}
            for p, name in names.items():
                check_parameter(name, p, any_strides=host is None)
            whole = {name: (shapes or {}).get(name, self.host.shape(p)) for p, name in names.items()}
            if not whole:  # patterns, which have nothing to match, are no mistake: they may come with another model
                return checked, [], Routing((), {}, {}, (NOTHING,)), names
            routing = route(
                whole, model=model, exclude=checked.exclude, split=checked.split, layers=self.host.layers(model)
            )
            if host is None:
                _check_matrices(names, routing)
            split = parameter_groups(groups, routing, checked, self.host)
            routing = replace(routing, notes=(*routing.notes, *notes_on(groups, self.host)))
            if not routing.matrices and stage is None:
                routing = replace(routing, notes=(*routing.notes, NO_MATRIX))
            return checked, split, routing, names

        # One rank's bad setting is every rank's error, and a model that differs is found before anything is exchanged.
        #: names: parameter -> its name in `routing`
        self.settings, groups, self.routing, self.names = together(prepare, alike)
        agree(
            "the model or the settings of Muon",
            [*self.routing.describe(), repr(self.settings)],
            "Build the same model from the same configuration on every rank",
            alike,
        )
        # torch wants a group even if there is nothing to train, as in a reference model.
        defaults = {"lr": self.settings.lr, "weight_decay": self.settings.weight_decay}
        super().__init__(groups or [{"params": [], "use_muon": False, "name": "adamw", "client_group": 0}], defaults)
        self._complete = True
        #: all groups, also while an engine leaves one of them in `param_groups` for each call of `step`
        self._groups = self.param_groups
        self._set_digests()
        if host is None and all(self.routing.shapes[name] == tuple(p.shape) for p, name in self.names.items()):
            self._attach_alone()

    def _attach_alone(self) -> None:
        held = [(i, group["params"]) for i, group in enumerate(self.param_groups) if group["params"]]
        self.attach([_whole(i, parameters, self.names, self.process_group) for i, parameters in held])
        self._check_replicas = True
        if not self.routing.matrices:
            warnings.warn(f"muon_plugin.Muon: {self.routing.notes[-1]}", stacklevel=3)

    def _set_digests(self) -> None:
        #: the names of each group's parameters, which an engine replaces by others in `param_groups`
        self._members = [[self.names[p] for p in group["params"]] for group in self.param_groups]
        for group, names in zip(self.param_groups, self._members):
            group["layout"] = layout_digest(names, self.routing.shapes)
        apart = self.settings.muon_lr is not None or self.settings.adam_lr is not None
        self._halved = [] if apart else Halved.among(self.param_groups)

    def attach(self, calls: Sequence[Call], device: torch.device | None = None) -> None:
        """Binds the optimizer to the tensors that an engine will step, creates their state and the plans. Collective.

        Args:
            calls: one for each call of the inner step that the engine will make, in that order.
            device: where matrices are orthogonalized; by default the device of the call's tensors.
        """
        self.detach()
        self._bind(calls, device)

    def _bind(self, calls: Sequence[Call], device: torch.device | None = None) -> None:
        """Plans these calls, and creates the state of the tensors that have none."""
        self.calls = tuple(calls)
        phases.start(self.process_group, any(self.param_groups[call.group]["use_muon"] for call in calls))
        muon = MuonHalf(self.host.momentum, offload=self.settings.offload)
        for call in self.calls:
            if self.param_groups[call.group]["use_muon"]:
                update = Update(
                    self.routing.matrices,
                    call.shards,
                    call.process_group,
                    device or call.tensors[0].device,
                    self.settings.newton_schulz,
                    lambda m: scale_for(self.settings.adjust_lr_fn, *m.out_in),
                    normalize=self.settings.adjust_lr_fn == "update_norm",
                )
                muon.add(update, call.tensors)
        self.halves = Halves(muon, self._new_adamw([c for c in calls if not self.param_groups[c.group]["use_muon"]]))
        self.halves.new_states(self.state)

    def _new_adamw(self, calls: Sequence[Call]) -> AdamWHalf:
        if not calls:
            return AdamWHalf()
        groups = [{**self.param_groups[call.group], "params": list(call.tensors)} for call in calls]
        process_group = self.calls[0].process_group
        optimizer, label = together(lambda: adamw.build(groups, self.settings.adamw), process_group)
        agree("the AdamW to use", [label], "Install the same packages on every rank, or set adamw", process_group)
        for call in calls:
            self.param_groups[call.group].update(adamw.own_options(optimizer))
        return AdamWHalf(optimizer, label, (p for call in calls for p in call.tensors))

    def detach(self) -> None:
        """Discards the tensors, their state and the plans; `step` does nothing until the next `attach`."""
        self.state.clear()
        self.calls, self.halves, self._check_replicas = (), Halves(MuonHalf(), AdamWHalf()), False

    def hand_over(self, host: Host, names: Mapping[Tensor, str], process_group: Any = None) -> None:
        """Transfers an optimizer that was built without an engine to `host`, whose hooks then call `attach`.

        Args:
            host: the engine.
            process_group: all ranks that train with the engine; by default those of the default group.
            names: parameter -> its name in the engine's module, which its checkpoints use. The client may have called
                the same parameter by another name: that of a submodule, or without a wrapper's prefix.

        Raises:
            RuntimeError: if it has stepped or restored a checkpoint: the engine's shards start from new state.
            ValueError: for a parameter that the engine's module does not have.
        """
        for p, name in self.names.items():
            if p not in names:
                raise ValueError(
                    f"the optimizer holds {name} {list(self.routing.shapes[name])}, which the model given to the "
                    "engine does not have; allowed: an optimizer of that model's parameters"
                )
            check_parameter(name, p)
        state = (value for of_tensor in self.state.values() for value in of_tensor.values())
        if any(bool(torch.as_tensor(value).any()) for value in state):
            raise RuntimeError(
                "this Muon has stepped or loaded a checkpoint, and the engine would discard its momentum. Build the "
                "engine around a new Muon, then load the checkpoint through the engine"
            )
        self.detach()
        self.host, self._in_engine, self.process_group, self._model = host, True, process_group, None
        self.routing = self.routing.renamed({name: names[p] for p, name in self.names.items()})
        self.names = {p: names[p] for p in self.names}
        self._set_digests()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the tensors of ``self.param_groups`` (engines may call it for one group at a time). Collective."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.calls:
            if self.names and not self._in_engine:
                raise RuntimeError(
                    "an engine has cut the parameters of this Muon: call muon_plugin.register(), give the optimizer "
                    "to that engine, and step the engine"
                )
            return loss  # an engine may step once on zeros while it builds its wrapper: that must change nothing
        for halved in self._halved:
            halved.check(self._groups)
        if self._check_replicas:
            self._compare_replicas()
        self.halves.step([group for group in self.param_groups if group["params"]], self.state)
        return loss

    def _compare_replicas(self) -> None:
        """At the first step only, as DDP may make the replicas late. Ranks with different models would mix updates."""
        self._check_replicas = False
        if world_of(self.process_group)[1] > 1:
            tensors = [p for g in self.param_groups for p in g["params"]]
            sums = [[checksum(t) for t in (p, p.grad) if t is not None] for p in tensors]
            agree(
                "the weights or the gradients",
                [f"{self.names[p]} with the checksums {values}" for p, values in zip(tensors, sums)],
                "Without an engine, all ranks must hold replicas (DistributedDataParallel). For a model of its own on "
                "each rank, pass process_group=torch.distributed.new_group([rank]) made for each rank",
                self.process_group,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters that came later: adapters, a new head, layers that are unfrozen. Collective.

        Those that were there keep their state, and the plan is made anew. Without an engine only.

        Args:
            param_group: as in the constructor, with (name, parameter) pairs; it becomes one or two groups, the last
                ones of `param_groups`.

        Raises:
            RuntimeError: under an engine, which has sharded the parameters that it was given at its start.
            ValueError: for an invalid group, or a parameter or a name that the optimizer has already.
        """
        if not self._complete:
            super().add_param_group(param_group)
            return
        if self._in_engine or (self.names and not self.calls):
            raise RuntimeError(
                "an engine shards the parameters that it is given at its start, and would not train a group that is "
                "added to its Muon later. Build the engine with all parameters"
            )
        groups, routing, names = together(lambda: self._prepare_later(param_group), self.process_group)
        agree(
            "the added parameters",
            routing.describe(),
            "Add the same parameters on every rank",
            self.process_group,
        )
        begin = len(self.param_groups)
        for group in groups:
            super().add_param_group(group)
        known = replace(self.routing, notes=tuple(n for n in self.routing.notes if n not in (NO_MATRIX, NOTHING)))
        self.routing, self.names = known.joined(routing), {**self.names, **names}
        self._set_digests()
        later = [_whole(i, group["params"], self.names, self.process_group) for i, group in enumerate(groups, begin)]
        self._bind([*self.calls, *later])
        self._check_replicas = True

    def _prepare_later(self, param_group: Any) -> tuple[list[dict[str, Any]], Routing, dict[Tensor, str]]:
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but is {type(param_group).__name__}")
        given = named_groups([param_group])
        names = {p: name for name, p in given[0]["params"]}
        if not names:
            raise ValueError(
                "add_param_group was given no parameter that requires gradients; allowed: set requires_grad=True first"
            )
        for p, name in names.items():
            check_parameter(name, p, any_strides=True)
            if p in self.names:
                raise ValueError(f"parameter {name} is in the optimizer already; allowed: each parameter once")
            if name in self.routing.shapes:
                raise ValueError(
                    f"the optimizer holds another parameter of the name {name}; allowed: names of their own. After "
                    "replacing a layer, build a new Muon"
                )
        routing = route(
            {name: tuple(p.shape) for p, name in names.items()},
            model=self._model,
            exclude=self.settings.exclude,
            split=self.settings.split,
            layers=self.host.layers(self._model),
            complete=False,
        )
        _check_matrices(names, routing)
        first = 1 + max(group["client_group"] for group in self.param_groups)
        groups = parameter_groups(given, routing, self.settings, self.host, first)
        return groups, replace(routing, notes=(*routing.notes, *notes_on(given, self.host))), names

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict that was saved with the same split into Muon's and AdamW's parameters.

        Without an engine, the groups may be in another order, or merged as 0.1.0 merged equal groups.

        Raises:
            RuntimeError: if the optimizer is not attached to its engine's tensors yet.
            ValueError: if the saved groups were split differently (another `exclude`, another optimizer), or have two
                rates where this run has one.
        """
        if not self._in_engine and (groups := self.saved_as_ours(state_dict["param_groups"])) is not None:
            state_dict = {**state_dict, "param_groups": groups}
            check_halves(groups, self._halved, self.host.advice)
        else:
            self.check_saved(state_dict["param_groups"])
        if self.names and not self.calls:
            raise RuntimeError(
                "Muon is not attached to an engine's tensors yet: load the checkpoint through the engine"
            )
        own = [{key: group[key] for key in OWN_KEYS} for group in self.param_groups]
        self.halves.load(self, state_dict, super().load_state_dict)
        self._groups = self.param_groups  # torch makes new ones
        for group, keys in zip(self.param_groups, own, strict=True):
            group.update(keys)

    def saved_as_ours(self, saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """Saved groups as `saved.as_ours` finds them for this run's, or None."""
        return as_ours(saved, self.param_groups, self._members, self.routing.shapes)

    def take_groups(self, saved: Sequence[Mapping[str, Any]]) -> list[int]:
        """Restores the options (learning rates, ...) of groups that a checkpoint has with the same parameters.

        A client's group is restored with all of it or not at all, so that its halves keep one rate.

        Returns:
            The numbers of the groups that keep this run's options.

        Raises:
            ValueError: if a saved group has two rates where this run has one.
        """
        theirs = {(group.get("name"), group.get("layout")): group for group in saved}
        keys = [(group["name"], group["layout"]) for group in self.param_groups]
        matching = {number: theirs[key] for number, key in enumerate(keys) if key in theirs}
        found = dict(enumerate(self.saved_as_ours(saved) or ())) or matching
        lacking = {g["client_group"] for number, g in enumerate(self.param_groups) if number not in found}
        taken = {n: of for n, of in found.items() if self.param_groups[n]["client_group"] not in lacking}
        check_halves(taken, [halves for halves in self._halved if halves.matrices in taken], self.host.advice)
        for number, of in taken.items():
            kept = {key: value for key, value in of.items() if key not in ("params", *OWN_KEYS)}
            self.param_groups[number].update(kept)
        return [number for number in range(len(self.param_groups)) if number not in taken]

    def check_saved(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Checks that saved parameter groups come from this optimizer with the same routing.

        Raises:
            ValueError: if they do not, with what to do instead.
        """
        if not same_groups(saved, self.param_groups):
            what = difference(saved, self.param_groups, self._members)
            raise ValueError(
                f"the checkpoint's optimizer {what}. Load it with the model and settings it was saved with (exclude, "
                f"parameter groups), or {self.host.advice}"
            )
        check_halves(saved, self._halved, self.host.advice)

    @property
    def plans(self) -> list[Plan]:
        """One plan for each call with matrices, in order."""
        return self.halves.muon.plans

    def summary(self, notes: Sequence[str] = ()) -> str:
        """The start-up table: Muon's and AdamW's parameters, the plan's balance, bytes and memory; and `notes`."""
        if not self.names:
            return f"muon_plugin: {NOTHING}"
        if not self.calls:
            return "muon_plugin: not attached to an engine's tensors yet"
        plans: dict[str, list[Plan]] = {}  # experts are sharded over other ranks than the dense layers
        groups = [self.param_groups[call.group] for call in self.calls]
        for group, plan in zip((group for group in groups if group["use_muon"]), self.plans, strict=True):
            plans.setdefault(self.host.experts(group) or "dense layers", []).append(plan)
        routing = replace(self.routing, notes=(*self.routing.notes, *self.settings.notes, *notes))
        return report.table(routing, report.options(self.settings, self.param_groups), [self.halves], plans)


def _check_matrices(names: Mapping[Tensor, str], routing: Routing) -> None:
    for p, name in names.items():
        if name not in routing.adamw:
            check_parameter(name, p)


def _whole(group: int, tensors: Sequence[Tensor], names: Mapping[Tensor, str], process_group: Any) -> Call:
    shards = tuple(Shard.of_range(names[p], 0, p.numel(), p) for p in tensors)
    return Call(group, tuple(tensors), shards, process_group)
