"""Which parameters are matrices, and which matrices fused parameters hold."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from muon_plugin.core.layout import Shard, Strided, pieces
from muon_plugin.core.routing import route
from tests.support.parallel_models import Last, NamedLikeHeads

pytestmark = pytest.mark.fast


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def cut(model_or_shapes, **options) -> dict[str, torch.Tensor]:
    """Every matrix of a parameter filled with its own positions: name -> (rows, cols) of positions."""
    model = model_or_shapes if isinstance(model_or_shapes, nn.Module) else None
    known = shapes(model) if model else model_or_shapes
    routing = route(known, model=model, **options)
    found = {}
    for matrix in routing.matrices:
        flat = torch.arange(torch.Size(known[matrix.parameter]).numel())
        found[matrix.name] = matrix.where.view(flat).reshape(matrix.rows, matrix.cols)
    return found


def positions(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("transformer.wpe.weight", "embedding"),
        ("lm_head.weight", "output head"),
        ("output.weight", "output head"),
        ("embed_out.weight", "output head"),
    ],
)
def test_embeddings_and_heads_go_to_adamw(name, why):
    assert route({name: (64, 32), "layers.0.w.weight": (8, 8)}).adamw == {name: why}


def test_an_output_projection_inside_a_block_is_a_matrix():
    assert not route({"layer.0.attention.output.weight": (8, 8)}).adamw


def test_modules_tell_what_names_do_not():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.conv = nn.Conv1d(6, 8, 3)
            self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
            self.grouped = nn.Conv2d(4, 6, 3, groups=2)
            self.value = nn.Linear(8, 1)

    routing = route(shapes(Odd()), model=Odd())
    assert routing.adamw["table.weight"] == "embedding"
    assert routing.adamw["depthwise.weight"] == routing.adamw["value.weight"] == "a vector"
    assert [(m.name, m.rows, m.cols) for m in routing.matrices] == [
        ("conv.weight", 8, 18),
        ("grouped.weight[0]", 3, 18),
        ("grouped.weight[1]", 3, 18),
    ]


def test_experts_are_a_batch():
    found = cut({"experts.w1": (3, 4, 5)})
    assert [torch.equal(found[f"experts.w1[{i}]"], positions(3, 4, 5)[i]) for i in range(3)] == [True] * 3


def test_qkv_with_fewer_key_value_heads_needs_the_config():
    model = nn.Module()
    model.qkv_proj = nn.Linear(16, (4 + 2 + 2) * 4, bias=False)
    model.config = SimpleNamespace(model_type="phi3", num_attention_heads=4, num_key_value_heads=2)
    found = cut(model)
    assert [m.shape for m in found.values()] == [(16, 16), (8, 16), (8, 16)]
    assert torch.equal(found["qkv_proj.weight[1]"], positions(32, 16)[16:24])
    del model.config
    routing = route(shapes(model), model=model)
    assert len(routing.matrices) == 1
    assert "qkv_proj" in routing.notes[0]


def test_gpt2_stores_in_out():
    import transformers

    config = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    found = cut(model)
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(found[f"{name}[2]"], positions(8, 24)[:, 16:])
    matrix = next(m for m in route(shapes(model), model=model).matrices if m.parameter.endswith("mlp.c_fc.weight"))
    assert matrix.out_in == (32, 8)


def test_query_key_value_by_head():
    model = nn.Module()
    model.query_key_value = nn.Linear(8, 24, bias=False)
    model.config = SimpleNamespace(model_type="bloom", num_attention_heads=2)
    found = cut(model)
    rows = positions(24, 8)
    assert torch.equal(found["query_key_value.weight[1]"], torch.cat([rows[4:8], rows[16:20]]))


def test_llama_moe_and_phi3_of_transformers():
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    phi = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, **heads))
    assert {k: tuple(v.shape) for k, v in cut(phi).items() if "layers.0" in k} == {
        "model.layers.0.self_attn.o_proj.weight": (16, 16),
        "model.layers.0.self_attn.qkv_proj.weight[0]": (16, 16),
        "model.layers.0.self_attn.qkv_proj.weight[1]": (8, 16),
        "model.layers.0.self_attn.qkv_proj.weight[2]": (8, 16),
        "model.layers.0.mlp.gate_up_proj.weight[0]": (24, 16),
        "model.layers.0.mlp.gate_up_proj.weight[1]": (24, 16),
        "model.layers.0.mlp.down_proj.weight": (16, 24),
    }
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, num_local_experts=2))
    experts = {tuple(v.shape) for k, v in cut(mixtral).items() if "experts" in k}
    assert experts <= {(24, 16), (16, 24)}
    assert sum("experts" in k for k in cut(mixtral)) == 2 * 3


@pytest.mark.parametrize(
    ("value", "rows"),
    [
        ([2, 6, 4], [range(2), range(2, 8), range(8, 12)]),
        (3, [range(4), range(4, 8), range(8, 12)]),
        ({"sizes": [1, 2], "groups": 4}, [[0, 3, 6, 9], [1, 2, 4, 5, 7, 8, 10, 11]]),
        ("whole", [range(12)]),
    ],
)
@pytest.mark.parametrize("stored", ["out, in", "in, out"])
def test_a_split_that_the_user_asks_for(value, rows, stored):
    model = nn.Module()
    if stored == "out, in":
        model.mix = nn.Linear(5, 12, bias=False)
    else:
        model.mix = type("Conv1D", (nn.Module,), {})()
        model.mix.weight = nn.Parameter(torch.randn(5, 12))
    found = list(cut(model, split={"mix": value}).values())
    full = positions(12, 5) if stored == "out, in" else positions(5, 12)
    for part, r in zip(found, (list(r) for r in rows), strict=True):
        assert torch.equal(part, full[r] if stored == "out, in" else full[:, r])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"split": {"mix": [1, 2]}}, "add up to 3, not to its 12 outputs"),
        ({"split": {"mix": 5}}, "12 outputs cannot be cut in 5 equal parts"),
        ({"split": {"mix": "heads"}}, "is not a split"),
        ({"split": {"mix": {"size": [12]}}}, "the keys are"),
        ({"split": {"mix": [12, 0]}}, "is not a split"),
        ({"split": {"mix": [11, 1]}}, "a part of one row is not a matrix"),
        ({"split": {"mix": 2, "mi": 3}}, "'mi'.=3 cuts nothing"),
        ({"split": {"lm_head": 2}}, "'lm_head'.=2 cuts nothing"),
        ({"split": {"nothing": 2}}, "split pattern 'nothing' matches no trainable parameter"),
        ({"exclude": ["*.nothing"]}, "exclude pattern"),
    ],
)
def test_what_cannot_be_split_as_asked_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        route({"mix.weight": (12, 5), "lm_head.weight": (8, 4)}, **options)


def test_exclude():
    routing = route({"a.router.weight": (8, 4), "a.w.weight": (8, 4)}, exclude=["*.router.*"])
    assert routing.adamw == {"a.router.weight": "excluded"}


@pytest.mark.parametrize("where", [Strided(3, 20), Strided(2, 3, 7, 5), Strided(0, 1, 2, 9)])
def test_a_range_cut_anywhere_keeps_every_element_once_and_in_order(where):
    size = where.start + where.stride * where.count + where.run + 5
    flat = torch.arange(size)
    elements = where.view(flat).reshape(-1)
    for first in range(size + 1):
        assert where.before(first) == (elements < first).sum()
        for last in range(first, size + 1, 3):
            a, b = where.before(first), where.before(last)
            parts = [part.view(flat).reshape(-1) for part in where.cut(a, b)]
            assert len(parts) <= 3
            found = torch.cat(parts) if parts else flat[:0]
            assert torch.equal(found, elements[(elements >= first) & (elements < last)])


def test_pieces_of_a_strided_matrix_in_a_shard():
    routing = route({"qkv.weight": (12, 4)}, split={"qkv": {"sizes": [2, 2], "groups": 3}})
    tensor = torch.arange(100.0)
    shard = Shard.of_range("qkv.weight", 5, 30, tensor, 40)
    parameter = torch.arange(48.0)
    tensor[40:70] = parameter[5:35]
    for piece in pieces(routing.matrices, [shard], {id(tensor): 0}):
        whole = routing.matrices[piece.matrix].where.view(parameter).reshape(-1)
        for block in piece.blocks:
            assert torch.equal(block.local.view(tensor).reshape(-1), block.inside.view(whole).reshape(-1))


def test_a_vision_tower_has_its_own_heads():
    """The text model's head counts once cut the vision tower's qkv in 2880, 480 and 480 rows."""
    model = nn.Module()
    model.config = SimpleNamespace(model_type="qwen2_vl", num_attention_heads=12, num_key_value_heads=2)
    model.visual = nn.Module()
    model.visual.qkv = nn.Linear(1280, 3840)
    assert [tuple(v.shape) for v in cut(model).values()] == [(1280, 1280)] * 3


def test_a_known_name_in_a_model_whose_layout_was_not_read_is_kept_whole_and_noted():
    model = nn.Module()
    model.config = SimpleNamespace(model_type="codegen", num_attention_heads=4)
    model.qkv_proj = nn.Linear(16, 48, bias=False)
    routing = route(shapes(model), model=model)
    assert [(m.rows, m.cols) for m in routing.matrices] == [(48, 16)]
    assert "kept whole" in routing.notes[0]


def test_experts_stored_in_out_are_cut_along_the_outputs():
    model = nn.Module()
    model.config = SimpleNamespace(model_type="llama4_text", hidden_size=6)
    model.experts = nn.Module()
    model.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 6, 8))
    found = cut(model)
    assert torch.equal(found["experts.gate_up_proj[1,0]"], positions(2, 6, 8)[1, :, :4])
    model.config = SimpleNamespace(model_type="gpt_oss", hidden_size=6)
    assert torch.equal(cut(model)["experts.gate_up_proj[0,1]"], positions(2, 6, 8)[0, :, 1::2])
    model.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 6, 6))  # rows or columns? not cut, and said
    routing = route(shapes(model), model=model)
    assert len(routing.matrices) == 2
    assert "kept whole" in routing.notes[0]


@pytest.mark.parametrize(
    "name",
    ["x.gate_up_proj_bias", "x.relative_position_bias_table", "x.A_log", "x.query_tokens", "x.rel_pos_h"],
)
def test_tables_and_biases_of_two_dimensions_go_to_adamw(name):
    assert route({name: (8, 4)}).adamw == {name: "a table or a bias"}


@pytest.mark.parametrize("name", ["head.fc.weight", "classifier.1.weight", "fc.weight", "lm_head.decoder.weight"])
def test_output_heads_by_name(name):
    assert route({name: (8, 4)}).adamw == {name: "output head"}


def test_a_hugging_face_model_says_what_its_head_is():
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    assert route(shapes(model), model=model).adamw["cls.predictions.decoder.weight"] == "output head"
    wrapped = nn.ModuleDict({"of": nn.ModuleDict({"model": model})})  # as Lightning does, or a module with the loss
    ways = route(shapes(wrapped), model=wrapped).adamw
    assert ways["of.model.cls.predictions.decoder.weight"] == "output head"
    assert ways == {f"of.model.{name}": why for name, why in route(shapes(model), model=model).adamw.items()}


def test_three_dimensions_that_are_no_experts_go_to_adamw():
    assert "neither a kernel nor experts" in route({"rel_attn.q": (8, 4, 4)}).adamw["rel_attn.q"]


def test_a_model_of_other_names_is_refused():
    with pytest.raises(ValueError, match=r"model has no parameter a\.weight"):
        route({"a.weight": (8, 4)}, model=nn.ModuleDict({"b": nn.Linear(4, 8)}))


@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_weight_is_an_embedding_by_any_of_its_names(head_first):
    """`named_parameters()` gives one name, the first registered, which may say nothing of the table."""
    table, decoder = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
    decoder.weight = table.weight
    parts = {"tok": table, "decoder": decoder, "up": nn.Linear(16, 24)}
    model = nn.ModuleDict(dict(reversed(parts.items())) if head_first else parts)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    routing = route(shapes, model=model)
    assert {m.parameter for m in routing.matrices} == {"up.weight"}
    assert routing.adamw["decoder.weight" if head_first else "tok.weight"] == "embedding"
    for pattern in ("tok", "decoder"):  # both names may be excluded by
        assert route(shapes, model=model, exclude=[pattern]).adamw.keys() == routing.adamw.keys()


def test_heads_are_known_where_names_begin_with_the_number_of_a_layer():
    """nn.Sequential, DeepSpeed's pipelines: the last layers, of classes that occur once, are no blocks."""
    model = nn.Sequential(nn.Embedding(40, 8), NamedLikeHeads(), NamedLikeHeads(), Last())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    blocks = {f"{i}.{name}.weight" for i in (1, 2) for name in ("fc", "output")}
    routing = route(shapes, model=model)
    assert {m.parameter for m in routing.matrices} == blocks
    assert routing.adamw["3.head.weight"] == "output head"
    # The same under a prefix.
    wrapped = nn.ModuleDict({"net": model})
    routing = route({f"net.{name}": shape for name, shape in shapes.items()}, model=wrapped)
    assert {m.parameter for m in routing.matrices} == {f"net.{name}" for name in blocks}
    assert routing.adamw["net.3.head.weight"] == "output head"
    # A stage holds one block, and knows from the pipeline that there are others.
    stage = nn.ModuleDict({"2": model[2], "3": model[3]})
    shapes = {name: tuple(p.shape) for name, p in stage.named_parameters()}
    layers = {"0": nn.Embedding, "1": NamedLikeHeads, "2": NamedLikeHeads, "3": Last}
    routing = route(shapes, model=stage, layers=layers)
    assert {m.parameter for m in routing.matrices} == {"2.fc.weight", "2.output.weight"}
