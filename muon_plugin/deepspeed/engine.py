"""Replacements of the DeepSpeed functions that `hooks` wraps; each takes the original first, then its arguments."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.module import PipelineModule

from .. import watchdog
from ..core import phases
from ..core.agreement import agree, together, world_of
from ..core.layout import Partition
from ..core.muon import Muon
from ..core.settings import Settings
from . import tensor_parallel
from .checkpoints import check_before_loading, right_slices, saved_like_adam
from .host import HOST, whole_shape
from .monitor import watch
from .refusals import check_supported
from .shards import calls, holdings

phases.at_start(watchdog.start)


def set_optimizer_flags(original: Callable[..., Any], config_class: Any, model: Any) -> None:
    if config_class.optimizer_name != "muon":
        original(config_class, model)
        return
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu" and "LOCAL_RANK" in os.environ:
        # The engine does so later; a collective before that would put all ranks of a node on one device.
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    together(lambda: Settings.from_dict(config_class.optimizer_params or {}))
    if isinstance(model, PipelineModule):
        return  # every stage has a model of its own: the ranks of one compare theirs when the optimizer is built
    agree(
        "the model",
        [f"{name} {list(whole_shape(p))} {p.dtype}" for name, p in model.named_parameters()],
        "Build the same model from the same configuration on every rank",
    )


def _configure_basic_optimizer(original: Callable[..., Any], engine: Any, model_parameters: Any) -> Any:
    if not _asks_for_muon(engine):
        return original(engine, model_parameters)

    def prepare() -> tuple[list[Any], dict[str, Any]]:
        check_supported(engine)
        return _named(model_parameters, engine.param_names), dict(engine.optimizer_params() or {})

    params, options = together(prepare)
    unfreezes = _unfreezes(engine)
    trained = {p: name for p, name in engine.param_names.items() if p.requires_grad or unfreezes}
    engine._muon_partitions = together(lambda: tensor_parallel.cuts(engine, trained))
    shapes = {name: partition.shape for name, partition in engine._muon_partitions.items()}
    stage = engine.seq_data_parallel_group if engine.pipeline_parallelism else None
    muon = Muon(
        params, model=engine.module, process_group=stage, host=HOST, shapes=shapes, unfreezes=unfreezes, **options
    )
    if engine.pipeline_parallelism and engine.zero_optimization():
        agree(
            "the parameter groups of the pipeline's stages",
            [f"group {group['name']}" for group in muon.param_groups],
            "ZeRO adds up the gradient norm group by group over the stages, and would hang. Use fewer stages or "
            "another partition_method, so that every stage has a matrix and another parameter; or use ZeRO stage 0",
        )
    return muon


def _configure_optimizer(
    original: Callable[..., Any], engine: Any, client_optimizer: Any, model_parameters: Any
) -> None:
    def taken_over(optimizer: Any) -> Any:
        if isinstance(optimizer, Muon):
            together(lambda: check_supported(engine))
            together(lambda: optimizer.hand_over(HOST, engine.param_names, _unfreezes(engine)))
        else:
            _refuse_remade(optimizer)  # not together: no collectives for engines without Muon; all ranks do the same
        return optimizer

    if client_optimizer is None or isinstance(client_optimizer, torch.optim.Optimizer):
        original(engine, taken_over(client_optimizer), model_parameters)
    else:  # a callable that makes one
        original(engine, lambda parameters: taken_over(client_optimizer(parameters)), model_parameters)
    muon = engine.basic_optimizer
    if not isinstance(muon, Muon):
        return
    names, tp = muon.names, tensor_parallel.group_of(engine)
    partitions = getattr(
        engine, "_muon_partitions", None
    )  # on all ranks or on none: not yet there for a client's own optimizer
    if partitions is None:
        partitions = together(lambda: tensor_parallel.cuts(engine, names))
    together(lambda: _check_whole(muon, partitions))
    tensor_parallel.compare_replicas(names, tp)
    found = together(lambda: calls(engine, names))
    muon.attach(holdings(found, names, partitions, tp), torch.device(engine.device))
    given = {*muon.names, *muon.left_out}
    muon.halves.outside = {n: p for p, n in engine.param_names.items() if not p.requires_grad and p not in given}
    muon.register_state_dict_post_hook(saved_like_adam)
    right_slices(engine.optimizer, found)
    check_before_loading(engine.optimizer, muon)
    watch(engine)
    if world_of(None)[0] == 0:
        print(muon.summary(_left_out(engine, muon)), flush=True)


def _unfreezes(engine: Any) -> bool:
    """Whether DeepSpeed trains what is frozen now and unfrozen later: its wrappers (ZeRO, bf16, fp16) leave it out."""
    return not engine.zero_optimization() and engine.get_data_types()[0] == torch.float32


def _check_whole(muon: Muon, partitions: Mapping[str, Partition]) -> None:
    """Refuses a client's Muon that was built for the parts of matrices that tensor parallelism left on this rank."""
    for name, partition in partitions.items():
        shape = muon.routing.shapes.get(name, partition.shape)
        if tuple(shape) != tuple(partition.shape):
            raise ValueError(
                f"optimizer=Muon was built for {name} {list(shape)}, which tensor parallelism has cut from "
                f'{list(partition.shape)}; allowed: "optimizer": {{"type": "Muon"}} in the DeepSpeed JSON, which knows '
                "the whole matrices"
            )


def _left_out(engine: Any, muon: Muon) -> list[str]:
    """A note on parameters that are trainable, but in no optimizer: DeepSpeed trains only those that it was given."""
    known = {*muon.names, *muon.left_out}
    names = [name for p, name in engine.param_names.items() if p.requires_grad and p not in known]
    if not names:
        return []
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [f"{len(names)} parameters require gradients but are not in the optimizer, and are not trained: {shown}"]


def _refuse_remade(optimizer: Any) -> None:
    """With offload, accelerate silently replaces any optimizer by a DeepSpeedCPUAdam over the same groups."""
    if any({"use_muon", "layout"} <= set(group) for group in getattr(optimizer, "param_groups", [])):
        raise ValueError(
            f"optimizer={type(optimizer).__name__} holds the parameter groups of a muon_plugin.Muon that was "
            'replaced (accelerate does so with offload); allowed: "optimizer": {"type": "Muon"} in the DeepSpeed JSON, '
            "with accelerate's DummyOptim"
        )


def _asks_for_muon(engine: Any) -> bool:
    return engine.client_optimizer is None and engine.optimizer_name() == "muon"


def _named(model_parameters: Iterable[Any], names: Any) -> list[Any]:
    """The client's parameters or groups, with their names in the model."""

    def pair(p: Any) -> tuple[str, Any]:
        if isinstance(p, tuple):  # model.named_parameters(), as standalone Muon takes them
            p = p[1]
        if p not in names:
            raise ValueError(
                f"model_parameters holds a parameter of shape {list(p.shape)} that the model given to "
                "deepspeed.initialize does not have; allowed: parameters of that model"
            )
        return names[p], p

    given = list(model_parameters)
    if given and isinstance(given[0], dict):
        return [{**group, "params": [pair(p) for p in group["params"]]} for group in given]
    return [pair(p) for p in given]
