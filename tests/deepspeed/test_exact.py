"""The contract: the same bits on every layout."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from muon_plugin.core import messages, plan
from tests.support.combinations import covering, in_turn, some
from tests.support.integers import STEPS, IntegerModel, build, config, differing, train, trained, weights

DTYPES = ("fp32", "bf16", "fp16")


@pytest.fixture
def reference(ranks):
    """One process, stage 0: by dtype."""
    return {dtype: ranks.alone(trained, config(0, dtype)) for dtype in DTYPES}


@pytest.mark.parametrize(("dtype", "stage", "world", "gas"), covering(DTYPES, (0, 1, 2, 3), (1, 2, 3, 4), (1, 4)))
def test_layouts_end_in_the_same_bits(ranks, reference, dtype, stage, world, gas):
    for rank, found in enumerate(ranks(world).run(trained, config(stage, dtype, gas))):
        assert differing(found, reference[dtype]) == [], f"rank {rank}"


@pytest.mark.parametrize(("stage", "rounds"), [(1, 1), (3, 4)])  # in stage 1 no rank owns two matrices that are cut
def test_rounds_and_batches_of_messages_change_no_bit(ranks, reference, stage, rounds):
    """Models as small as this one are exchanged in one round, and no rank has more than 256 messages."""
    everyone = ranks(4).run(in_small_rounds, config(stage))
    assert max(of_rank for _, of_rank in everyone) == rounds
    for found, _ in everyone:
        assert differing(found, reference["fp32"]) == []


def in_small_rounds(rank: int, settings: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    with mock.patch.object(plan, "WORTHWHILE", 1), mock.patch.object(messages, "MOST", 2):
        engine = build(rank, settings, IntegerModel())
        train(engine, rank, STEPS)
    rounds = max(plan.rounds for plan in engine.basic_optimizer.plans)
    found = weights(engine)
    engine.destroy()
    return found, rounds


OPTIONS: dict[str, dict[str, Any]] = {
    "overlap_comm": {"zero_optimization": {"overlap_comm": True}},
    "no overlap_comm": {"zero_optimization": {"overlap_comm": False}},
    "round_robin_gradients": {"zero_optimization": {"round_robin_gradients": True}},
    "no contiguous_gradients": {"zero_optimization": {"contiguous_gradients": False}},
    "no reduce_scatter": {"zero_optimization": {"reduce_scatter": False}},
    "small buckets": {"zero_optimization": {"reduce_bucket_size": 500, "allgather_bucket_size": 500}},
    "parameter_alignment": {"zero_optimization": {"parameter_alignment": True}},
}


@pytest.mark.parametrize(("layout", "option"), in_turn([(1, 2), (2, 3)], OPTIONS))
def test_zero_options_change_no_bit(ranks, reference, layout, option):
    stage, world = layout
    found = ranks(world).run(trained, config(stage, "bf16", **OPTIONS[option]))[0]
    # Masters cannot be gathered under round_robin_gradients: DeepSpeed's own map of them walks the wrong order there.
    assert differing(found, {name: reference["bf16"][name] for name in found}) == []


OPTIONS_3: dict[str, dict[str, Any]] = {
    "overlap_comm": {"overlap_comm": True},
    "sub-groups": {"sub_group_size": 300},
    "one parameter a sub-group": {"sub_group_size": 1},
    "no parameter persists": {"stage3_param_persistence_threshold": 0},
    "small buckets": {
        "reduce_bucket_size": 500,
        "stage3_prefetch_bucket_size": 100,
        "stage3_max_live_parameters": 1000,
    },
    "no reduce_scatter": {"reduce_scatter": False},
    "no contiguous_gradients": {"contiguous_gradients": False},
    "parameters on the CPU": {"offload_param": {"device": "cpu"}},
    "ZeRO++'s second partition": {"zero_hpz_partition_size": 2},
}


@pytest.mark.parametrize("option", some(OPTIONS_3, 3))
def test_zero_3_options_change_no_bit(ranks, reference, option):
    found = ranks(4).run(trained, config(3, "bf16", gas=2, zero_optimization=OPTIONS_3[option]))[0]
    assert differing(found, reference["bf16"]) == []


OFFLOADED = {(1, 1), (1, 2), (1, 3), (2, 2), (2, 4), (3, 1), (3, 2), (3, 4)}  # stage, world


@pytest.mark.parametrize(
    ("dtype", "stage", "world", "gas"),
    some(
        covering(
            DTYPES, (1, 2, 3), (1, 2, 3, 4), (1, 4), valid=lambda _, stage, world, gas: (stage, world) in OFFLOADED
        ),
        6,
    ),
)
def test_offload_changes_no_bit(ranks, reference, dtype, stage, world, gas):
    """DeepSpeed #8463: CPU offload diverges from the run without it."""
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": dtype == "bf16"}}
    found = ranks(world).run(trained, config(stage, dtype, gas, zero_optimization=offload))[0]
    assert differing(found, reference[dtype]) == []


@pytest.mark.parametrize(
    ("dtype", "stage", "world", "nesterov"), some(covering(DTYPES, (0, 1, 2, 3), (1, 3), (True, False)), 6)
)
def test_momentum_in_cpu_memory_changes_no_bit(ranks, dtype, stage, world, nesterov):
    """On the CPU as well the momentum is copied to and from where it is."""
    alone = ranks.alone(trained, config(0, dtype, params={"nesterov": nesterov}))
    offloaded = {"nesterov": nesterov, "offload": True}
    assert differing(ranks(world).run(trained, config(stage, dtype, params=offloaded))[0], alone) == []


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "bfloat16"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16"), (0, "float16")]
)
def test_torch_autocast_changes_no_bit(ranks, reference, stage, dtype):
    """Parameters stay fp32; ZeRO reduces gradients in the dtype of the forward."""
    settings = config(stage, torch_autocast={"enabled": True, "dtype": dtype})
    for found in ranks(2, apart="autocast").run(trained, settings):  # DeepSpeed keeps it on for good
        assert differing(found, reference["fp32"]) == []


@pytest.mark.fast
def test_a_model_built_under_zero_init(ranks):
    """DeepSpeed #8438: every parameter looks one-dimensional there, so the built-in is silently off."""
    alone = ranks.alone(init_under_zero, config(3, "bf16"), False)
    for world in (1, 2, 4):
        assert differing(ranks(world).run(init_under_zero, config(3, "bf16"), True)[0], alone) == []


def init_under_zero(rank: int, settings: dict[str, Any], under: bool) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=under):
        model = Small()
    engine = build(rank, settings, model)
    assert [m.name for m in engine.basic_optimizer.routing.matrices] == ["a.weight", "b.weight"]
    assert "Muon   2 parameters, 2 matrices, 25 elements" in engine.basic_optimizer.summary()
    train(engine, rank, 5)
    return weights(engine)


def test_fp32_gradient_accumulation_under_bf16_changes_no_bit(ranks, reference):
    """`data_types.grad_accum_dtype` fp32 makes DeepSpeed take another wrapper for stage 1: BF16_Optimizer."""
    for stage, world in ((1, 1), (1, 2), (1, 3), (2, 2)):
        settings = config(stage, "bf16", gas=2, data_types={"grad_accum_dtype": "fp32"})
        assert differing(ranks(world).run(trained, settings)[0], reference["bf16"]) == [], (stage, world)


@pytest.mark.fast
def test_more_ranks_than_matrices(ranks):
    """Two matrices on four ranks, some of which own nothing, or hold only padding."""
    alone = ranks.alone(small, config(0))
    for stage in (0, 1, 2):
        assert differing(ranks(4).run(small, config(stage))[0], alone) == []


class Drawn(nn.Linear):
    """The same weights in every dtype: torch 2.6 draws other numbers in bf16 than in fp32."""

    def reset_parameters(self) -> None:
        for p in self.parameters():
            p.data.copy_(torch.randint(-8, 9, p.shape) / 16)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = Drawn(3, 5, bias=False), Drawn(5, 2)

    forward = IntegerModel.forward


def small(rank: int, settings: dict[str, Any]) -> dict[str, Tensor]:
    engine = build(rank, settings, Small())
    train(engine, rank, 5)
    return weights(engine)


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (1, 2), (2, 3)])
def test_a_fused_projection_ends_as_separate_ones(ranks, stage, world):
    """q, k, v and gate, up: the same gradients in one parameter or in five, the same bits."""
    fused, apart = (ranks(world).run(rows, config(stage, "bf16"), fused)[0] for fused in (True, False))
    assert differing(fused, apart) == []


class Projections(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.names = {"qkv": ["q", "k", "v"], "gate_up_proj": ["gate", "up"]}
        self.fused = fused
        for name, parts in self.names.items():
            torch.manual_seed(len(name))
            weights = [torch.randn(24, 24) for _ in parts]
            for part, weight in zip([name] if fused else parts, [torch.cat(weights)] if fused else weights):
                linear = nn.Linear(24, len(weight), bias=False)
                linear.weight = nn.Parameter(weight)
                self.add_module(part, linear)

    def whole(self, name: str) -> Tensor:
        if self.fused:
            return self.get_submodule(name).weight
        return torch.cat([self.get_submodule(part).weight for part in self.names[name]])

    def forward(self, step: int, *_: int) -> Tensor:
        torch.manual_seed(step)
        return sum((self.whole(name).float() * 12 * torch.randint(-5, 6, (24 * len(p), 24))).sum()
                   for name, p in self.names.items())  # fmt: skip


def rows(rank: int, settings: dict[str, Any], fused: bool) -> dict[str, Tensor]:
    model = Projections(fused)
    train(build(rank, settings, model), rank, STEPS)
    return {name: model.whole(name).detach() for name in model.names}


@pytest.mark.parametrize("fn", ["original", "update_norm", "none"])
def test_every_scaling_is_the_same_on_every_layout(ranks, fn):
    """Eq. 6 has a scale that only the owner knows: it travels with the update."""
    alone = ranks.alone(trained, config(0, params={"adjust_lr_fn": fn}))
    for stage, world in ((0, 3), (1, 3), (2, 4)):
        found = ranks(world).run(trained, config(stage, params={"adjust_lr_fn": fn}))[0]
        assert differing(found, alone) == [], (stage, world)


def test_client_groups_schedulers_and_a_frozen_half(ranks):
    """Groups with their own lr and weight_decay, a scheduler of the client's, and one of the JSON's."""
    for job in (client_groups, json_scheduler):
        alone = ranks.alone(job, config(0))
        for stage, world in ((0, 2), (1, 3), (2, 2)):
            assert differing(ranks(world).run(job, config(stage))[0], alone) == [], (job.__name__, stage, world)


def client_groups(rank: int, settings: dict[str, Any]) -> dict[str, Tensor]:
    model = IntegerModel()
    slow = [p for name, p in model.named_parameters() if "wide" in name or "norm" in name]
    rest = [p for name, p in model.named_parameters() if not ("wide" in name or "norm" in name)]
    groups = [{"params": slow, "lr": 0.002, "weight_decay": 0.0}, {"params": rest}]
    engine = build(
        rank,
        settings,
        model,
        model_parameters=groups,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    )
    # The scheduler and the engine see both halves of both groups, each with its own values.
    found = {(g["use_muon"], g["initial_lr"], g["weight_decay"]) for g in engine.basic_optimizer.param_groups}
    assert found == {(muon, *values) for muon in (True, False) for values in ((0.002, 0.0), (0.01, 0.1))}
    train(engine, rank, 5)
    return weights(engine)


def json_scheduler(rank: int, settings: dict[str, Any]) -> dict[str, Tensor]:
    scheduler = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 4}}
    engine = build(rank, {**settings, "scheduler": scheduler})
    train(engine, rank, 5)
    return weights(engine)
