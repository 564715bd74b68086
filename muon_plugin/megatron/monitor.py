"""What a user watches, in Megatron's log, TensorBoard and W&B: the sizes of updates, weights, momentum and gradients.

A step is measured where Megatron's ``--log-interval`` logs one; in all other steps nothing is computed. Names, over
Megatron's iteration:

- ``muon/update_rms/LABEL``, ``weight_rms/LABEL``, ``momentum_norm/LABEL``, over all ranks; LABEL is ``muon`` or
  ``adamw``, or one of these with ``_experts``; see `core.measure`;
- ``muon/gradient_norm``: of all gradients, before clipping;
- ``muon/optimizer_share``, ``exchange_share``: of the time since the end of the step before, on the rank that logs.

Megatron writes from the last rank, and so do we.
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
        step: the optimizer's own.
        halves: of its inner optimizers.
        parts: this rank's shards.
        shapes: of the whole parameters, by name.
        elsewhere: parameters of this rank that an earlier pipeline stage counts.
        device: that computes.
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
        """In the place of the optimizer's step: what that returns. Collective over the world, where it is measured."""
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
    """Megatron's command line, where it was parsed; None otherwise."""
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
