"""Muon under Megatron-Core: `register` makes ``--optimizer muon --use-distributed-optimizer`` mean this Muon.

Megatron's functions are wrapped only here, and the wrappers act only on that pair of arguments:

- ``megatron.core.optimizer.get_megatron_optimizer`` (and 0.16.1's ``get_megatron_muon_optimizer``): Megatron rejects
  the pair (0.16.1) or shards whole layers (0.19.2). The wrapper builds the stock optimizer with AdamW and puts Muon
  inside (`engine.build`);
- ``megatron.core.optimizer.OptimizerConfig.__post_init__``: lets only Transformer Engine's AdamW be precision-aware;
- ``megatron.training.arguments.validate_args``: would reject the pair among the arguments; the wrapper accepts it;
- ``megatron.core.optimizer.qk_clip.clip_qk`` would scale parts of matrices after the weights were gathered; the wrapper
  leaves that to the optimizer's step (`qk_clip`);
- ``megatron.training.arguments.add_megatron_arguments``: adds ``--muon-paper``, ``--muon-ns-method``,
  ``--muon-ns-dtype``, ``--muon-offload``, ``--muon-split-qkv-per-head``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from typing import Any

from ..core.hooks import Hook, Hooks

TESTED = ("0.16.1", "0.19.2")
FACTORY = ["config", "model_chunks", "config_overrides", "use_gloo_process_groups", "pg_collection"]
_hooks = Hooks("Megatron-Core", TESTED)


def register() -> None:
    """Wraps Megatron's functions. Idempotent.

    Raises:
        ImportError: if Megatron-Core is not installed.
        RuntimeError: if a function to wrap has another signature than expected.
    """
    if _hooks.installed:
        return
    from megatron.core import optimizer
    from megatron.core.optimizer import OptimizerConfig, qk_clip
    from megatron.core.package_info import __version__

    from . import arguments as ours
    from . import engine
    from . import qk_clip as ours_qk_clip

    hooks = [
        Hook(
            optimizer,
            "get_megatron_optimizer",
            [*FACTORY, "dump_param_to_param_group_map"],
            engine.get_megatron_optimizer,
        ),
        Hook(OptimizerConfig, "__post_init__", ["self"], ours.check_config),
        Hook(qk_clip, "clip_qk", ["model", "log_max_only"], ours_qk_clip.clip_qk),
    ]
    muon = importlib.import_module("megatron.core.optimizer.muon")
    if inspect.isfunction(getattr(muon, "get_megatron_muon_optimizer", None)) and __version__ < "0.17":
        parameters = [*FACTORY[:4], "layer_wise_distributed_optimizer", "pg_collection"]
        hooks.append(Hook(muon, "get_megatron_muon_optimizer", parameters, engine.get_megatron_muon_optimizer))
    arguments = _training_arguments()
    if arguments is not None:
        hooks.append(Hook(arguments, "validate_args", ["args", "defaults"], ours.validate_args))
        hooks.append(Hook(arguments, "add_megatron_arguments", ["parser"], ours.add_megatron_arguments))
    _hooks.install(__version__, hooks)


def _training_arguments() -> Any:
    """Megatron's command line, where it is there and can be imported."""
    if importlib.util.find_spec("megatron.training") is None:
        return None
    try:
        return importlib.import_module("megatron.training.arguments")
    except ImportError as error:  # 0.19's on Python 3.11, for example, which its megatron.core does not need
        warnings.warn(
            f"megatron.training cannot be imported ({error}), so its command line does not know Muon; "
            "get_megatron_optimizer does. Megatron-Core 0.19 wants Python 3.12",
            stacklevel=3,
        )
        return None


def unregister() -> None:
    """Restores Megatron's own functions. Optimizers that were built before keep Muon."""
    _hooks.remove()
