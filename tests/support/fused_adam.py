"""A stand-in for Transformer Engine's FusedAdam, which needs a GPU: the same arguments and state, on any device.

What Megatron's precision-aware optimizer asks of it, as in Transformer Engine 2: main parameters, or the 16 bits that
bf16 weights lack (which checkpoints get as they are), moments in bf16, gradients in `decoupled_grad`, steps that are
counted in the groups. Its arithmetic is written out; the rest of Transformer Engine stays absent.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        assert adam_w_mode
        assert not capturable
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.master_weights, self.use_decoupled_grad = master_weights, use_decoupled_grad
        self.remainders = store_param_remainders and master_weights
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": master_weight_dtype}

    def initialize_state(self, p: Tensor, store_param_remainders: bool = False) -> None:
        state = self.state[p]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(p, dtype=self.dtypes[name])
        if self.master_weights:
            split = self.remainders and p.dtype == torch.bfloat16
            state["master_param"] = torch.zeros_like(p, dtype=torch.int16) if split else p.detach().float()

    def get_unscaled_state(self, p: Tensor, name: str) -> Tensor:
        found = self.state[p][name]
        return found if found.dtype == torch.int16 else found.float()

    def set_scaled_state(self, p: Tensor, name: str, value: Tensor) -> None:
        if not self.state[p]:
            self.initialize_state(p)
        assert (value.dtype == torch.int16) is (self.state[p][name].dtype == torch.int16)
        self.state[p][name].copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for p, state in self.state.items():  # torch has cast it to the weight's dtype
            for name in state:
                split = name == "master_param" and self.remainders and p.dtype == torch.bfloat16
                state[name] = state[name].to(torch.int16 if split else self.dtypes[name])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                grad = p.decoupled_grad if self.use_decoupled_grad else p.grad
                if grad is not None:
                    if not self.state[p]:
                        self.initialize_state(p)
                    self._one(p, grad.float(), group)

    def _one(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (one, two) = self.state[p], group["betas"]
        first, second = state["exp_avg"].float(), state["exp_avg_sq"].float()
        main = self._main(p, state)
        first.mul_(one).add_(grad, alpha=1 - one)
        second.mul_(two).addcmul_(grad, grad, value=1 - two)
        bias_one, bias_two = 1 - one ** group["step"], 1 - two ** group["step"]
        update = (first / bias_one) / ((second / bias_two).sqrt() + group["eps"])
        main.sub_(group["lr"] * (update + group["weight_decay"] * main))
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        kept = state.get("master_param")
        if kept is not None and kept.dtype == torch.int16:
            bits = main.view(torch.int32)
            kept.copy_(bits & 0xFFFF)
            p.view(torch.int16).copy_((bits >> 16) + (kept < 0))
        elif kept is not None:
            kept.copy_(main)
            p.copy_(main)

    @staticmethod
    def _main(p: Tensor, state: dict[str, Any]) -> Tensor:
        kept = state.get("master_param")
        if kept is None:
            return p
        if kept.dtype != torch.int16:
            return kept
        upper = p.view(torch.int16).int() - (kept < 0).int()
        return (upper * 2**16 + (kept.int() & 0xFFFF)).view(torch.float32)


@contextmanager
def fused_adam() -> Iterator[None]:
    """While it lasts, Megatron finds this FusedAdam where it looks for Transformer Engine's."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer, optimizer_config

    names = ["transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"]
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]].FusedAdam = FusedAdam  # type: ignore[attr-defined]
    new = {"is_te_min_version": lambda *_, **__: True}
    with (
        patch.dict(sys.modules, modules),
        patch.multiple(optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False, **new),
        patch.multiple(distrib_optimizer, Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True),
        patch.multiple(optimizer_config, **new),
    ):
        yield
