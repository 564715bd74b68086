"""Reads a DeepSpeed JSON for the planner: Muon's settings, how ZeRO shards, and the bytes of its own traffic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.settings import Settings
from .calls import Zero
from .cost import Traffic
from .memory import Engine

SECTIONS = ("optimizer", "zero_optimization", "tensor_parallel", "expert_parallel", "bf16", "fp16", "data_types")
#: ``communication_data_type`` -> bytes an element.
WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}
#: DeepSpeed's default of ``reduce_bucket_size``, elements.
REDUCE_BUCKET = 500_000_000

Section = Mapping[str, Any]


@dataclass(frozen=True)
class DeepSpeedConfig:
    """Muon's settings, the cut, the bytes of the engine's own traffic, and what it holds in memory."""

    settings: Settings
    zero: Zero
    traffic: Traffic
    engine: Engine


def read(config: Section, zero_stage: int | None, ep: int = 1) -> DeepSpeedConfig:
    """Reads the JSON; an empty one means bf16, ZeRO-1 and Muon's defaults.

    Args:
        config: the DeepSpeed JSON.
        zero_stage: in the place of the JSON's.
        ep: the expert parallel size that is planned.

    Raises:
        ValueError: with the key, its value and what is allowed.
    """
    sections = {key: _section(config, key) for key in SECTIONS}
    settings = _settings(sections["optimizer"] or {"type": "Muon"})
    zero_section = sections["zero_optimization"]
    stage = _stage(zero_section.get("stage", 0 if config else 1) if zero_stage is None else zero_stage)
    sub_group_size = _sub_group_size(zero_section)
    _refuse_autotp(sections["tensor_parallel"])
    _check_auto_ep(sections["expert_parallel"], ep)
    half = not config or any(sections[key].get("enabled") not in (None, False) for key in ("bf16", "fp16"))
    accumulated = sections["data_types"].get("grad_accum_dtype")
    element_bytes = 2 if half else 4
    gradient_bytes = _gradient_bytes(config.get("communication_data_type") or accumulated, element_bytes)
    own_wrapper = stage == 1 and half and accumulated == "fp32"  # BF16_Optimizer, which has neither option
    zero = Zero(
        stage,
        sub_group_size,
        round_robin=bool(zero_section.get("round_robin_gradients", False)) and not own_wrapper,
        parameter_alignment=bool(zero_section.get("parameter_alignment", False)) and not own_wrapper,
        element_bytes=element_bytes,
        moment_bytes=2 if sections["bf16"].get("bf16_optimizer_states", False) else 4,
    )
    optimizer_away = _share_away(_section(zero_section, "offload_optimizer"))
    engine = Engine(
        weights=element_bytes,
        gradients=WIDTHS.get(str(accumulated), element_bytes),
        masters=_master_bytes(sections, stage, half),
        weights_cut=stage == 3,
        gradients_cut=stage >= 2,
        buffer=0 if own_wrapper else _bucket(zero_section, stage),
        weights_away=_share_away(_section(zero_section, "offload_param")) if stage == 3 else 0.0,
        masters_away=optimizer_away,
        state_away=optimizer_away,
        momentum_away=settings.momentum_type.itemsize if settings.offload else 0,
    )
    return DeepSpeedConfig(settings, zero, _traffic(stage, gradient_bytes, element_bytes), engine)


def _share_away(section: Section) -> float:
    """How much ZeRO keeps in CPU memory or on NVMe: with the optimizer's ``ratio`` (twin-flow), a part."""
    return float(section.get("ratio", 1.0)) if section.get("device") not in (None, "none") else 0.0


def _master_bytes(sections: Mapping[str, Section], stage: int, half: bool) -> int:
    """Without ZeRO the weights of an fp32 model are stepped themselves; with it, a rank's part of them is a copy."""
    if not half:
        return 4 if stage else 0
    keys = (("bf16", "bf16_master_weights_and_grads"), ("fp16", "fp16_master_weights_and_grads"))
    return 2 if any(sections[section].get(key, False) for section, key in keys) else 4


def _bucket(section: Section, stage: int) -> int:
    """Elements of the buckets in which gradients are reduced: two where that overlaps with the backward pass."""
    size = section.get("reduce_bucket_size", "auto")
    size = REDUCE_BUCKET if size == "auto" else size
    if stage == 0 or not section.get("contiguous_gradients", True) or not isinstance(size, (int, float)):
        return 0
    return int(size) * (2 if stage < 3 and section.get("overlap_comm", False) else 1)


def _section(config: Section, key: str) -> Section:
    section = config.get(key) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{key}={section!r} in the DeepSpeed JSON; allowed: an object")
    return section


def _settings(optimizer: Section) -> Settings:
    """Muon's settings; "auto" means the default, since there is no Trainer here to fill it in."""
    if str(optimizer.get("type", "")).lower() != "muon":
        raise ValueError(f'optimizer.type={optimizer.get("type")!r} in the DeepSpeed JSON; allowed: "Muon"')
    return Settings.from_dict({k: v for k, v in _section(optimizer, "params").items() if v != "auto"})


def _stage(stage: Any) -> int:
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"zero_optimization.stage={stage!r}; allowed: 0, 1, 2, 3")
    return int(stage)


def _sub_group_size(section: Section) -> int:
    size = section.get("sub_group_size", "auto")
    if size == "auto":
        return Zero.sub_group_size
    if not isinstance(size, (int, float)) or size < 1:
        raise ValueError(f"zero_optimization.sub_group_size={size!r}; allowed: a number from 1 on")
    return int(size)


def _refuse_autotp(section: Section) -> None:
    if section.get("autotp_size", 0) not in (0, 1):
        raise ValueError(
            f"tensor_parallel.autotp_size={section['autotp_size']!r}; allowed: 1 for the planner, since AutoTP "
            "partitions live modules. Use --shapes with --tp, whose entries say how TP partitions them"
        )


def _check_auto_ep(section: Section, ep: int) -> None:
    size = section.get("autoep_size", 1) if section.get("enabled") else ep
    if size != ep:
        raise ValueError(
            f"expert_parallel.autoep_size={size!r} with --ep {ep}; allowed: --shapes with the same --ep, whose entries "
            "say which parameters are experts, since AutoEP distributes those of live modules"
        )


def _gradient_bytes(dtype: Any, default: int) -> int:
    if dtype is None:
        return default
    if dtype not in WIDTHS:
        raise ValueError(f"communication_data_type={dtype!r}; allowed: {', '.join(WIDTHS)}")
    return WIDTHS[dtype]


def _traffic(stage: int, gradient_bytes: int, element_bytes: int) -> Traffic:
    if stage == 0:  # an all-reduce is a reduce-scatter and an all-gather; weights stay where they are
        return Traffic(2 * gradient_bytes, element_bytes, gathers=0)
    return Traffic(gradient_bytes, element_bytes, gathers=2 if stage == 3 else 1)
