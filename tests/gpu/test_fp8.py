"""Weights in fp8 (``--fp8-param-gather``): main parameters over ranks, and what Megatron makes of them.

megatron/test_quantized.py has the same on the CPU, where there are no types of Transformer Engine's.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.integers import differing
from tests.support.megatron_model import Layout, build, named, optimizer_for, step
from tests.support.ranks import Ranks

RELEASE = "0.19.2"
#: Compute capability that a recipe needs.
RECIPES = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"),
]


def trained(rank: int, layout: Layout, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Whole main parameters, the weights that Megatron made of them, and how many are in fp8."""
    from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout, fp8_recipe=layout.fp8)
    for number in range(steps):
        step(chunks, optimizer, layout, number)
    mine, weights, quantized = {}, {}, 0
    part = optimizer.chained_optimizers[0]
    for name, p, _ in named(chunks):
        quantized += is_float8tensor(p)
        value = dequantize_fp8_tensor(p) if is_float8tensor(p) else p
        weights[name] = value.detach().float().cpu()
        if p in part.model_param_group_index_map:
            start = part._get_model_param_range_map(p)["param"].start
            main = part._get_main_param_and_optimizer_states(p)["param"]
            mine[name] = start, main.detach().cpu().numpy()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    mains = {name: torch.full((w.numel(),), torch.nan) for name, w in weights.items()}
    for held in everyone:
        for name, (start, array) in held.items():
            mains[name][start : start + array.size] = torch.from_numpy(array)
    return {name: main.view(weights[name].shape) for name, main in mains.items()}, weights, quantized


@pytest.mark.parametrize("settings", [{}, {"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16}])
@pytest.mark.parametrize("recipe", RECIPES)
def test_main_parameters_do_not_depend_on_the_ranks_and_are_what_is_quantized(recipe, settings):
    if torch.cuda.get_device_capability() < RECIPES[recipe]:
        pytest.skip(f"{recipe} needs compute capability {RECIPES[recipe]}")
    layout = Layout(fp8=recipe, muon=settings, ddp={"fp8_param_gather": True})
    found = []
    for size in (1, 2):
        pool = Ranks(size, RELEASE, device="cuda")
        try:
            found.append(pool.run(trained, layout, 4))
        finally:
            pool.close()
    ((mains, weights, quantized),), others = found
    assert quantized == 16
    for other, *_ in others:
        assert differing(other, mains) == []
    for name, main in mains.items():
        assert (weights[name] - main).norm() < 0.05 * main.norm(), (
            name
        )  # e4m3 has 3 bits: 0.036 at most, 0.02 on average
