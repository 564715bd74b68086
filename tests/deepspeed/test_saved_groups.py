"""Parameter groups of a client under DeepSpeed: in checkpoints with other groups, and added after the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.deepspeed_runs import convert
from tests.support.integers import IntegerModel, build, config, differing, train, weights
from tests.support.ranks import RankError


def grouped(model: nn.Module, apart: bool) -> list[dict[str, Any]]:
    """Two groups with equal options, or one of the same parameters in the same order: what 0.1.0 made of the two."""
    parameters = list(model.parameters())
    first, second = parameters[::2], parameters[1::2]
    return [{"params": first}, {"params": second}] if apart else [{"params": first + second}]


def save(rank: int, settings: dict[str, Any], folder: Path, apart: bool) -> dict[str, Tensor]:
    model = IntegerModel()
    engine = build(rank, settings, model, model_parameters=grouped(model, apart))
    for group in engine.optimizer.param_groups:  # as a schedule would
        group["lr"] = 0.004
    train(engine, rank, 2)
    engine.save_checkpoint(str(folder), tag="tag")
    if rank == 0 and engine.zero_optimization():
        convert(folder)
    train(engine, rank, 2, first=2)
    return weights(engine)


def resume(
    rank: int, settings: dict[str, Any], folder: Path, frozen: str | None = None, steps: int = 2, **how: Any
) -> tuple[dict[str, Tensor], list[float], str]:
    """The weights after more steps, the rates in the checkpoint, what was logged."""
    import logging

    from deepspeed.utils import logger

    model = IntegerModel()
    for name, p in model.named_parameters():
        if name == frozen:
            p.requires_grad_(False)
    engine = build(rank, settings, model, model_parameters=grouped(model, frozen is None))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel("WARNING")
    engine.load_checkpoint(str(folder), **how)
    logger.removeHandler(handler)
    logger.setLevel("ERROR")
    rates = engine.get_lr()
    train(engine, rank, steps, first=2)
    return weights(engine), rates, "\n".join(lines)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_groups_that_0_1_0_merged_are_refused_and_the_advice_works(ranks, tmp_path, stage):
    settings = config(stage, "bf16")
    whole = ranks(2).run(save, settings, tmp_path, False)[0]
    with pytest.raises(RankError, match=r"has 2 parameter groups, this run has 4\..*load_module_only=True") as caught:
        ranks(2).run(resume, settings, tmp_path, tag="tag")
    assert {kind for kind, _ in caught.value.errors} == {"ValueError"}
    ranks(2).run(resume, settings, tmp_path, tag="tag", load_module_only=True)
    if stage > 0:
        universal = {**settings, "checkpoint": {"load_universal": True}}
        found, rates, logged = ranks(2).run(resume, universal, tmp_path)[0]
        assert differing(found, whole) == []
        assert rates == [0.004] * 4
        assert "other parameter groups" not in logged


@pytest.mark.parametrize("stage", [1, 3])
def test_a_group_of_which_half_is_in_the_checkpoint_keeps_one_rate(ranks, tmp_path, stage):
    """The matrices alone would get the saved rate; the rest has lost a parameter."""
    settings = config(stage, "bf16")
    ranks(2).run(save, settings, tmp_path, False)
    universal = {**settings, "checkpoint": {"load_universal": True}}
    _, rates, logged = ranks(2).run(resume, universal, tmp_path, frozen="norm.bias")[0]
    assert rates == [0.01, 0.01]
    assert "the learning rate, decay and other options of param_groups [0, 1] are those that this run" in logged


@pytest.mark.parametrize("stage", [0, 1])
def test_a_group_cannot_be_added_after_the_start(ranks, stage):
    """AdamW takes one too, and DeepSpeed does not train it."""
    with pytest.raises(RankError, match=r"would not train a group .* Build the engine with all parameters"):
        ranks(1).run(added, config(stage))


def added(rank: int, settings: dict[str, Any]) -> None:
    engine = build(rank, settings)
    engine.basic_optimizer.add_param_group({"params": [("late", nn.Parameter(torch.zeros(3, 3)))]})
