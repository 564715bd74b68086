"""`register` and `unregister`: which engines are installed, and their hooks."""

from __future__ import annotations

import contextlib
import importlib
import sys

#: Engine -> the package that it is.
ENGINES = {"deepspeed": "deepspeed", "megatron": "megatron.core"}


def register(*engines: str) -> None:
    """Hooks the installed engines, so that their own configuration selects this Muon. Calling it twice is harmless.

    Call it on every rank before ``deepspeed.initialize`` or Megatron's ``get_megatron_optimizer``. It checks the
    signatures of the engines' functions that it wraps, and replaces them in this process; the engines' files stay as
    they are. `unregister` restores the functions.

    Args:
        *engines: "deepspeed", "megatron"; all that are installed where none is named.

    Raises:
        ValueError: for another engine.
        RuntimeError: if no engine is installed, one that was named is not, or an installed release is unsupported.

    Examples:
        >>> import muon_plugin
        >>> muon_plugin.register("deepspeed")
        >>> muon_plugin.unregister()
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
        importlib.import_module(f".{engine}", __package__).register()
    if missing and (engines or len(missing) == len(ENGINES)):
        raise RuntimeError(
            f"muon_plugin.register() found no engine to register with: {'; '.join(missing.values())}. Install one "
            "(pip install deepspeed, or megatron-core), or use muon_plugin.Muon alone"
        )


def unregister() -> None:
    """Restores the engines' own functions. Engines that were built before keep their optimizer."""
    with contextlib.ExitStack() as every:  # the others too, should one raise
        for engine in ENGINES:
            every.callback(importlib.import_module(f".{engine}", __package__).unregister)
        if attention := sys.modules.get(f"{__package__}.attention"):
            every.callback(attention.unwatch)
