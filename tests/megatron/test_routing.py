"""What is a matrix, and how TP cuts it: forms that need Transformer Engine, on stand-ins with the same attributes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muon_plugin.core.layout import Shard, cut_shards, pieces


def stand_in(shapes: dict[str, tuple[int, ...]], config: Any, **attributes: Any) -> nn.Module:
    """A module tree with parameters of these dotted names."""
    root = nn.Module()
    root.config = config
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        p = nn.Parameter(torch.randn(shape))
        for key, value in attributes.get(leaf, {}).items():
            setattr(p, key, value)
        module.register_parameter(leaf, p)
    return root


def matrices_of(model: nn.Module, tp: int = 1, expert_tp: int = 1, **options: Any) -> Any:
    from muon_plugin.megatron.routing import parameters, route

    found = parameters([model], tp, expert_tp)
    return found, route(found, [model], **options)


CONFIG: dict[str, Any] = {"gated_linear_unit": True, "hidden_size": 6, "multi_latent_attention": False}
COLUMN = {"tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1}
ROW = {"tensor_model_parallel": True, "partition_dim": 1, "partition_stride": 1}

MLA = SimpleNamespace(
    **{**CONFIG, "multi_latent_attention": True},
    kv_lora_rank=5,
    qk_pos_emb_head_dim=2,
    qk_head_dim=4,
    v_head_dim=3,
    num_attention_heads=4,
    q_lora_rank=None,
)


def reassembled(found: Any, routing: Any, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every matrix put together from the TP ranks' parts of whole parameters, by what `pieces` says."""
    matrices = {m.name: torch.full((m.numel,), float("nan")) for m in routing.matrices}
    for parameter in found:
        for rank, blocks in enumerate(parameter.partition.ranks):
            part = torch.full((parameter.tensor.numel(),), float("nan"))
            for block in blocks:
                block.local.view(part).copy_(block.inside.view(whole[parameter.name].reshape(-1)))
            half = part.numel() // 3
            for first, last in ((0, half), (half, part.numel())):  # DP cuts it again
                tensor = part[first:last].clone()
                shard = Shard.of_range(parameter.name, first, last - first, tensor)
                held = cut_shards(parameter.partition, rank, shard)
                for piece in pieces(routing.matrices, held, {id(tensor): 0}):
                    for block in piece.blocks:
                        target = matrices[routing.matrices[piece.matrix].name]
                        block.inside.view(target).copy_(block.local.view(tensor))
    return {m.name: matrices[m.name].view(m.rows, m.cols) for m in routing.matrices}


def test_mambas_projection_is_taken_apart_over_tp():
    """Gate, hidden states, B, C and time steps, of which each of two ranks holds a part."""
    packed = {"in_proj.weight": (13, 6)}
    mark = {**COLUMN, "partition_sizes": [4, 4, 2, 2, 1]}
    model = stand_in(packed, SimpleNamespace(**CONFIG), weight=mark)
    _, routing = matrices_of(model, tp=2)
    assert [m.rows for m in routing.matrices] == [8, 8, 4, 4, 2]
    flat = torch.arange(26)[:, None].expand(26, 6).reshape(-1)
    assert routing.matrices[1].where.view(flat).reshape(8, 6)[:, 0].tolist() == [4, 5, 6, 7, 17, 18, 19, 20]
    assert not routing.notes
    _, routing = matrices_of(stand_in(packed, SimpleNamespace(**CONFIG), weight=COLUMN), tp=2)
    assert len(routing.matrices) == len(routing.notes) == 1


def test_mlas_projections_are_taken_apart():
    """Megatron #6326: multi-latent attention's fused projections as one matrix. Here: by head, and apart."""
    shapes = {
        "self_attention.linear_kv_down_proj.weight": (7, 6),  # replicated over TP
        "self_attention.linear_kv_up_proj.weight": (14, 5),
        "self_attention.linear_q_proj.weight": (12, 6),
    }
    model = stand_in(shapes, MLA)
    for name in ("linear_kv_up_proj", "linear_q_proj"):
        for key, value in COLUMN.items():
            setattr(getattr(model.self_attention, name).weight, key, value)
    # Transformer Engine marks what it repeats on every rank as cut; 0.16.1 leaves the mark there.
    model.self_attention.linear_kv_down_proj.parallel_mode = None
    for key, value in COLUMN.items():
        setattr(model.self_attention.linear_kv_down_proj.weight, key, value)
    found, routing = matrices_of(model, tp=2)
    whole = {p.name: torch.randn(p.partition.shape) for p in found}
    got = reassembled(found, routing, whole)
    down, up, q = (whole[name] for name in shapes)
    heads = up.view(4, 7, 5)
    expected = [down[:5], down[5:], heads[:, :4].reshape(16, 5), heads[:, 4:].reshape(12, 5)]
    expected += [q.view(4, 6, 6)[:, :4].reshape(16, 6), q.view(4, 6, 6)[:, 4:].reshape(8, 6)]
    assert [tuple(m.shape) for m in got.values()] == [tuple(m.shape) for m in expected]
    assert all(torch.equal(a, b) for a, b in zip(got.values(), expected))
    _, whole_ones = matrices_of(model, tp=2, split_qkv=False)
    assert len(whole_ones.matrices) == 3


def gate_up_down(whole: dict[str, Tensor]) -> list[Tensor]:
    return [half for fc1 in whole.values() for half in fc1.chunk(2)]


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "0.16.1 marks nothing"])
def test_te_grouped_experts(marked):
    """weight0 ... weightN in one TEGroupedMLP; partition_stride says 1, yet each rank holds gate, then up."""
    shapes = {f"mlp.experts.linear_fc1.weight{i}": (8, 6) for i in range(2)}
    shapes |= {f"mlp.experts.linear_fc2.weight{i}": (6, 4) for i in range(2)}
    model = stand_in(shapes, SimpleNamespace(**CONFIG))
    if marked:
        for name, p in model.named_parameters():
            for key, value in (COLUMN if "fc1" in name else ROW).items():
                setattr(p, key, value)
    found, routing = matrices_of(model, tp=1, expert_tp=2)
    whole = {p.name: torch.randn(p.partition.shape) for p in found}
    got = reassembled(found, routing, whole)
    expected = [half for name, w in whole.items() for half in (w.chunk(2) if "fc1" in name else [w])]
    assert [tuple(w.shape) for w in whole.values()] == [(16, 6)] * 2 + [(6, 8)] * 2
    assert all(torch.equal(a, b) for a, b in zip(got.values(), expected, strict=True))


def test_experts_whose_gate_and_up_take_turns():
    """0.19.2's moe_mlp_glu_interleave_size: blocks of gate, then of up, in turn, also within a TP rank's part."""
    shapes = {"mlp.experts.linear_fc1.weight0": (8, 6), "mlp.experts.linear_fc1.bias0": (8,)}
    shapes["mlp.shared_experts.linear_fc1.weight"] = (8, 6)
    model = stand_in(shapes, SimpleNamespace(**CONFIG, moe_mlp_glu_interleave_size=2))
    for key, value in COLUMN.items():
        setattr(model.mlp.shared_experts.linear_fc1.weight, key, value)
    found, routing = matrices_of(model, tp=2, expert_tp=2)
    whole = {p.name: torch.randn(p.partition.shape) for p in found}
    got = list(reassembled(found, routing, whole).values())
    expert, shared = whole["mlp.experts.linear_fc1.weight0"], whole["mlp.shared_experts.linear_fc1.weight"]
    blocks = expert.view(4, 2, 2, 6)
    assert torch.equal(got[0], blocks[:, 0].reshape(8, 6))
    assert torch.equal(got[1], blocks[:, 1].reshape(8, 6))
    assert all(torch.equal(a, b) for a, b in zip(got[2:], shared.chunk(2), strict=True))


def test_vectors_and_convolutions_are_whole_too():
    """What AdamW has is cut as well: the start-up table and the sizes that a user watches are of whole parameters."""
    shapes = {
        "mixer.conv1d.weight": (6, 1, 4),
        "mixer.A_log": (6,),
        "mlp.linear_fc1.bias": (8,),
        "mlp.linear_fc2.bias": (6,),
        "mlp.experts.linear_fc1.bias": (3, 8),
        "mlp.experts.linear_fc1.bias0": (8,),
        "mlp.experts.linear_fc2.bias": (3, 6),
        "mlp.experts.linear_fc2.bias0": (6,),
    }
    model = stand_in(shapes, SimpleNamespace(**CONFIG))
    for p in (model.mixer.conv1d.weight, model.mixer.A_log, model.mlp.linear_fc1.bias):
        for key, value in COLUMN.items():
            setattr(p, key, value)
    found, _ = matrices_of(model, tp=2, expert_tp=4)
    assert {p.name: p.partition.shape for p in found} == {
        "mixer.conv1d.weight": (12, 1, 4),
        "mixer.A_log": (12,),
        "mlp.linear_fc1.bias": (16,),
        "mlp.linear_fc2.bias": (6,),
        "mlp.experts.linear_fc1.bias": (3, 32),
        "mlp.experts.linear_fc1.bias0": (32,),
        "mlp.experts.linear_fc2.bias": (3, 6),
        "mlp.experts.linear_fc2.bias0": (6,),
    }
    bias = next(p.partition for p in found if p.name == "mlp.linear_fc1.bias")
    assert [[block.inside.start for block in blocks] for blocks in bias.ranks] == [[0, 8], [4, 12]], "gate, then up"


def test_a_single_grouped_weight():
    """0.19.2 may hold all experts of a layer in one (experts, out, in) parameter."""
    model = stand_in(
        {"mlp.experts.linear_fc1.weight": (3, 8, 6), "mlp.experts.linear_fc2.weight": (3, 6, 4)},
        SimpleNamespace(**CONFIG),
    )
    found, routing = matrices_of(model, expert_tp=2)
    whole = {p.name: torch.randn(p.partition.shape) for p in found}
    got = reassembled(found, routing, whole)
    fc1, fc2 = whole.values()
    expected = [half for expert in fc1 for half in expert.chunk(2)] + list(fc2)
    assert all(torch.equal(a, b) for a, b in zip(got.values(), expected, strict=True))


def test_legacy_grouped_experts():
    """0.16.1's weight1 and weight2: (hidden, experts x outputs), read as (experts, hidden, outputs)."""
    model = nn.Module()
    model.config = SimpleNamespace(**CONFIG)
    model.experts = nn.Module()
    model.experts.num_local_experts = 3
    model.experts.weight1 = nn.Parameter(torch.randn(6, 3 * 8))
    model.experts.weight2 = nn.Parameter(torch.randn(3 * 4, 6))
    found, routing = matrices_of(model, expert_tp=2)
    whole = {p.name: torch.randn(p.partition.shape) for p in found}
    got = reassembled(found, routing, whole)
    first, second = whole.values()
    assert (tuple(first.shape), tuple(second.shape)) == ((3, 6, 16), (3, 8, 6))
    expected = [half for expert in first for half in expert.chunk(2, dim=1)] + list(second)
    assert all(torch.equal(a, b) for a, b in zip(got.values(), expected, strict=True))
    assert [m.out_in for m in routing.matrices[:1] + routing.matrices[-1:]] == [(8, 6), (6, 8)]


def test_what_is_no_matrix():
    model = stand_in(
        {
            "embedding.word_embeddings.weight": (8, 6),
            "decoder.router.weight": (4, 6),
            "decoder.shared_experts.gate_weight": (1, 6),
            "decoder.conv1d.weight": (6, 1, 4),
            "decoder.experts.linear_fc1.bias": (4, 6),
            "decoder.norm.weight": (6,),
            "output_layer.weight": (8, 6),
        },
        SimpleNamespace(**CONFIG),
    )
    model.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
    _, routing = matrices_of(model)
    assert [m.name for m in routing.matrices] == ["decoder.router.weight"]
    assert len(routing.adamw) == 6


def test_a_fused_layer_that_is_not_as_the_config_says_is_told():
    config = SimpleNamespace(**CONFIG, num_attention_heads=4, num_query_groups=2, kv_channels=3)
    model = stand_in({"self_attention.linear_qkv.weight": (25, 6)}, config)
    with pytest.raises(ValueError, match=r"25 outputs, but the model's config says 2 x \[6, 3, 3\].*muon-no-split"):
        matrices_of(model)
    assert len(matrices_of(model, split_qkv=False)[1].matrices) == 1
