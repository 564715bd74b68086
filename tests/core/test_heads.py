"""Per-head Muon: which rows of which parameter are which head, and what is left whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import muon_plugin
from muon_plugin.core.exchange import ended
from muon_plugin.core.heads import GATE, KEY, QUERY, VALUE, Heads, Part, known_heads
from muon_plugin.core.layout import Shard, pieces
from muon_plugin.core.places import places
from muon_plugin.core.routing import Routing, route, stored_as
from tests.support.layers import block, outputs_of
from tests.support.model_sweep import build

pytestmark = pytest.mark.fast


def routed(model: nn.Module, **options: Any) -> Routing:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return route(shapes, model=model, per_head=True, **options)


def rows_of(model: nn.Module, **options: Any) -> list[list[int]]:
    """For each matrix of a model with one Linear, the outputs that it holds."""
    (found,) = outputs_of(routed(model, **options).matrices, model).values()
    return found


def consecutive(*widths: int) -> list[list[int]]:
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return [list(range(end - width, end)) for end, width in zip(ends, widths)]


GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}
LATENT = {"num_heads": 3, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4}
FALCON = {"new_decoder_architecture": True, "num_heads": 4, "num_kv_heads": 2, "head_dim": 2, "multi_query": False}
MULTI_QUERY = {"is_cross_attention": False, "multi_query": True, "num_heads": 4, "head_dim": 2,
               "embed_dim": 8, "kv_dim": 2}  # fmt: skip
#: class, attribute, what the module says, what the config says -> roles and widths of the heads in their order.
KNOWN = {
    "q": (("LlamaAttention", "q_proj", {"head_dim": 2}, GROUPED), [(QUERY, 2)] * 4),
    "k": (("LlamaAttention", "k_proj", {"head_dim": 2}, GROUPED), [(KEY, 2)] * 2),
    "v": (("LlamaAttention", "v_proj", {"head_dim": 2}, GROUPED), [(VALUE, 2)] * 2),
    "hidden size over heads": (("OtherAttention", "q_proj", {}, GROUPED), [(QUERY, 2)] * 4),
    "key-value groups": (
        ("SomeAttention", "k_proj", {"head_dim": 3, "num_heads": 6, "num_key_value_groups": 3}, None), [(KEY, 3)] * 2),
    "values of another width": (
        ("SomeAttention", "v_proj", {"head_dim": 3, "v_head_dim": 2, "num_heads": 4}, None), [(VALUE, 2)] * 4),
    "fewer keys by the config alone": (
        ("SomeAttention", "k_proj", {"num_heads": 8}, {"num_attention_heads": 8, "num_key_value_heads": 2,
         "hidden_size": 64}), [(KEY, 8)] * 2),
    "a module of one's own": (("SelfAttention", "query", {"n_head": 4}, None), [(QUERY, 3)] * 4),
    "thirds": (("Attention", "qkv", {"num_heads": 4}, None), [(QUERY, 2)] * 4 + [(KEY, 2)] * 4 + [(VALUE, 2)] * 4),
    "a part for each": (
        ("Phi3Attention", "qkv_proj", {"head_dim": 2, "num_key_value_heads": 2}, GROUPED),
        [(QUERY, 2)] * 4 + [(KEY, 2)] * 2 + [(VALUE, 2)] * 2),
    "by head": (("GPTNeoXAttention", "query_key_value", {"head_size": 2}, {**GROUPED, "num_key_value_heads": 4,
        "model_type": "gpt_neox"}), [(QUERY, 2), (KEY, 2), (VALUE, 2)] * 4),
    "by query group": (
        ("FalconAttention", "query_key_value", FALCON, None), [(QUERY, 2), (QUERY, 2), (KEY, 2), (VALUE, 2)] * 2),
    "multi-query": (("GPTBigCodeAttention", "c_attn", MULTI_QUERY, None), [(QUERY, 2)] * 4 + [(KEY, 2), (VALUE, 2)]),
    "four times query, value, key": (
        ("CodeGenAttention", "qkv_proj", {"num_attention_heads": 8, "head_dim": 2}, None),
        ([(QUERY, 2)] * 2 + [(VALUE, 2)] * 2 + [(KEY, 2)] * 2) * 4),
    "query and gate": (
        ("Qwen3NextAttention", "q_proj", {"head_dim": 2, "o_proj": SimpleNamespace(in_features=8)}, GROUPED),
        [(QUERY, 2), (GATE, 2)] * 4),
    "latent query": (("AnyAttention", "q_b_proj", LATENT, None), [(QUERY, 5)] * 3),
    "latent query without a low rank": (("AnyAttention", "q_proj", LATENT, None), [(QUERY, 5)] * 3),
    "latent key and value": (("AnyAttention", "kv_b_proj", LATENT, None), [(KEY, 3), (VALUE, 4)] * 3),
    "Kimi's delta attention": (("KimiDeltaAttention", "q_proj", {"num_heads": 4, "head_dim": 3}, {
        **GROUPED, "head_dim": 6, "num_attention_heads": 2}), [(QUERY, 3)] * 4),
}  # fmt: skip


@pytest.mark.parametrize("case", KNOWN)
def test_each_head_is_a_matrix(case):
    (kind, attribute, sizes, config), expected = KNOWN[case]
    model = block(kind, attribute, sum(width for _, width in expected), config, **sizes)
    name = f"block.{attribute}.weight"
    assert rows_of(model) == consecutive(*(width for _, width in expected))
    heads = routed(model).by_head[name]
    assert [(head.role, head.width) for head in heads] == expected
    assert [head.start for head in heads] == [rows[0] for rows in rows_of(model)]
    for role in {role for role, _ in expected}:
        numbers = [head.number for head in heads if head.role == role]
        assert numbers == list(range(len(numbers)))
    assert heads.softmax is ("Delta" not in kind)


def test_a_rotary_part_is_of_its_head():
    model = block("AnyAttention", "q_b_proj", 15, None, **LATENT)
    heads = routed(model).by_head["block.q_b_proj.weight"]
    assert [head.rotary for head in heads] == [2] * 3
    assert heads.by_role.sizes == (3, 2)  # W_UQ and W_QR, as without heads
    assert heads.by_role.groups == 3


def test_stored_in_out():
    """GPT-2's Conv1D: heads are columns."""
    import transformers

    config = transformers.GPT2Config(n_embd=12, n_layer=1, n_head=3, vocab_size=9, n_positions=4)
    model = transformers.GPT2LMHeadModel(config)
    routing = routed(model)
    mine = [m for m in routing.matrices if m.parameter == "transformer.h.0.attn.c_attn.weight"]
    assert [m.out_in for m in mine] == [(4, 12)] * 9
    weight = model.transformer.h[0].attn.c_attn.weight.detach()
    assert torch.equal(mine[4].where.view(weight.view(-1)), weight[:, 16:20])
    held = pieces(
        routing.matrices, [Shard.of_range(mine[0].parameter, 5, 200, flat := torch.zeros(200))], {id(flat): 0}
    )
    assert sum(part.numel for piece in held for part in piece.inside) == 200


def test_torchs_own_attention():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=6, vdim=5))
    found = [(m.name, m.rows, m.cols) for m in routed(model).matrices if "out_proj" not in m.name]
    assert found[:6] == [(f"0.in_proj_weight[{i}]", 4, 8) for i in range(6)]
    assert [(rows, cols) for _, rows, cols in found[6:]] == [(4, 8)] * 2 + [(4, 6)] * 2 + [(4, 5)] * 2


@pytest.mark.parametrize(
    ("kind", "attribute", "sizes", "why"),
    [
        ("Qwen3NextGatedDeltaNet", "in_proj_qkvz", {}, "linear attention"),
        ("MiniMaxLightningAttention", "qkv_proj", {"num_attention_heads": 4, "head_dim": 2}, "linear attention"),
        ("BailingHybridDeltaAttention", "q_proj", {"num_heads": 4, "head_dim": 6}, "linear attention"),
        ("Mamba2Mixer", "in_proj", {}, "state space"),
        ("DeepseekV32Indexer", "wq_b", {"n_heads": 4, "head_dim": 6}, "indexer"),
        ("AnyAttention", "kv_b_proj", {**LATENT, "num_heads": 5, "v_head_dim": 5}, "neither its module nor the config"),
        ("LlamaAttention", "q_proj", {"head_dim": 7}, "neither its module nor the config"),
        ("LlamaAttention", "q_proj", {"head_dim": 6, "num_heads": 2, "num_attention_heads": 3}, "neither"),
        ("SelfAttention", "query", {"n_head": 24, "head_dim": 1}, "a vector"),
    ],
)
def test_other_geometry_is_left_alone_and_named(kind, attribute, sizes, why):
    model = block(kind, attribute, 24, {"num_attention_heads": 5, "hidden_size": 8}, **sizes)
    model.other = type("LlamaAttention", (nn.Module,), {})()
    model.other.q_proj, model.other.num_heads, model.other.head_dim = nn.Linear(8, 6, bias=False), 3, 2
    routing, plain = routed(model), route({n: tuple(p.shape) for n, p in model.named_parameters()}, model=model)
    name = f"block.{attribute}.weight"
    assert list(routing.by_head) == ["other.q_proj.weight"]
    assert [m for m in routing.matrices if m.parameter == name] == [m for m in plain.matrices if m.parameter == name]
    assert why in next(note for note in routing.notes if note.startswith(f"{name} is not cut by head"))


def test_what_is_no_projection_to_heads_is_as_it_was():
    model = build("LlamaForCausalLM")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    apart = {f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"}
    found, plain = routed(model), route(shapes, model=model)
    mine = [m for m in found.matrices if ".layers.0." in m.name and m.parameter not in apart]
    assert mine == [m for m in plain.matrices if ".layers.0." in m.name and m.parameter not in apart]
    assert any("o_proj" in m.name for m in mine)


def test_a_split_of_the_users_goes_first():
    model = block("LlamaAttention", "q_proj", 8, GROUPED, head_dim=2)
    assert rows_of(model, split={"*q_proj*": "whole"}) == consecutive(8)
    assert rows_of(model, split={"*q_proj*": [6, 2]}) == consecutive(6, 2)


def test_the_output_projection_by_head_where_it_is_asked():
    model = block("LlamaAttention", "o_proj", 6, GROUPED, head_dim=2)
    assert rows_of(model, split={}) == consecutive(6)
    asked = {"o_proj": {"sizes": 4, "along": "inputs"}}
    found = route({"block.o_proj.weight": (6, 8)}, model=model, split=asked).matrices
    weight = torch.arange(48).view(6, 8)
    assert [m.out_in for m in found] == [(6, 2)] * 4
    assert all(torch.equal(m.where.view(weight.view(-1)), weight[:, 2 * i : 2 * i + 2]) for i, m in enumerate(found))
    for wrong in ({"sizes": 3, "along": "inputs"}, {"sizes": [4, 3], "along": "inputs"}, {"sizes": 4, "along": "rows"}):
        with pytest.raises(ValueError, match="split"):
            route({"block.o_proj.weight": (6, 8)}, model=model, split={"o_proj": wrong})


def test_heads_that_differ_by_layer():
    """Gemma 4: other widths, and numbers of key and value heads, in its global layers."""
    model = build("Gemma4ForCausalLM")
    routing = routed(model)
    widths = {part.width for name, heads in routing.by_head.items() if "q_proj" in name for part in heads.parts}
    assert len(widths) > 1
    assert not routing.not_by_head


def test_tensor_parallelism_may_have_divided_the_modules_numbers():
    """DeepSpeed's AutoTP writes a rank's numbers into the modules; what they say is of no whole parameter then."""
    model = block("SomeAttention", "q_proj", 6, None, head_dim=3, num_heads=2)
    place = places(model, ["block.q_proj.weight"])["block.q_proj.weight"]
    assert known_heads(place, stored_as(place, (12, 8)), tp=2) == Heads((Part(QUERY, 3, 4),))
    del model.block.head_dim
    assert isinstance(known_heads(place, stored_as(place, (12, 8)), tp=2), str)  # 4 heads of 3 or 2 of 6


def test_adapters_and_frozen_parameters_are_left_alone():
    class Adapter(nn.Module):
        adapter_layer_names = ("lora_A", "lora_B")

        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base
            self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})

    model = block("LlamaAttention", "q_proj", 8, GROUPED, head_dim=2)
    model.block.v_proj = nn.Linear(8, 4, bias=False)
    model.block.q_proj = Adapter(model.block.q_proj)
    found = {m.name: (m.rows, m.cols) for m in routed(model).matrices if "lora" in m.name}
    assert found == {"block.q_proj.lora_A.default.weight": (2, 8), "block.q_proj.lora_B.default.weight": (8, 2)}
    model.block.q_proj.base_layer.requires_grad_(False)
    frozen = model.block.v_proj.requires_grad_(False).weight.clone()
    optimizer = muon_plugin.Muon(model.named_parameters(), model=model, per_head_muon=True)
    assert "per_head_muon changes nothing here" in optimizer.summary()
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    assert torch.equal(model.block.v_proj.weight, frozen)


def test_nothing_that_can_be_told_to_be_a_head_is_an_error():
    model = block("LlamaAttention", "q_proj", 9, GROUPED, head_dim=2)
    with pytest.raises(ValueError, match=r"per_head_muon=True.*block.q_proj.weight: neither its module") as error:
        muon_plugin.Muon(model.named_parameters(), model=model, per_head_muon=True)
    assert "`split` with the number of heads" in str(error.value)
    model = block("LlamaAttention", "q_proj", 8, GROUPED, head_dim=2)
    with pytest.raises(ValueError, match=r"model=\.\.\."):
        muon_plugin.Muon(model.named_parameters(), per_head_muon=True)
    with pytest.raises(ValueError, match="none of them looks like a projection"):
        muon_plugin.Muon(nn.Linear(3, 4).named_parameters(), model=nn.Linear(3, 4), per_head_muon=True)
    with pytest.raises(ValueError, match=r"per_head_muon='yes'.*true or false"):
        muon_plugin.Muon(model.named_parameters(), model=model, per_head_muon="yes")


def test_the_table_says_how_many_heads_of_what_shape():
    model = block("AnyAttention", "kv_b_proj", 21, None, **LATENT)
    model.other = type("LlamaAttention", (nn.Module,), {})()
    model.other.qkv, model.other.num_heads = nn.Linear(8, 24, bias=False), 4
    table = muon_plugin.Muon(model.named_parameters(), model=model, per_head_muon=True).summary()
    assert "block.kv_b_proj.weight  21x8, 3 key heads of 3x8, 3 value heads of 4x8" in table
    assert "other.qkv.weight  24x8, 4 query, 4 key and 4 value heads of 2x8" in table
    assert "attention head by head" in table


def test_the_scale_is_that_of_a_heads_own_shape():
    model = block("LlamaAttention", "q_proj", 12, None, head_dim=3, num_heads=4)
    weight = model.block.q_proj.weight
    before = weight.detach().clone()
    settings = {"lr": 0.5, "weight_decay": 0.0, "momentum": 0.0}
    weight.grad = torch.randn(12, 8)
    muon_plugin.Muon(model.named_parameters(), model=model, per_head_muon=True, **settings).step()
    for start in range(0, 12, 3):
        head = nn.Module()
        head.linear = nn.Linear(8, 3, bias=False)
        head.linear.weight = nn.Parameter(before[start : start + 3].clone())
        head.linear.weight.grad = weight.grad[start : start + 3].clone()
        muon_plugin.Muon(head.named_parameters(), model=head, **settings).step()
        assert torch.equal(head.linear.weight, weight[start : start + 3])


def test_many_heads_are_few_kernels():
    """The heads of a parameter are read and applied at once: only the products' batches and the norms know of them."""

    def operations(per_head: bool, heads: int) -> int:
        model = nn.Module()
        model.block = type("SomeAttention", (nn.Module,), {})()
        model.block.num_heads, model.block.head_dim = heads, 4
        model.block.qkv = nn.Linear(heads * 4, 3 * heads * 4, bias=False)
        optimizer = muon_plugin.Muon(model.named_parameters(), model=model, per_head_muon=per_head)
        model.block.qkv.weight.grad = torch.randn(3 * heads * 4, heads * 4)
        (update,) = optimizer.halves.muon.updates
        counts = {"read": 0, "write": 0}

        def read(runs: Any, *_: Any) -> None:
            counts["read"] += len(runs)

        def write(runs: Any, *_: Any) -> None:
            counts["write"] += len(runs)

        ended(update._exchange.run(read, write))
        assert len(update.matrices) == (3 * heads if per_head else 3)
        return counts["read"] + counts["write"]

    assert operations(True, 8) == operations(True, 16) == 2
    assert operations(False, 16) == 2  # query, key and value have one shape
