"""Runs under DeepSpeed in which parameters are frozen and unfrozen: jobs for ranks, of integers.py's model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.integers import build, train, weights

#: Matrices and the rest: fused and batched ones, one that other parameters surround in ZeRO's flat tensors.
COMING_AND_GOING = ("qkv.weight", "qkv.bias", "norm.weight", "conv.weight", "experts")
LATE = ("frozen.weight", "frozen.bias")


def freeze(engine: Any, names: tuple[str, ...], frozen: bool = True) -> None:
    for name, p in engine.module.named_parameters():
        if name in names:
            p.requires_grad_(not frozen)


def state(engine: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Whole masters, momentum and moments of these parameters."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for name, p in engine.module.named_parameters():
        if name in names:
            frozen = not p.requires_grad
            p.requires_grad_(True)  # DeepSpeed finds nothing of what is frozen
            found[name] = safe_get_full_fp32_param(p)
            second = ("exp_avg_sq",) if name in ("qkv.bias", "norm.weight") else ()
            found |= {f"{name} {key}": safe_get_full_optimizer_state(p, key) for key in ("exp_avg", *second)}
            p.requires_grad_(not frozen)
    return {key: value.clone() for key, value in found.items()}


def come_and_go(rank: int, settings: dict[str, Any]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Two steps, two with some parameters frozen, two more: the weights, what moved meanwhile, what did not after."""
    engine = build(rank, settings)
    # (DeepSpeed's own map of where state lies is wrong under round_robin_gradients.)
    flat = engine.zero_optimization() and not getattr(engine.optimizer, "round_robin_gradients", False)
    train(engine, rank, 2)
    before = weights(engine) | (state(engine, COMING_AND_GOING) if flat else {})
    freeze(engine, COMING_AND_GOING)
    train(engine, rank, 2, first=2)
    after = weights(engine) | (state(engine, COMING_AND_GOING) if flat else {})
    freeze(engine, COMING_AND_GOING, False)
    train(engine, rank, 2, first=4)
    end = weights(engine)
    engine.destroy()
    frozen = [name for name in before if name in after and name.removesuffix(" (fp32)").split()[0] in COMING_AND_GOING]
    moved = [name for name in frozen if not torch.equal(before[name], after[name])]
    still = [name for name in COMING_AND_GOING if torch.equal(after[name], end[name])]
    assert not torch.equal(before["down.weight"], after["down.weight"])
    return end, moved, still


def unfrozen_late(rank: int, settings: dict[str, Any], folder: str = "") -> dict[str, Tensor]:
    """A layer that is frozen at start is unfrozen after two steps; perhaps all is saved and loaded after four."""
    engine = build(rank, settings)
    train(engine, rank, 2)
    freeze(engine, LATE, False)
    train(engine, rank, 2, first=2)
    if folder:
        engine.save_checkpoint(folder)
        engine.destroy()
        engine = build(rank, settings)
        freeze(engine, LATE, False)
        train(engine, rank, 1)  # something else than what is loaded
        freeze(engine, LATE)
        engine.load_checkpoint(folder)
        freeze(engine, LATE, False)
    train(engine, rank, 2, first=4)
    found = weights(engine)
    engine.destroy()
    return found
