"""Muon, the optimizer of "Muon is Scalable for LLM Training", for DeepSpeed and Megatron-Core, and alone.

import muon_plugin

muon_plugin.register()                  # then "optimizer": {"type": "Muon", ...} in a DeepSpeed JSON,
                                        # or --optimizer muon --use-distributed-optimizer under Megatron
muon_plugin.Muon(model.named_parameters(), lr=1e-3)      # one process, or plain DDP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .optimizer import Muon

__version__ = "0.1.0"
__all__ = ["Muon", "register", "unregister"]
#: Engine -> the package that it is.
ENGINES = {"deepspeed": "deepspeed", "megatron": "megatron.core"}


def register(*engines: str) -> None:
    """Hooks the installed engines, so that their own configuration reaches this Muon. Twice is the same as once.

    Args:
        *engines: "deepspeed", "megatron"; all that are installed where none is named.

    Raises:
        ValueError: for another engine.
        RuntimeError: if no engine is installed, or one that was named is not; or one is not as this release knows it.
    """
    for engine in engines:
        if engine not in ENGINES:
            raise ValueError(f"muon_plugin.register({engine!r}): no such engine; allowed: {', '.join(ENGINES)}")
    missing = {}
    for engine in engines or ENGINES:
        try:
            importlib.import_module(ENGINES[engine])
        except ImportError as error:
            missing[engine] = f"importing {ENGINES[engine]} failed ({error})"
            continue
        importlib.import_module(f".{engine}", __name__).register()
    if missing and (engines or len(missing) == len(ENGINES)):
        raise RuntimeError(
            f"muon_plugin.register() found no engine to register with: {'; '.join(missing.values())}. Install one "
            "(pip install deepspeed, or megatron-core), or use muon_plugin.Muon alone"
        )


def unregister() -> None:
    """Gives the engines their own code back. Engines that were built before keep their optimizer."""
    for engine in ENGINES:
        importlib.import_module(f".{engine}", __name__).unregister()


def __getattr__(name: str) -> Any:
    # Importing torch takes more than a second; a launcher that imports the package to register must not wait for it.
    if name == "Muon":
        from .optimizer import Muon

        return Muon
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
