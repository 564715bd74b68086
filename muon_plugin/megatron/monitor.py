"""Monitoring in Megatron's log, TensorBoard and W&B: norms of updates, weights, momentum and gradients.

Only the steps that Megatron's ``--log-interval`` logs are measured. The metrics, by Megatron's iteration:

- ``muon/update_rms/LABEL``, ``muon/weight_rms/LABEL``, ``muon/momentum_norm/LABEL``, over all ranks; LABEL is ``muon``
  or ``adamw`` (or ``lion``), or one of these with ``_experts``; see `core.measure`;
- ``muon/gradient_norm``: of all gradients, before clipping;
- ``muon/zero_gradient_matrices``: how many matrices have a gradient of zeros alone, and are not frozen;
- ``muon/max_logit/LAYER``, ``muon/clipped_heads``, with ``--qk-clip``: the largest attention logit of each layer (in
  the log, of all), and how many heads were scaled;
- ``muon/optimizer_share``, ``muon/exchange_share``: fractions of the time since the end of the step before, on the
  rank that logs.

The last rank of those that train with the optimizer writes them, as in Megatron.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer

from ..core.agreement import world_of
from ..core.halves import Halves
from ..core.measure import Measure, Monitor, Part
from ..core.qk_clip import Clip


class MonitoredOptimizer(ChainedOptimizer):  # type: ignore[misc]
    """Megatron's ChainedOptimizer, with the steps measured that Megatron's training loop logs.

    Its optimizers (of the dense layers, of the experts) are stepped in turns: while the messages of one are in flight,
    the other one computes.
    """

    @classmethod
    def convert(cls, optimizer: ChainedOptimizer, monitor: StepMonitor, clip: Clip | None) -> None:
        """Makes a stock one, as just built, one of this class."""
        optimizer.__class__ = cls
        optimizer._muon_monitor, optimizer._muon_clip = monitor, clip

    def step(self) -> Any:
        """Its result is Megatron's own. Collective over the optimizer's ranks when the step is measured."""
        try:
            return self._muon_monitor.step(super().step)
        finally:
            if self._muon_clip is not None:
                self._muon_clip.reset()

    def step_with_ready_grads(self) -> bool:
        """The gradients of all its optimizers are ready."""
        if not self.config.overlap_param_gather_with_optimizer_step:  # which gathers after the first one's step
            live = [optimizer.optimizer for optimizer in self.chained_optimizers if not optimizer.is_stub_optimizer]
            if live:  # a pipeline stage may have nothing to train
                live[0].beside = live[1:]
        return bool(super().step_with_ready_grads())


class StepMonitor:
    """Measures the steps of Megatron's optimizer, under Megatron's own training loop.

    Args:
        halves: those of its inner optimizers.
        parts: this rank's shards, by label.
        shapes: shapes of the whole parameters, by name.
        elsewhere: parameters of this rank that an earlier pipeline stage counts.
        device: on which the optimizer computes.
        ranks: all that train with the optimizer: a process group, None or a `Grid`.
    """

    def __init__(
        self,
        halves: Sequence[Halves],
        parts: Sequence[Part],
        shapes: Mapping[str, Sequence[int]],
        elsewhere: Sequence[str],
        device: torch.device,
        ranks: Any,
    ) -> None:
        self._monitor = Monitor(halves, lambda: Measure(parts, shapes, elsewhere, ranks, device), device)
        rank, size = world_of(ranks)
        self._writes = rank == size - 1

    def step(self, take: Callable[[], Any]) -> Any:
        """Calls `take`, the optimizer's own step, and returns its result."""
        args = arguments()
        interval = getattr(args, "log_interval", None)
        before = getattr(args, "curr_iteration", getattr(args, "iteration", None))
        if not interval or before is None:  # a training loop of the user's own
            return take()
        iteration = before + 1
        if iteration % interval:
            made = take()
        else:
            made, found = self._monitor.step(take)
            if found and self._writes:
                norm = made[1]  # (whether it stepped, gradient norm, zeros in the gradients)
                _write(found if norm is None else {**found, "gradient_norm": float(norm)}, iteration, args)
        if (iteration + 1) % interval == 0:
            self._monitor.clock.begin()
        return made


def arguments() -> Any:
    """Megatron's parsed command line; None if it was not parsed."""
    return getattr(_global_vars(), "_GLOBAL_ARGS", None)


def _global_vars() -> Any:
    return sys.modules.get("megatron.training.global_vars")


def _write(found: Mapping[str, float], iteration: int, args: Any) -> None:
    # of the layers the largest: the log has one line
    logits = [value for name, value in found.items() if name.startswith("max_logit/")]
    line = {name: value for name, value in found.items() if not name.startswith("max_logit/")}
    line |= {"max_logit": max(logits)} if logits else {}
    values = " | ".join(f"{name} {value:.4g}" for name, value in line.items())
    print(f" [muon] iteration {iteration:8d}/{getattr(args, 'train_iters', None) or 0:8d} | {values}", flush=True)
    named = {f"muon/{name}": value for name, value in found.items()}
    writer = getattr(_global_vars(), "_GLOBAL_TENSORBOARD_WRITER", None)
    if writer is not None:
        for name, value in named.items():
            writer.add_scalar(name, value, iteration)
    wandb = getattr(_global_vars(), "_GLOBAL_WANDB_WRITER", None)
    if wandb:
        wandb.log(named, iteration)
