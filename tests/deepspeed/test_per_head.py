"""Per-head Muon under DeepSpeed: the same bits on every layout; what the built-in does for the heads that it knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.attention import HEADS, Model, trained, trained_apart
from tests.support.combinations import covering, some
from tests.support.integers import STEPS, IntegerModel, build, config, differing, gathered, train
from tests.support.model_sweep import build as build_model
from tests.support.parallel_models import described
from tests.support.ranks import RankError

PER_HEAD = {"per_head_muon": True}


@pytest.mark.parametrize(
    ("dtype", "stage", "world", "offload"),
    some(
        covering(
            ("fp32", "bf16"), (0, 1, 2, 3), (1, 2, 3), (False, True), valid=lambda _, stage, __, off: stage or not off
        ),
        6,
    ),
)
def test_the_same_bits_as_a_parameter_for_each_head(ranks, dtype, stage, world, offload):
    alone = ranks.alone(trained_apart, config(0, dtype))
    zero = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    for found in ranks(world).run(trained, config(stage, dtype, params=PER_HEAD, zero_optimization=zero)):
        assert differing(found, alone) == []


@pytest.mark.fast
@pytest.mark.parametrize("fn", ["original", "update_norm"])
def test_the_scale_is_a_heads_own(ranks, fn):
    settings = config(1, "bf16", params={"adjust_lr_fn": fn})
    alone = ranks.alone(trained_apart, config(0, "bf16", params={"adjust_lr_fn": fn}))
    settings["optimizer"]["params"] |= PER_HEAD
    assert differing(ranks(2).run(trained, settings)[0], alone) == []
    assert differing(ranks.alone(trained, config(0, "bf16", params={"adjust_lr_fn": fn})), alone) == list(HEADS)


CUT = {
    "layer_specs": [
        {"patterns": [r".*(q|k|v|q_b|kv_b)_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*o_proj\.weight$"], "partition_type": "row"},
        {"patterns": [r".*qkv\.weight$"], "partition_type": "skip"},
    ],
    "use_default_specs": False,
}


@pytest.mark.parametrize(("stage", "world", "tp"), [(1, 4, 2), (3, 2, 2), (2, 4, 4)])
def test_tensor_parallelism_may_cut_inside_a_head(ranks, stage, world, tp):
    """At TP 4 there are fewer key and value heads than ranks: each holds half a head."""
    alone = ranks.alone(trained_apart, config(0, "bf16"))
    pool = "autotp" if tp == 2 else f"autotp {tp}"  # DeepSpeed keeps its groups
    for found in ranks(world, apart=pool).run(under_autotp, config(stage, "bf16", params=PER_HEAD), tp):
        assert differing(found, alone) == []


def under_autotp(rank: int, settings: dict[str, Any], tp: int) -> dict[str, Tensor]:
    from deepspeed.utils import groups

    engine = build(rank, {**settings, "tensor_parallel": {"autotp_size": tp, "partition_config": CUT}}, Model())
    model = engine.module
    model.cut = True
    assert model.grouped.num_heads == 6 // tp or tp == 4  # DeepSpeed has written this rank's number
    dp_rank, dp = dist.get_rank(engine.data_parallel_group), engine.dp_world_size
    for step in range(STEPS):
        engine.backward(engine(step, 0, dp_rank, dp, 1))
        engine.step()
    found = {}
    with gathered(model):
        for name, p in model.named_parameters():
            found[name] = p.detach().clone()
            if described(p):
                shards: list[Any] = [None] * tp
                dist.all_gather_object(shards, found[name], group=groups.get_tensor_model_parallel_group())
                found[name] = described(p).rebuild(dict(enumerate(shards)))
    return found


def test_a_checkpoint_saved_without_is_loaded_with(ranks, tmp_path):
    """Momentum is elementwise: it is taken over, whatever the matrices are."""
    found = []
    for world, stage in ((1, 0), (2, 1), (2, 3)):
        folder = tmp_path / f"{world}-{stage}"
        same, weights = ranks(world).run(resumed, config(stage, "bf16"), folder)[0]
        assert same
        found.append(weights)
    assert differing(found[0], found[1]) == differing(found[0], found[2]) == []
    assert differing(found[0], ranks.alone(trained, config(0, "bf16"), 6)) == list(HEADS)


def resumed(rank: int, settings: dict[str, Any], folder: Path) -> tuple[bool, dict[str, Tensor]]:
    """Three steps without, then three with per-head Muon; and whether the momentum after loading was the one saved."""
    engine = build(rank, settings, Model())
    train(engine, rank, 3)
    engine.save_checkpoint(str(folder))
    saved = momenta(engine)
    params = {**settings["optimizer"]["params"], **PER_HEAD}
    model = Model()
    engine = build(rank, {**settings, "optimizer": {"type": "Muon", "params": params}}, model)
    engine.load_checkpoint(str(folder))
    same = len(saved) > 0 and all(torch.equal(*pair) for pair in zip(saved, momenta(engine), strict=True))
    train(engine, rank, 3, first=3)
    with gathered(model):
        return same, {name: p.detach().clone() for name, p in model.named_parameters()}


def momenta(engine: Any) -> list[Tensor]:
    state = engine.basic_optimizer.state.values()
    return [of["exp_avg"].clone() for of in state if "exp_avg" in of and of["exp_avg"].any()]


@pytest.mark.fast
def test_a_model_without_heads_is_refused_on_every_rank(ranks):
    with pytest.raises(RankError) as error:
        ranks(2).run(refused, config(1, params=PER_HEAD))
    for kind, message in error.value.errors:
        assert kind == "ValueError"
        assert "per_head_muon=True" in message
        assert "qkv.weight: neither its module nor the config says" in message


def refused(rank: int, settings: dict[str, Any]) -> None:
    build(rank, settings, IntegerModel())


@pytest.mark.fast
def test_the_update_is_the_built_ins_within_its_rounding():
    """DeepSpeed 0.19.8's ``per_head_muon``, on the same momentum and with its scale, for the heads that it tags."""
    from deepspeed.runtime.zero.muon.original_muon import _per_head_orthogonalize

    import muon_plugin

    model = Model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # As the built-in cuts keys and values of latent attention: both of a head in one matrix.
    settings = {"adjust_lr_fn": "original", "ns_method": "standard", "split": {"kv_b_proj": 4}, **PER_HEAD}
    optimizer = muon_plugin.Muon(
        model.named_parameters(), model=model, lr=1.0, weight_decay=0.0, momentum=0.0, **settings
    )
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    for name, heads in HEADS.items():
        p = model.get_parameter(name)
        if name != "together.qkv.weight":  # fused ones the built-in keeps whole
            number = len(heads) // (2 if "kv_b" in name else 1)
            theirs = _per_head_orthogonalize(p.grad.clone(), number, 5, "standard").float()
            ours = before[name] - p.detach()
            whole = _per_head_orthogonalize(p.grad.clone(), 1, 5, "standard").float()
            # bf16's iterations are as far from float64's (core/orthogonalize.py).
            assert (ours - theirs).norm() < 0.06 * theirs.norm() < 0.06 * 5 * (whole - theirs).norm(), name


TAGGED = [
    "LlamaForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "BertForMaskedLM",
    "KimiLinearForCausalLM",
]


@pytest.mark.parametrize("name", TAGGED)
def test_the_heads_are_those_that_the_built_in_tags(name):
    """Each projection that DeepSpeed 0.19.8 tags has as many heads here, keys and values of latent attention apart."""
    import deepspeed

    from muon_plugin.core.heads import KEY, QUERY, VALUE
    from muon_plugin.core.routing import route

    model = build_model(name)
    routing = route({n: tuple(p.shape) for n, p in model.named_parameters()}, model=model, per_head=True)
    meta, text_config = deepspeed._per_head_muon_meta(model)
    owners, tagged = dict(model.named_modules()), 0
    for parameter, p in model.named_parameters():
        number, _ = deepspeed._resolve_attention_head_count(parameter, p, meta, text_config, owners)
        if number is not None:
            tagged += 1
            counts = [sum(head.role == role for head in routing.by_head[parameter]) for role in (QUERY, KEY, VALUE)]
            assert {count for count in counts if count} == {number}, parameter
    assert tagged >= 2


def test_the_built_ins_own_refusal_is_ours_too():
    """Its tests expect an error where no projection can be tagged: of a shard whose width no config describes."""
    import deepspeed

    import muon_plugin

    model = nn.Module()
    model.config = type("Config", (), {"num_attention_heads": 4, "hidden_size": 32})()
    model.attn = type("Attention", (nn.Module,), {})()
    model.attn.q_proj = nn.Linear(32, 12, bias=False)
    settings = type("Config", (), {"optimizer_name": "muon", "optimizer_params": PER_HEAD})()
    with pytest.raises(ValueError, match="no attention projection could be tagged"):
        deepspeed.set_optimizer_flags(settings, model)
    with pytest.raises(ValueError, match=r"attn\.q_proj\.weight"):
        muon_plugin.Muon(model.named_parameters(), model=model, **PER_HEAD)
