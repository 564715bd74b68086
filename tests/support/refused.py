"""What `muon_plugin.deepspeed.refusals` checks, for an engine whose config has everything that it names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

ZERO = SimpleNamespace(
    stage=2,
    offload_optimizer=SimpleNamespace(device="nvme", super_offload=True, pipeline_read=True, pipeline_write=False),
    offload_param=None,
    elastic_checkpoint=True,
    zenflow=object(),
    mics_shard_size=2,
)
CONFIG = SimpleNamespace(
    zero_config=ZERO,
    expert_parallel_config=SimpleNamespace(enabled=True),
    bfloat16_config=SimpleNamespace(enabled=True, immediate_grad_update=False),
)


def engine() -> Any:
    schedule = {"warmup_max_lr": 0.1, "cycle_momentum": True}
    calls = {
        "autotp_size": 2,
        "torch_autocast_enabled": True,
        "torch_autocast_dtype": torch.float16,
        "bf16_master_weights_and_gradients": True,
        "fp16_master_weights_and_gradients": True,
        "bf16_optimizer_states": False,
        "load_universal_checkpoint": True,
        "optimizer_params": {"muon_lr": 0.1, "adam_lr": 0.1, "momentum_dtype": "bf16"},
        "scheduler_name": "WarmupLR",
        "scheduler_params": schedule,
        "get_data_types": (torch.bfloat16, torch.float32),
    }
    methods = {name: lambda value=value: value for name, value in calls.items()}
    return SimpleNamespace(_config=CONFIG, has_moe_layers=True, **methods)
