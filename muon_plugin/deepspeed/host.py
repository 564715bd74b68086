"""What DeepSpeed requires of the optimizer in it. Does not import DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..core.groups import Host, expect
from ..core.routing import layer_types


def _experts(group: Mapping[str, Any]) -> str | None:
    """DeepSpeed's name of an expert parallel group, by which it finds the group's ranks; None for other groups."""
    return str(group["name"]) if group.get("moe") else None


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The shape before ZeRO-3 cut the parameter: afterwards, and under ``zero.Init`` from the start, it looks empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _layers(model: Any) -> dict[str, Any]:
    """All layers of a PipelineModule, of which a stage holds some; of another model, those that it holds."""
    specs = getattr(model, "_layer_specs", None)
    if specs is None:
        return layer_types(model)
    kinds = {str(number): getattr(spec, "typename", type(spec)) for number, spec in enumerate(specs)}
    return {number: kind for number, kind in kinds.items() if issubclass(kind, nn.Module)}  # others are functions


CONVERT = (
    "make a universal checkpoint of it (python -m muon_plugin.deepspeed.convert), from which a run with "
    '"checkpoint": {"load_universal": true} restores what both have in common'
)
WEIGHTS_ONLY = "load only the weights (load_checkpoint(..., load_module_only=True))"
BEFORE = "load the weights into the model before deepspeed.initialize"

#: DeepSpeed moves, reshards and converts optimizer state that has Adam's names.
HOST = Host(
    momentum="exp_avg",
    advice=f"{CONVERT}; or {WEIGHTS_ONLY}",
    unfreeze="DeepSpeed trains only what requires gradients at deepspeed.initialize (except at stage 0 in fp32). "
    "Unfreeze it before deepspeed.initialize, and freeze it again afterwards",
    group_keys=("moe",),
    experts=_experts,
    shape=whole_shape,
    layers=_layers,
)


def is_converted(engine: Any) -> bool:
    """Whether DeepSpeed's converter takes its checkpoints: not of stage 0, of ``deepspeed.moe``, or on NVMe."""
    auto_ep = getattr(getattr(engine._config, "expert_parallel_config", None), "enabled", False)
    return bool(engine.zero_optimization() and (auto_ep or not engine.has_moe_layers) and not swaps(engine))


def swaps(engine: Any) -> bool:
    """Whether the optimizer is on NVMe, between which and the CPU DeepSpeed swaps it (in stage 3)."""
    return getattr(engine._config.zero_config.offload_optimizer, "device", None) == "nvme"


def host_of(engine: Any) -> Host:
    """DeepSpeed, with advice that works for this engine."""
    whole = not (engine.has_moe_layers and engine.zero_optimization_partition_weights()) and not swaps(engine)
    ways = [CONVERT] if is_converted(engine) else []
    return replace(HOST, advice="; or ".join([*ways, WEIGHTS_ONLY if whole else BEFORE]))


expect(HOST)  # a client's own Muon, which `deepspeed.initialize(optimizer=...)` takes over
