"""Muon, the optimizer of "Muon is Scalable for LLM Training", for DeepSpeed and Megatron-Core, and alone.

import muon_plugin

muon_plugin.register()                  # then "optimizer": {"type": "Muon", ...} in a DeepSpeed JSON,
                                        # or --optimizer muon --use-distributed-optimizer under Megatron
muon_plugin.Muon(model.named_parameters(), lr=1e-3)      # one process, or plain DDP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .registration import register, unregister

if TYPE_CHECKING:
    from .alone import Muon
    from .attention import record_logits
    from .core.logits import largest_logits

__version__ = "0.1.0"
__all__ = ["Muon", "largest_logits", "record_logits", "register", "unregister"]


def __getattr__(name: str) -> Any:
    # Importing torch takes more than a second; a launcher that imports the package to register must not wait for it.
    if name == "Muon":
        from .alone import Muon

        return Muon
    if name == "record_logits":
        from .attention import record_logits

        return record_logits
    if name == "largest_logits":
        from .core.logits import largest_logits

        return largest_logits
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
