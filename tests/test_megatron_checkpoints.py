"""Saved under one layout and resumed under another: the run ends in the bits of the one that never stopped."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from integers import differing
from megatron_model import Layout, build, full_masters, full_weights, named, optimizer_for, step, trained

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


def second_half(rank: int, layout: Layout, kind: str, folder: str) -> Any:
    chunks = build(layout)
    with torch.no_grad():
        for _, p, _ in named(chunks):
            p.zero_()  # what is not restored shows
    optimizer = optimizer_for(chunks, layout)
    load(chunks, optimizer, kind, folder)
    for number in range(HALF, STEPS):
        step(chunks, optimizer, layout, number)
    return full_weights(chunks, layout) | full_masters(chunks, optimizer, layout)


FULLY = {
    "TP 2 x DP 2 to one": (4, Layout(tp=2), 1, Layout()),
    "one to TP 2 x DP 2": (1, Layout(), 4, Layout(tp=2)),
    "TP 2 x PP 2 to DP 4": (4, Layout(tp=2, pp=2), 4, Layout()),
    "DP 4 to TP 4": (4, Layout(), 4, Layout(tp=4)),
    "EP 2 x DP 2 to EP 4": (4, Layout("moe", ep=2), 4, Layout("moe", ep=4)),
    # From EP above 1 to EP 1 Megatron's AdamW cannot resume either: one has two optimizers, the other one.
    "EP 4 to TP 2 x EP 2": (4, Layout("moe", ep=4), 4, Layout("moe", tp=2, ep=2, etp=1)),
    "EP 2 to PP 2 x EP 2": (2, Layout("moe", ep=2), 4, Layout("moe", pp=2, ep=2)),
}
BY_DP = {
    "DP 2 to 4": (2, Layout(), 4, Layout()),
    "DP 4 to 1": (4, Layout(), 1, Layout()),
    "TP 2, DP 2 to 1": (4, Layout(tp=2), 2, Layout(tp=2)),
    "experts, the same layout": (4, Layout("moe", ep=2), 4, Layout("moe", ep=2)),
}


def resume(ranks, release, kind: str, case: Any, folder: Path) -> None:
    world, before, after_world, after = case
    ranks(world, release).run(first_half, before, kind, str(folder))
    found = ranks(after_world, release).run(second_half, after, kind, str(folder))[0]
    straight = ranks(1, release).run(trained, Layout(before.model), STEPS)[0]
    assert differing(found, straight) == []


@pytest.mark.parametrize("case", FULLY)
def test_fully_reshardable_resumes_under_any_layout(ranks, release, case, tmp_path):
    """Row 12."""
    resume(ranks, release, "fully_reshardable", FULLY[case], tmp_path)


@pytest.mark.parametrize("case", BY_DP)
def test_dp_reshardable_resumes_at_another_dp(ranks, release, case, tmp_path):
    resume(ranks, release, "dp_reshardable", BY_DP[case], tmp_path)


@pytest.mark.parametrize("case", [case for case in BY_DP if "experts" not in case])
def test_legacy_resumes_at_another_dp(ranks, release, case, tmp_path):
    resume(ranks, release, "legacy", BY_DP[case], tmp_path)


def from_adamw(rank: int, layout: Layout, kind: str, folder: str) -> Any:
    """Weights and state right after an AdamW checkpoint was loaded, and what was logged."""
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger("muon_plugin").addHandler(handler)
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout)
    with contextlib.redirect_stdout(logged):
        load(chunks, optimizer, kind, folder)
    states = [state for part in optimizer.chained_optimizers for state in part.optimizer.state.values()]
    momentum = sum(float(s["momentum_buffer"].abs().sum()) for s in states if "momentum_buffer" in s)
    rest = sum(float(s["exp_avg"].abs().sum()) for s in states if "exp_avg" in s)
    steps = {float(s["step"]) for s in states}
    weights = full_weights(chunks, layout) | full_masters(chunks, optimizer, layout)
    step(chunks, optimizer, layout, HALF)
    return weights, momentum, rest, steps, logged.getvalue()


@pytest.mark.parametrize("kind", ["fully_reshardable", "dp_reshardable", "legacy"])
def test_an_adamw_checkpoint_of_megatron_is_taken_over(ranks, release, kind, tmp_path):
    """Its weights and its half for the rest; the momentum of matrices starts from zero, and the log says so."""
    layout = Layout(tp=2)
    pool = ranks(4, release)
    saved = pool.run(first_half, layout, kind, str(tmp_path), optimizer="adam")[0]
    weights, momentum, rest, steps, logged = pool.run(from_adamw, layout, kind, str(tmp_path))[0]
    assert differing(weights, saved) == []
    assert (momentum, steps) == (0.0, {float(HALF)})
    assert rest > 0
    assert "AdamW" in logged
    assert "starts from zero" in logged
