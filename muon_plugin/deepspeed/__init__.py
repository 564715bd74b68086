"""Muon under DeepSpeed: `register` makes ``"optimizer": {"type": "Muon"}`` mean this Muon.

Three methods of ``DeepSpeedEngine`` are wrapped, here and nowhere else, and only act when the config asks for Muon:

- ``_broadcast_model``: first checks that all ranks built the same model (the broadcast itself hangs or corrupts if not);
- ``_configure_basic_optimizer``: builds our optimizer in place of DeepSpeed's own Muon;
- ``_configure_optimizer``: once the wrapper (ZeRO, bf16, fp16 or none) has cut the parameters, reads where the shards
  lie (`shards`) and attaches the optimizer to them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

#: What is wrapped, with the parameters it must have: another signature means another DeepSpeed.
HOOKED = {
    "_broadcast_model": ["self"],
    "_configure_basic_optimizer": ["self", "model_parameters"],
    "_configure_optimizer": ["self", "client_optimizer", "model_parameters"],
}
TESTED = ("0.18.9", "0.19.8")
_originals: dict[str, Callable[..., Any]] = {}


def register() -> None:
    """Wraps the engine. Twice is the same as once.

    Raises:
        RuntimeError: if DeepSpeed is not installed, or what is wrapped has changed.
    """
    if _originals:
        return
    try:
        import deepspeed
        from deepspeed.runtime.engine import DeepSpeedEngine
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    except ImportError as error:
        raise RuntimeError(
            f"muon_plugin.register() found no engine to register with: importing deepspeed failed ({error}). Install "
            "it (pip install deepspeed), or use muon_plugin.Muon alone"
        ) from error
    for name, expected in HOOKED.items():
        method = getattr(DeepSpeedEngine, name, None)
        found = list(inspect.signature(method).parameters) if method else "nothing of that name"
        if found != expected:
            raise RuntimeError(
                f"DeepSpeed {deepspeed.__version__} is not as muon_plugin knows it: DeepSpeedEngine.{name} has {found}, "
                f"not {expected}. Use a release that was tested ({', '.join(TESTED)}), or a newer muon_plugin"
            )
    from ..optimizer import Muon
    from . import engine

    for name in HOOKED:
        original = _originals[name] = getattr(DeepSpeedEngine, name)
        setattr(DeepSpeedEngine, name, _wrapped(original, getattr(engine, name)))
    ZERO_SUPPORTED_OPTIMIZERS.append(Muon)


def unregister() -> None:
    """Gives DeepSpeed its own methods back."""
    if not _originals:
        return
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    from ..optimizer import Muon

    for name, original in _originals.items():
        setattr(DeepSpeedEngine, name, original)
    _originals.clear()
    ZERO_SUPPORTED_OPTIMIZERS.remove(Muon)


def _wrapped(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(engine: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(original, engine, *args, **kwargs)

    return method
