"""What a user watches: through DeepSpeed's monitor (TensorBoard, CSV, W&B, Comet) and its ``wall_clock_breakdown``.

Every ``steps_per_print`` steps (10, where the config has no number there) a step is measured. Written then, beside
DeepSpeed's own ``Train/Samples/lr``, over the number of samples:

- ``Train/Muon/update_rms/GROUP``, ``weight_rms/GROUP``, ``momentum_norm/GROUP``: over all ranks; see `measure`;
- ``Train/Muon/gradient_norm``: of the gradients, before clipping where DeepSpeed computes it;
- ``Train/Muon/zero_gradient_matrices``: how many matrices have a gradient of zeros alone, and are not frozen;
- ``Train/Muon/max_logit/LAYER``, ``clipped_heads``, with ``qk_clip``: the largest attention logit of each layer, and
  how many heads were scaled;
- ``Train/Muon/optimizer_share``, ``exchange_share``: of the time from the end of the step before, on rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from ..core import phases, report
from ..core.measure import Measure, Monitor, Part
from ..core.muon import Muon
from .steps import follow

EVERY = 10
TIMERS = {name: f"muon_{name}" for name in phases.PHASES}


class StepMonitor:
    """Measures the steps of one engine; for a monitor or the wall clock breakdown in its config."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        steps = engine.steps_per_print()
        self.every = int(steps) if steps and math.isfinite(steps) else EVERY  # Hugging Face sets infinity
        self._monitor = Monitor([engine.basic_optimizer.halves], self._measure, torch.device(engine.device))

    def _measure(self) -> Measure:
        muon = self._engine.basic_optimizer
        parts = [
            Part(report.label(muon.param_groups[call.group], muon.param_groups), call.shards, call.process_group)
            for call in muon.calls
        ]
        tied = [name for p, name in muon.names.items() if getattr(p, "ds_pipe_replicated", False)]
        return Measure(parts, muon.routing.shapes, tied, muon.process_group, torch.device(self._engine.device))

    def step(self, original: Callable[..., None], *args: Any) -> None:
        """In the place of the engine's `_take_model_step`. Collective over the engine's ranks where it is measured."""
        engine, breakdown = self._engine, self._engine.wall_clock_breakdown()
        with ExitStack() as listening:
            if breakdown:
                listening.enter_context(phases.heard(_listener(engine.timers)))
            if self._due():
                self._write(partial(original, *args))
            else:
                original(*args)
        if breakdown:
            engine.timers.log(list(TIMERS.values()))
        if self._due():
            self._monitor.clock.begin()

    def _due(self) -> bool:
        """Whether the next step is to be measured."""
        return bool(self._engine.monitor.enabled) and (self._engine.global_steps + 1) % self.every == 0

    def _write(self, take_model_step: Callable[[], None]) -> None:
        engine = self._engine
        _, found = self._monitor.step(take_model_step)
        if not found:
            return  # an overflow: every rank left the step out
        norm = engine.get_global_grad_norm()
        if norm is not None:
            found["gradient_norm"] = float(norm)
        engine.monitor.write_events(
            [(f"Train/Muon/{name}", value, engine.global_samples) for name, value in found.items()]
        )


def get_mom(original: Callable[..., Any], engine: Any) -> Any:
    """Momentum of each group of matrices, betas of each other group, as in ``engine.get_mom()`` and DeepSpeed's log.

    DeepSpeed looks for betas in every group, and reports 0.0 for a group without them.
    """
    if not isinstance(engine.basic_optimizer, Muon):
        return original(engine)
    groups = engine.optimizer.param_groups
    return [group["momentum"] if group["use_muon"] else group["betas"] for group in groups]


def _listener(timers: Any) -> phases.Listener:
    def changed(left: str, entered: str) -> None:
        if left in TIMERS:
            timers(TIMERS[left]).stop()
        if entered in TIMERS:
            timers(TIMERS[entered]).start()

    return changed


def watch(engine: Any) -> None:
    """Measures the steps of an engine around this Muon, if its config wants anything of it.

    Raises:
        RuntimeError: for a release without the method whose calls are measured.
    """
    if engine.monitor.enabled or engine.wall_clock_breakdown():
        follow(engine, StepMonitor(engine).step, "switch off monitors and wall_clock_breakdown")
