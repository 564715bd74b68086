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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from . import rounding
from .agreement import agree, alike, together, world_of
from .by_table import Listed
from .collector import without_collector
from .elementwise import Run, Source, Target, apply, average, by_table_on, pack
from .exchange import Exchange, Turns
from .frozen import NONE, Frozen
from .holders import publish
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

    @without_collector
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
            together(lambda: _check_device(shards, device), process_group)
            matrices, index = publish(matrices, shards, process_group, device)
            agree_on(newton_schulz, process_group, {(m.rows, m.cols) for m in matrices})
            plan = together(lambda: make_plan(matrices, index, newton_schulz.flops, 2 * normalize), process_group)
            agree("the plan", plan.describe(matrices), "Please report this as a bug", process_group)
        self.matrices, self.plan = matrices, plan
        #: names of the parameters of which the ranks hold parts
        self.parameters = {matrix.parameter for matrix in self.matrices}
        self.tensors: list[Tensor] = list({id(shard.tensor): shard.tensor for shard in shards}.values())
        mine = pieces(self.matrices, shards, {id(tensor): i for i, tensor in enumerate(self.tensors)})
        self._exchange = Exchange(
            self.matrices, mine, self.plan, newton_schulz, process_group, device, normalize=normalize
        )
        self._scales = [scale(matrix) for matrix in self.matrices]
        self._group = process_group
        #: how many steps it has made; a plan that takes the place of another one goes on counting
        self.steps = 0

    def turns(
        self,
        groups: Sequence[Mapping[str, Any]],
        momenta: Sequence[Tensor],
        offloaded: bool = False,
        frozen: Frozen = NONE,
        measure: Measurement | None = None,
        applied: Callable[[Tensor, str, int], None] | None = None,
    ) -> Turns:
        """Updates `tensors` from their gradients, in turns: see `exchange.Turns`. Collective.

        Args:
            groups: for each of `tensors`, its "lr", "weight_decay", "momentum" and "nesterov"; with a momentum in bf16
                also the number of the "step".
            momenta: for each of `tensors`, its momentum: fp32 or bf16, of the tensor's shape. With bf16 its gradient is
                overwritten.
            offloaded: whether the momenta are in CPU memory; one at a time is then copied to its gradient's device.
            frozen: what stays as it is. The plan does not change: the matrices are orthogonalized, and not applied.
            measure: is told of the gradients and updates.
            applied: called with a tensor, a parameter's name and how many of its elements there have been updated.
        """
        self.steps += 1
        current.step = max(current.step, self.steps)
        if measure is not None:
            measure.zero_gradients(self._without_gradient(frozen), world_of(self._group)[1])
        trained = [frozen.trained(p) for p in self.tensors]
        with phase("momentum"):
            sources = self._sources(groups, momenta, trained, offloaded, bool(frozen.names))
        # A parameter without a gradient is skipped, as in torch's optimizers. (The engines fill in zeros.)
        targets = Listed(
            Target(p.view(-1), float(of["lr"]), 1 - float(of["lr"]) * of["weight_decay"]) if source else None
            for p, of, source in zip(self.tensors, groups, sources)
        )

        def seen(run: Run, change: Tensor) -> None:
            parameter = self.matrices[run.matrix].parameter
            if measure is not None:
                measure.update(parameter, change)
            if applied is not None:
                applied(self.tensors[run.tensor], parameter, run.local.numel)

        def read(runs: Sequence[Run], flat: Tensor) -> None:
            with phase("momentum"):
                pack(runs, sources, flat)

        def write(runs: Sequence[Run], flat: Tensor, factors: Mapping[int, Tensor] | None) -> None:
            if frozen.names:
                runs = [run for run in runs if self.matrices[run.matrix].parameter not in frozen.names]
            with phase("apply"):
                apply(runs, targets, flat, self._scales, factors, seen if measure or applied else None)

        running = self._exchange.run(read, write)
        while True:
            with phase("exchange"):
                if next(running, self) is self:
                    return
            yield

    def _sources(
        self,
        groups: Sequence[Mapping[str, Any]],
        momenta: Sequence[Tensor],
        trained: Sequence[Sequence[Strided]],
        offloaded: bool,
        any_frozen: bool,
    ) -> list[Source | None]:
        """Updates the momenta; what the direction of each tensor is made of, None without a gradient."""
        found: list[Source | None] = []
        averages = []
        # Where nothing is frozen and this rank packs each element once, momentum is updated in the same pass.
        device = self._exchange.device
        packed = by_table_on(device) and self._exchange.reads_all and not any_frozen
        for p, momentum, group, parts in zip(self.tensors, momenta, groups, trained):
            if p.grad is None or not parts:
                found.append(None)
                continue
            grad, flat, mu = p.grad.reshape(-1).float(), momentum.view(-1), group["momentum"]
            if momentum.dtype != torch.float32:
                found.append(_in_bf16(grad, flat, mu, group["nesterov"], parts, group["step"]))
                continue
            if offloaded:
                found.append(_offloaded(grad, flat, mu, group["nesterov"], parts))
                continue
            source = Source(grad, flat, mu) if group["nesterov"] else Source(flat)
            if packed and flat.device == device:
                found.append(replace(source, gradient=grad, average=1 - mu))
                continue
            averages += [(part.view(flat), part.view(grad), 1 - mu) for part in parts]
            found.append(source)
        average(averages)
        return Listed(found)

    def _without_gradient(self, frozen: Frozen) -> int:
        """How many of the matrices that are not frozen have a gradient of zeros alone. Collective."""
        seen = torch.zeros(len(self.matrices), device=self._exchange.wire.moves)
        for number, parts in self._exchange.held.items():
            for tensor, block in parts:
                grad = self.tensors[tensor].grad
                if grad is not None:
                    seen[number] += block.local.view(grad.reshape(-1)).any().to(seen.device)
        if world_of(self._group)[1] > 1:
            dist.all_reduce(seen, group=self._group)
        zero = (seen == 0).tolist()
        return sum(none and m.parameter not in frozen.names for none, m in zip(zero, self.matrices))


def agree_on(newton_schulz: NewtonSchulz | None, process_group: Any, shapes: Iterable[tuple[int, int]] = ()) -> None:
    """Checks that matrices of these shapes get the same bits on every rank. Collective.

    Args:
        newton_schulz: as it runs on this rank's device; None where the rank has no matrix.
        process_group: the ranks.
        shapes: products are tried for them here, so that no rank finds out alone in a step that they fail.

    Raises:
        ValueError: on every rank, with the ranks that would compute otherwise.
    """
    fact = together(lambda: newton_schulz.describe(sorted(shapes)) if newton_schulz else None, process_group)
    advice = (
        "Use GPUs of one kind and the same packages on every rank, or Newton-Schulz' method standard (ns_method, "
        "--muon-ns-method)"
    )
    alike("how matrices are orthogonalized, so their bits would depend on the layout", fact, advice, process_group)


def _offloaded(grad: Tensor, momentum: Tensor, mu: float, nesterov: bool, parts: Sequence[Strided]) -> Source:
    """Updates these parts of a momentum in CPU memory. None stays on the device: the direction overwrites the
    gradient."""
    here = momentum.to(grad.device, non_blocking=True, copy=True)
    average([(part.view(here), part.view(grad), 1 - mu) for part in parts])
    momentum.copy_(here)
    return Source(grad.lerp_(here, mu) if nesterov else grad.copy_(here))


def _in_bf16(grad: Tensor, momentum: Tensor, mu: float, nesterov: bool, parts: Sequence[Strided], step: int) -> Source:
    """Updates these parts of a momentum in bf16, on the device or in CPU memory. The direction, made of what has not
    been rounded yet, overwrites the gradient."""
    here = momentum.to(grad.device, non_blocking=True)
    rounding.average(here, grad, parts, 1 - mu, mu if nesterov else None, step)
    if here is not momentum:
        momentum.copy_(here)
    return Source(grad)


def _check_device(shards: Sequence[Shard], device: torch.device) -> None:
    devices = {shard.tensor.device for shard in shards}
    if len(devices) > 1 or not devices <= {device, torch.device("cpu")}:
        raise ValueError(f"one process holds matrices on {sorted(map(str, devices))}; allowed: one device per process")
