"""Checkpoints under DeepSpeed: resumed at another stage and world size, converted, taken over from AdamW."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integers import build, config, differing, train, trained, weights
from torch import Tensor

STAGES, WORLDS = (1, 2, 3), (1, 2, 4)


def convert(folder: Path) -> None:
    """DeepSpeed's own converter, as its command line runs it; no plugin in sight."""
    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(folder / "tag"), "output_folder": str(folder / "universal")}
    ds_to_universal.main(SimpleNamespace(**folders, **options, inject_missing_state=True))
    (folder / "latest_universal").write_text("universal")


def save(rank: int, settings: dict[str, Any], folder: Path, steps: int) -> None:
    engine = build(rank, settings)
    train(engine, rank, steps)
    engine.save_checkpoint(str(folder), tag="tag")
    if rank == 0:
        convert(folder)
    torch.distributed.barrier()
    engine.destroy()


def resume(rank: int, settings: dict[str, Any], folder: Path, first: int, steps: int) -> dict[str, Tensor]:
    engine = build(rank, {**settings, "checkpoint": {"load_universal": True}})
    engine.load_checkpoint(str(folder))
    train(engine, rank, steps, first)
    found = weights(engine)
    engine.destroy()
    return found


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_resumed_at_every_other_stage_and_world(ranks, tmp_path, stage, world):
    """DeepSpeed #8608: the built-in's checkpoints cannot be converted (KeyError: 'exp_avg')."""
    settings = config(stage, "bf16", zero_optimization={"round_robin_gradients": stage == 2})
    ranks(world).run(save, settings, tmp_path, 3)
    whole = ranks(1).run(trained, config(1, "bf16"), 5)[0]
    for other_stage in STAGES:
        for other_world in WORLDS:
            found = ranks(other_world).run(resume, config(other_stage, "bf16"), tmp_path, 3, 2)[0]
            assert differing(found, whole) == [], (other_stage, other_world)
