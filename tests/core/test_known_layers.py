"""Fused projections, experts, heads and adapters: known by the class and the attribute that hold them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from muon_plugin.core.modelling_code import split_in
from muon_plugin.core.routing import ADAPTER_RATE, route
from tests.support.layers import block, outputs_of
from tests.support.model_sweep import COMMON, build

pytestmark = pytest.mark.fast


def rows_of(model: nn.Module, name: str) -> list[list[int]]:
    """For each matrix of a Linear's weight, the outputs that it holds."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    matrices = route(shapes, model=model).matrices
    return outputs_of([m for m in matrices if m.parameter == name], model).get(name, [])


@pytest.mark.parametrize(
    ("kind", "attribute", "sizes", "parts"),
    [
        # DeepSeek's W_DKV and W_KR; W_UK and W_UV, and W_UQ and W_QR, head by head.
        ("Any", "kv_a_proj_with_mqa", {"qk_rope_head_dim": 2}, [range(6), range(6, 8)]),
        ("Any", "kv_b_proj", {"qk_nope_head_dim": 3, "v_head_dim": 2}, [[0, 1, 2, 5, 6, 7], [3, 4, 8, 9]]),
        ("Any", "q_b_proj", {"qk_nope_head_dim": 3, "qk_rope_head_dim": 2}, [[0, 1, 2, 5, 6, 7], [3, 4, 8, 9]]),
        ("Any", "q_proj", {"qk_nope_head_dim": 2, "qk_rope_head_dim": 2}, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("Any", "q_proj", {}, [range(8)]),
        # Gate, hidden states, B, C and time steps.
        (
            "Mamba2Mixer",
            "in_proj",
            {"intermediate_size": 4, "conv_dim": 8, "n_groups": 1, "ssm_state_size": 2, "num_heads": 2},
            [range(4), range(4, 8), range(8, 10), range(10, 12), range(12, 14)],
        ),
        ("MambaMixer", "in_proj", {"intermediate_size": 4}, [range(4), range(4, 8)]),
        ("ZambaMambaMixer", "in_proj", {"intermediate_size": 4}, [range(0, 8, 2), range(1, 8, 2)]),
        ("Lfm2ShortConv", "in_proj", {}, [range(2), range(2, 4), range(4, 6)]),
        (
            "Qwen3NextGatedDeltaNet",
            "in_proj_qkvz",
            {"num_k_heads": 2, "num_v_heads": 2, "head_k_dim": 1, "head_v_dim": 2},
            [[0, 6], [1, 7], [2, 3, 8, 9], [4, 5, 10, 11]],
        ),
        ("ModernBertMLP", "Wi", {}, [range(3), range(3, 6)]),
        ("CodeGenAttention", "qkv_proj", {}, [[*range(0, 24, 6), *range(1, 24, 6)]]),
    ],
)
def test_a_fused_projection_is_cut_as_its_code_splits_it(kind, attribute, sizes, parts):
    outputs = sum(len(part) for part in parts) * (3 if kind == "CodeGenAttention" else 1)
    found = rows_of(block(kind, attribute, outputs, **sizes), f"block.{attribute}.weight")
    if kind == "CodeGenAttention":
        assert sorted(found[0]) == sorted(parts[0])
        assert len(found) == 3
    else:
        assert found == [list(part) for part in parts]


def test_the_projection_of_a_prefix_is_cut_into_key_and_value_of_each_layer():
    """PEFT's PrefixEncoder: a Sequential, whose layers are known by the module around it."""
    model = block("PrefixEncoder", "unused", 1)
    model.block.embedding = nn.Embedding(4, 3)
    model.block.transform = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2 * 2 * 3))
    expected = [[*range(at, at + 3)] for at in (0, 3, 6, 9)]
    assert rows_of(model, "block.transform.2.weight") == expected
    assert rows_of(model, "block.transform.0.weight") == [[*range(5)]]


def test_the_same_name_in_an_unknown_class_is_whole_and_named_once():
    model = nn.Module()
    model.layers = nn.ModuleList(block("Unheard", "in_proj_qkvz", 12) for _ in range(3))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    routing = route(shapes, model=model)
    assert len(routing.matrices) == 3
    assert [note.split(", because")[0] for note in routing.notes] == [
        "layers.*.block.in_proj_qkvz.weight is kept whole"
    ]


class Splits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.one, self.batch = nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        fused = self.both(x).view(2, -1)
        left, right = fused.chunk(2, dim=-1)
        first, second = torch.split(self.batch(x), 2)
        return left * right + self.one(x) + first + second


def test_what_the_models_code_splits_is_named():
    assert split_in(Splits) == {"both"}
    model = Splits()
    routing = route({n: tuple(p.shape) for n, p in model.named_parameters()}, model=model)
    assert [note.split(" is")[0] for note in routing.notes] == ["both.weight"]


def test_nobody_guesses_how_experts_are_stored():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.empty(2, 8, 8))

    model = nn.Module()
    model.experts, model.config = Experts(), SimpleNamespace(hidden_size=8)
    shapes = {"experts.gate_up_proj": (2, 8, 8)}
    routing = route(shapes, model=model)
    assert len(routing.matrices) == 2
    assert "(in, out)" in routing.notes[0]
    model.experts.is_transposed = True
    assert {m.out_in for m in route(shapes, model=model).matrices} == {(4, 8)}


def test_the_hidden_layers_of_a_head_are_matrices():
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(vocab_size=40, **sizes))
    routing = route({n: tuple(p.shape) for n, p in model.named_parameters()}, model=model)
    assert "lm_head.dense.weight" in {m.parameter for m in routing.matrices}
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(vocab_size=40, **sizes))
    routing = route({n: tuple(p.shape) for n, p in model.named_parameters()}, model=model)
    assert "classifier.dense.weight" in {m.parameter for m in routing.matrices}
    assert routing.adamw["classifier.out_proj.weight"] == "output head"


def test_parametrized_weights_are_what_their_layer_is():
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.MultiheadAttention(4, 2), nn.LSTM(4, 4), nn.Embedding(9, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.parametrizations.weight_norm(model[1], "in_proj_weight")
    nn.utils.parametrizations.spectral_norm(model[3])
    routing = route({n: tuple(p.shape) for n, p in model.named_parameters()}, model=model)
    found = [(m.name, m.rows, m.cols) for m in routing.matrices]
    assert ("0.parametrizations.weight.original1", 6, 12) in found
    assert ("1.parametrizations.in_proj_weight.original1[2]", 4, 4) in found
    assert ("2.weight_hh_l0[3]", 4, 4) in found
    assert routing.adamw["3.parametrizations.weight.original"] == "embedding"
    assert routing.adamw["0.parametrizations.weight.original0"] == "magnitudes of a normed weight"


def test_a_block_whose_own_weight_is_normed_is_known_by_its_class():
    """torch calls the class ParametrizedLSTM then."""
    lstm = nn.utils.parametrizations.weight_norm(nn.LSTM(4, 6), "weight_ih_l0")
    shapes = {name: tuple(p.shape) for name, p in lstm.named_parameters()}
    found = [(m.rows, m.cols) for m in route(shapes, model=lstm).matrices if "original1" in m.parameter]
    assert found == [(6, 4)] * 4  # the gates


def test_the_sweep_knows_its_models():
    assert len(COMMON) >= 30
    assert sum(p.numel() for p in build("LlamaForCausalLM").parameters()) > 6e9


class ParamWrapper(nn.Module):
    """As PEFT's: the adapters of all experts in two linear layers; lora_B's columns belong to the experts in turn."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base: nn.Module, parameter_name: str, rank: int) -> None:
        super().__init__()
        self.base_layer, self.parameter_name = base, parameter_name
        self.num_experts, outputs, inputs = base.gate_up_proj.shape
        self.lora_A = nn.ModuleDict({"my_embed": nn.Linear(inputs, rank * self.num_experts, bias=False)})
        self.lora_B = nn.ModuleDict({"my_embed": nn.Linear(rank * self.num_experts, outputs, bias=False)})


def test_each_experts_adapters_are_matrices_of_their_own():
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.empty(3, 8, 6), requires_grad=False)
    model = nn.Module()
    model.experts = ParamWrapper(experts, "gate_up_proj", rank=2)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    routing = route(shapes, model=model)
    assert not routing.adamw  # although the adapter is called my_embed
    a, b = (torch.arange(n).view(shape) for n, shape in ((36, (6, 6)), (48, (8, 6))))
    found = [m.where.view(torch.arange(elements_of(shapes, m))).view(m.rows, m.cols) for m in routing.matrices]
    expected = [a[2 * e : 2 * e + 2] for e in range(3)]
    expected += [b[half : half + 4, e::3] for half in (0, 4) for e in range(3)]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(("beside", "told"), [(8, True), (9, False)])
def test_the_table_tells_that_adapters_need_another_learning_rate(beside, told):
    """Where most matrices are adapters': 9 of these (3 experts: lora_A, and gate and up of lora_B)."""
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.empty(3, 8, 6), requires_grad=False)
    model = nn.Module()
    model.experts = ParamWrapper(experts, "gate_up_proj", rank=2)
    model.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(beside))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    notes = [note for note in route(shapes, model=model).notes if "learning rate does not carry over" in note]
    assert notes == [f"9 of {9 + beside} matrices are factors of adapters: {ADAPTER_RATE}"] * told


def elements_of(shapes, matrix) -> int:
    return torch.Size(shapes[matrix.parameter]).numel()


@pytest.mark.parametrize("attribute", ["oft_R", "randlora_lambda", "vblora_vector_bank", "unheard_of"])
def test_an_adapters_parameter_is_known_by_its_attribute(attribute):
    layer = type("Tuner", (nn.Module,), {"adapter_layer_names": (attribute,)})()
    layer.add_module(attribute, nn.ParameterDict({"default": nn.Parameter(torch.empty(4, 6))}))
    model = nn.Module()
    model.experts = layer
    assert list(route({f"experts.{attribute}.default": (4, 6)}, model=model).adamw) == [f"experts.{attribute}.default"]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj_out = nn.Linear(4, 12), nn.Linear(4, 4)


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.linear = nn.Linear(4, 4), nn.Linear(4, 9)


class AttentionModel(nn.Module):
    """Neither its own name nor that of its head's class says that `lm_head` is one."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = SelfAttention()
        self.layers = nn.ModuleList([nn.ModuleDict({"k_head": nn.Linear(4, 4)})])
        self.score, self.lm_head = nn.Linear(4, 2), Scores()
        self.heads = nn.ModuleList([nn.Linear(4, 9), nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 9))])


def test_a_head_is_known_by_its_name_and_only_its_last_layer_gives_the_scores():
    model = AttentionModel()
    routing = route({n: tuple(p.shape) for n, p in model.named_parameters()}, model=model)
    heads = {"score.weight", "lm_head.linear.weight", "heads.0.weight", "heads.1.1.weight"}
    assert {name for name, why in routing.adamw.items() if why == "output head"} >= heads
    hidden = {"mixer.qkv.weight", "mixer.proj_out.weight", "layers.0.k_head.weight", "lm_head.dense.weight"}
    assert {matrix.parameter for matrix in routing.matrices} >= hidden
