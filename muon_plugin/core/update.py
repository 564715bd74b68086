"""One step for the matrices of one call: momentum on the shards, exchange, Newton-Schulz, the update applied.

For every matrix W (A x B) with gradient G, learning rate eta, weight decay lambda, momentum mu::

    M <- M + (1 - mu) (G - M)                      on each shard, fp32, in place
    D  = G + mu (M - G)   (Nesterov; else M)       on each shard, to bf16
    O  = NewtonSchulz(D)                           on the one rank that owns the matrix
    W <- W (1 - eta lambda) - eta s(A, B) O        on each shard

This is the paper's Eq. 4 (s = 0.2 sqrt(max(A, B))) with torch.optim.Muon's scaling of the momentum: an exponential
average differs from Eq. 1's sum by a factor that Newton-Schulz removes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import agree, gather, together, world_of
from .exchange import Exchange
from .frozen import NONE, Frozen
from .layout import Matrix, Shard, Strided, pieces
from .orthogonalize import NewtonSchulz
from .phases import current, phase
from .plan import Plan, make_plan


class Measurement(Protocol):
    """What is told of the gradients and the updates of a measured step."""

    def update(self, parameter: str, update: Tensor) -> None:
        """An fp32 (count, run) part of a parameter's scaled update."""

    def zero_gradients(self, matrices: int, ranks: int) -> None:
        """So many matrices have a gradient of zeros alone, which each of so many ranks tells."""


class Update:
    """Plans and steps the matrices of one call of the optimizer. Constructing one is collective.

    Args:
        matrices: the same on every rank; matrices of which no rank holds a shard are ignored.
        shards: the shards of whole parameters that this rank holds; there may be none.
        process_group: the ranks that together hold every element of every matrix; None is the default group.
        device: where matrices are assembled and orthogonalized. The shards are there or, if offloaded, on the CPU.
        newton_schulz: orthogonalizes (batch, rows, cols) bf16 matrices.
        scale: returns the factor s(A, B) on the update of a matrix.
        normalize: whether the RMS of each update is first set to 1 (Eq. 6).
        plan: of exactly these matrices, where it was made without asking the other ranks.

    Raises:
        ValueError: on every rank, if the shards of all ranks do not make up the matrices, or are on several devices.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        shards: Sequence[Shard],
        process_group: Any,
        device: torch.device,
        newton_schulz: NewtonSchulz,
        scale: Callable[[Matrix], float],
        normalize: bool = False,
        plan: Plan | None = None,
    ) -> None:
        if plan is None:
            held = set().union(*gather(sorted({shard.parameter for shard in shards}), process_group))
            matrices = [matrix for matrix in matrices if matrix.parameter in held]
        self.matrices = matrices
        #: names of the parameters of which the ranks hold parts
        self.parameters = {matrix.parameter for matrix in self.matrices}
        self.tensors: list[Tensor] = list({id(shard.tensor): shard.tensor for shard in shards}.values())
        mine = pieces(self.matrices, shards, {id(tensor): i for i, tensor in enumerate(self.tensors)})
        if plan is None:
            together(lambda: _check_device(self.tensors, device), process_group)
            index = gather([(piece.matrix, piece.inside) for piece in mine], process_group)
            plan = together(lambda: make_plan(matrices, index, newton_schulz.flops, 2 * normalize), process_group)
            agree("the plan", [repr(plan)], "Please report this as a bug", process_group)
        self.plan = plan
        self._exchange = Exchange(
            self.matrices, mine, self.plan, newton_schulz, process_group, device, normalize=normalize
        )
        self._scales = [scale(matrix) for matrix in self.matrices]
        self._group = process_group
        #: how many steps it has made; a plan that takes the place of another one goes on counting
        self.steps = 0

    def step(
        self,
        groups: Sequence[Mapping[str, Any]],
        momenta: Sequence[Tensor],
        offloaded: bool = False,
        frozen: Frozen = NONE,
        measure: Measurement | None = None,
        applied: Callable[[Tensor, str, int], None] | None = None,
    ) -> None:
        """Updates `tensors` from their gradients. Collective.

        Args:
            groups: for each of `tensors`, its "lr", "weight_decay", "momentum" and "nesterov".
            momenta: for each of `tensors`, its momentum: fp32, of the tensor's shape.
            offloaded: whether the momenta are in CPU memory; one at a time is then copied to its gradient's device.
            frozen: what stays as it is. The plan does not change: the matrices are orthogonalized, and not applied.
            measure: is told of the gradients and updates.
            applied: called with a tensor, a parameter's name and how many of its elements there have been updated.
        """
        self.steps += 1
        current.step = max(current.step, self.steps)
        if measure is not None:
            measure.zero_gradients(self._without_gradient(frozen), world_of(self._group)[1])
        flat = [p.view(-1) for p in self.tensors]
        trained = [frozen.trained(p) for p in self.tensors]
        # A parameter without a gradient is skipped, as in torch's optimizers. (The engines fill in zeros.)
        with phase("momentum"):
            directions = [
                None
                if p.grad is None or not parts
                else _direction(p.grad.reshape(-1).float(), momentum.view(-1), group, offloaded, parts)
                for p, momentum, group, parts in zip(self.tensors, momenta, groups, trained)
            ]
        rates = [float(group["lr"]) for group in groups]
        with phase("apply"):
            for p, direction, rate, group, parts in zip(flat, directions, rates, groups, trained):
                if direction is not None:
                    for part in parts:
                        part.view(p).mul_(1 - rate * group["weight_decay"])

        def read(tensor: int, local: Strided, out: Tensor) -> None:
            direction = directions[tensor]
            with phase("momentum"):
                if direction is None:
                    out.zero_()
                else:
                    direction(local, out)

        def write(tensor: int, local: Strided, matrix: int, update: Tensor, scale: Tensor | None) -> None:
            parameter = self.matrices[matrix].parameter
            if directions[tensor] is None or parameter in frozen.names:
                return
            # Always in this order: u to fp32, times its scale, times the learning rate. Other orders round differently.
            here = flat[tensor].device
            with phase("apply"):
                change = update.to(here).float().mul_(self._scales[matrix])
                if scale is not None:
                    change.mul_(scale.to(here))
                local.view(flat[tensor]).add_(change, alpha=-rates[tensor])
            if measure is not None:
                measure.update(parameter, change)
            if applied is not None:
                applied(self.tensors[tensor], parameter, local.numel)

        with phase("exchange"):
            self._exchange.run(read, write)

    def _without_gradient(self, frozen: Frozen) -> int:
        """How many of the matrices that are not frozen have a gradient of zeros alone. Collective."""
        seen = torch.zeros(len(self.matrices), device=self._exchange.wire)
        for number, parts in self._exchange.held.items():
            for tensor, block in parts:
                grad = self.tensors[tensor].grad
                if grad is not None:
                    seen[number] += block.local.view(grad.reshape(-1)).any().to(seen.device)
        if world_of(self._group)[1] > 1:
            dist.all_reduce(seen, group=self._group)
        zero = (seen == 0).tolist()
        return sum(none and m.parameter not in frozen.names for none, m in zip(zero, self.matrices))


def _direction(
    grad: Tensor, momentum: Tensor, group: Mapping[str, Any], offloaded: bool, parts: Sequence[Strided]
) -> Callable[[Strided, Tensor], Any]:
    """Updates these parts of the momentum in place; returns a function that writes the direction of some elements into
    a bf16 view."""
    mu, nesterov = group["momentum"], group["nesterov"]
    # offloaded: no momentum stays on the device, and the direction overwrites the gradient
    here = momentum.to(grad.device, non_blocking=True, copy=True) if offloaded else momentum
    for part in parts:
        part.view(here).lerp_(part.view(grad), 1 - mu)
    if offloaded:
        momentum.copy_(here)
        whole = grad.lerp_(here, mu) if nesterov else grad.copy_(here)
        return lambda local, out: _fill(out, local.view(whole))
    if nesterov:
        return lambda local, out: _fill(out, local.view(grad).lerp(local.view(momentum), mu))
    return lambda local, out: _fill(out, local.view(momentum))


def _fill(out: Tensor, values: Tensor) -> None:
    out.copy_(values if values.device == out.device else values.bfloat16())  # copies between devices are bf16


def _check_device(tensors: Sequence[Tensor], device: torch.device) -> None:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1 or not devices <= {device, torch.device("cpu")}:
        raise ValueError(f"one process holds matrices on {sorted(map(str, devices))}; allowed: one device per process")
