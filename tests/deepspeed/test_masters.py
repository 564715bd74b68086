"""Masters of 16 bits (``bf16_master_weights_and_grads``, ``fp16_...``), and offload of a part (``ratio``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.combinations import covering, in_turn, some
from tests.support.deepspeed_runs import interrupted
from tests.support.integers import STEPS, build, config, differing, train, trained
from tests.support.ranks import RankError

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
MASTERS: dict[str, dict[str, Any]] = {
    "bf16, moments bf16": {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
    "bf16, moments bf16, offload": {
        "bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
        "zero_optimization": OFFLOAD,
    },
    "bf16, offload": {"bf16": {"bf16_master_weights_and_grads": True}, "zero_optimization": OFFLOAD},
    "fp16, offload": {"fp16": {"fp16_master_weights_and_grads": True}, "zero_optimization": OFFLOAD},
}


def settings(masters: str, stage: int, **params: Any) -> dict[str, Any]:
    return config(stage, masters[:4], params=params, **MASTERS[masters])


@pytest.mark.parametrize(("masters", "stage", "world"), some(covering([*MASTERS], (1, 2, 3), (1, 2, 3)), 6))
def test_the_same_bits_over_stages_and_ranks(ranks, masters, stage, world):
    alone = ranks.alone(trained, settings(masters, 1))
    for found in ranks(world).run(trained, settings(masters, stage)):
        assert differing(found, alone) == []


@pytest.mark.parametrize(("stage", "masters"), in_turn((1, 2, 3), MASTERS))
def test_resumed_to_the_same_bits_with_state_of_the_promised_dtypes(ranks, tmp_path, masters, stage):
    """torch's `load_state_dict` would cast fp32 moments to the masters' dtype."""
    straight = ranks.alone(trained, settings(masters, 1), 6)
    for found in ranks(2).run(interrupted, settings(masters, stage), str(tmp_path)):
        assert differing(found, straight) == []


@pytest.mark.parametrize("masters", MASTERS)
def test_the_bytes_of_the_state(ranks, masters):
    """An element's master, and its momentum or AdamW's moments."""
    moments = 2 if "moments bf16" in masters else 4
    assert ranks(1).run(widths, settings(masters, 2)) == [[{2}, {4}, {moments}]]


def widths(rank: int, settings: dict[str, Any]) -> list[set[int]]:
    engine = build(rank, settings)
    train(engine, rank, 1)
    muon = engine.basic_optimizer
    matrices = {p for call in muon.calls if muon.param_groups[call.group]["use_muon"] for p in call.tensors}
    masters = {p.element_size() for p in muon.state}
    momentum = {muon.state[p]["exp_avg"].element_size() for p in matrices}
    rest = [muon.state[p][key] for p in muon.state if p not in matrices for key in ("exp_avg", "exp_avg_sq")]
    assert "which loses small updates" in muon.summary(notes_of(muon))
    return [masters, momentum, {moment.element_size() for moment in rest}]


def notes_of(muon: Any) -> list[str]:
    from muon_plugin.deepspeed.cpu_adam import notes

    return notes(muon)


def test_deepspeeds_adamw_has_the_same_masters(ranks):
    """What its own AdamW does with moments of bf16, so that no more is promised than that."""
    adamw = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    alone = ranks.alone(trained, {**settings("bf16, moments bf16", 1), "optimizer": adamw}, 3)
    for found in ranks(2).run(trained, {**settings("bf16, moments bf16", 3), "optimizer": adamw}, 3):
        assert differing(found, alone) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_without_offload_deepspeed_has_none_of_them_with_fp32_moments(ranks, dtype):
    """DeepSpeed's own limit: an assertion about its AdamW, too."""
    without = config(1, dtype, **{dtype: {f"{dtype}_master_weights_and_grads": True}})
    with pytest.raises(RankError, match=rf"{dtype}_master_weights_and_grads without offload=True is not supported"):
        ranks(1).run(build, without)
    adamw = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    with pytest.raises(RankError, match="Master weights feature requires ZeRO-1 Offload with DeepSpeedCPUAdam"):
        ranks(1).run(build, {**without, "optimizer": adamw})


def test_another_adamw_is_refused(ranks):
    with pytest.raises(RankError, match=r"adamw='torch' is not supported.*torch_fp32"):
        ranks(1).run(build, settings("bf16, offload", 1, adamw="torch"))


SUB_GROUPS = {"sub_group_size": 300, "offload_optimizer": {"device": "cpu", "ratio": 0.4}}


@pytest.mark.parametrize(("dtype", "world"), [("bf16", 1), ("fp32", 2), ("bf16", 3)])
def test_a_part_of_the_sub_groups_stays_on_the_device(ranks, dtype, world):
    """ZeRO-Offload++. On the CPU all sub-groups are there, so those of the device are marked by hand."""
    alone = ranks.alone(trained, config(0, dtype))
    for found, kept, by_adamw in ranks(world).run(kept_on_device, config(3, dtype, zero_optimization=SUB_GROUPS)):
        assert differing(found, alone) == []
        assert kept > 1
        assert not by_adamw


def kept_on_device(rank: int, settings: dict[str, Any]) -> tuple[dict[str, Tensor], int, bool]:
    """Weights, how many sub-groups were stepped as those of the device, whether by another optimizer"""
    from tests.support.integers import weights

    engine = build(rank, settings)
    zero, muon = engine.optimizer, engine.basic_optimizer
    count = len(zero.fp16_groups)
    kept = int((1 - 0.4) * count)
    for number in range(kept):
        zero.subgroup_to_device[number] = "the device"
    train(engine, rank, STEPS)
    assert {"betas", "eps"} - set(muon.param_groups[0]) == {"betas", "eps"}  # the group of matrices
    return weights(engine), kept, zero.backup_optimizer is not muon


def test_torch_fp32_rounds_only_the_weights():
    """The AdamW of masters of 16 bits, against torch's on a copy in fp32."""
    from muon_plugin.core.adamw import InFp32, new_state

    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        p = torch.randn(101).to(dtype)
        wide = p.float()
        group = {"params": [p], "lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        ours, theirs = InFp32([dict(group)]), torch.optim.AdamW([{**group, "params": [wide]}])
        ours.state[p] = new_state(ours, p)
        for _ in range(5):
            p.grad = torch.randn(101).to(dtype)
            wide.grad = p.grad.float()
            with torch.no_grad():
                wide.copy_(p)
            ours.step()
            theirs.step()
            assert torch.equal(p, wide.to(dtype))
        assert ours.state[p]["exp_avg_sq"].dtype == torch.float32
        assert list(ours.state) == [p]
