"""Moonlight's pieces against the paper's numbers, and its scaled-down copy under Megatron with EP 2."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from muon_plugin.moonlight import Stages, gate_scaling_factor, router_bias
from tests.support import ROOT
from tests.support.forks import Engine
from tests.support.jobs import Job
from tests.support.ranks import release as release_folder

STEP = 2048 * 8192  # tokens


def test_the_stages_are_the_papers():
    stages = Stages()
    assert stages.lr(0) == 0
    assert stages.lr(1000 * STEP) == pytest.approx(2.1e-4)
    assert stages.lr(2000 * STEP) == pytest.approx(4.2e-4)
    assert stages.warmup == pytest.approx(33.5e9, rel=0.01)  # "up to 33B tokens"
    assert stages.lr((stages.warmup + 5.2e12) / 2) == pytest.approx((4.2e-4 + 4.2e-5) / 2)  # a cosine's middle
    assert stages.lr(5.2e12 * (1 - 1e-9)) == pytest.approx(4.2e-5)
    assert stages.lr(5.2e12 + 50 * 2 * STEP) == pytest.approx((4.2e-5 + 1e-4) / 2)
    assert stages.lr(5.2e12 + 100 * 2 * STEP) == pytest.approx(1e-4)
    assert stages.lr((stages.cooldown_warmup + 5.7e12) / 2) == pytest.approx(5e-5)
    assert stages.lr(5.7e12) == stages.lr(6e12) == 0
    assert [stages.batch(tokens) for tokens in (0, 199e9, 200e9, 5.7e12)] == [2048, 2048, 4096, 4096]
    assert [stages.bias_rate(tokens) for tokens in (0, 5.19e12, 5.2e12)] == [1e-3, 1e-3, 0]


def test_scaled_stages_keep_their_shape():
    small = Stages().scaled(5700, 100, 10, lr=10, batch=8)
    assert (small.lr(100), small.lr(5210), small.lr(5700)) == pytest.approx((4.2e-3, 1e-3, 0))
    assert small.lr(5199.999) == pytest.approx(4.2e-4, rel=1e-3)
    assert [small.batch(tokens) for tokens in (0, 199, 201)] == [8, 8, 16]
    assert (small.bias_rate(5199), small.bias_rate(5200)) == (1e-3, 0)
    with pytest.raises(ValueError, match="do not follow one another"):
        Stages().scaled(100, 95, 1)


def test_gate_scaling_factor_is_moonlights():
    found = gate_scaling_factor(64, 6, generator=torch.Generator().manual_seed(1))
    assert found == pytest.approx(2.446, abs=2e-3)
    assert gate_scaling_factor(8, 1) == pytest.approx(1.0)  # one expert: its weight is 1
    by_hand = []
    for logits in torch.randn(4000, 8, generator=torch.Generator().manual_seed(2)):
        p = sorted(1 / (1 + (-x).exp()) for x in logits)[-2:]
        by_hand.append(float(sum(p) / (p[0] ** 2 + p[1] ** 2).sqrt()))
    assert gate_scaling_factor(8, 2) == pytest.approx(sum(by_hand) / len(by_hand), abs=2e-3)


def test_router_bias_by_hand():
    """Mean load 4: the two below it get +1, the three above -1, the one at it 0; the mean of the signs is -1/6."""
    bias = torch.tensor([0.0, 0.1, 0.0, 0.0, -0.1, 0.0])
    found = router_bias(bias, torch.tensor([1.0, 2, 4, 5, 5, 7]), 1e-3)
    change = torch.tensor([7.0, 7, 1, -5, -5, -5]) / 6e3
    torch.testing.assert_close(found, bias + change)
    assert float(found.sum()) == pytest.approx(float(bias.sum()), abs=1e-7)
    both = router_bias(torch.stack([bias, bias]), torch.tensor([[1, 2, 4, 5, 5, 7], [3, 3, 3, 3, 3, 3]]), 1e-3)
    assert torch.equal(both[0], found)
    assert torch.equal(both[1], bias)


def megatron_bias(rank: int, bias: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

    group = torch.distributed.group.WORLD
    return get_updated_expert_bias(tokens, bias, 1e-3, group)


def test_megatrons_bias_rule_chooses_the_same_experts(ranks):
    """It leaves the mean out: all biases of a router are moved alike, which changes no choice."""
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.zeros(16)
    for _ in range(20):
        load = torch.randint(0, 50, (16,), generator=generator).float()
        ours = router_bias(ours, load, 1e-3)
        theirs = ranks(1, "0.19.2").run(megatron_bias, theirs, load.clone())[0]
    difference = theirs - ours
    assert float(difference.abs().max()) > 1e-4, "the rules do differ"
    torch.testing.assert_close(difference, difference.mean().expand(16), rtol=0, atol=1e-6)


def scheduled(rank: int, resumed: bool) -> list[tuple[float, float, float]]:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from muon_plugin.megatron.moonlight import three_stages

    def build() -> tuple[Any, Any]:
        groups = [{"lr": 0.0}, {"lr": 0.0, "max_lr": 2.1e-4}]
        constant = {"start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": 1, "wd_incr_style": "constant"}
        scheduler = OptimizerParamScheduler(
            SimpleNamespace(param_groups=groups), 0.0, 4.2e-4, 4.2e-5, 10, 1000, "cosine", **constant
        )
        config = SimpleNamespace(moe_router_bias_update_rate=1e-3)
        three_stages(scheduler, Stages().scaled(1000 * 32, 100 * 32, 10 * 32), 32, [config])
        return scheduler, config

    scheduler, config = build()
    found = []
    for number in range(100):
        if resumed and number == 60:
            saved = scheduler.state_dict()
            scheduler, config = build()
            scheduler.load_state_dict(saved)
        scheduler.step(increment=10)
        rates = [group["lr"] for group in scheduler.optimizer.param_groups]
        found.append((*rates, config.moe_router_bias_update_rate))
    return found


def test_megatrons_scheduler_follows_the_stages_and_resumes(ranks, release):
    found = ranks(1, release).run(scheduled, False)[0]
    stages = Stages().scaled(1000, 100, 10)
    for number, (lr, half, rate) in enumerate(found, start=1):
        assert lr == pytest.approx(stages.lr(10 * number))
        assert half == pytest.approx(lr / 2)
        assert rate == (1e-3 if 10 * number < stages.cosine_end else 0)
    assert ranks(1, release).run(scheduled, True)[0] == found


def test_moonlight_scaled_down_trains_with_two_expert_ranks(tmp_path):
    sys.path.insert(0, str(ROOT / "examples" / "llama"))
    import data

    text = Path(sysconfig.get_paths()["stdlib"]) / "http"  # short: validation takes longer than the steps
    data.prepare(text, tmp_path / "data")
    arguments = [str(ROOT / "examples" / "megatron" / "train.py"), "--moonlight", "--hidden", "64", "--tp", "1"]
    arguments += ["--ep", "2", "--steps", "24", "--lr", "0.002"]
    arguments += ["--data", str(tmp_path / "data"), "--out", str(tmp_path)]
    job = Job(tmp_path, 2, arguments, engine=Engine(megatron=str(release_folder("0.19.2"))))
    job.ends()
    assert job.codes == [0, 0], job.all_logs()
    assert "mlp.router.weight" in job.log(0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    rates = [line["lr"] for line in lines]
    assert rates[20] < rates[21], "the cooldown's own warm-up"
    assert rates[23] == 0


def test_the_tokens_of_a_step_are_checked():
    from muon_plugin.megatron.moonlight import three_stages

    with pytest.raises(ValueError, match="tokens=0: must be at least 1"):
        three_stages(SimpleNamespace(step=None), Stages(), 0)
