"""A model whose gradients are small integers and whose attention hands over logits that are known beforehand.

What QK-Clip must make of it is written out in `reference`, in one process on whole weights.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.integers import gradient

THRESHOLD, ALPHA = 100.0, 0.3
CLIP = {"threshold": THRESHOLD, "alpha": ALPHA}


class GroupedAttention(nn.Module):
    """Four query heads share two key heads; biases."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 4, 2, 6
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(20, 24), nn.Linear(20, 12), nn.Linear(20, 12)


class LatentAttention(nn.Module):
    """Three heads of multi-head latent attention."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = 3, 4, 2, 5
        self.q_b_proj, self.kv_b_proj = nn.Linear(10, 18, bias=False), nn.Linear(8, 27, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(20, 10, bias=False)


class FusedAttention(nn.Module):
    """Query, key and value of four heads in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 6
        self.qkv = nn.Linear(24, 72)


class ClippedModel(nn.Module):
    heads: ClassVar = {"grouped": 4, "latent": 3, "fused": 4}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(11, 20)
        self.grouped, self.latent, self.fused = GroupedAttention(), LatentAttention(), FusedAttention()
        self.down = nn.Linear(40, 24, bias=False)

    def forward(self, step: int, micro: int, rank: int, world: int, gas: int) -> Tensor:
        from muon_plugin import record_logits

        for name, whole in logits(step).items():
            # The largest logit of a head is seen in one micro-batch of one rank, another one for each head.
            heads = torch.arange(len(whole))
            here = (heads % world == rank) & (heads % gas == micro)
            record_logits(getattr(self, name), maxima=torch.where(here, whole, whole - 300))
        loss = torch.zeros(())
        for number, (_, p) in enumerate(self.named_parameters()):
            loss = loss + (p.float() * gradient(p.shape, number, step, micro, rank, world, gas).to(p.device)).sum()
        return loss


def logits(step: int) -> dict[str, Tensor]:
    """The largest logit of each head; about half of them above the threshold."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: THRESHOLD * (0.2 + 1.6 * torch.rand(heads, generator=generator))
        for name, heads in ClippedModel.heads.items()
    }


@torch.no_grad()
def clip(weights: dict[str, Tensor], step: int) -> None:
    """The report's rule on whole weights, head by head."""

    def scale(name: str, start: int, width: int, power: float, largest: float) -> None:
        factor = (THRESHOLD / largest) ** power if largest > THRESHOLD else 1.0
        for leaf in ("weight", "bias"):
            if f"{name}.{leaf}" in weights:
                weights[f"{name}.{leaf}"][start : start + width] *= factor

    seen = {name: values.tolist() for name, values in logits(step).items()}
    for head in range(4):
        group = head // 2
        largest = max(seen["grouped"][2 * group : 2 * group + 2])
        scale("grouped.q_proj", 6 * head, 6, ALPHA, largest)
        if head % 2 == 0:
            scale("grouped.k_proj", 6 * group, 6, 1 - ALPHA, largest)
        scale("fused.qkv", 6 * head, 6, ALPHA, seen["fused"][head])
        scale("fused.qkv", 24 + 6 * head, 6, 1 - ALPHA, seen["fused"][head])
    for head, largest in enumerate(seen["latent"]):
        scale("latent.q_b_proj", 6 * head, 4, ALPHA, largest)
        scale("latent.q_b_proj", 6 * head + 4, 2, 1.0, largest)
        scale("latent.kv_b_proj", 9 * head, 4, 1 - ALPHA, largest)


def reference(rank: int, steps: int, clips: bool = True, by_head: bool = False) -> dict[str, Tensor]:
    """Muon without QK-Clip in one process, then the rule after each step: the weights."""
    from muon_plugin import Muon

    model = ClippedModel()
    muon = Muon(model.named_parameters(), model=model, lr=0.01, weight_decay=0.1, per_head_muon=by_head)
    for step in range(steps):
        muon.zero_grad()
        model(step, 0, 0, 1, 1).backward()
        muon.step()
        if clips:
            clip(dict(model.named_parameters()), step)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def alone(rank: int, steps: int) -> dict[str, Tensor]:
    """The plugin's, in one process or under plain DDP."""
    from muon_plugin import Muon

    model, world = ClippedModel(), dist.get_world_size()
    muon = Muon(model.named_parameters(), model=model, lr=0.01, weight_decay=0.1, qk_clip=CLIP)
    for step in range(steps):
        muon.zero_grad()
        model(step, 0, rank, world, 1).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= world
        muon.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def llama(layers: int = 1, seed: int = 0, **settings: Any) -> nn.Module:
    """A tiny Llama of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 40, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **settings}))


def largest(found: Any) -> float:
    """Of all layers, of a `Clip`."""
    return max((logit for _, logit, _ in found.last), default=-math.inf)
