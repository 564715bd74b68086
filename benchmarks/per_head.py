"""Per-head Muon against whole projections: FLOPs of Newton-Schulz and kernels launched, counted in one step.

    python benchmarks/per_head.py --out benchmarks/results/per_head.md

Nothing is timed. Equal shapes are orthogonalized as batches, as on CUDA devices (on the CPU a step takes matrices one
at a time, whose bits would depend on the batch): a head is a batch entry; alone it is launched for its norm.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import muon_plugin
from muon_plugin.core import orthogonalize

#: What launches no kernel.
VIEWS = {"view", "_unsafe_view", "as_strided", "t", "transpose", "slice", "select", "detach", "unsqueeze", "expand",
         "alias", "split", "split_with_sizes", "unbind", "diagonal", "empty", "_local_scalar_dense"}  # fmt: skip
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}


class Launches(TorchDispatchMode):
    """Counts the operations that launch a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.of[name] += 1
        return function(*args, **(kwargs or {}))


def grouped() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 64}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=4)
    )


def latent() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 64}
    ranks = {"q_lora_rank": 192, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "first_k_dense_replace": 4}
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes, **ranks, **heads))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "grouped attention, 16 query, 4 key and 4 value heads of 32x512, 4 layers": grouped,
    "latent attention, 16 heads, 4 layers": latent,
}


def counted(build: Callable[[], nn.Module], per_head: bool) -> tuple[int, int, int, int, int]:
    """Matrices; FLOPs, products, kernels of Newton-Schulz; kernels of the step, with AdamW's."""
    torch.manual_seed(0)
    model = build()
    optimizer = muon_plugin.Muon(model.named_parameters(), model=model, per_head_muon=per_head)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    together = orthogonalize.NewtonSchulz.__call__
    inside: Counter[str] = Counter()

    def iteration(self: Any, matrices: Any) -> Any:
        with Launches() as launches:
            found = together(self, matrices)
        inside.update(launches.of)
        return found

    with (
        mock.patch.object(orthogonalize, "_batch_is_exact", lambda _, shape, __: shape[0] > 1),
        mock.patch.object(orthogonalize.NewtonSchulz, "__call__", iteration),
        FlopCounterMode(display=False) as flops,
        Launches() as launches,
    ):
        optimizer.step()
    products = sum(inside[name] for name in PRODUCTS)
    matrices = len(optimizer.routing.matrices)
    return matrices, flops.get_total_flops(), products, inside.total(), launches.of.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    rows = [
        "| model | cut | matrices | Newton-Schulz | its products | its kernels | kernels of the whole step |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, build in MODELS.items():
        for per_head in (False, True):
            matrices, flops, *kernels = counted(build, per_head)
            cells = [
                name,
                "by head" if per_head else "whole",
                str(matrices),
                f"{flops / 1e9:.1f} GFLOP",
                *map(str, kernels),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    text = "\n".join(rows) + "\n"
    print(text)
    if out:
        out.write_text(text)


if __name__ == "__main__":
    main()
