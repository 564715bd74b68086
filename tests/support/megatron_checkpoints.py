"""Runs under Megatron that save half-way and go on: jobs for ranks, of megatron_model.py's models."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.support.megatron_model import Layout, build, full_masters, full_weights, named, optimizer_for, step

HALF, STEPS = 4, 8


def _sharded(chunks: list[Any], optimizer: Any, kind: str, loading: bool) -> dict[str, Any]:
    """What Megatron's training loop saves as torch_dist."""
    from megatron.core import parallel_state as mpu
    from megatron.core.utils import unwrap_model

    metadata = {
        "distrib_optim_sharding_type": kind,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    models = unwrap_model(chunks)
    keys = ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]
    found = {key: model.sharded_state_dict(metadata=metadata) for key, model in zip(keys, models)}
    found["optimizer"] = optimizer.sharded_state_dict(dict(found), is_loading=loading, metadata=metadata)
    return found


def save(chunks: list[Any], optimizer: Any, kind: str, folder: str) -> None:
    if kind == "legacy":
        name = f"{folder}/{_model_parallel_rank()}"
        if dist.get_rank(_data_group()) == 0:
            models = [chunk.state_dict_for_save_checkpoint() for chunk in chunks]
            torch.save({"models": models, "optimizer": optimizer.state_dict()}, f"{name}.pt")
        optimizer.save_parameter_state(f"{name}.parameters.pt")
        dist.barrier()
        return
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(_sharded(chunks, optimizer, kind, loading=False), folder)


def load(chunks: list[Any], optimizer: Any, kind: str, folder: str) -> None:
    if kind == "legacy":
        name = f"{folder}/{_model_parallel_rank()}"
        saved = torch.load(f"{name}.pt", weights_only=False)
        for chunk, weights in zip(chunks, saved["models"]):
            chunk.load_state_dict(weights)
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.load_parameter_state(f"{name}.parameters.pt")
        return
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    loaded = dist_checkpointing.load(_sharded(chunks, optimizer, kind, loading=True), folder)
    models = unwrap_model(chunks)
    for i, model in enumerate(models):
        model.load_state_dict(loaded["model" if len(models) == 1 else f"model{i}"])
    optimizer.load_state_dict(loaded["optimizer"])


def _data_group() -> Any:
    from megatron.core import parallel_state as mpu

    return mpu.get_data_parallel_group(with_context_parallel=True)


def _model_parallel_rank() -> int:
    from megatron.core import parallel_state as mpu

    return dist.get_rank(mpu.get_model_parallel_group())


def first_half(rank: int, layout: Layout, kind: str, folder: str, **options: Any) -> Any:
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout, **options)
    for number in range(HALF):
        step(chunks, optimizer, layout, number)
    save(chunks, optimizer, kind, folder)
    return full_weights(chunks, layout) | full_masters(chunks, optimizer, layout)


def second_half(rank: int, layout: Layout, kind: str, folder: str, **options: Any) -> Any:
    chunks = build(layout)
    with torch.no_grad():
        for _, p, _ in named(chunks):
            p.zero_()  # what is not restored shows
    optimizer = optimizer_for(chunks, layout, **options)
    load(chunks, optimizer, kind, folder)
    for number in range(HALF, STEPS):
        step(chunks, optimizer, layout, number)
    return full_weights(chunks, layout) | full_masters(chunks, optimizer, layout)
