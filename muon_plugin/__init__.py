"""Muon, the optimizer of "Muon is Scalable for LLM Training", for DeepSpeed, and alone.

import muon_plugin

muon_plugin.register()                  # then "optimizer": {"type": "Muon", ...} in a DeepSpeed JSON
muon_plugin.Muon(model.named_parameters(), lr=1e-3)      # one process, or plain DDP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .optimizer import Muon

__version__ = "0.1.0"
__all__ = ["Muon", "register", "unregister"]


def register() -> None:
    """Hooks the installed engines, so that their own configuration reaches this Muon. Twice is the same as once.

    Raises:
        RuntimeError: if no engine is installed, or an installed one is not as this release knows it.
    """
    from .deepspeed import register as register_deepspeed

    register_deepspeed()


def unregister() -> None:
    """Gives the engines their own code back. Engines that were built before keep their optimizer."""
    from .deepspeed import unregister as unregister_deepspeed

    unregister_deepspeed()


def __getattr__(name: str) -> Any:
    # Importing torch takes more than a second; a launcher that imports the package to register must not wait for it.
    if name == "Muon":
        from .optimizer import Muon

        return Muon
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
