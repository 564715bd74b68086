"""Replacements of the DeepSpeed functions that `hooks` wraps; each takes the original first, then its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils import groups

from .. import attention as attention  # the logits of QK-Clip
from .. import watchdog
from ..core import phases
from ..core.agreement import agree, together, world_of
from ..core.checks import Refusal, refuse
from ..core.layout import Partition
from ..core.muon import Muon
from ..core.qk_clip import Clip
from ..core.settings import Settings
from . import ranks, tensor_parallel
from .checkpoints import check_before_loading, right_slices, saved_like_adam
from .cpu_adam import choose_adamw, in_its_place, notes
from .host import host_of, swaps, whole_shape
from .monitor import watch
from .pipeline import even_out_norms
from .refusals import check_supported
from .shards import calls, holdings
from .steps import follow
from .swapping import keep_empty, step_swapped
from .swapping import notes as nvme_notes

phases.at_start(watchdog.start)


def set_optimizer_flags(original: Callable[..., Any], config_class: Any, model: Any) -> None:
    """No tags for DeepSpeed's own Muon."""
    if config_class.optimizer_name != "muon":
        original(config_class, model)


def _configure_distributed_model(original: Callable[..., Any], engine: Any, model: Any) -> None:
    compare_at_start(engine, model)
    original(engine, model)


def compare_at_start(engine: Any, model: Any) -> None:
    """Checks that the settings are valid on all ranks of the engine, and that they have the same model.

    As soon as the engine's groups are known, and before it broadcasts the model over them.
    """
    if not _asks_for_muon(engine):
        return
    own = ranks.of(engine)
    together(lambda: Settings.from_dict(engine.optimizer_params() or {}), own)
    if isinstance(model, PipelineModule):
        return  # every stage has a model of its own: the ranks of one compare theirs when the optimizer is built
    lines = [f"{name} {list(whole_shape(p))} {p.dtype}" for name, p in model.named_parameters()]
    advice = "Build the same model from the same configuration on every rank"
    together(lambda: agree("the model", lines, advice, ranks.same_weights(engine)), own)


def _configure_basic_optimizer(original: Callable[..., Any], engine: Any, model_parameters: Any) -> Any:
    if not _asks_for_muon(engine):
        return original(engine, model_parameters)

    def prepare() -> tuple[list[Any], dict[str, Any]]:
        check_supported(engine)
        return _named(model_parameters, engine.param_names), dict(engine.optimizer_params() or {})

    own = ranks.of(engine)
    params, options = together(prepare, own)
    unfreezes = _unfreezes(engine)
    trained = {p: name for p, name in engine.param_names.items() if p.requires_grad or unfreezes}
    engine._muon_partitions = together(lambda: tensor_parallel.cuts(engine, trained), own)
    shapes = {name: partition.shape for name, partition in engine._muon_partitions.items()}
    options |= {"process_group": own, "stage": ranks.same_weights(engine) if engine.pipeline_parallelism else None}
    options |= {"host": host_of(engine), "shapes": shapes, "unfreezes": unfreezes}
    # The ranks of one stage may fail in it, while those of the others do not.
    return together(lambda: Muon(params, model=engine.module, **options), own)


def _configure_optimizer(
    original: Callable[..., Any], engine: Any, client_optimizer: Any, model_parameters: Any
) -> None:
    def taken_over(optimizer: Any) -> Any:
        if isinstance(optimizer, Muon):
            own = ranks.of(engine)
            together(lambda: check_supported(engine), own)
            host, unfreezes = host_of(engine), _unfreezes(engine)
            together(lambda: optimizer.hand_over(host, engine.param_names, own, unfreezes), own)
        else:
            _refuse_remade(optimizer)  # not together: no collectives for engines without Muon; all ranks do the same
        return optimizer

    with in_its_place(engine):
        if client_optimizer is None or isinstance(client_optimizer, torch.optim.Optimizer):
            original(engine, taken_over(client_optimizer), model_parameters)
        else:  # a callable that makes one
            original(engine, lambda parameters: taken_over(client_optimizer(parameters)), model_parameters)
    muon = engine.basic_optimizer
    if not isinstance(muon, Muon):
        if world_of(None)[0] == 0:
            print(_another(engine), flush=True)
        return
    names, tp, own = muon.names, tensor_parallel.group_of(engine), ranks.of(engine)
    partitions = getattr(
        engine, "_muon_partitions", None
    )  # on all ranks or on none: not yet there for a client's own optimizer
    if partitions is None:
        partitions = together(lambda: tensor_parallel.cuts(engine, names), own)
    together(lambda: _check_whole(muon, partitions), own)
    matrices = {matrix.parameter for matrix in muon.routing.matrices}
    together(lambda: tensor_parallel.compare_replicas(names, tp, matrices), own)
    if swaps(engine):
        keep_empty(engine)
        follow(engine, partial(step_swapped, engine), "offload to the CPU")
    found = together(lambda: calls(engine, names), own)
    held = together(lambda: holdings(found, partitions, tp, own), own)
    together(lambda: _cut_heads(muon, partitions, tp), own)
    together(lambda: choose_adamw(engine, muon), own)
    together(lambda: muon.attach(held, torch.device(engine.device)), own)
    if (clip := muon.halves.clip) is not None:
        follow(engine, partial(_end_step, clip), "leave qk_clip out")
    given = {*muon.names, *muon.left_out}
    muon.halves.outside = {n: p for p, n in engine.param_names.items() if not p.requires_grad and p not in given}
    muon.register_state_dict_post_hook(saved_like_adam)
    right_slices(engine.optimizer, found)
    even_out_norms(engine, own)
    check_before_loading(engine.optimizer, muon)
    watch(engine)
    if world_of(own)[0] == 0:
        print(muon.summary([*_left_out(engine, muon), *notes(muon), *nvme_notes(engine)]), flush=True)


def _cut_heads(muon: Muon, partitions: Mapping[str, Partition], tp: Any) -> None:
    """QK-Clip's heads, of which tensor parallelism leaves some on each rank.

    Ulysses' attention function gets some of the tokens of all heads, and sends them to others out of QK-Clip's sight.
    """
    if muon.clipping is not None:
        size = groups._get_sequence_parallel_world_size()
        refuse([Refusal("qk_clip with a sequence parallel size", size, size > 1, "1, or no qk_clip")])
        muon.clipping.cut(partitions, 0 if tp is None else dist.get_rank(tp))


def _end_step(clip: Clip, take: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Ends QK-Clip's step with the engine's, which may make several calls of the inner step, or skip them all."""
    try:
        take(*args, **kwargs)
    finally:
        clip.reset()


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


def _another(engine: Any) -> str:
    """What rank 0 says of an engine without Muon: clients drop an optimizer without a word, as the Trainer does."""
    found = f"muon_plugin: this engine trains with {type(engine.basic_optimizer).__name__} and not with Muon, "
    if engine.client_optimizer is not None and str(engine._config.optimizer_name).lower() == "muon":
        return found + "which its DeepSpeed JSON names: the optimizer that deepspeed.initialize was given replaces it"
    return found + "which neither its DeepSpeed JSON names nor deepspeed.initialize was given"


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
