"""Muon, the optimizer of "Muon is Scalable for LLM Training", for DeepSpeed, Megatron-Core and plain PyTorch.

Under an engine, its own configuration selects the optimizer after `register`::

    import muon_plugin
    muon_plugin.register()      # DeepSpeed's JSON: "optimizer": {"type": "Muon", "params": {"lr": 4.2e-4}}
                                # Megatron's arguments: --optimizer muon --use-distributed-optimizer

``python -m muon_plugin SCRIPT ...`` does the same without a change of code. In one process or under plain DDP::

    optimizer = muon_plugin.Muon(model.named_parameters(), model=model, lr=4.2e-4, weight_decay=0.1)

Commands, each with ``--help``::

    python -m muon_plugin.planner               # FLOPs, communication volume and memory of a run, before it starts
    python -m muon_plugin.preflight             # whether a job of many nodes can start
    python -m muon_plugin.metrics               # RMS and singular values of the matrices of a checkpoint
    python -m muon_plugin.deepspeed.convert     # universal checkpoints
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


def __dir__() -> list[str]:
    """With the names that `__getattr__` imports: ``help(muon_plugin)`` documents them."""
    return sorted({*globals(), *__all__})
