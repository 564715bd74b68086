"""A checkpoint that another stage, dtype or number of ranks has saved: one error on every rank, with ways that work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.deepspeed_runs import save_only, whole
from tests.support.integers import build, config, differing
from tests.support.ranks import RankError

ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
WEIGHTS, CONVERT, BEFORE = "load_module_only=True", "muon_plugin.deepspeed.convert", "before deepspeed.initialize"
#: (stage, dtype, ranks) of the run that saved and of the run that loads -> what the error advises, and what DeepSpeed
#: raises with AdamW.
LAYOUTS = {
    ((1, "bf16", 2), (3, "bf16", 2)): ({CONVERT}, "AssertionError"),
    ((3, "bf16", 2), (1, "bf16", 2)): ({CONVERT}, "AssertionError"),
    ((2, "bf16", 2), (1, "fp32", 2)): ({CONVERT, WEIGHTS}, "FileNotFoundError"),
    ((1, "bf16", 2), (1, "bf16", 3)): ({CONVERT, WEIGHTS}, "ZeRORuntimeException"),
    ((1, "fp32", 2), (0, "fp32", 2)): ({WEIGHTS}, "AttributeError"),
    ((0, "bf16", 2), (1, "bf16", 2)): ({WEIGHTS}, "FileNotFoundError"),
    ((0, "bf16", 2), (0, "fp32", 2)): ({WEIGHTS}, "KeyError"),
    ((0, "bf16", 2), (3, "bf16", 2)): ({BEFORE}, "AssertionError"),
}


def load(rank: int, settings: dict[str, Any], folder: Path, **how: bool) -> Any:
    engine = build(rank, settings)
    try:
        path, _ = engine.load_checkpoint(str(folder), tag="tag", **how)
        assert path is not None
        return whole(engine)
    finally:
        engine.destroy()


def kinds(ranks: Any, size: int, settings: dict[str, Any], folder: Path, **how: bool) -> tuple[set[str], str]:
    with pytest.raises(RankError) as caught:
        ranks(size).run(load, settings, folder, **how)
    return {kind for kind, _ in caught.value.errors}, caught.value.errors[0][1]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: "{}{}{}-{}{}{}".format(*case[0], *case[1]))
def test_what_another_layout_saved_is_refused_with_ways_that_work(ranks, tmp_path, case):
    (stage, dtype, world), (other_stage, other_dtype, other_world) = case
    advice, _ = LAYOUTS[case]
    saved = ranks(world).run(save_only, config(stage, dtype), tmp_path, 1)[0]
    settings = config(other_stage, other_dtype)
    found, message = kinds(ranks, other_world, settings, tmp_path)
    assert found == {"ValueError"}
    assert f"was saved with ZeRO stage {stage} in" in message
    assert f"this run has ZeRO stage {other_stage} in" in message
    assert {way for way in (CONVERT, WEIGHTS, BEFORE) if way in message} == advice
    if WEIGHTS in advice:
        assert differing(ranks(other_world).run(load, settings, tmp_path, load_module_only=True)[0], saved) == []
    else:
        assert kinds(ranks, other_world, settings, tmp_path, load_module_only=True)[0] == {"ValueError"}


@pytest.mark.parametrize("case", [*LAYOUTS][:2], ids=lambda case: f"{case[0][0]}-{case[1][0]}")
def test_with_adamw_deepspeed_says_less(ranks, tmp_path, case):
    """What is refused above is DeepSpeed's own limit."""
    (stage, dtype, world), (other_stage, other_dtype, other_world) = case
    ranks(world).run(save_only, {**config(stage, dtype), "optimizer": ADAMW}, tmp_path, 1)
    found, message = kinds(ranks, other_world, {**config(other_stage, other_dtype), "optimizer": ADAMW}, tmp_path)
    assert (found, message) == ({LAYOUTS[case][1]}, "")


def test_stages_1_and_2_read_each_others_files(ranks, tmp_path):
    saved = ranks(2).run(save_only, config(1, "bf16"), tmp_path, 1)[0]
    assert differing(ranks(2).run(load, config(2, "bf16"), tmp_path)[0], saved) == []


def test_a_universal_checkpoint_is_told_from_deepspeeds_own(ranks, tmp_path):
    (tmp_path / "tag" / "zero").mkdir(parents=True)
    found, message = kinds(ranks, 1, config(1), tmp_path)
    assert (found, '"checkpoint": {"load_universal": true}' in message) == ({"ValueError"}, True)
