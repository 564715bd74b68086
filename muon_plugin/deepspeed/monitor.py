"""What a user watches: through DeepSpeed's monitor (TensorBoard, CSV, W&B, Comet) and its ``wall_clock_breakdown``.

Every ``steps_per_print`` steps (10, where the config has no number there) a step is measured. Written then, beside
DeepSpeed's own ``Train/Samples/lr``, over the number of samples:

- ``Train/Muon/update_rms/GROUP``, ``weight_rms/GROUP``, ``momentum_norm/GROUP``: over all ranks; see `measure`;
- ``Train/Muon/gradient_norm``: of the gradients, before clipping where DeepSpeed computes it;
- ``Train/Muon/optimizer_share``, ``exchange_share``: of the time from the end of the step before, on rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils.timer import SynchronizedWallClockTimer

from ..core import phases
from ..core.measure import Measure

EVERY = 10
TIMERS = {name: f"muon_{name}" for name in phases.PHASES}
WHOLE = "whole step"


class Monitor:
    """Measures the steps of one engine; for a monitor or the wall clock breakdown in its config."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        steps = engine.steps_per_print()
        self.every = int(steps) if steps and math.isfinite(steps) else EVERY  # Hugging Face sets infinity
        self._measure: Measure | None = None
        self._clock = SynchronizedWallClockTimer()

    def step(self, original: Callable[..., None], *args: Any) -> None:
        """In the place of the engine's `_take_model_step`. Collective over the world, where it is measured."""
        engine, breakdown = self._engine, self._engine.wall_clock_breakdown()
        due = self._due()
        with ExitStack() as listening:
            for timers in [engine.timers] * breakdown + [self._clock] * due:
                listening.enter_context(phases.heard(_listener(timers)))
            if due:
                self._write(partial(original, *args))
            else:
                original(*args)
        if breakdown:
            engine.timers.log(list(TIMERS.values()))
        if self._due():
            self._clock(WHOLE).reset()
            self._clock(WHOLE).start()

    def _due(self) -> bool:
        """Whether the next step is to be measured."""
        return bool(self._engine.monitor.enabled) and (self._engine.global_steps + 1) % self.every == 0

    def _write(self, take_model_step: Callable[[], None]) -> None:
        engine, muon = self._engine, self._engine.basic_optimizer
        if self._measure is None:
            tied = [name for p, name in engine.param_names.items() if getattr(p, "ds_pipe_replicated", False)]
            self._measure = Measure(muon, tied)
        self._measure.clear()
        muon.measure = self._measure
        try:
            take_model_step()
        finally:
            muon.measure = None
        shares = self._shares()
        if not self._measure.stepped:
            return  # an overflow: every rank left the step out
        found = self._measure.result(torch.device("cpu" if dist.get_backend() == "gloo" else engine.device))
        norm = engine.get_global_grad_norm()
        found |= shares if norm is None else {"gradient_norm": float(norm), **shares}
        engine.monitor.write_events(
            [(f"Train/Muon/{name}", value, engine.global_samples) for name, value in found.items()]
        )

    def _shares(self) -> dict[str, float]:
        parts = {name: self._clock(timer).elapsed() for name, timer in TIMERS.items()}
        whole = self._clock(WHOLE)
        if not whole.started_:
            return {}
        whole.stop()
        milliseconds = whole.elapsed()
        return {
            "optimizer_share": sum(parts.values()) / milliseconds,
            "exchange_share": parts["exchange"] / milliseconds,
        }


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
        if not hasattr(engine, "_take_model_step"):
            raise RuntimeError(
                "this DeepSpeed is not as muon_plugin knows it: its engine has no _take_model_step. Use a release that "
                "was tested, or switch off monitors and wall_clock_breakdown"
            )
        engine._take_model_step = partial(Monitor(engine).step, engine._take_model_step)
