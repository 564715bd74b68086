"""Muon under DeepSpeed: `register` makes ``"optimizer": {"type": "Muon"}`` mean this Muon.

Three functions are wrapped, here and nowhere else, and only act when the config asks for Muon:

- ``deepspeed.set_optimizer_flags``: tags parameters for DeepSpeed's own Muon, whose code in the gradient path starts
  from these tags. Instead, checks that all ranks have good settings and the same model, before anything is built (the
  engine's broadcast of the model hangs or crashes if they differ);
- ``DeepSpeedEngine._configure_basic_optimizer``: builds our optimizer in place of DeepSpeed's own Muon;
- ``DeepSpeedEngine._configure_optimizer``: once the wrapper (ZeRO, bf16, fp16 or none) has cut the parameters, reads
  where the shards lie (`shards`) and attaches the optimizer to them.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

#: What is wrapped, with the parameters it must have: another signature means another DeepSpeed.
HOOKED = {
    "set_optimizer_flags": ["config_class", "model"],
    "_configure_basic_optimizer": ["self", "model_parameters"],
    "_configure_optimizer": ["self", "client_optimizer", "model_parameters"],
}
TESTED = ("0.19.8",)
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
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    except ImportError as error:
        raise RuntimeError(
            f"muon_plugin.register() found no engine to register with: importing deepspeed failed ({error}). Install "
            "it (pip install deepspeed), or use muon_plugin.Muon alone"
        ) from error
    for name, expected in HOOKED.items():
        function = getattr(_holder(name), name, None)
        found = list(inspect.signature(function).parameters) if function else "nothing of that name"
        if found != expected:
            raise RuntimeError(
                f"DeepSpeed {deepspeed.__version__} is not as muon_plugin knows it: {_holder(name).__name__}.{name} "
                f"has {found}, not {expected}. Use a release that was tested ({', '.join(TESTED)}), or a newer "
                "muon_plugin"
            )
    if deepspeed.__version__ not in TESTED:
        warnings.warn(
            f"muon_plugin was not tested with DeepSpeed {deepspeed.__version__} (tested: {', '.join(TESTED)}). Its "
            "layout is checked at start all the same",
            stacklevel=2,
        )
    from ..optimizer import Muon
    from . import engine

    for name in HOOKED:
        _originals[name] = getattr(_holder(name), name)
        setattr(_holder(name), name, _wrapped(_originals[name], getattr(engine, name)))
    ZERO_SUPPORTED_OPTIMIZERS.append(Muon)


def unregister() -> None:
    """Gives DeepSpeed its own code back."""
    if not _originals:
        return
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    from ..optimizer import Muon

    for name, original in _originals.items():
        setattr(_holder(name), name, original)
    _originals.clear()
    ZERO_SUPPORTED_OPTIMIZERS.remove(Muon)


def _holder(name: str) -> Any:
    """The module or class that the wrapped function belongs to."""
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine

    return DeepSpeedEngine if HOOKED[name][0] == "self" else deepspeed


def _wrapped(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    return function
