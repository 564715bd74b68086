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

from . import adamw, phases, proof, report
from .adamw import AdamWHalf
from .agreement import agree, checksum, gather, together, world_of
from .call import Call
from .clipping import Clipping
from .collector import without_collector
from .exchange import ended
from .frozen import FROZEN
from .groups import Halved, Host, check_parameter, is_usable, layout_digest, named_groups, no_engine
from .halves import Halves, MuonHalf
from .layout import Shard
from .orthogonalize import NewtonSchulz
from .plan import Plan
from .prepared import NOTHING, Prepared, prepare, prepare_later
from .routing import Routing, check_heads
from .saved import OWN_KEYS, as_ours, check_halves, difference
from .settings import Settings, scale_for
from .update import Update, agree_on


class Muon(Optimizer):
    r"""Muon as in "Muon is Scalable for LLM Training" (arXiv 2502.16982), with AdamW for all other parameters.

    For every matrix W (A x B) with gradient G, learning rate eta, weight decay lambda and momentum mu:

        M <- M + (1 - mu) (G - M)                         momentum (Eq. 1, as an exponential average)
        D  = G + mu (M - G)                               Nesterov; without it D = M
        O  = NewtonSchulz(D)                              bf16, about U V^T of D's SVD (Eq. 2)
        W <- W (1 - eta lambda) - eta s(A, B) O           s = 0.2 sqrt(max(A, B)) (Eqs. 3 and 4)

    Newton-Schulz normalizes its input, so the exponential average gives what Eq. 1's sum would. With s(A, B), the
    learning rate and weight decay tuned for AdamW carry over. Embeddings, the LM head, norms and biases are trained by
    AdamW with the same learning rate and weight decay.

    Args:
        params: ``model.named_parameters()``, or parameter groups whose ``"params"`` are (name, parameter) pairs. Names
            are required, because they decide which parameters are embeddings or heads. Parameters are dense,
            contiguous and of a real floating-point dtype. Frozen ones are not touched, and have no state until they are
            unfrozen; from then on they are trained as well.
        model: the module itself, if available: module types and ``model.config`` then help to recognize embeddings
            and fused projections.
        process_group: the ranks that hold replicas of the parameters (plain DDP), by default those of the default
            group; under an engine, all ranks that train with it. Each matrix is orthogonalized on one of these ranks.
        stage: passed by an engine's hooks: the ranks of `process_group` that hold this pipeline stage, if there are
            several stages.
        host: passed by an engine's hooks: the optimizer then waits for `attach`, and `step` does nothing until then.
        shapes: passed by an engine's hooks: the whole shape of each parameter that the engine has sharded, by name.
        unfreezes: passed by an engine's hooks: False where it leaves out for good what is frozen now.
        **settings: keyword arguments, all of them optional; `muon_plugin.core.settings.Settings` has their defaults and
            says what each may be. Of both halves: ``lr``, ``weight_decay``. Of the matrices: ``muon_lr``, ``momentum``,
            ``nesterov``, ``adjust_lr_fn`` (s above), ``ns_steps``, ``ns_coefficients``, ``ns_method``, ``ns_dtype``
            (Newton-Schulz), ``momentum_dtype``, ``offload``, ``per_head_muon``, ``qk_clip``. Of the rest: ``adam_lr``,
            ``betas``, ``eps``, ``adamw``. Which is which: ``exclude`` (patterns of names that go to AdamW), ``split``
            (how a fused projection is cut into matrices).

    State, created on every rank before the first step: for tensors that hold matrices ``momentum_buffer``, of
    ``momentum_dtype`` and the tensor's shape (under an engine the `host` names it), and ``step`` if it is in bf16; for
    the rest ``step``, ``exp_avg`` and ``exp_avg_sq``.

    Raises:
        ValueError: for an invalid setting or parameter, with the allowed values; on every rank, if any rank has one.

    Examples:
        A model that learns which token follows which. Muon trains ``up`` and ``down``, AdamW the embedding, the head
        and the biases:

        >>> import torch
        >>> from torch import nn
        >>> import muon_plugin
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential()
        >>> for name, layer in [
        ...     ("embed_tokens", nn.Embedding(16, 32)),
        ...     ("up", nn.Linear(32, 64)),
        ...     ("act", nn.ReLU()),
        ...     ("down", nn.Linear(64, 32)),
        ...     ("lm_head", nn.Linear(32, 16, bias=False)),
        ... ]:
        ...     model.add_module(name, layer)
        >>> optimizer = muon_plugin.Muon(model.named_parameters(), model=model, lr=1e-2, weight_decay=0.1)
        >>> [(group["name"], group["use_muon"], len(group["params"])) for group in optimizer.param_groups]
        [('muon', True, 2), ('adamw', False, 4)]
        >>> tokens = torch.arange(16)
        >>> for _ in range(50):
        ...     loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 16)
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> bool(loss < 0.1)
        True
    """

    @without_collector
    def __init__(
        self,
        params: Iterable[Any],
        *,
        model: nn.Module | None = None,
        process_group: Any = None,
        stage: Any = None,
        host: Host | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        unfreezes: bool = True,
        **settings: Any,
    ) -> None:
        self.host = host or no_engine()
        #: whether an engine decides which tensors are stepped
        self._in_engine = host is not None
        #: whether these are the parameters of one of several pipeline stages
        self._one_of_many = stage is not None
        self._complete = False
        #: what `attach` was given; the device is the one where matrices are orthogonalized
        self.calls: tuple[Call, ...] = ()
        self._device: torch.device | None = None
        #: number of a call -> its tensors that have a plan, and that plan
        self._planned: dict[int, tuple[tuple[Tensor, ...], Update]] = {}
        self.process_group = process_group
        #: whether to check at the first step that the ranks of `process_group` hold replicas
        self._check_replicas = False
        #: for groups that are added later
        self._model = model if host is None else None
        alike = process_group if stage is None else stage

        def prepared() -> tuple[Settings, Prepared, Clipping | None]:
            checked = Settings.from_dict(settings)
            given, in_engine = named_groups(params), host is not None
            made = prepare(given, checked, self.host, model, shapes=shapes, in_engine=in_engine, unfreezes=unfreezes)
            return checked, made, Clipping.of(checked.clip, model, made.routing.shapes, stage is not None)

        # One rank's bad setting is every rank's error, and a model that differs is found before anything is exchanged.
        self.settings, found, self.clipping = together(prepared, alike)
        agree(
            "the model or the settings of Muon",
            [*found.describe(), repr(self.settings)],
            "Build the same model from the same configuration on every rank",
            alike,
        )
        if self.settings.per_head_muon:
            check_heads("per_head_muon=True", gather(found.routing.head_facts, process_group))
        #: names: parameter -> its name in `routing`
        #: left_out: the same of parameters that are frozen now, and that are not trained if they are unfrozen
        self.routing, self.names, self.left_out = found.routing, found.names, found.left_out
        #: parameters that have been frozen since the optimizer was built; they are in no plan, and have no state
        self._waiting = found.frozen()
        self._frozen_at_start = frozenset(self._waiting)
        self.halves = self._no_halves()
        # torch wants a group even if there is nothing to train, as in a reference model.
        defaults = {"lr": self.settings.lr, "weight_decay": self.settings.weight_decay}
        nothing = {"params": [], "use_muon": False, "name": "adamw", "client_group": 0}
        super().__init__(found.groups or [nothing], defaults)
        self._complete = True
        #: all groups, also while an engine leaves one of them in `param_groups` for each call of `step`
        self._groups = self.param_groups
        self._set_digests()
        if host is None and all(self.routing.shapes[name] == tuple(p.shape) for p, name in self.names.items()):
            self._attach_alone()

    def _attach_alone(self) -> None:
        held = [(i, group["params"]) for i, group in enumerate(self.param_groups) if group["params"]]
        self.attach([Call.whole(i, parameters, self.names, self.process_group) for i, parameters in held])
        self._check_replicas = True
        if not self._trained().matrices:
            warnings.warn(f"muon_plugin.Muon: {report.NO_MATRIX if self.names else NOTHING}", stacklevel=3)

    def _set_digests(self) -> None:
        #: the names of each group's parameters, which an engine replaces by others in `param_groups`
        self._members = [[self.names[p] for p in group["params"]] for group in self.param_groups]
        for group, names in zip(self.param_groups, self._members):
            group["layout"] = layout_digest(names, self.routing.shapes)
        apart = self.settings.muon_lr is not None or self.settings.adam_lr is not None
        self._halved = [] if apart else Halved.among(self.param_groups)

    def _no_halves(self) -> Halves:
        """Those of an optimizer that is not attached to its tensors."""
        return Halves(left_out={name: p for p, name in self.left_out.items()}, advice=self.host.unfreeze)

    def attach(self, calls: Sequence[Call], device: torch.device | None = None) -> None:
        """Binds the optimizer to the tensors that an engine will step, creates their state and the plans. Collective.

        Args:
            calls: one for each call of the inner step that the engine will make, in that order.
            device: where matrices are orthogonalized; by default the device of the call's tensors.
        """
        self.detach()
        self._waiting = {p for p in self._waiting if not p.requires_grad}
        self._bind(calls, device)

    @without_collector
    def _bind(self, calls: Sequence[Call], device: torch.device | None = None) -> None:
        """Plans these calls, and creates the state of the tensors that have none."""
        self.calls, self._device = tuple(calls), device
        with_matrices = [call for call in self.calls if self.param_groups[call.group]["use_muon"]]
        phases.start(self.process_group, any(p not in self._waiting for call in with_matrices for p in call.tensors))
        one = next((call for call in with_matrices if call.tensors), None)  # a pipeline stage may have no matrix
        agree_on(together(lambda: self._newton_schulz(one) if one else None, self.process_group), self.process_group)
        muon = MuonHalf(self.host.momentum, offload=self.settings.offload, dtype=self.settings.momentum_type)
        self._plan(muon)
        rest = self._new_adamw([call for call in self.calls if not self.param_groups[call.group]["use_muon"]])
        parameters, left_out = ({name: p for p, name in of.items()} for of in (self.names, self.left_out))
        self.halves = Halves(muon, rest, self.calls, parameters, left_out, self.host.unfreeze)
        if self.clipping is not None:
            self.halves.clip = self.clipping.clip(self.calls, self._members, parameters, not self._in_engine, device)
        self._begin()

    def _plan(self, half: MuonHalf) -> None:
        """Plans the matrices that are trained, or those of calls in which that has changed. Collective."""
        half.clear()
        for number, call in enumerate(self.calls):
            if not self.param_groups[call.group]["use_muon"]:
                continue
            tensors = tuple(p for p in call.tensors if p not in self._waiting)
            before = self._planned.get(number)
            if tensors and (before is None or len(before[0]) != len(tensors)):  # there are never fewer
                update = self._new_update(call, [shard for shard in call.shards if shard.tensor not in self._waiting])
                update.steps = before[1].steps if before else 0
                self._planned[number] = tensors, update
            if tensors:
                half.add(self._planned[number][1], tensors)
            half.wait(p for p in call.tensors if p in self._waiting)

    def _newton_schulz(self, call: Call) -> NewtonSchulz:
        """As it runs on the device where the matrices of a call are orthogonalized."""
        return self.settings.newton_schulz.on(self._device_of(call))

    def _new_update(self, call: Call, shards: Sequence[Shard]) -> Update:
        return Update(
            self.routing.matrices,
            shards,
            call.process_group,
            self._device_of(call),
            self._newton_schulz(call),
            lambda m: scale_for(self.settings.adjust_lr_fn, *m.out_in),
            normalize=self.settings.adjust_lr_fn == "update_norm",
        )

    def _device_of(self, call: Call) -> torch.device:
        """Where the matrices of a call are orthogonalized."""
        return self._device or call.tensors[0].device

    def _begin(self) -> None:
        """Proves that the plans hold what is trained, and creates the state that is lacking. Collective."""
        shapes, waiting = self.routing.shapes, {self.names[p] for p in self._waiting}
        proof.check_routing(self.routing.matrices, self.routing.adamw, shapes)
        matrices = {matrix.parameter for matrix in self.routing.matrices} - waiting
        proof.check_calls("Muon", matrices, [update.parameters for update in self.halves.muon.updates], shapes)
        rest = [call for call in self.calls if not self.param_groups[call.group]["use_muon"]]
        held = [proof.held(call, shapes, self._device_of(call)) for call in rest]
        proof.check_calls("AdamW", self.routing.adamw, held, shapes)
        self._mark_frozen()
        self.halves.waiting = self._waiting
        self.halves.first_step = proof.FirstStep(self.calls)
        self.halves.new_states(self.state)

    def _mark_frozen(self) -> None:
        """What has no state is told in the checkpoint."""
        for group in self.param_groups:
            group.pop(FROZEN, None)
            if frozen := [i for i, p in enumerate(group["params"]) if p in self._waiting and not self.state.get(p)]:
                group[FROZEN] = frozen

    def _join(self, unfrozen: set[Tensor]) -> None:
        """Trains parameters that were frozen when the optimizer was built: a new plan, and new state. Collective."""
        advice = "Unfreeze the same parameters at the same step on every rank"
        for call in self.calls:
            if joined := [self.names[p] for p in call.tensors if p in unfrozen]:
                agree("which parameters are unfrozen", joined, advice, call.process_group)
        self._waiting -= unfrozen
        self._plan(self.halves.muon)
        self._begin()
        if not self._in_engine:
            self._compare_replicas(unfrozen)

    def _new_adamw(self, calls: Sequence[Call]) -> AdamWHalf:
        if not calls:
            return AdamWHalf()
        groups = [{**self.param_groups[call.group], "params": list(call.tensors)} for call in calls]
        process_group = self.calls[0].process_group
        optimizer, label = together(lambda: adamw.build(groups, self.settings.adamw), process_group)
        agree("the AdamW to use", [label], "Install the same packages on every rank, or set adamw", process_group)
        for call in calls:
            self.param_groups[call.group].update(adamw.own_options(optimizer))
        return AdamWHalf(optimizer, label, (p for call in calls for p in call.tensors), counts_frozen=self._in_engine)

    def detach(self) -> None:
        """Discards the tensors, their state and the plans; `step` does nothing until the next `attach`."""
        self.state.clear()
        self._planned.clear()
        self.calls, self.halves, self._check_replicas = (), self._no_halves(), False

    def hand_over(
        self, host: Host, names: Mapping[Tensor, str], process_group: Any = None, unfreezes: bool = True
    ) -> None:
        """Transfers an optimizer that was built without an engine to `host`, whose hooks then call `attach`.

        Args:
            host: the engine.
            names: parameter -> its name in the engine's module, which its checkpoints use. The client may have called
                the same parameter by another name: that of a submodule, or without a wrapper's prefix.
            process_group: all ranks that train with the engine; by default those of the default group.
            unfreezes: False where the engine leaves out for good what is frozen now.

        Raises:
            RuntimeError: if it has stepped or restored a checkpoint: the engine's shards start from new state.
            ValueError: for a parameter that the engine's module does not have.
        """
        for p, name in {**self.names, **self.left_out}.items():
            if p not in names:
                raise ValueError(
                    f"the optimizer holds {name} {list(self.routing.shapes.get(name, p.shape))}, which the model given "
                    "to the engine does not have; allowed: an optimizer of that model's parameters"
                )
        frozen = {p for p, n in self.names.items() if not p.requires_grad and not (unfreezes and is_usable(n, p))}
        for p, name in self.names.items():
            if p not in frozen:
                check_parameter(name, p)
        state = (value for of_tensor in self.state.values() for value in of_tensor.values())
        if any(bool(torch.as_tensor(value).any()) for value in state):
            raise RuntimeError(
                "this Muon has stepped or loaded a checkpoint, and the engine would discard its momentum. Build the "
                "engine around a new Muon, then load the checkpoint through the engine"
            )
        self.host, self._in_engine, self.process_group, self._model = host, True, process_group, None
        self.routing = self.routing.renamed({name: names[p] for p, name in self.names.items()})
        if self.clipping is not None:
            self.clipping = self.clipping.renamed({name: names[p] for p, name in self.names.items()})
        self.names, self.left_out = ({p: names[p] for p in of} for of in (self.names, self.left_out))
        if frozen:
            self._leave_out(frozen)
        self.detach()
        self._set_digests()

    def _leave_out(self, frozen: set[Tensor]) -> None:
        """Drops parameters that the engine will not train."""
        self.left_out |= {p: name for p, name in self.names.items() if p in frozen}
        self.names = {p: name for p, name in self.names.items() if p not in frozen}
        self.routing = self.routing.only(set(self.names.values()))
        self._waiting, self._frozen_at_start = self._waiting - frozen, self._frozen_at_start - frozen
        for group in self.param_groups:
            group["params"] = [p for p in group["params"] if p not in frozen]
        kept = [number for number, group in enumerate(self.param_groups) if group["params"]] or [0]
        if kept[-1] + 1 != len(kept) and any("initial_lr" in group for group in self.param_groups):
            emptied = next(number for number in range(kept[-1]) if number not in kept)
            raise ValueError(
                f"a scheduler was built on a Muon whose param_groups[{emptied}] holds frozen parameters alone, which "
                "the engine leaves out: its rates would reach other groups. Build the scheduler after the engine, or "
                "give the engine a function that builds it"
            )
        self.param_groups[:] = [self.param_groups[number] for number in kept]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the tensors of ``self.param_groups`` (engines may call it for one group at a time). Collective.

        Args:
            closure: computes the loss again, as in ``torch.optim.Optimizer.step``.

        Returns:
            What `closure` returns, or None.

        Raises:
            RuntimeError: where an engine has cut the parameters of an optimizer that it was not given.
            ValueError: at the first step without an engine, if the ranks do not hold replicas.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.calls:
            self.halves.check_left_out()  # elsewhere the halves do so in each step
            if self.names and not self._in_engine:
                raise RuntimeError(
                    "an engine has cut the parameters of this Muon: call muon_plugin.register(), give the optimizer "
                    "to that engine, and step the engine"
                )
            return loss  # an engine may step once on zeros while it builds its wrapper: that must change nothing
        for halved in self._halved:
            halved.check(self._groups)
        if unfrozen := {p for p in self._waiting if p.requires_grad}:
            self._join(unfrozen)
        if self._check_replicas:
            self._check_replicas = False
            self._compare_replicas(p for p in self.names if p not in self._waiting)
        ended(self.halves.turns([group for group in self.param_groups if group["params"]], self.state))
        return loss

    def _compare_replicas(self, parameters: Iterable[Tensor]) -> None:
        """At the first step only, as DDP may make the replicas late. Ranks with different models would mix updates."""
        if world_of(self.process_group)[1] > 1:
            sums = {self.names[p]: [checksum(t) for t in (p, p.grad) if t is not None] for p in parameters}
            agree(
                "the weights or the gradients",
                [f"{name} with the checksums {sums[name]}" for name in sorted(sums)],
                "Without an engine, all ranks must hold replicas (DistributedDataParallel, which does not reduce what "
                "was frozen when it was built). For a model of its own on each rank, pass "
                "process_group=torch.distributed.new_group([rank]) made for each rank",
                self.process_group,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters that were not given before: adapters, a new head. Collective.

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
        known = Prepared(self.param_groups, self.routing, self.names, self.left_out)

        def prepared() -> tuple[Prepared, Clipping | None]:
            later = prepare_later(param_group, self.settings, self.host, self._model, known)
            shapes = {**self.routing.shapes, **later.routing.shapes}
            return later, Clipping.of(self.settings.clip, self._model, shapes)

        found, self.clipping = together(prepared, self.process_group)
        advice = "Add the same parameters on every rank"
        agree("the added parameters", found.describe(), advice, self.process_group)
        begin = len(self.param_groups)
        for group in found.groups:
            super().add_param_group(group)
        before = replace(self.routing, notes=tuple(note for note in self.routing.notes if note != NOTHING))
        self.routing, self.names = before.joined(found.routing), {**self.names, **found.names}
        self.left_out = {p: name for p, name in self.left_out.items() if p not in found.names} | found.left_out
        self._waiting |= found.frozen()
        self._frozen_at_start |= found.frozen()
        self._set_digests()
        later = enumerate(found.groups, begin)
        new = [Call.whole(i, group["params"], self.names, self.process_group) for i, group in later]
        self._bind([*self.calls, *new])
        self._check_replicas = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict that was saved with the same split into Muon's and AdamW's parameters.

        Without an engine, the groups may be in another order, or merged as 0.1.0 merged equal groups.

        Raises:
            RuntimeError: if the optimizer is not attached to its engine's tensors yet.
            ValueError: if the saved groups were split differently (another `exclude`, another optimizer), or have two
                rates where this run has one.
        """
        groups = self._found(state_dict["param_groups"], any_order=not self._in_engine)
        if self.names and not self.calls:
            raise RuntimeError(
                "Muon is not attached to an engine's tensors yet: load the checkpoint through the engine"
            )
        own = [{key: group[key] for key in OWN_KEYS if key in group} for group in self.param_groups]
        self.halves.load(self, {**state_dict, "param_groups": groups}, super().load_state_dict)
        self._groups = self.param_groups  # torch makes new ones
        for group, keys in zip(self.param_groups, own, strict=True):
            group.update(keys)
        self._mark_frozen()

    def saved_as_ours(self, saved: Sequence[Mapping[str, Any]], any_order: bool = True) -> list[dict[str, Any]] | None:
        """Saved groups as `saved.as_ours` finds them for this run's, or None."""
        frozen = {self.names[p] for p in self._frozen_at_start}
        return as_ours(saved, self.param_groups, self._members, self.routing.shapes, frozen, any_order)

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
        self._found(saved, any_order=False)

    def _found(self, saved: Sequence[Mapping[str, Any]], any_order: bool) -> list[dict[str, Any]]:
        groups = self.saved_as_ours(saved, any_order)
        if groups is None:
            what = difference(saved, self.param_groups, self._members)
            raise ValueError(
                f"the checkpoint's optimizer {what}. Load it with the model and settings it was saved with (exclude, "
                f"parameter groups), or {self.host.advice}"
            )
        check_halves(groups, self._halved, self.host.advice)
        return groups

    @property
    def plans(self) -> list[Plan]:
        """The plan of each call with matrices, in order: which rank owns which matrix, its FLOPs and bytes."""
        return self.halves.muon.plans

    def summary(self, notes: Sequence[str] = ()) -> str:
        """The start-up table: Muon's and AdamW's parameters, the plan's balance, bytes and memory.

        Args:
            notes: further lines.
        """
        if not self.names:
            return f"muon_plugin: {NOTHING}"
        if not self.calls:
            return "muon_plugin: not attached to an engine's tensors yet"
        of = [(self.param_groups[self.calls[i].group], self._planned[i][1].plan) for i in sorted(self._planned)]
        plans = [(self.host.experts(group) or "dense layers", plan) for group, plan in of]  # experts have other ranks
        routing, waiting = self._trained(), [self.names[p] for p in self._waiting]
        frozen = report.about_frozen(self.routing, waiting, len(self.left_out), self.host.unfreeze)
        clipping = () if self.clipping is None else self.clipping.notes
        notes = (*clipping, *report.about_matrices(routing, self.settings, self._one_of_many), *notes)
        notes = (*self.routing.notes, *frozen, *self.settings.notes, *notes)
        options, computed = report.options(self.settings, self.param_groups), self._newton_schulz(self.calls[0])
        return report.table(replace(routing, notes=notes), options, computed, [self.halves], plans)

    def _trained(self) -> Routing:
        """The ways of the parameters that are not waiting to be unfrozen."""
        return self.routing.only({name for p, name in self.names.items() if p not in self._waiting})
