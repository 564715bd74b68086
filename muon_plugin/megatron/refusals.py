"""What this Muon cannot work with under Megatron-Core, checked before anything is built. Imports no engine.

Beside each: whether the engine stands in the way, this plugin has not been written for it, or nobody has tried it.
"""

from __future__ import annotations

from typing import Any

from ..core.checks import Refusal, refuse
from .settings import PRECISION, dtype_name, precision_aware


def check_supported(config: Any, ddp: Any) -> None:
    """Refuses the settings that Muon cannot work with.

    Args:
        config: an OptimizerConfig, or Megatron's arguments.
        ddp: a DistributedDataParallelConfig, or Megatron's arguments.

    Raises:
        ValueError: with the flag or field, its value and what is supported.
    """
    refuse(refusals(config, ddp))


def refusals(config: Any, ddp: Any) -> list[Refusal]:
    """All of them, also those that are not set; docs/refused-megatron.md has a row for each."""
    return [*_optimizer(config), *_data_parallel(ddp)]


def _optimizer(config: Any) -> list[Refusal]:
    decoupled = getattr(config, "decoupled_weight_decay", True)
    layer_wise = getattr(config, "use_layer_wise_distributed_optimizer", False)
    return [
        *(_dtype(config, name) for name in PRECISION),
        # Not written: decay would be added to the gradient, and so be orthogonalized with it.
        Refusal("decoupled_weight_decay", decoupled, not decoupled, "true: Muon's weight decay is decoupled"),
        # A contradiction: Megatron's own validation sets one or the other.
        Refusal(
            "use_layer_wise_distributed_optimizer",
            True,
            layer_wise,
            "false: it shards whole layers, this Muon shards as the stock distributed optimizer does",
        ),
        # Not right: learning rates, weight decay and numbers of steps are numbers of Python here, which a graph would
        # replay as they were when it was captured. Megatron made it for FusedAdam, which has tensors of them.
        Refusal(
            "--optimizer-cuda-graph", None, getattr(config, "optimizer_cuda_graph", False), "steps without this flag"
        ),
    ]


def _dtype(config: Any, name: str) -> Refusal:
    """Not right over layouts: FusedAdam scales fp16 and fp8 by the largest value of a shard, so that the result depends
    on where it is cut."""
    allowed = ("fp32",) if name == "main_params_dtype" else ("fp32", "bf16")
    found = dtype_name(config, name)
    is_set = precision_aware(config) and found not in allowed
    reason = "other dtypes need a scale for each shard, on which the results would depend"
    return Refusal(f"--{name.replace('_', '-')}", found, is_set, f"{', '.join(allowed)}; {reason}")


def _data_parallel(ddp: Any) -> list[Refusal]:
    return [
        # Not tried, for want of a GPU that has this type.
        Refusal(
            "--fp4-param-gather",
            None,
            getattr(ddp, "fp4_param_gather", False),
            "--fp8-param-gather, or main parameters from bf16 or fp16",
        ),
        # The engine: FSDP's parameters are DTensors in buffers of its own, with other tables.
        Refusal(
            "--use-megatron-fsdp",
            None,
            getattr(ddp, "use_megatron_fsdp", False),
            "--use-distributed-optimizer, without FSDP",
        ),
        # A contradiction: the buffers are cut for the distributed optimizer, or they are not.
        Refusal(
            "DistributedDataParallelConfig.use_distributed_optimizer",
            ddp.use_distributed_optimizer,
            not ddp.use_distributed_optimizer,
            "true, as in the OptimizerConfig",
        ),
    ]
