"""Megatron's DistributedOptimizer with Muon as its inner optimizer; checkpoints use Adam's names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.optim import Optimizer

from ..core import adamw
from ..core.adamw import AdamWHalf, moments
from ..core.call import Call
from ..core.exchange import Turns, ended, in_turns
from ..core.halves import Halves, MuonHalf
from ..core.lion import Lion
from ..core.proof import FirstStep
from ..core.update import Update
from .precision import Kept, first_part, joined
from .settings import Settings
from .shards import masters

logger = logging.getLogger(__name__)
#: Key that marks the parameter groups of a checkpoint in which `exp_avg` of matrices is Muon's momentum.
MARK = "muon_plugin"
#: What to do about a parameter that is unfrozen too late.
UNFREEZE = (
    "Megatron has no gradient buffer for what is frozen when DistributedDataParallel is built. Unfreeze it before "
    "that, and freeze it again afterwards"
)


class InnerOptimizer(Optimizer):
    """Muon for the matrices and Megatron's own Adam, or Lion, for the rest, in Megatron's own parameter groups.

    The groups are left as Megatron made them, so that its schedulers and checkpoints work as with AdamW. `halves`
    records which half a tensor belongs to.

    State, from construction on: ``momentum_buffer`` (fp32, of the tensor's shape) for matrices; ``exp_avg`` and
    (AdamW's) ``exp_avg_sq`` for the rest; and ``step`` for both, if Megatron's Adam keeps it in the state and not in
    the group.

    Args:
        adam: the optimizer that Megatron built; its `param_groups` hold this rank's shards.
        update: the step of the matrices.
        settings: momentum, Nesterov, offload, Lion.
        call: all of its tensors, and this rank's shards in them.
        parameters: the model's parameters of these shards, by name.
        left_out: the model's parameters that were frozen when Megatron built it, by name.
        weights: main parameters that need not stay in memory between steps -> the weights that they update.
    """

    def __init__(
        self,
        adam: Optimizer,
        update: Update,
        settings: Settings,
        call: Call,
        parameters: Mapping[str, Tensor],
        left_out: Mapping[str, Tensor],
        weights: Mapping[Tensor, Tensor],
    ) -> None:
        # No parameters here: Megatron's shards are views, which the constructor rejects.
        super().__init__([{"params": []}], adam.defaults)
        self.param_groups = adam.param_groups
        self._in_tensors = isinstance(adam, torch.optim.AdamW)

        def count(p: Tensor) -> dict[str, Any]:  # Megatron expects a step in every state, or in none
            return {key: value for key, value in adamw.new_state(adam, p.detach()).items() if key == "step"}

        options = {"momentum": settings.momentum, "nesterov": settings.nesterov}
        matrices = MuonHalf(options=options, offload=settings.offload, beside=count)
        matrices.add(update, update.tensors)
        held = set(update.tensors)
        rest = (p for p in call.tensors if p not in held)
        optimizer, label, name = adam, "Megatron's AdamW", "AdamW"
        if settings.scalar == "lion":
            optimizer, label, name = Lion((settings.lion_beta1, settings.lion_beta2), adam), "this plugin's", "Lion"
        half = AdamWHalf(optimizer, label, rest, counts_frozen=True, name=name)  # checkpoints want one count for all
        self.halves = Halves(matrices, half, [call], parameters, left_out, UNFREEZE)
        self.halves.first_step = FirstStep([call])
        self.halves.new_states(self.state)
        #: others that the next step of this one steps with it, in turns
        self.beside: Sequence[InnerOptimizer] = ()
        self._stepped = False
        matrices.bytes_each, half.bytes_each = settings.state_bytes
        offloaded = first_part(call.tensors, settings.offload_fraction)
        self.kept = Kept(lambda: self.state, settings.rounded, weights, settings.lower_bits, offloaded)
        self._mark()

    def _mark(self) -> None:
        for group in self.param_groups:
            group[MARK] = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every shard. Collective over DP and TP."""
        if self._stepped:
            self._stepped = False
            return
        others, self.beside = self.beside, ()
        for other in others:
            other._stepped = True
        ended(in_turns(each._turns() for each in (self, *others)))

    def _turns(self) -> Turns:
        before = max((group.get("step", 0) for group in self.param_groups), default=0)
        step = next((state["step"] for state in self.state.values() if "step" in state), before)  # one count for all
        with self.kept.opened(int(step)):
            yield from self.halves.turns(self.param_groups, self.state)
        if not self._in_tensors:  # FusedAdam counts in its groups, but skips groups without a tensor of its own
            for group in self.param_groups:
                group["step"] = before + 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.halves.load(self, state_dict, super().load_state_dict)
        self.kept.close()
        self._mark()


class MuonDistributedOptimizer(DistributedOptimizer):
    """Megatron's DistributedOptimizer around an `InnerOptimizer`.

    Megatron's checkpoints use Adam's names, so the momentum, or Lion's moment, is saved as ``exp_avg`` and its square
    as ``exp_avg_sq``. If AdamW resumes from such a checkpoint, its first update of each weight is about the learning
    rate, where a zero second moment would make it explode. While a checkpoint is saved, the state takes as much memory
    as AdamW's. A checkpoint of Megatron's AdamW lacks `MARK`: its weights are loaded, and the momentum of matrices
    starts from zero.
    """

    @classmethod
    def convert(
        cls,
        optimizer: DistributedOptimizer,
        logs: bool,
        update: Update,
        settings: Settings,
        call: Call,
        parameters: Mapping[str, Tensor],
        left_out: Mapping[str, Tensor],
    ) -> None:
        """Turns a DistributedOptimizer that Megatron has just built around Adam into one of this class, in place.

        Args:
            optimizer: Megatron's.
            logs: whether this rank logs for all that train with the optimizer.
            update, settings, call, parameters, left_out: of its `InnerOptimizer`.
        """
        held = [(model, weight, main) for model, weight, main in masters(optimizer) if weight is not main]
        plain = [(model, weight, main) for model, weight, main in held if weight is not None]
        plain = [triple for triple in plain if not is_float8tensor(triple[0])]
        optimizer._weights = {model: weight for model, weight, _ in plain if weight.dtype == torch.bfloat16}
        weights = {main: weight for _, weight, main in plain if settings.frees}
        optimizer.optimizer = InnerOptimizer(optimizer.optimizer, update, settings, call, parameters, left_out, weights)
        for model, _, _ in plain if settings.frees else ():
            model.main_param = None  # as in Megatron where the inner optimizer holds it
        optimizer.__class__ = cls
        optimizer._fresh_momentum, optimizer._logs, optimizer._writes_weights = False, logs, settings.frees

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["optimizer"]["param_groups"]
        self._fresh_momentum = not any(group.get(MARK) for group in groups)
        if self._fresh_momentum and self._logs:
            logger.warning(
                "muon_plugin: the checkpoint was saved by Megatron's AdamW, not by Muon: restored the weights and the "
                "AdamW state of the other parameters; the momentum of matrices starts from zero"
            )
        super().load_state_dict(state_dict)
        if "param_state" in state_dict:
            self._gather_weights()

    def load_parameter_state(self, *args: Any, **kwargs: Any) -> None:
        super().load_parameter_state(*args, **kwargs)
        self._gather_weights()

    def _gather_weights(self) -> None:
        """Main parameters that lie halfway between two weights are rounded otherwise by a run that keeps them whole."""
        if self._writes_weights:  # on every rank, or on none, whatever it holds
            for chunk in self.model_chunks:
                chunk.start_param_sync(force_sync=True)

    def _get_main_param_and_optimizer_states(self, model_param: Tensor) -> dict[str, Tensor]:
        main, state = self._main_and_state(model_param)
        first = state["momentum_buffer" if self._is_matrix(main) else "exp_avg"].to(main.device, torch.float32)
        second = state["exp_avg_sq"].float() if "exp_avg_sq" in state else first.square()
        return {"param": self.optimizer.kept.main(main), "exp_avg": first, "exp_avg_sq": second}

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: Mapping[str, Tensor]) -> None:
        main, state = self._main_and_state(model_param)
        self.optimizer.kept.set_main(main, self._saved_main(model_param, tensors["param"]))
        if not self._is_matrix(main):
            for name in moments(self.optimizer.halves.adamw.optimizer):
                state[name].copy_(tensors[name])
        elif self._fresh_momentum:
            state["momentum_buffer"].zero_()
        else:
            state["momentum_buffer"].copy_(tensors["exp_avg"])

    def _saved_main(self, model_param: Tensor, saved: Tensor) -> Tensor:
        """What a checkpoint means by a main parameter: FusedAdam saves the bits that the weight lacks, as a number."""
        weight = self._weights.get(model_param)
        if weight is None or not self._fresh_momentum:
            return saved
        saved, whole = saved.to(weight.device).view(weight.shape), torch.iinfo(torch.int16)
        numbers = bool(((saved == saved.round()) & (saved >= whole.min) & (saved <= whole.max)).all())
        return joined(weight, saved.to(torch.int16)) if numbers and not torch.equal(saved, weight.float()) else saved

    def _copy_main_params_to_model_params(self) -> None:
        if not self._writes_weights:
            super()._copy_main_params_to_model_params()

    def _copy_model_params_to_main_params(self, *args: Any, **kwargs: Any) -> None:
        with self.optimizer.kept.opened():
            super()._copy_model_params_to_main_params(*args, **kwargs)
        self._gather_weights()

    def _main_and_state(self, model_param: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        return main, self.optimizer.state[main]

    def _is_matrix(self, main: Tensor) -> bool:
        halves = self.optimizer.halves
        return halves.of(main) is halves.muon
