"""Megatron's DistributedOptimizer with Muon as its inner optimizer; checkpoints use Adam's names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.optim import Optimizer

from ..core import adamw
from ..core.adamw import AdamWHalf
from ..core.call import Call
from ..core.exchange import Turns, ended, in_turns
from ..core.halves import Halves, MuonHalf
from ..core.proof import FirstStep
from ..core.update import Update
from .settings import Settings

logger = logging.getLogger(__name__)
#: Key that marks the parameter groups of a checkpoint in which `exp_avg` of matrices is Muon's momentum.
MARK = "muon_plugin"
#: What to do about a parameter that is unfrozen too late.
UNFREEZE = (
    "Megatron has no gradient buffer for what is frozen when DistributedDataParallel is built. Unfreeze it before "
    "that, and freeze it again afterwards"
)


class InnerOptimizer(Optimizer):
    """Muon for the matrices and Megatron's own Adam for the rest, in Megatron's own parameter groups.

    The groups are left as Megatron made them, so that its schedulers and checkpoints work as with AdamW. `halves`
    records which half a tensor belongs to.

    State, from construction on: ``momentum_buffer`` (fp32, of the tensor's shape) for matrices; ``exp_avg`` and
    ``exp_avg_sq`` for the rest; and ``step`` for both, if Megatron's Adam keeps it in the state and not in the group.

    Args:
        adam: the optimizer that Megatron built; its `param_groups` hold this rank's shards.
        update: the step of the matrices.
        settings: momentum, Nesterov, offload.
        call: all of its tensors, and this rank's shards in them.
        parameters: the model's parameters of these shards, by name.
        left_out: the model's parameters that were frozen when Megatron built it, by name.
    """

    def __init__(
        self,
        adam: Optimizer,
        update: Update,
        settings: Settings,
        call: Call,
        parameters: Mapping[str, Tensor],
        left_out: Mapping[str, Tensor],
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
        half = AdamWHalf(adam, "Megatron's AdamW", rest, counts_frozen=True)  # its checkpoints want one count for all
        self.halves = Halves(matrices, half, [call], parameters, left_out, UNFREEZE)
        self.halves.first_step = FirstStep([call])
        self.halves.new_states(self.state)
        #: others that the next step of this one steps with it, in turns
        self.beside: Sequence[InnerOptimizer] = ()
        self._stepped = False
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
        yield from self.halves.turns(self.param_groups, self.state)
        if not self._in_tensors:  # FusedAdam counts in its groups, but skips groups without a tensor of its own
            for group in self.param_groups:
                group["step"] = before + 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.halves.load(self, state_dict, super().load_state_dict)
        self._mark()


class MuonDistributedOptimizer(DistributedOptimizer):
    """Megatron's DistributedOptimizer around an `InnerOptimizer`.

    Megatron's checkpoints use Adam's names, so momentum is saved as ``exp_avg`` and its square as ``exp_avg_sq``. If
    AdamW resumes from such a checkpoint, its first update of each weight is about the learning rate, where a zero
    second moment would make it explode. While a checkpoint is saved, the state takes as much memory as AdamW's. A
    checkpoint of Megatron's AdamW lacks `MARK`: its weights are loaded, and the momentum of matrices starts from zero.
    """

    @classmethod
    def convert(cls, optimizer: DistributedOptimizer, logs: bool, *inner: Any) -> None:
        """Turns a DistributedOptimizer that Megatron has just built around Adam into one of this class, in place.

        Args:
            optimizer: Megatron's.
            logs: whether this rank logs for all that train with the optimizer.
            inner: the further arguments of its `InnerOptimizer`.
        """
        optimizer.optimizer = InnerOptimizer(optimizer.optimizer, *inner)
        optimizer.__class__ = cls
        optimizer._fresh_momentum, optimizer._logs = False, logs

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["optimizer"]["param_groups"]
        self._fresh_momentum = not any(group.get(MARK) for group in groups)
        if self._fresh_momentum and self._logs:
            logger.warning(
                "muon_plugin: the checkpoint was saved by Megatron's AdamW, not by Muon: restored the weights and the "
                "AdamW state of the other parameters; the momentum of matrices starts from zero"
            )
        super().load_state_dict(state_dict)

    def _get_main_param_and_optimizer_states(self, model_param: Tensor) -> dict[str, Tensor]:
        main, state = self._main_and_state(model_param)
        if self._is_matrix(main):
            momentum = state["momentum_buffer"].to(main.device)
            return {"param": main, "exp_avg": momentum, "exp_avg_sq": momentum.square()}
        return {"param": main, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: Mapping[str, Tensor]) -> None:
        main, state = self._main_and_state(model_param)
        main.copy_(tensors["param"])
        if not self._is_matrix(main):
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].copy_(tensors[name])
        elif self._fresh_momentum:
            state["momentum_buffer"].zero_()
        else:
            state["momentum_buffer"].copy_(tensors["exp_avg"])

    def _main_and_state(self, model_param: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        return main, self.optimizer.state[main]

    def _is_matrix(self, main: Tensor) -> bool:
        halves = self.optimizer.halves
        return halves.of(main) is halves.muon
