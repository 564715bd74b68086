"""Attention of every kind with integer gradients: projections to heads, or each head as a parameter of its own.

Both end in the same bits if each head is a matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.integers import STEPS, build, gathered, gradient, train
from tests.support.parallel_models import described, part_of

HIDDEN = 24


class Grouped(nn.Module):
    """Six query heads that share two heads of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 6, 2, 8
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(HIDDEN, n * 8, bias=False) for n in (6, 2, 2))
        self.o_proj = nn.Linear(48, HIDDEN, bias=False)


class Latent(nn.Module):
    """Multi-head latent attention."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = 4, 6, 4, 5
        self.q_b_proj, self.kv_b_proj = nn.Linear(14, 4 * 10, bias=False), nn.Linear(10, 4 * 11, bias=False)


class Conv1D(nn.Module):
    """As GPT-2's: (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))


class Together(nn.Module):
    """Query, key and value in one parameter, stored (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 3, 8
        self.qkv = Conv1D(HIDDEN, 72)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.latent, self.together = (
            type(f"{kind.__name__}Attention", (kind,), {})() for kind in (Grouped, Latent, Together)
        )
        self.norm = nn.LayerNorm(HIDDEN)
        fill(self)

    def forward(self, step: int, micro: int, rank: int, world: int, gas: int) -> Tensor:
        loss, index = torch.zeros(()), tp_rank() if self.cut else 0
        for number, p in enumerate(self.parameters()):
            shape = described(p).logical_shape if described(p) else p.shape
            whole = gradient(shape, number, step, micro, rank, world, gas)
            loss = loss + (p.float() * part_of(p, whole, index)).sum()
        return loss

    cut = False


def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(11)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)


def tp_rank() -> int:
    from deepspeed.utils import groups

    return int(groups.get_tensor_model_parallel_rank())


#: Parameter of `Model` -> the sizes of its heads along its outputs, by the definition of its attention.
HEADS = {
    "grouped.q_proj.weight": [8] * 6,
    "grouped.k_proj.weight": [8] * 2,
    "grouped.v_proj.weight": [8] * 2,
    "latent.q_b_proj.weight": [10] * 4,
    "latent.kv_b_proj.weight": [6, 5] * 4,
    "together.qkv.weight": [8] * 9,
}


class Apart(nn.Module):
    """The same weights and gradients, with a Linear for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.whole_shapes = {}
        for name, p in Model().named_parameters():
            self.whole_shapes[name] = p.shape
            parts = nn.ModuleList()
            if p.dim() == 1:
                self.register_parameter(name.replace(".", "/"), nn.Parameter(p.detach().clone()))
                continue
            rows = p.detach().t() if name == "together.qkv.weight" else p.detach()
            for part in rows.split(HEADS.get(name, [len(rows)])):
                linear = nn.Linear(part.shape[1], len(part), bias=False)
                linear.weight = nn.Parameter(part.clone(memory_format=torch.contiguous_format))
                parts.append(linear)
            self.add_module(name.replace(".", "/"), parts)

    def whole(self, name: str) -> Tensor:
        held = getattr(self, name.replace(".", "/"))
        if isinstance(held, nn.Parameter):
            return held
        rows = torch.cat([linear.weight for linear in held])
        return rows.t().contiguous() if name == "together.qkv.weight" else rows

    def forward(self, step: int, micro: int, rank: int, world: int, gas: int) -> Tensor:
        loss = torch.zeros(())
        for number, (name, shape) in enumerate(self.whole_shapes.items()):
            loss = loss + (self.whole(name).float() * gradient(shape, number, step, micro, rank, world, gas)).sum()
        return loss


def trained(rank: int, settings: dict[str, Any], steps: int = STEPS) -> dict[str, Tensor]:
    """What `Model` ends in."""
    model = Model()
    engine = build(rank, settings, model)
    train(engine, rank, steps)
    with gathered(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained_apart(rank: int, settings: dict[str, Any], steps: int = STEPS) -> dict[str, Tensor]:
    """What the same model with a parameter for each head ends in, without per-head Muon."""
    model = Apart()
    engine = build(rank, settings, model)
    assert all(heads > 1 for heads in map(len, HEADS.values()))
    train(engine, rank, steps)
    with gathered(model):
        return {name: model.whole(name).detach().clone() for name in model.whole_shapes}
