"""What DeepSpeed allows with DeepSpeedCPUAdam alone: masters of 16 bits under offload, and offload with a ``ratio``.

It asks for that class by name and calls nothing but its `step`, so while ZeRO's wrapper is built, Muon is in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.zero import stage3, stage_1_and_2

from ..core.checks import Refusal, refuse
from ..core.muon import Muon

#: The AdamW whose moments are fp32 whatever the masters are, as those of DeepSpeedCPUAdam.
FP32_MOMENTS = "torch_fp32"
#: What ZeRO-3 reads in every group to make an AdamW of its own for the sub-groups that stay on the device.
ADAMWS = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}


@contextmanager
def in_its_place(engine: Any) -> Iterator[None]:
    """As long as the context lasts, this engine builds ZeRO's wrapper around Muon as around DeepSpeedCPUAdam."""
    original = engine._configure_zero_optimizer
    engine._configure_zero_optimizer = partial(_configure_zero_optimizer, engine, original)
    try:
        yield
    finally:
        del engine._configure_zero_optimizer  # the attribute; the method is its class's


def _configure_zero_optimizer(engine: Any, original: Callable[..., Any], optimizer: Any) -> Any:
    if not isinstance(optimizer, Muon):
        return original(optimizer)
    own = [(module, module.DeepSpeedCPUAdam) for module in (stage_1_and_2, stage3)]
    ratio = engine.zero_use_cpu_optimizer() and engine.zero_partial_offload() != 1.0
    groups, keys = optimizer.param_groups, [set(group) for group in optimizer.param_groups]
    optimizer.__dict__["fp32_optimizer_states"] = not engine.bf16_optimizer_states()  # which the wrapper asks for
    for module, _ in own:
        module.DeepSpeedCPUAdam = type(optimizer)
    for group in groups if ratio else ():
        group.update({key: value for key, value in ADAMWS.items() if key not in group})
    try:
        wrapper = original(optimizer)
    finally:
        for module, cls in own:
            module.DeepSpeedCPUAdam = cls
        for group, before in zip(groups, keys):
            for key in set(group) - before:
                del group[key]
    if ratio and hasattr(wrapper, "backup_optimizer"):
        wrapper.backup_optimizer = optimizer  # its call is that of a sub-group like the others
    return wrapper


def choose_adamw(engine: Any, muon: Muon) -> None:
    """Keeps AdamW's moments in fp32 over masters of 16 bits, unless ``bf16_optimizer_states`` says otherwise.

    Raises:
        ValueError: for another `adamw`.
    """
    narrow = engine.bf16_master_weights_and_gradients() or engine.fp16_master_weights_and_gradients()
    if not narrow or engine.bf16_optimizer_states() or muon.settings.adamw == FP32_MOMENTS:
        return
    asked = muon.settings.adamw
    advice = f'"auto" or "{FP32_MOMENTS}" with masters of 16 bits, whose moments are fp32; or bf16_optimizer_states'
    refuse([Refusal("adamw", asked, asked != "auto", advice)])
    muon.settings = replace(muon.settings, adamw=FP32_MOMENTS)


def notes(muon: Muon) -> list[str]:
    """What the start-up table says of masters of 16 bits."""
    dtypes = {p.dtype for call in muon.calls for p in call.tensors}
    if not dtypes & {torch.bfloat16, torch.float16}:
        return []
    shown = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return [f"weights are updated in {shown}, which loses small updates; the momentum is fp32"]
