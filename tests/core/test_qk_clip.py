"""QK-Clip: the largest logits, computed in blocks; whose they are in models of transformers; what is refused."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import muon_plugin
from muon_plugin import Muon
from muon_plugin.core import logits as kept
from muon_plugin.core.layout import Partition
from tests.support.clipped import CLIP, ClippedModel, llama


def full(query: Tensor, key: Tensor, allowed: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """By definition, with the whole matrix of scores."""
    scores = query.float() @ key.float().repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~allowed, -math.inf).amax((0, 2, 3))


CASES = {
    "everything": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "window on both sides": {"window": 3},
    "softcap": {"causal": True, "softcap": 2.0},
    "scaling": {"scaling": 0.7},
    "packed sequences": {"causal": True, "segments": torch.tensor([0] * 4 + [1] * 3 + [2] * 6)},
}


@pytest.mark.parametrize("block", [1, 40, 10**6])
@pytest.mark.parametrize("case", CASES)
def test_blocks_find_the_maximum_of_the_whole_matrix(case, block):
    how = dict(CASES[case])
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 13, 8), torch.randn(2, 2, 13, 8)
    at, to = torch.arange(13)[:, None], torch.arange(13)[None]
    allowed = torch.ones(13, 13, dtype=torch.bool)
    if how.get("causal"):
        allowed &= to <= at
    if "window" in how:
        allowed &= (to - at).abs() < how["window"]
    if "segments" in how:
        allowed &= how["segments"][:, None] == how["segments"][None]
    expected = full(query, key, allowed, how.get("scaling", 8**-0.5), how.get("softcap"))
    torch.testing.assert_close(muon_plugin.largest_logits(query, key, **how, block=block), expected)


@pytest.mark.parametrize("kind", ["bool", "additive", "by head", "padding", "function"])
def test_every_kind_of_mask(kind):
    torch.manual_seed(1)
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    allowed = torch.rand(2, 4 if kind == "by head" else 1, 9, 9) > 0.7
    mask: Any = allowed
    if kind == "additive":
        mask = torch.where(allowed, torch.randn(2, 1, 9, 9), torch.finfo(torch.float32).min)
    elif kind == "padding":
        mask = torch.arange(9)[None] >= torch.tensor([[2], [4]])
        allowed = mask[:, None, None].expand(2, 1, 9, 9)
        mask = mask.long()
    elif kind == "function":

        def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q + k + b) % 3 == 0

        b, q, k = torch.arange(2)[:, None, None], torch.arange(9)[:, None], torch.arange(9)
        allowed = ((q + k + b) % 3 == 0)[:, None]
    expected = full(query, key, allowed, 8**-0.5)
    torch.testing.assert_close(muon_plugin.largest_logits(query, key, mask=mask, block=100), expected)


def eager_logits(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The maxima over what eager attention gives its softmax, by layer."""
    found: list[Tensor] = []
    softmax = nn.functional.softmax

    def seen(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if scores.dim() == 4:
            found.append(scores.detach().float().masked_fill(scores < -9999, -math.inf).amax((0, 2, 3)))
        return softmax(scores, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", seen)
        with torch.no_grad():
            model(**batch)
    return found


def _models() -> dict[str, Any]:
    from transformers import (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        MistralConfig,
        MistralForCausalLM,
        ModernBertConfig,
        ModernBertForMaskedLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 40, "num_attention_heads": 4}
    grouped = {**sizes, "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 64}
    no_dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    gpt2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 40, **no_dropout}
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
    experts |= {"topk_group": 1, "first_k_dense_replace": 2}
    latent = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
    tokens = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    local = {"local_attention": 8, "global_attn_every_n_layers": 2, "num_hidden_layers": 2, **tokens}
    gemma2 = {**grouped, "head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0}
    return {
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**grouped)),
        "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**grouped, sliding_window=5)),
        "gemma2, softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**gemma2)),
        "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**sizes, **local)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**gpt2)),
        "deepseek": lambda: DeepseekV3ForCausalLM(
            DeepseekV3Config(**{**grouped, "num_key_value_heads": 4}, **experts, **latent)
        ),
    }


NAMES = ("qwen2", "mistral, sliding window", "gemma2, softcap", "gpt2", "deepseek")


@pytest.mark.parametrize("name", NAMES)
def test_models_of_transformers_hand_over_what_their_softmax_gets(name):
    torch.manual_seed(0)
    model = _models()[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    tokens = torch.randint(0, 40, (2, 16))
    padding = torch.ones_like(tokens)
    padding[0, :5] = 0
    batch = {"input_ids": tokens, "attention_mask": padding}
    model.set_attn_implementation("eager")
    model.train()
    expected = torch.cat(eager_logits(model, batch))
    ways = ["eager"] if "gemma2" in name else ["eager", "sdpa"]
    muon = Muon(model.named_parameters(), model=model, qk_clip={"threshold": 1e9})
    for way in ways:
        model.set_attn_implementation(way)
        muon.clipping.maxima.reset()
        model(**batch)
        found = muon.clipping.maxima.read()
        # Rows of padding alone, which both ways treat in their own way, have no logits here or there.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_clipped_models_logits_shrink_to_the_threshold(name):
    """The whole way: what was seen, scaled in the weights, is what is seen next on the same input."""
    torch.manual_seed(0)
    model = _models()[name]()
    with torch.no_grad():
        for name_of, p in model.named_parameters():
            p.normal_(std=0.1) if name_of.endswith("bias") else p.mul_(6)
    # softcap's tanh is not linear in the scale
    model.config.attn_logit_softcapping = None
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    tokens = torch.randint(0, 40, (2, 16))
    model.train()
    threshold = 0.05
    muon = Muon(model.named_parameters(), model=model, lr=0.0, weight_decay=0.0, qk_clip={"threshold": threshold})
    model(input_ids=tokens).logits.sum().backward()
    before = muon.clipping.maxima.read()
    muon.step()
    first = muon.clipping.found.layers[0]  # inputs of the later layers change with it
    model(input_ids=tokens)
    after = muon.clipping.maxima.read()[: first.heads]
    groups = {(rows.first, rows.heads) for rows in first.rows}
    for begin, count in groups:
        largest = float(before[begin : begin + count].max())
        assert largest > threshold
        torch.testing.assert_close(
            after[begin : begin + count], before[begin : begin + count] * (threshold / largest), rtol=1e-4, atol=1e-5
        )
    assert sum(count for _, count in groups) == first.heads


def flash(seen: dict[nn.Module, Tensor]) -> Any:
    """Flash attention by definition, as transformers calls its kernels, which do not run on the CPU."""

    def attend(module, query, key, value, mask, scaling, sliding_window=None, is_causal=None, **kwargs):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        at, to = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None]
        allowed = (to <= at) if (module.is_causal if is_causal is None else is_causal) else at == at
        if sliding_window is not None:
            allowed = allowed & ((to - at).abs() < sliding_window)
        if mask is not None:  # (batch, tokens): what is padding is taken out of queries and keys
            allowed = allowed & (mask[:, None, :, None] & mask[:, None, None]).bool()
        elif kwargs.get("position_ids") is not None:  # ModernBERT keeps them to itself
            sequence = (kwargs["position_ids"][0] == 0).cumsum(0)
            allowed = allowed & (sequence[:, None] == sequence)
        scores = (query @ key.mT * scaling).masked_fill(~allowed, -math.inf)
        seen[module] = scores.detach().amax((0, 2, 3))
        return (scores.softmax(-1).nan_to_num(0) @ value).transpose(1, 2).contiguous(), None

    return attend


@pytest.mark.parametrize("case", ["right padding", "left padding", "packed sequences"])
@pytest.mark.parametrize("name", ["mistral, sliding window", "modernbert"])
def test_flash_attention_leaves_out_padding_and_what_is_outside_of_a_window(name, case, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, seen = _models()[name](), {}
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash(seen))
    model.config._attn_implementation = "flash_attention_2"
    muon = Muon(model.named_parameters(), model=model, qk_clip={"threshold": 1e9})
    tokens, lengths = torch.randint(3, 40, (2, 16), generator=torch.Generator().manual_seed(1)), (5, 7, 4)
    batch: dict[str, Tensor] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if case == "packed sequences":
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        batch = {"input_ids": tokens[:1], "position_ids": positions}
    else:
        batch["attention_mask"][:, 6:] = 0
        batch["attention_mask"] = (
            batch["attention_mask"] if case == "right padding" else batch["attention_mask"].flip(1)
        )
    model.train()(**batch)
    expected = torch.cat([seen[module] for module in muon.clipping.found.modules])
    torch.testing.assert_close(muon.clipping.maxima.read(), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_was_compiled_and_has_run_before(monkeypatch):
    """Its compiled code has traced transformers without our function, and then another optimizer."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # the tests are run without the compiler otherwise
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    muon_plugin.unregister()
    model, tokens = llama(1, attn_implementation="sdpa").train(), torch.randint(0, 40, (1, 8))
    attention = model.model.layers[0].self_attn
    attention.compile(backend="eager")
    model(input_ids=tokens)
    for _ in range(2):
        maxima = Muon(model.named_parameters(), model=model, qk_clip=CLIP).clipping.maxima
        model(input_ids=tokens)
        found = maxima.read()
        assert found.isfinite().all()
    maxima.reset()
    attention._compiled_call_impl = None
    model(input_ids=tokens)
    torch.testing.assert_close(maxima.read(), found)


def test_evaluation_does_not_count_and_recomputation_does_not_disturb():
    model = llama(2)
    muon = Muon(model.named_parameters(), model=model, qk_clip=CLIP)
    tokens, other = torch.randint(0, 40, (2, 16)), torch.randint(0, 40, (2, 16))
    maxima = muon.clipping.maxima
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    expected = maxima.read()
    model.eval()
    model(input_ids=other)
    with torch.no_grad():
        model.train()(input_ids=other)
    assert torch.equal(maxima.read(), expected)
    for reentrant in (True, False):
        maxima.reset()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert torch.equal(maxima.read(), expected), reentrant


def test_micro_batches_are_one_step_and_steps_are_apart():
    model = llama(1)
    muon = Muon(model.named_parameters(), model=model, lr=0.0, qk_clip=CLIP)
    model.train()
    found = []
    for seed in (0, 1):
        tokens = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(seed))
        model(input_ids=tokens, labels=tokens).loss.backward()
        found.append(muon.clipping.maxima.read())
        if seed == 0:
            first = found[0]
    assert torch.equal(found[1], torch.maximum(found[1], first))
    muon.step()
    assert muon.halves.clip.last[0][1] == float(found[1].max())
    assert float(muon.clipping.maxima.read().max()) == -math.inf


def test_unregister_gives_transformers_its_own_function_back():
    from transformers.modeling_utils import AttentionInterface

    muon_plugin.unregister()
    original = AttentionInterface.get_interface
    model = llama(1)
    muon = Muon(model.named_parameters(), model=model, qk_clip=CLIP)
    assert AttentionInterface.get_interface is not original
    muon_plugin.unregister()
    assert AttentionInterface.get_interface is original
    tokens = torch.randint(0, 40, (1, 8))
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    with pytest.raises(RuntimeError, match="no attention logits were seen"):
        muon.step()


def test_without_qk_clip_nothing_is_hooked():
    from transformers.modeling_utils import AttentionInterface

    muon_plugin.unregister()
    original = AttentionInterface.get_interface
    model = llama(1)
    Muon(model.named_parameters(), model=model)
    assert AttentionInterface.get_interface is original


def test_a_frozen_projection_is_not_scaled():
    model = ClippedModel()
    muon = Muon(model.named_parameters(), model=model, lr=0.0, weight_decay=0.0, qk_clip=CLIP)
    model.grouped.q_proj.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, heads in ClippedModel.heads.items():
            muon_plugin.record_logits(getattr(model, name), maxima=torch.full((heads,), 200.0))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        muon.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"latent.q_b_proj.weight", "latent.kv_b_proj.weight", "fused.qkv.weight", "fused.qkv.bias"}
    assert [count for _, _, count in muon.halves.clip.last] == [0, 3, 4]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_logits_that_are_no_number_clip_nothing(bad):
    model = ClippedModel()
    muon = Muon(model.named_parameters(), model=model, lr=0.0, weight_decay=0.0, qk_clip=CLIP)
    before = model.fused.qkv.weight.detach().clone()
    muon_plugin.record_logits(model.fused, maxima=torch.tensor([bad, 1.0, 1.0, 1.0]))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match="no attention logits were seen in the first step of 2 layers"):
        muon.step()
    assert torch.equal(model.fused.qkv.weight, before)


def test_layers_whose_weights_are_tied_are_one():
    """As in Zamba: another module computes with the same weights, and may have the larger logits."""
    model = llama(3)
    first, second = model.model.layers[0].self_attn, model.model.layers[2].self_attn
    second.q_proj.weight, second.k_proj.weight = first.q_proj.weight, first.k_proj.weight
    muon = Muon(model.named_parameters(), model=model, lr=0.0, weight_decay=0.0, qk_clip={"threshold": 10.0})
    before = first.q_proj.weight.detach().clone()
    muon_plugin.record_logits(first, maxima=torch.tensor([1.0, 2.0, 5.0, 1.0]))
    muon_plugin.record_logits(second, maxima=torch.tensor([40.0, 2.0, 1.0, 1.0]))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match=r"of 1 layers.*layers\.1"):
        muon.step()
    assert muon.halves.clip.last[0][1:] == (40.0, 2)
    torch.testing.assert_close(first.q_proj.weight[:16], before[:16] / 2)
    assert torch.equal(first.q_proj.weight[16:], before[16:])
    assert len(muon.halves.clip.last) == 2


class Saved(nn.Module):
    """As PEFT's modules_to_save keep a layer: the frozen one, and a copy that is trained and computed with."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(layer)})
        self.original_module = layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.modules_to_save["default"](x)


def test_a_trained_copy_of_a_frozen_projection_is_clipped():
    model, tokens = llama(1), torch.randint(0, 40, (2, 16))
    attention = model.model.layers[0].self_attn
    attention.q_proj = Saved(attention.q_proj)
    muon = Muon(model.named_parameters(), model=model, lr=0.0, weight_decay=0.0, qk_clip={"threshold": 0.01})
    model.train()(input_ids=tokens).logits.sum().backward()
    assert float(muon.clipping.maxima.read().max()) > 0.02
    muon.step()
    assert muon.halves.clip.last[0][2] == 4
    model(input_ids=tokens)
    assert float(muon.clipping.maxima.read().max()) == pytest.approx(0.01, rel=1e-4)


def _weight_normed() -> nn.Module:
    model = llama(1)
    nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)
    return model


def _half_tied() -> nn.Module:
    model = llama(2)
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    return model


def _query_is_key() -> nn.Module:
    model = llama(1, num_key_value_heads=4)
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight = attention.q_proj.weight
    return model


def _zamba2() -> nn.Module:
    from transformers import Zamba2Config, Zamba2ForCausalLM

    layers = {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"], "num_attention_heads": 4}
    mamba = {"mamba_d_state": 8, "mamba_d_conv": 2, "mamba_ngroups": 1, "n_mamba_heads": 4, "chunk_size": 8}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 40, "adapter_rank": 4, "num_mem_blocks": 1}
    return Zamba2ForCausalLM(Zamba2Config(**sizes, **layers, **mamba, use_shared_attention_adapter=True))


class Unknown(nn.Module):
    """An attention that does not say how many heads it has."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = UnknownAttention()


class UnknownAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)


class NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 40, "num_hidden_layers": 1, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2))


REFUSED = [
    (_qwen3, "norms its queries or keys"),
    (_half_tied, r"layers\.0\.self_attn\.q_proj\.weight is tied to a projection of other heads"),
    (_query_is_key, "is tied to a projection of other heads"),
    (_weight_normed, r"q_proj\.parametrizations\.weight\.original1 is parametrized"),
    (_zamba2, r"adds an adapter \(linear_q_adapter_list\) to its queries or keys"),
    (Unknown, "neither its module nor the config says how its outputs are heads"),
    (NoAttention, "the model has no attention"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED)
def test_models_that_cannot_be_clipped_are_refused(make, words):
    model = make()
    with pytest.raises(ValueError, match=words):
        Muon(model.named_parameters(), model=model, qk_clip=CLIP)


def test_it_needs_the_model():
    model = ClippedModel()
    with pytest.raises(ValueError, match="pass model="):
        Muon(model.named_parameters(), qk_clip=CLIP)


def test_heads_that_tensor_parallelism_scatters_are_refused():
    """Each of two TP ranks holds every second head: a rank's logits could not be told apart."""
    model = llama()
    clipping = Muon(model.named_parameters(), model=model, qk_clip=CLIP).clipping
    name, weight = next((name, p) for name, p in model.named_parameters() if "q_proj" in name)
    clipping.cut({name: Partition.of(name, weight.shape, 0, 2)}, 1)
    with pytest.raises(ValueError, match=r"qk_clip: tensor parallelism leaves rank 1 the heads \[1, 3\] of"):
        clipping.cut({name: Partition.of(name, weight.shape, 0, 2, parts=2)}, 1)


def test_another_number_of_heads_is_an_error():
    model = ClippedModel()
    Muon(model.named_parameters(), model=model, qk_clip=CLIP)
    with pytest.raises(RuntimeError, match="its query projection has 4 heads"):
        muon_plugin.record_logits(model.fused, maxima=torch.zeros(3))


def test_attention_that_was_not_described_is_an_error():
    model = ClippedModel()
    Muon(model.named_parameters(), model=model, qk_clip=CLIP)
    with pytest.raises(RuntimeError, match="is not known"):
        muon_plugin.record_logits(model.down, maxima=torch.zeros(3))
    assert not kept.is_watched(ClippedModel().fused)
