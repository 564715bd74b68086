"""Small models of every family that DeepSpeed's AutoEP has a preset for, with the gradients of integers.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.integers import build, gathered
from tests.support.parallel_models import first_expert, of_integers

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = {**LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK |= {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
#: preset -> (transformers' name of the model type, its configuration).
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "qwen2_moe": ("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {
            **QWEN,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "minimax_m3": (
        "minimax_m3_vl_text",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "shared_intermediate_size": 24},
    ),
}


def make(preset: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, sizes = PRESETS[preset]
    torch.manual_seed(4)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **sizes}))


@contextmanager
def registry_by_name() -> Iterator[None]:
    """Transformers 5.24 looks up by model what an output recorder records; AutoEP of 0.19.8 does so by name, and fails
    on all of its presets but DeepSeek's, with any optimizer."""
    from transformers.utils import output_capturing

    cls = output_capturing._CanRecordRegistry
    get, put = cls.get, cls.__setitem__

    def get_by_name(self: Any, key: Any, default: Any = None) -> Any:
        return dict.get(self, key, default) if isinstance(key, str) else get(self, key)

    def put_by_name(self: Any, key: Any, value: Any) -> None:
        (dict.__setitem__ if isinstance(key, str) else put)(self, key, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "get", get_by_name)
        patch.setattr(cls, "__setitem__", put_by_name)
        yield


def built(rank: int, settings: dict[str, Any], preset: str, ep: int) -> Any:
    """An engine of a model whose experts AutoEP has replaced by its preset."""
    import deepspeed

    name = "qwen3_moe" if preset == "qwen2_moe" else preset
    section = {"enabled": True, "autoep_size": ep, "preset_model": name, "use_grouped_mm": False}
    with registry_by_name():
        engine = build(rank, {**settings, "expert_parallel": section}, make(preset))
    if engine.zero_optimization_stage() == 3:  # `build` registered those that AutoEP has replaced
        engine.module._external_params = {}
        for p in engine.module.parameters():
            deepspeed.zero.register_external_parameter(engine.module, p)
    return engine


def trained(rank: int, settings: dict[str, Any], preset: str, ep: int) -> tuple[dict[str, Tensor], list[float], int]:
    """Three steps of integers: weights on this rank, experts by their number; the losses of two steps of the model's
    own forward after them; how many matrices its experts are."""
    engine = built(rank, settings, preset, ep)
    forward = engine.module.forward
    engine.module.forward = MethodType(of_integers, engine.module)
    for step in range(3):
        engine.backward(engine(step))
        engine.step()
    found = {}
    with gathered(engine.module):
        for name, p in engine.module.named_parameters():
            if getattr(p, "allreduce", True):
                found[name] = p.detach().clone()
            else:
                found |= {f"{name} {first_expert(p) + i}": expert.detach().clone() for i, expert in enumerate(p)}
    engine.module.forward = forward
    losses = []
    tokens = torch.arange(24)[None] * 5 % SIZES["vocab_size"]
    for _ in range(2):
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        losses.append(float(loss.detach()))
        engine.backward(loss)
        engine.step()
    experts = sum(".experts." in matrix.parameter for matrix in engine.basic_optimizer.routing.matrices)
    engine.destroy()
    return found, losses, experts
