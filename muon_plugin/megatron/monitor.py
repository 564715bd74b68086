"""Monitoring in Megatron's log, TensorBoard and W&B: norms of updates, weights, momentum and gradients.

Only the steps that Megatron's ``--log-interval`` logs are measured. The metrics, by Megatron's iteration:

- ``muon/update_rms/LABEL``, ``muon/weight_rms/LABEL``, ``muon/momentum_norm/LABEL``, over all ranks; LABEL is ``muon``
  or ``adamw``, or one of these with ``_experts``; see `core.measure`;
- ``muon/gradient_norm``: of all gradients, before clipping;
- ``muon/optimizer_share``, ``muon/exchange_share``: fractions of the time since the end of the step before, on the
  rank that logs.

The last rank writes them, as in Megatron.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..core.halves import Halves
from ..core.measure import Measure, Monitor, Part


class StepMonitor:
    """Measures the steps of Megatron's optimizer, under Megatron's own training loop.

    Args:
        step: the optimizer's own step, which is called.
        halves: those of its inner optimizers.
        parts: this rank's shards, by label.
        shapes: shapes of the whole parameters, by name.
        elsewhere: parameters of this rank that an earlier pipeline stage counts.
        device: on which the optimizer computes.
    """

    def __init__(
        self,
        step: Callable[[], Any],
        halves: Sequence[Halves],
        parts: Sequence[Part],
        shapes: Mapping[str, Sequence[int]],
        elsewhere: Sequence[str],
        device: torch.device,
    ) -> None:
        self._step = step
        wire = torch.device("cpu") if dist.get_backend() == "gloo" else device
        self._monitor = Monitor(halves, lambda: Measure(parts, shapes, elsewhere), device, wire)

    def step(self) -> Any:
        """Replaces the optimizer's step and returns its result. Collective over the world when the step is measured."""
        args = arguments()
        if args is None:
            return self._step()
        iteration = getattr(args, "curr_iteration", args.iteration) + 1
        if iteration % args.log_interval:
            made = self._step()
        else:
            made, found = self._monitor.step(self._step)
            if found:
                norm = made[1]  # (whether it stepped, gradient norm, zeros in the gradients)
                _write(found if norm is None else {**found, "gradient_norm": float(norm)}, iteration, args)
        if (iteration + 1) % args.log_interval == 0:
            self._monitor.clock.begin()
        return made


def arguments() -> Any:
    """Megatron's parsed command line; None if it was not parsed."""
    return getattr(_global_vars(), "_GLOBAL_ARGS", None)


def _global_vars() -> Any:
    return sys.modules.get("megatron.training.global_vars")


def _write(found: Mapping[str, float], iteration: int, args: Any) -> None:
    if dist.get_rank() != dist.get_world_size() - 1:
        return
    values = " | ".join(f"{name} {value:.4g}" for name, value in found.items())
    print(f" [muon] iteration {iteration:8d}/{getattr(args, 'train_iters', None) or 0:8d} | {values}", flush=True)
    named = {f"muon/{name}": value for name, value in found.items()}
    writer = getattr(_global_vars(), "_GLOBAL_TENSORBOARD_WRITER", None)
    if writer is not None:
        for name, value in named.items():
            writer.add_scalar(name, value, iteration)
    wandb = getattr(_global_vars(), "_GLOBAL_WANDB_WRITER", None)
    if wandb:
        wandb.log(named, iteration)
