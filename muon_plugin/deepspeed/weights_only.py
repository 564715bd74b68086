"""Loading the weights of a checkpoint without the optimizer's state: ``load_checkpoint(..., load_module_only=True)``.

DeepSpeed's two arguments for it do not work at every stage, with any optimizer and without a word:

- In ZeRO-3, ``load_module_only=True`` loads nothing: the file of the module holds empty tensors.
- In ZeRO-3, ``load_optimizer_states=False`` reads the tag that the file ``latest`` names, whatever tag was asked for.
- In stage 0 under bf16 and fp16, ``load_optimizer_states=False`` leaves the fp32 masters as they were, so that the next
  step restores the old weights.

Both are what the errors about another optimizer's checkpoint advise, so around this Muon they are made to work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from ..core.agreement import alike, together
from ..core.muon import Muon
from . import ranks
from .host import BEFORE, swaps
from .other_layouts import check_layout, folder_of
from .swapping import SETTING, check_device, check_files, restore


def load_checkpoint(
    original: Callable[..., Any],
    engine: Any,
    load_dir: str,
    tag: str | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Any = None,
) -> Any:
    """In the place of the engine's, with its arguments and results.

    Raises:
        ValueError: where DeepSpeed cannot load weights alone, or not at this run's stage, number of ranks and offload.
    """
    ours = isinstance(getattr(engine, "basic_optimizer", None), Muon)
    weights_only = ours and (load_module_only or not load_optimizer_states)
    folder = folder_of(engine, load_dir, tag) if ours else None
    if ours:
        own, there = ranks.of(engine), "a checkpoint" if folder else "none"
        alike("what load_checkpoint finds", there, f"{load_dir} must be the same on every node", own)
        together(lambda: check_device(engine, folder), own)
        together(lambda: check_layout(engine, load_dir, tag, weights_only), own)
    if weights_only and folder is not None:
        _check(engine, "load_module_only=True" if load_module_only else "load_optimizer_states=False")
    if ours and folder is not None and swaps(engine):
        together(lambda: check_files(engine, folder), own)
    if weights_only and engine.zero_optimization():
        load_optimizer_states = False  # in ZeRO-3 this makes it read the weights from the shards
    with _asked_for(tag) if weights_only else nullcontext():
        found = original(
            engine,
            load_dir,
            tag,
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
            custom_load_fn,
        )
    if ours and folder is not None and swaps(engine):
        restore(engine, folder)
    if weights_only and found[0] is not None and not engine.zero_optimization():
        refresh = getattr(engine.optimizer, "refresh_fp32_params", None)
        if refresh is not None:
            refresh()
    return found


def _check(engine: Any, asked: str) -> None:
    """State on NVMe is restored with the weights; masters of AutoEP in ZeRO-3 by position, from any optimizer's."""
    setting = allowed = ""
    if swaps(engine):
        setting, allowed = SETTING, "to load all of it"
    elif engine.has_moe_layers and engine.zero_optimization_partition_weights():
        setting, allowed = "expert_parallel (AutoEP) in ZeRO-3", "stage 0, 1 or 2"
    if setting:
        raise ValueError(f"{asked} with {setting} does not restore the weights alone; allowed: {allowed}, or {BEFORE}")


#: The tag that is being loaded, while `load_checkpoint` runs.
_tag: ContextVar[str | None] = ContextVar("tag", default=None)


@contextmanager
def _asked_for(tag: str | None) -> Iterator[None]:
    token = _tag.set(tag)
    try:
        yield
    finally:
        _tag.reset(token)


def read_zero_3(
    original: Callable[..., Any], checkpoint_dir: Any, tag: str | None = None, *args: Any, **kw: Any
) -> Any:
    """Reads the weights of the tag that was asked for: DeepSpeed's engine does not pass it on."""
    return original(checkpoint_dir, _tag.get() if tag is None else tag, *args, **kw)
