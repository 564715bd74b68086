"""What this Muon cannot work with under Megatron-Core, checked before anything is built. Imports no engine.

Beside each: whether the engine stands in the way, this plugin has not been written for it, or nobody has tried it.
"""

from __future__ import annotations

from typing import Any

from ..core.checks import Refusal, refuse


def check_supported(config: Any, ddp: Any) -> None:
    """Refuses the settings that Muon cannot work with.

    Args:
        config: an OptimizerConfig, or Megatron's arguments.
        ddp: a DistributedDataParallelConfig, or Megatron's arguments.

    Raises:
        ValueError: with the flag or field, its value and what is supported.
    """
    refuse([*_optimizer(config), *_data_parallel(ddp)])


def _optimizer(config: Any) -> list[Refusal]:
    scalar = getattr(config, "muon_scalar_optimizer", "adam")
    decoupled = getattr(config, "decoupled_weight_decay", True)
    layer_wise = getattr(config, "use_layer_wise_distributed_optimizer", False)
    return [
        # The engine: Transformer Engine's FusedAdam then holds the main parameters in its own state, and their shards,
        # on which Muon works, are None.
        Refusal(
            "--use-precision-aware-optimizer",
            None,
            config.use_precision_aware_optimizer,
            "momentum and main parameters in fp32, without this flag; --muon-offload saves memory",
        ),
        # The engine: HybridDeviceOptimizer steps all its parameters, matrices too, in Adams of its own over copies.
        Refusal(
            "--optimizer-cpu-offload (HybridDeviceOptimizer)",
            None,
            config.optimizer_cpu_offload,
            "--muon-offload, which keeps Muon's momentum in CPU memory",
        ),
        # Not written: Lion keeps one moment, and the other half's state and checkpoints are AdamW's two.
        Refusal(
            "--muon-scalar-optimizer", scalar, scalar != "adam", "adam: everything but the matrices is trained by AdamW"
        ),
        # Not written: decay would be added to the gradient, and so be orthogonalized with it.
        Refusal("decoupled_weight_decay", decoupled, not decoupled, "true: Muon's weight decay is decoupled"),
        # A contradiction: Megatron's own validation sets one or the other.
        Refusal(
            "use_layer_wise_distributed_optimizer",
            True,
            layer_wise,
            "false: it shards whole layers, this Muon shards as the stock distributed optimizer does",
        ),
        # Not tried: messages between ranks and the copies of --muon-offload would have to be captured. Megatron made
        # it for Adam.
        Refusal(
            "--optimizer-cuda-graph", None, getattr(config, "optimizer_cuda_graph", False), "steps without this flag"
        ),
    ]


def _data_parallel(ddp: Any) -> list[Refusal]:
    gathered = "main parameters from bf16 or fp16, without this flag"
    return [
        # Not tried, for want of Transformer Engine and a GPU that has these types. Of most, parts cannot be viewed, so
        # that where they lie could not be checked.
        Refusal("--fp8-param-gather", None, getattr(ddp, "fp8_param_gather", False), gathered),
        Refusal("--fp4-param-gather", None, getattr(ddp, "fp4_param_gather", False), gathered),
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
