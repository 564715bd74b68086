"""Runs under DeepSpeed that are saved, resumed, converted or overflow: jobs for ranks, of integers.py's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.integers import build, differing, train, trained, weights


def convert(folder: Path) -> None:
    """The documented command, in this process."""
    from muon_plugin.deepspeed import convert

    folders = ["--input_folder", str(folder / "tag"), "--output_folder", str(folder / "universal")]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["convert", *folders, *workers])
        convert.main()


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


def interrupted(rank: int, settings: dict[str, Any], folder: str) -> dict[str, Tensor]:
    engine = build(rank, settings)
    train(engine, rank, 3)
    engine.save_checkpoint(folder)
    engine = build(rank, settings)
    train(engine, rank, 1)  # something else than what is loaded
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    train(engine, rank, 3, first=3)
    return weights(engine)


def overflow(rank: int, settings: dict[str, Any], bad: str = "inf") -> tuple[bool, list[str], list[str]]:
    undisturbed = trained(rank, settings, 4)
    engine = build(rank, settings)
    train(engine, rank, 2)
    before = _bytes(engine)
    engine.backward(engine(2, 0, rank, dist.get_world_size(), 1) * (float(bad) if rank == 0 else 1.0))
    engine.step()
    assert engine.skipped_steps == 1
    same = differing(before, _bytes(engine)) == []
    train(engine, rank, 2, first=2)
    return same, differing(weights(engine), undisturbed), differing(weights(engine), before)


def _bytes(engine: Any) -> dict[str, Tensor]:
    """Weights, masters and optimizer state."""
    found = weights(engine)
    for number, state in enumerate(engine.basic_optimizer.state.values()):
        found |= {f"{number} {key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found
