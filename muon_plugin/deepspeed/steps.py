"""Around the steps of one engine: what measures them (`monitor`), and what ends with them (QK-Clip)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def follow(engine: Any, step: Callable[..., None], advice: str) -> None:
    """From now on ``step(take, *args)`` is called in the place of the engine's ``take(*args)``.

    ``take`` is the `_take_model_step` of this engine: once for each step of the engine, also one that is skipped
    after an overflow, however often that calls the inner optimizer.

    Raises:
        RuntimeError: for a release without that method; `advice` says how to do without it.
    """
    if not hasattr(engine, "_take_model_step"):
        raise RuntimeError(
            f"unsupported DeepSpeed: its engine has no _take_model_step. Use a release that was tested, or {advice}"
        )
    engine._take_model_step = partial(step, engine._take_model_step)
