"""Builds Megatron's optimizer with Muon in it, and replaces the Megatron functions that `hooks` wraps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import megatron.core.optimizer
import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from .. import watchdog
from ..core import phases, proof
from ..core.agreement import agree, gather, joined, together, world_of
from ..core.call import Call
from ..core.halves import Halves
from ..core.layout import Shard
from ..core.measure import Part
from ..core.orthogonalize import NewtonSchulz
from ..core.process_groups import joint_groups
from ..core.qk_clip import Clip, summary
from ..core.report import table
from ..core.routing import Routing, check_heads
from ..core.update import Update, agree_on
from . import qk_clip
from .arguments import asks_for_muon, plain
from .monitor import MonitoredOptimizer, StepMonitor, arguments
from .optimizer import MuonDistributedOptimizer
from .qk_clip import Attentions
from .refusals import check_supported
from .routing import Parameter, frozen_parameters, is_expert, parameters, route
from .settings import Settings
from .shards import has_fp8_weights, names, shards

phases.at_start(watchdog.start)


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
        ValueError: on every rank, for an unsupported setting or model, with what to change.
    """

    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    ranks = joined([_dp_group(groups), groups.tp, groups.pp])

    def fp8_weights() -> bool:
        _check_model(model_chunks)
        return has_fp8_weights(model_chunks)

    in_fp8 = any(gather(together(fp8_weights, ranks), ranks))  # a pipeline stage may have none

    def prepare() -> tuple[Settings, list[Parameter], Attentions | None]:
        # OptimizerConfig takes over only the flags that it knows.
        settings = Settings.from_config(config, arguments(), in_fp8)
        check_supported(config, model_chunks[0].ddp_config)
        tp, expert_tp = (dist.get_world_size(group) for group in _tp_groups(groups))
        found, clips = parameters(model_chunks, tp, expert_tp), qk_clip.setting_of(model_chunks[0].config)
        return settings, found, qk_clip.find(model_chunks, found, clips) if clips else None

    settings, found, attention = together(prepare, ranks)
    clips = f"QK-Clip {attention.setting if attention else 'off'}"
    _compare([*_lines(settings), *_lines(config), clips], found, _dp_group(groups), ranks)
    stock = copy.copy(config)
    stock.optimizer = "adam"
    plain(stock)
    chained = original(stock, model_chunks, *args, pg_collection=pg_collection, **kwargs)
    together(lambda: _check_built(chained), ranks)
    overridden = _overridden(chained, found, [_dp_group(groups), getattr(groups, "expt_dp", None) or _dp_group(groups)])
    routing = together(lambda: route(found, model_chunks, settings.split_qkv, overridden, settings.per_head), ranks)
    if settings.per_head:
        check_heads("--muon-split-qkv-per-head", gather(routing.head_facts, ranks))
    live = [optimizer for optimizer in chained.chained_optimizers if not optimizer.is_stub_optimizer]
    tp, expert_tp = _tp_groups(groups)
    experts = [any(group["is_expert_parallel"] for group in optimizer.param_groups) for optimizer in live]
    pairs = [(o.data_parallel_group, expert_tp if e else tp) for o, e in zip(live, experts, strict=True)]
    # QK-Clip's maxima are those of all optimizer instances.
    process_groups = joint_groups(pairs + [(_dp_group(groups), tp)] * (attention is not None), ranks)
    device = next(model_chunks[0].parameters()).device
    tp_ranks = dist.get_rank(tp), dist.get_rank(expert_tp)
    frozen = frozen_parameters(model_chunks)
    first = world_of(ranks)[0] == 0
    newton_schulz = together(lambda: settings.newton_schulz.on(device), ranks)
    agree_on(newton_schulz, ranks)
    phases.start(ranks, bool(live))

    def convert() -> list[Converted]:
        return [
            _convert(
                optimizer, found, routing, settings, newton_schulz, group, tp_ranks, device, of_experts, frozen, first
            )
            for optimizer, of_experts, group in zip(live, experts, process_groups)
        ]

    converted = together(convert, ranks)
    clip = None
    if attention is not None:
        clip = _clip(attention, converted, model_chunks, found, world_of(tp), process_groups[-1], device)
        routing = replace(routing, notes=(*routing.notes, summary(attention.layers, attention.setting)))
    together(lambda: _prove(converted, routing), ranks)
    stages = dist.get_world_size(groups.pp)
    together(lambda: _report(converted, routing, settings, newton_schulz, stages) if first else None, ranks)
    _watch(chained, converted, found, routing, model_chunks[0].ddp_config, device, ranks, clip)
    return chained


def _clip(
    attention: Attentions,
    converted: Sequence[Converted],
    chunks: Sequence[Any],
    found: Sequence[Parameter],
    tp: tuple[int, int],
    group: Any,
    device: torch.device,
) -> Clip | None:
    """QK-Clip, for the optimizers that hold queries and keys."""
    held = [shard for each in converted for shard in each.held]
    clip = qk_clip.make(attention, chunks, held, {p.name: p.tensor for p in found}, tp, group, device)
    wanted = {name for layer in attention.layers for name in layer.parameters}
    for each in converted:
        if wanted & each.trained:
            each.halves.clip = clip
    return clip


def _compare(settings: list[str], found: Sequence[Parameter], dp: Any, ranks: Any) -> None:
    """All ranks must have the same settings, and those of one stage and TP rank the same model."""
    agree("the optimizer's settings", settings, "Start every rank with the same arguments", ranks)
    model = [f"{p.name} {list(p.partition.shape)} {p.tensor.dtype}" for p in found]
    advice = "Build the same model, with the same parameters frozen, on every rank"
    together(lambda: agree("the model", model, advice, dp), ranks)


@dataclass(frozen=True)
class Converted:
    """One DistributedOptimizer with Muon in it.

    Attributes:
        halves: those of its inner optimizer.
        held: this rank's shards of its parameters.
        process_group: the ranks over which these parameters are sharded.
        experts: whether it holds the routed experts alone. (Without expert parallelism they are with everything else.)
        trained: the parameters of which its ranks hold parts.
    """

    halves: Halves
    held: tuple[Shard, ...]
    process_group: Any
    experts: bool
    trained: set[str]

    def parts(self, copies: int) -> list[Part]:
        """This rank's shards by the label of their metrics; `copies` optimizer instances hold replicas of them."""
        names = [half.name.lower() for half in (self.halves.muon, self.halves.adamw)]
        found: dict[str, list[Shard]] = {name + end: [] for end in ("", "_experts") for name in names}
        for shard in self.held:
            name = self.halves.of(shard.tensor).name.lower()
            found[name + "_experts" * is_expert(shard.parameter)].append(shard)
        return [Part(label, shards, self.process_group, copies) for label, shards in found.items()]


def _watch(
    chained: Any,
    converted: Sequence[Converted],
    found: Sequence[Parameter],
    routing: Routing,
    ddp: Any,
    device: Any,
    ranks: Any,
    clip: Clip | None,
) -> None:
    """Measures the steps that Megatron's training loop logs."""
    copies = getattr(ddp, "num_distributed_optimizer_instances", 1)
    monitor = StepMonitor(
        [each.halves for each in converted],
        [part for each in converted for part in each.parts(copies)],
        routing.shapes,
        [p.name for p in found if getattr(p.tensor, "shared", False)],
        device,
        ranks,
    )
    MonitoredOptimizer.convert(chained, monitor, clip)


def _lines(settings: Any) -> list[str]:
    """Fields with plain values, a line each, for comparing ranks."""
    values = ((field.name, getattr(settings, field.name)) for field in fields(settings))
    return [f"{name}={value!r}" for name, value in values if isinstance(value, (int, float, str, type(None)))]


def _overridden(chained: Any, found: Sequence[Parameter], process_groups: Sequence[Any]) -> set[int]:
    """Ids of the model parameters that ``config_overrides`` send to another optimizer than Muon (0.19.2). Collective.

    A rank knows of those that it holds a part of: what the ranks of these groups know of each other is put together.
    """
    mine: set[int] = set()
    for optimizer in chained.chained_optimizers:
        if not optimizer.is_stub_optimizer:
            for model, (group, _) in optimizer.model_param_group_index_map.items():
                if optimizer.optimizer.param_groups[group].get("optimizer", "muon") != "muon":
                    mine.add(id(model))
    names = {p.name for p in found if id(p.tensor) in mine}
    for process_group in process_groups:
        names = names.union(*gather(sorted(names), process_group))
    return {id(p.tensor) for p in found if p.name in names}


def _dp_group(groups: Any) -> Any:
    """Data parallel with context parallel. Without the latter, a client's own groups need not name it."""
    return getattr(groups, "dp_cp", None) or groups.dp


def _tp_groups(groups: Any) -> tuple[Any, Any]:
    """The TP groups of the dense layers and of the routed experts."""
    return groups.tp, getattr(groups, "expt_tp", None) or groups.tp


def _convert(
    optimizer: Any,
    found: Sequence[Parameter],
    routing: Routing,
    settings: Settings,
    newton_schulz: NewtonSchulz,
    process_group: Any,
    tp_ranks: tuple[int, int],
    device: torch.device,
    experts: bool,
    frozen: Mapping[str, Tensor],
    first: bool,
) -> Converted:
    """Puts Muon into one stock DistributedOptimizer. `first`: whether this is the rank that logs for all."""
    muon = {matrix.parameter for matrix in routing.matrices}
    held = together(lambda: shards(optimizer, names(found), *tp_ranks), process_group)
    update = Update(
        routing.matrices,
        [shard for shard in held if shard.parameter in muon],
        process_group,
        device,
        newton_schulz,
        settings.scale,
    )
    tensors = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
    call = together(lambda: Call(0, tuple(tensors), tuple(held), process_group), process_group)
    parameters = {p.name: p.tensor for p in found}
    trained = proof.held(call, routing.shapes, device)
    MuonDistributedOptimizer.convert(optimizer, first, update, settings, call, parameters, frozen)
    return Converted(optimizer.optimizer.halves, call.shards, process_group, experts, trained)


def _prove(converted: Sequence[Converted], routing: Routing) -> None:
    """That each parameter is in one of Megatron's optimizers, and in one half of it."""
    muon = {matrix.parameter for matrix in routing.matrices}
    proof.check_routing(routing.matrices, routing.adamw, routing.shapes)
    plans = [update.parameters for each in converted for update in each.halves.muon.updates]
    proof.check_calls("Muon", muon, plans, routing.shapes)
    proof.check_calls("AdamW", routing.adamw, [each.trained - muon for each in converted], routing.shapes)


def _check_built(chained: Any) -> None:
    for optimizer in chained.chained_optimizers:
        if type(optimizer) is not DistributedOptimizer:
            raise ValueError(
                f"Megatron built a {type(optimizer).__name__}; supported under Muon: its DistributedOptimizer "
                "(--use-distributed-optimizer, without FSDP)"
            )


def _check_model(model_chunks: Any) -> None:
    if not isinstance(model_chunks, (list, tuple)) or not all(hasattr(chunk, "ddp_config") for chunk in model_chunks):
        raise ValueError(
            f"model_chunks is {type(model_chunks).__name__} of unwrapped modules; allowed: a list of models in "
            "megatron.core.distributed.DistributedDataParallel"
        )
    # Not tried: needs Transformer Engine 2.19. It cuts weights along one more axis, which `routing` does not know.
    if any(getattr(p, "is_gtp_weight_remat", False) for chunk in model_chunks for p in chunk.parameters()):
        raise ValueError("GTP weight rematerialization is not supported with Muon: leave its group size at 1")


def _report(
    converted: Sequence[Converted], routing: Routing, settings: Settings, newton_schulz: NewtonSchulz, stages: int
) -> None:
    """Prints the start-up table, of the optimizers in which this rank takes part: the first of all ranks."""
    if stages > 1:
        routing = replace(routing, notes=(*routing.notes, f"this is pipeline stage 0 of {stages}"))
    plans = [("experts" if e.experts else "dense layers", plan) for e in converted for plan in e.halves.muon.plans]
    halves = [each.halves for each in converted]
    print(table(routing, settings.describe(), newton_schulz, halves, plans), flush=True)
    for note in settings.notes:
        print(f"muon_plugin: {note}", flush=True)


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
    """Replaces Megatron-Core 0.16.1's own entry point for Muon."""
    if not asks_for_muon(config):
        return original(
            config,
            model_chunks,
            config_overrides,
            use_gloo_process_groups,
            layer_wise_distributed_optimizer,
            pg_collection,
        )
    stock = megatron.core.optimizer.get_megatron_optimizer  # wrapped too; lets the inner AdamW config pass
    return build(stock, config, model_chunks, config_overrides, use_gloo_process_groups, pg_collection=pg_collection)
