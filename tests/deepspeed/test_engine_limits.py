"""What is refused because DeepSpeed itself cannot do it, seen with its AdamW. docs/refused.md names these tests.

A release that can do it fails here, and the refusal has to go.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.deepspeed_runs import save_only
from tests.support.integers import build, config, differing, train, weights
from tests.support.parallel_models import Experts
from tests.support.ranks import RankError

ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}


def with_adamw(stage: int, dtype: str = "fp32", **sections: Any) -> dict[str, Any]:
    return {**config(stage, dtype, **sections), "optimizer": {**ADAMW, "params": dict(ADAMW["params"])}}


def load(rank: int, settings: dict[str, Any], folder: Path) -> None:
    engine = build(rank, settings)
    engine.load_checkpoint(str(folder), tag="tag")


@pytest.mark.parametrize("elastic", [True, False])
def test_elastic_checkpoints_cannot_be_loaded(ranks, tmp_path, elastic):
    """They lack the step: with elastic checkpoints on, or off again."""
    settings = with_adamw(1, "bf16", zero_optimization={"elastic_checkpoint": True})
    ranks(2).run(save_only, settings, tmp_path, 1)
    settings = with_adamw(1, "bf16", zero_optimization={"elastic_checkpoint": elastic})
    with pytest.raises(RankError) as caught:
        ranks(2).run(load, settings, tmp_path)
    assert {kind for kind, _ in caught.value.errors} == {"AssertionError" if elastic else "KeyError"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_never_lowers_the_loss_scale_of_torch_autocast(ranks, stage):
    """Gradients of 12 to 180 times 65536 overflow in fp16: no step is ever made. (Stage 0 lowers the scale.)"""
    settings = with_adamw(stage, torch_autocast={"enabled": True, "dtype": "float16"})
    for moved, skipped, scale in ranks(2, apart="autocast").run(autocast_in_fp16, settings):
        assert (moved, skipped, scale) == ([], 4, 65536.0)


def autocast_in_fp16(rank: int, settings: dict[str, Any]) -> tuple[list[str], int, float]:
    engine = build(rank, settings)
    before = weights(engine)
    train(engine, rank, 4)
    moved = differing(before, weights(engine))
    return moved, engine.skipped_steps, float(engine.optimizer.torch_autocast_gradscaler.get_scale())


def test_deepspeed_moe_is_refused_in_stage_3(ranks):
    with pytest.raises(RankError) as caught:
        ranks(2, apart="experts").run(experts_in_stage_3, with_adamw(3, "bf16"))
    assert {kind for kind, _ in caught.value.errors} == {"AssertionError"}


def experts_in_stage_3(rank: int, settings: dict[str, Any]) -> None:
    build(rank, settings, Experts(2))
