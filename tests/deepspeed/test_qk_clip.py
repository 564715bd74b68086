"""QK-Clip under DeepSpeed: the report's rule on the shards, the same bits on every layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.clipped import CLIP, ClippedModel, alone, clip, largest, llama, logits, reference
from tests.support.combinations import FULL, covering
from tests.support.deepspeed_runs import OLD, mended
from tests.support.integers import build, config, differing, train, weights
from tests.support.monitored import written
from tests.support.ranks import RankError

STEPS = 3
PARAMS = {"qk_clip": CLIP}


def trained(rank: int, settings: dict[str, Any]) -> dict[str, Tensor]:
    engine = build(rank, settings, ClippedModel())
    train(engine, rank, STEPS)
    found = weights(engine)
    engine.destroy()
    return found


def whole(expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `weights` names them in fp32."""
    return expected | {f"{name} (fp32)": p for name, p in expected.items()}


@pytest.mark.parametrize(
    ("stage", "world", "gas"), covering((0, 1, 2, 3), (1, 2, 3), (1, 4), valid=lambda s, w, g: w * g > 1 or s == 0)
)
def test_weights_after_clipping_are_the_plain_references(ranks, stage, world, gas):
    expected = whole(ranks.alone(reference, STEPS))
    assert differing(expected, whole(ranks.alone(reference, STEPS, False))), "the logits must pass the threshold"
    for rank, found in enumerate(ranks(world).run(trained, config(stage, gas=gas, params=PARAMS))):
        assert differing(found, {name: expected[name] for name in found}) == [], f"rank {rank}"


@pytest.mark.parametrize(("stage", "dtype"), [(1, "bf16"), (3, "fp16")])
def test_masters_of_16_bit_weights_are_clipped_before_they_are_gathered(ranks, stage, dtype):
    expected = ranks.alone(trained, config(0, dtype, params=PARAMS))
    for found in ranks(2).run(trained, config(stage, dtype, params=PARAMS)):
        assert differing(found, expected) == []


@pytest.mark.skipif(not FULL, reason="FULL=1: the other release's shards are those of deepspeed/test_releases.py")
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_older_release(ranks, stage):
    expected = whole(ranks.alone(reference, STEPS, deepspeed=OLD))
    for found in ranks(2, deepspeed=OLD).run(mended, trained, config(stage, params=PARAMS)):
        assert differing(found, {name: expected[name] for name in found}) == []


def test_replicas_without_an_engine(ranks):
    expected = ranks.alone(reference, STEPS)
    for found in ranks(2).run(alone, STEPS):
        assert differing(found, expected) == []


def test_with_per_head_muon(ranks):
    expected = whole(ranks.alone(reference, STEPS, True, True))
    found = ranks(2).run(trained, config(1, params={**PARAMS, "per_head_muon": True}))[0]
    assert differing(found, expected) == []


def test_sub_groups_and_offload(ranks):
    expected = whole(ranks.alone(reference, STEPS))
    for zero in ({"sub_group_size": 300}, {"offload_optimizer": {"device": "cpu"}}):
        settings = config(3, params=PARAMS, zero_optimization=zero)
        for found in ranks(2).run(trained, settings):
            assert differing(found, {name: expected[name] for name in found}) == []


def test_a_resumed_run_ends_in_the_same_bits(ranks, tmp_path):
    found = ranks(2).run(interrupted, config(1, params=PARAMS), str(tmp_path))[0]
    assert differing(found, whole(ranks.alone(reference, STEPS))) == []


def interrupted(rank: int, settings: dict[str, Any], folder: str) -> dict[str, Tensor]:
    engine = build(rank, settings, ClippedModel())
    train(engine, rank, 1)
    engine.save_checkpoint(folder)
    engine = build(rank, settings, ClippedModel())
    engine.load_checkpoint(folder)
    train(engine, rank, STEPS - 1, first=1)
    return weights(engine)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_overflow_clips_nothing_and_its_logits_are_forgotten(ranks, stage):
    same, seen, expected = ranks(2).run(overflowing, config(stage, "fp16", params=PARAMS))[0]
    assert same, "a step that is skipped changes no weight"
    assert seen == pytest.approx(expected), "the next step's logits are its own"


def overflowing(rank: int, settings: dict[str, Any]) -> Any:
    engine = build(rank, settings, ClippedModel())
    before = weights(engine)
    engine.backward(engine(5, 0, rank, 2, 1) * (math.inf if rank == 0 else 1.0))
    engine.step()
    assert engine.skipped_steps == 1
    same = differing(before, weights(engine)) == []
    train(engine, rank, 1)
    return same, [logit for _, logit, _ in engine.basic_optimizer.halves.clip.last], _largest(0)


def _largest(step: int) -> list[float]:
    return [float(values.max()) for values in logits(step).values()]


def grown(rank: int, settings: dict[str, Any], clip: dict[str, float]) -> list[float]:
    """The largest logit in each step of a real run of a Llama whose attention is sharp and whose rate is too large."""
    settings["optimizer"]["params"]["qk_clip"] = clip
    model = llama(attn_implementation="sdpa")
    with torch.no_grad():  # the logits of small weights would grow by more than half in a step
        for name, p in model.named_parameters():
            p.mul_(38 if "q_proj" in name or "k_proj" in name else 1)
    engine = build(rank, settings, model)
    seen, tokens = [], torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(rank))
    for _ in range(40):
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
        seen.append(largest(engine.basic_optimizer.halves.clip))
    engine.destroy()
    return seen


def test_logits_that_would_grow_past_100_stay_below(ranks):
    """A clipped head was above the threshold in one step, by no more than the logits grow in one."""
    settings = config(2, params={"lr": 0.1, "adam_lr": 1e-3, "weight_decay": 0.0})
    without, default, lower = (
        ranks(2).run(grown, settings, clip)[0] for clip in ({"threshold": 1e9}, {}, {"threshold": 90})
    )
    assert max(without) > 150, without
    assert 100 < max(default) < 110, default
    assert max(lower) < 100, lower


def test_heads_that_autotp_cuts(ranks):
    """Each TP rank computes the logits of its own heads, and scales its part of their weights."""
    settings = config(1, params={"qk_clip": {"threshold": 0.02}})
    expected = ranks(1).run(cut, settings)[0]
    for found in ranks(2, apart="autotp").run(cut, {**settings, "tensor_parallel": {"autotp_size": 2}}):
        for (name, logit, count), (_, other, same) in zip(found, expected, strict=True):
            assert (logit, count) == (pytest.approx(other, rel=5e-3), same), name
        assert sum(count for _, _, count in found) > 0


def cut(rank: int, settings: dict[str, Any]) -> list[tuple[str, float, int]]:
    """(Layer, its largest logit, clipped heads) of three steps, each of which sees what the last one clipped."""
    engine = build(rank, settings, llama(2, num_key_value_heads=4))
    found = []
    for step in range(3):
        tokens = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(step))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
        found += engine.basic_optimizer.halves.clip.last
    return found


def test_what_is_watched(ranks, tmp_path):
    ranks(2).run(monitored, config(1, params=PARAMS), tmp_path)
    found = written(tmp_path)
    for name, values in logits(1).items():
        assert found[f"max_logit_{name}"] == [pytest.approx(float(values.max()), rel=1e-5)]
    values = logits(1)
    groups = [*values["grouped"].view(2, 2).amax(1).repeat_interleave(2), *values["latent"], *values["fused"]]
    assert found["clipped_heads"] == [sum(float(value) > 100 for value in groups)]


def monitored(rank: int, settings: dict[str, Any], folder: Path) -> None:
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "run"}
    engine = build(rank, {**settings, "steps_per_print": 2, "csv_monitor": monitor}, ClippedModel())
    train(engine, rank, 2)
    engine.destroy()


def test_bits_without_qk_clip_are_those_of_a_threshold_that_is_never_reached(ranks):
    expected = ranks.alone(reference, STEPS, False)
    found = ranks(2).run(trained, config(1, params={"qk_clip": {"threshold": 1e9}}))[0]
    assert differing(found, whole(expected)) == []


REFUSED = [
    ({"threshold": 0}, "qk_clip.threshold=0 is not valid; allowed: a number above 0"),
    ({"treshold": 50}, "qk_clip.treshold=50 is not a setting; allowed: threshold, alpha"),
    ({"alpha": 1.5}, "qk_clip.alpha=1.5 is not valid; allowed: a number from 0 to 1"),
    (100, "qk_clip=100 is not valid; allowed: an object"),
]


@pytest.mark.parametrize(("value", "words"), REFUSED)
def test_wrong_settings_are_refused_on_every_rank(ranks, value, words):
    with pytest.raises(RankError) as raised:
        ranks(2).run(trained, config(1, params={"qk_clip": value}))
    assert all(error is not None and error[0] == "ValueError" and words in error[1] for error in raised.value.errors)


def test_a_step_without_any_logits_is_an_error_on_every_rank(ranks):
    with pytest.raises(RankError) as raised:
        ranks(2).run(in_evaluation, config(1, params=PARAMS))
    assert all(error is not None and "no attention logits were seen" in error[1] for error in raised.value.errors)


def in_evaluation(rank: int, settings: dict[str, Any]) -> None:
    engine = build(rank, settings, ClippedModel())
    engine.eval()
    train(engine, rank, 1)


def test_the_reference_is_the_report_s():
    """Kimi K2's example: the logits of a head are multiplied by gamma, whatever alpha is."""
    model = ClippedModel()
    x = torch.randn(5, 20, dtype=torch.float64)
    model.double()

    def scores() -> Tensor:
        query = model.grouped.q_proj(x).view(5, 4, 6)
        key = model.grouped.k_proj(x).view(5, 2, 6).repeat_interleave(2, dim=1)
        return torch.einsum("qhd,khd->hqk", query, key)

    before = scores()
    clip(dict(model.named_parameters()), 0)
    values = logits(0)["grouped"].view(2, 2).amax(1).repeat_interleave(2)
    gamma = (100 / values).clamp(max=1).double()
    torch.testing.assert_close(scores(), before * gamma[:, None, None], rtol=1e-6, atol=1e-9)
