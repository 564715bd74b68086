"""What the errors about checkpoints advise is tried here, at each stage for which they advise it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.combinations import some
from tests.support.deepspeed_runs import OLD, WAYS_TO_LOAD_WEIGHTS, mended, weights_alone
from tests.support.integers import config, differing
from tests.support.parallel_models import ReplacedExperts, build_replaced
from tests.support.ranks import RankError

CASES = [(None, stage, dtype) for stage, dtype in ((0, "fp32"), (0, "bf16"), (0, "fp16"), (1, "bf16"), (2, "fp32"))]
CASES += [(None, 3, "bf16"), (OLD, 0, "bf16"), (OLD, 1, "bf16"), (OLD, 3, "bf16")]


@pytest.mark.parametrize(("release", "stage", "dtype"), some(CASES, 5))
def test_the_weights_of_another_optimizers_checkpoint_load_and_stay(ranks, tmp_path, release, stage, dtype):
    """DeepSpeed loads nothing in ZeRO-3, or another tag's weights; in stage 0 the next step restores the old ones."""
    job = (mended, weights_alone) if release == OLD else (weights_alone,)
    for found in ranks(2, deepspeed=release).run(*job, config(stage, dtype), tmp_path):
        message, *loads = found
        assert "load only the weights (load_checkpoint(..., load_module_only=True))" in message
        assert ("muon_plugin.deepspeed.convert" in message) is (stage > 0)
        for saved, loaded, stepped in loads:
            assert differing(saved, loaded) == []
            for name, value in saved.items():  # a step moves them by a percent or two, the old ones are 1 away
                assert (stepped[name] - value).abs().max() < 0.2, name


@pytest.mark.parametrize(
    ("how", "stage"), [("experts", 0), ("experts", 1), ("experts", 2), ("AutoEP", 0), ("AutoEP", 1)]
)
def test_those_of_a_mixture_of_experts_too(ranks, tmp_path, how, stage):
    """DeepSpeed's converter does not take `deepspeed.moe`, so the error does not advise it."""
    for message, *loads in ranks(2, apart=how).run(weights_alone, config(stage, "bf16"), tmp_path, how):
        assert message.endswith("or load only the weights (load_checkpoint(..., load_module_only=True))")
        for saved, loaded, stepped in loads:
            assert differing(saved, loaded) == []
            assert all((stepped[name] - value).abs().max() < 0.2 for name, value in saved.items())


@pytest.mark.parametrize("way", WAYS_TO_LOAD_WEIGHTS)
def test_those_of_autoep_in_zero_3_are_not_loaded_by_position(ranks, tmp_path, way):
    """There DeepSpeed copies the masters of another optimizer's groups, if their sizes are the same."""
    with pytest.raises(
        RankError, match=r"(True|False) with expert_parallel .* or load the weights into the model before"
    ):
        ranks(2, apart="AutoEP").run(autoep_in_zero_3, config(3, "bf16"), tmp_path, way)


def autoep_in_zero_3(rank: int, settings: dict[str, Any], folder: Path, way: dict[str, bool]) -> None:
    engine = build_replaced(rank, settings, 2, ReplacedExperts())
    engine.save_checkpoint(str(folder), tag="tag")
    engine.load_checkpoint(str(folder), tag="tag", **way)
