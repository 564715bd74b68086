"""A model whose gradients are small integers times 12, so that averages over 1 to 4 ranks are exact in every dtype.

What a run ends in then depends on the optimizer alone, and must not depend on the layout by a single bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.combinations import FULL

#: From the second on a step has all that a step can have: momentum, counts, weights that are not the first.
STEPS = 10 if FULL else 5


class IntegerModel(nn.Module):
    """Odd shapes, fused and batched matrices, a convolution, biases, norms, an embedding, tied, frozen, unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(37, 24)
        self.qkv = nn.Linear(24, 72)
        self.gate_up_proj = nn.Linear(24, 80, bias=False)
        self.down = nn.Linear(40, 24, bias=False)
        self.norm = nn.LayerNorm(24)
        self.wide = nn.Linear(91, 33)
        self.conv = nn.Conv2d(3, 7, 3)
        self.experts = nn.Parameter(torch.randn(3, 10, 6))
        self.unused = nn.Linear(9, 5)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.lm_head = nn.Linear(24, 37, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, step: int, micro: int, rank: int, world: int, gas: int) -> Tensor:
        loss = torch.zeros(())
        for number, (name, p) in enumerate(self.named_parameters()):
            if p.requires_grad and "unused" not in name:
                grad = gradient(p.shape, number, step, micro, rank, world, gas)
                loss = loss + (p.float() * grad.to(p.device)).sum()
        return loss


def gradient(shape: Any, number: int, step: int, micro: int, rank: int, world: int, gas: int) -> Tensor:
    """12 times small integers; the mean over ranks and micro-batches is the same for every `world` and `gas`."""

    def draw(*salt: int) -> Tensor:
        seed = hash((number, step, *salt)) % 2**31
        return torch.randint(-5, 6, shape, generator=torch.Generator().manual_seed(seed)).float()

    grad = draw()
    partnered = world - world % 2  # ranks cancel in pairs
    if rank < partnered:
        grad = grad + (1 if rank % 2 == 0 else -1) * draw(1, rank // 2, world)
    if gas > 1 and micro < gas - gas % 2:
        grad = grad + (1 if micro % 2 == 0 else -1) * draw(2, micro // 2)
    return 12 * grad


def config(
    stage: int = 1, dtype: str = "fp32", gas: int = 1, params: dict[str, Any] | None = None, **sections: Any
) -> dict[str, Any]:
    """A DeepSpeed JSON with Muon and otherwise default settings."""
    zero = {"stage": stage, **sections.pop("zero_optimization", {})}
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": gas,
        "steps_per_print": 10**9,
        # DeepSpeed clips at 1.0 by default, and a norm that is summed over other shards rounds otherwise.
        "gradient_clipping": 0.0,
        "optimizer": {"type": "Muon", "params": {"lr": 0.01, "weight_decay": 0.1, **(params or {})}},
        "zero_optimization": zero,
        **sections,
    }
    if dtype == "bf16":
        found["bf16"] = {"enabled": True, **found.get("bf16", {})}
    if dtype == "fp16":
        found["fp16"] = {"enabled": True, "initial_scale_power": 4, **found.get("fp16", {})}
    return found


def build(rank: int, settings: dict[str, Any], model: nn.Module | None = None, **kwargs: Any) -> Any:
    """A DeepSpeed engine around `model` with Muon registered."""
    import deepspeed

    import muon_plugin

    deepspeed.utils.logger.setLevel("ERROR")
    muon_plugin.register()
    model = model or IntegerModel()
    if (
        settings.get("zero_optimization", {}).get("stage") == 3
    ):  # these forwards use the parameters of all modules in one place
        for p in model.parameters():
            deepspeed.zero.register_external_parameter(model, p)
    engine, *_ = deepspeed.initialize(model=model, config=settings, **kwargs)
    return engine


def train(engine: Any, rank: int, steps: int, first: int = 0) -> None:
    import torch.distributed as dist

    gas = engine.gradient_accumulation_steps()
    for step in range(first, first + steps):
        for micro in range(gas):
            engine.backward(engine(step, micro, rank, dist.get_world_size(), gas))
            engine.step()


def gathered(model: nn.Module) -> Any:
    """ZeRO-3's parameters whole, as long as the context lasts."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()))


def weights(engine: Any) -> dict[str, Tensor]:
    """The model's weights; where the engine keeps fp32 masters, those too (gathered)."""
    from deepspeed.utils import safe_get_full_fp32_param

    with gathered(engine.module):
        found = {name: _kept(p) for name, p in engine.module.named_parameters()}
    wrapper = engine.optimizer
    names = engine.param_names
    if hasattr(wrapper, "fp32_groups"):
        pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups)
        found |= {names[p] + " (fp32)": _kept(m) for low, master in pairs for p, m in zip(low, master)}
    elif wrapper is not engine.basic_optimizer and not getattr(wrapper, "round_robin_gradients", False):
        for name, p in engine.module.named_parameters():
            if p.requires_grad:
                found[name + " (fp32)"] = _kept(safe_get_full_fp32_param(p)).view(found[name].shape)
    elif wrapper is engine.basic_optimizer:
        found |= {name + " (fp32)": _kept(p) for name, p in engine.module.named_parameters() if p.requires_grad}
    return found


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def trained(rank: int, settings: dict[str, Any], steps: int = STEPS) -> dict[str, Tensor]:
    """Steps from scratch: the weights they end in."""
    engine = build(rank, settings, IntegerModel())
    train(engine, rank, steps)
    found = weights(engine)
    engine.destroy()
    return found


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose bits differ, or that only one has."""
    return sorted(set(a) ^ set(b)) + [name for name in a if name in b and not torch.equal(a[name], b[name])]
