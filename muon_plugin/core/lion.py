"""Lion ("Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675), a choice for what is not a matrix.

For a tensor W with gradient G, learning rate eta, weight decay lambda and its only moment M::

    W <- W (1 - eta lambda) - eta sign(beta1 M + (1 - beta1) G)
    M <- beta2 M + (1 - beta2) G

Every element is computed by itself, so the result does not depend on where a shard is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    """Steps the tensors of its `param_groups`, with "lr" and "weight_decay"; ``exp_avg`` is in the state.

    Args:
        betas: of the update's interpolation and of the moment. They are not read from the groups, which have AdamW's.
        counted_as: the optimizer whose format the number of steps has, which Lion itself does not need.
    """

    moments = ("exp_avg",)

    def __init__(self, betas: tuple[float, float], counted_as: Optimizer) -> None:
        super().__init__([{"params": []}], {})
        self.betas, self.counted_as = betas, counted_as

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                p.add_(p, alpha=-group["weight_decay"] * group["lr"])
                p.add_(self._direction(p.grad, state), alpha=-group["lr"])
                state["exp_avg"].lerp_(p.grad, 1 - self.betas[1])
                if "step" in state:
                    state["step"] += 1

    def _direction(self, grad: Tensor, state: Mapping[str, Any]) -> Tensor:
        """Every element is -1, 0 or 1."""
        moment: Tensor = state["exp_avg"]
        return moment.lerp(grad, 1 - self.betas[0]).sign_()
