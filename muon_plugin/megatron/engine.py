"""Builds Megatron's optimizer with Muon in it, and what Megatron's wrapped functions do instead."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import megatron.core.optimizer
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from ..agreement import agree, together, world_of
from ..plan import Plan
from ..report import table
from ..routing import Routing
from ..update import Update
from .arguments import asks_for_muon
from .optimizer import MuonDistributedOptimizer
from .routing import Parameter, parameters, route
from .settings import Settings
from .shards import joint_groups, names, shards


def build(
    original: Callable[..., Any],
    config: Any,
    model_chunks: Sequence[Any],
    *args: Any,
    pg_collection: Any = None,
    **kwargs: Any,
) -> Any:
    """Megatron's optimizer for these model chunks, with Muon for the matrices. Collective.

    Args:
        original: Megatron's own ``get_megatron_optimizer``.
        config: an OptimizerConfig with ``optimizer="muon"`` and ``use_distributed_optimizer=True``.
        model_chunks: wrapped in Megatron's DistributedDataParallel.
        *args, pg_collection, **kwargs: as Megatron's.

    Returns:
        The ChainedOptimizer that Megatron builds, each DistributedOptimizer in it with Muon inside.

    Raises:
        ValueError: on every rank, for a setting or a model that cannot work, with what to change.
    """

    def prepare() -> tuple[Settings, list[Parameter], Routing, Any]:
        settings = Settings.from_config(config, _arguments())
        _check_supported(config, model_chunks)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        tp, expert_tp = (dist.get_world_size(group) for group in _tp_groups(groups))
        found = parameters(model_chunks, tp, expert_tp)
        return settings, found, route(found, model_chunks, settings.split_qkv), groups

    settings, found, routing, groups = together(prepare)
    agree("the settings of Muon", [repr(settings)], "Start every rank with the same arguments")
    stock = copy.copy(config)
    stock.optimizer = "adam"
    chained = original(stock, model_chunks, *args, pg_collection=pg_collection, **kwargs)
    together(lambda: _check_built(chained))
    live = [optimizer for optimizer in chained.chained_optimizers if not optimizer.is_stub_optimizer]
    tp, expert_tp = _tp_groups(groups)
    experts = [any(group["is_expert_parallel"] for group in optimizer.param_groups) for optimizer in live]
    process_groups = joint_groups(
        [(o.data_parallel_group, expert_tp if e else tp) for o, e in zip(live, experts, strict=True)]
    )
    updates = [
        _convert(optimizer, found, routing, settings, group, (dist.get_rank(tp), dist.get_rank(expert_tp)))
        for optimizer, group in zip(live, process_groups, strict=True)
    ]
    _report(chained, routing, settings, [update.plan for update in updates])
    return chained


def _arguments() -> Any:
    """Megatron's command line, where it was parsed: its OptimizerConfig takes over only the fields that it knows."""
    global_vars = sys.modules.get("megatron.training.global_vars")
    return getattr(global_vars, "_GLOBAL_ARGS", None)


def _tp_groups(groups: Any) -> tuple[Any, Any]:
    """The TP groups of the dense layers and of the routed experts."""
    return groups.tp, getattr(groups, "expt_tp", None) or groups.tp


def _convert(
    optimizer: Any,
    found: Sequence[Parameter],
    routing: Routing,
    settings: Settings,
    process_group: Any,
    tp_ranks: tuple[int, int],
) -> Update:
    """Puts Muon into one stock DistributedOptimizer."""
    muon = {matrix.parameter for matrix in routing.matrices}
    held = together(lambda: shards(optimizer, names(found), *tp_ranks), process_group)
    update = Update(
        routing.matrices,
        [shard for shard in held if shard.parameter in muon],
        process_group,
        found[0].tensor.device,
        settings.newton_schulz,
        settings.scale,
    )
    MuonDistributedOptimizer.convert(optimizer, update, settings)
    return update


def _check_built(chained: Any) -> None:
    for optimizer in chained.chained_optimizers:
        if type(optimizer) is not DistributedOptimizer:
            raise ValueError(
                f"Megatron built a {type(optimizer).__name__}; supported under Muon: its DistributedOptimizer "
                "(--use-distributed-optimizer, without FSDP)"
            )


def _check_supported(config: Any, model_chunks: Sequence[Any]) -> None:
    """Refuses what cannot work.

    Raises:
        ValueError: with the flag, its value and what to do.
    """
    ddp = model_chunks[0].ddp_config
    refused = {
        "--use-precision-aware-optimizer": (
            config.use_precision_aware_optimizer,
            "momentum and main parameters are fp32; leave it out. To save memory: --muon-offload",
        ),
        "--optimizer-cpu-offload (HybridDeviceOptimizer)": (
            config.optimizer_cpu_offload,
            "use --muon-offload, which keeps Muon's momentum in CPU memory",
        ),
        "--muon-scalar-optimizer lion": (
            getattr(config, "muon_scalar_optimizer", "adam") != "adam",
            "the rest is trained with AdamW: --muon-scalar-optimizer adam",
        ),
        "decoupled_weight_decay=False": (
            not getattr(config, "decoupled_weight_decay", True),
            "Muon's weight decay is decoupled: leave it true",
        ),
        "--optimizer-cuda-graph": (getattr(config, "optimizer_cuda_graph", False), "leave it out"),
        "--use-megatron-fsdp": (getattr(ddp, "use_megatron_fsdp", False), "use --use-distributed-optimizer alone"),
        "DistributedDataParallel without use_distributed_optimizer": (
            not ddp.use_distributed_optimizer,
            "set use_distributed_optimizer=True in DistributedDataParallelConfig too",
        ),
    }
    for setting, (is_set, advice) in refused.items():
        if is_set:
            raise ValueError(f"{setting} is not supported with Muon under the distributed optimizer: {advice}")
    if any(getattr(p, "is_gtp_weight_remat", False) for chunk in model_chunks for p in chunk.parameters()):
        raise ValueError("GTP weight rematerialization is not supported with Muon: leave its group size at 1")


def _report(chained: Any, routing: Routing, settings: Settings, plans: Sequence[Plan]) -> None:
    """Rank 0 prints the start-up table."""
    rank, _ = world_of(None)
    if rank == 0:
        print(table(routing, settings.describe(), "Megatron's AdamW", plans, *_held(chained)), flush=True)
        for note in settings.notes:
            print(f"muon_plugin: {note}", flush=True)


def _held(chained: Any) -> tuple[int, int]:
    """Elements of matrices and of the rest that this rank holds."""
    inner = [o.optimizer for o in chained.chained_optimizers if not o.is_stub_optimizer]
    held = {True: 0, False: 0}
    for optimizer in inner:
        for group in optimizer.param_groups:
            for p in group["params"]:
                held[optimizer.is_matrix(p)] += p.numel()
    return held[True], held[False]


def get_megatron_optimizer(original: Callable[..., Any], config: Any, model_chunks: Any, *args: Any, **kw: Any) -> Any:
    if not asks_for_muon(config):
        return original(config, model_chunks, *args, **kw)
    return build(original, config, model_chunks, *args, **kw)


def get_megatron_muon_optimizer(
    original: Callable[..., Any],
    config: Any,
    model_chunks: Any,
    config_overrides: Any = None,
    use_gloo_process_groups: bool = True,
    layer_wise_distributed_optimizer: bool = False,
    pg_collection: Any = None,
) -> Any:
    """0.16.1's own entry for Muon."""
    if not asks_for_muon(config):
        return original(
            config,
            model_chunks,
            config_overrides,
            use_gloo_process_groups,
            layer_wise_distributed_optimizer,
            pg_collection,
        )
    stock = megatron.core.optimizer.get_megatron_optimizer  # wrapped, and lets the AdamW inside through
    return build(stock, config, model_chunks, config_overrides, use_gloo_process_groups, pg_collection=pg_collection)
