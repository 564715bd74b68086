"""``--fp8-param-gather``: the engine quantizes main parameters into weights after the step, which is as it was.

Transformer Engine's types need a GPU (tests/gpu has those); here the weights are in bf16 and rounded to fp8's values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.support.combinations import in_turn, some
from tests.support.integers import differing
from tests.support.megatron_checkpoints import STEPS, first_half, second_half
from tests.support.megatron_model import Layout, trained

RELEASES = ("0.16.1", "0.19.2")


def rounded(values: Tensor) -> Tensor:
    return values.to(torch.float8_e4m3fn).to(torch.bfloat16)


def is_quantized(p: Tensor) -> bool:
    return p.dim() == 2 and p.dtype == torch.bfloat16 and not getattr(p, "is_embedding_or_output_parameter", False)


@torch.no_grad()
def quantize(weights: Any, mains: Any, starts: Any, group: Any) -> None:
    """As Megatron's quantize_param_shard: a rank writes its part, and None is for what it holds no part of."""
    for weight, main, start in zip(weights, mains, starts):
        if main is not None:
            weight.view(-1)[start : start + main.numel()].copy_(rounded(main))


@contextmanager
def quantized() -> Iterator[None]:
    """While it lasts, Megatron takes the matrices for Transformer Engine's: parts of them are None."""
    from megatron.core.optimizer import distrib_optimizer

    import muon_plugin.megatron.optimizer
    import muon_plugin.megatron.shards

    new = {"is_float8tensor": is_quantized}
    with (
        patch.multiple(distrib_optimizer, quantize_param_shard=quantize, **new),
        patch.multiple(muon_plugin.megatron.optimizer, **new),
        patch.multiple(muon_plugin.megatron.shards, **new),
    ):
        yield


FP8 = {"ddp": {"fp8_param_gather": True}}
RECIPE = {"fp8_recipe": "tensorwise"}
BITS = {"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16}


def in_fp8(rank: int, job: Any, *args: Any) -> Any:
    with quantized():
        return job(rank, *args)


CASES = [(2, {}, {"tp": 2}), (3, {}, {}), (2, BITS, {}), (4, {"muon_scalar_optimizer": "lion"}, {"tp": 2})]


@pytest.mark.parametrize(("release", "case"), in_turn(RELEASES, some(CASES, 2)))
def test_main_parameters_are_those_of_the_run_without_it(ranks, release, case):
    world, settings, cut = case
    found = ranks(world, release).run(in_fp8, trained, Layout(muon={**settings, **RECIPE}, **cut, **FP8))[0]
    plain = {"store_param_remainders": False, **settings} if settings is BITS else settings
    expected = ranks.alone(trained, Layout(muon=plain), megatron=release)
    masters = {name: value for name, value in expected.items() if name.endswith("(fp32)")}
    assert differing({name: found[name] for name in masters}, masters) == []
    few = 0
    for name, main in masters.items():
        name = name.removesuffix(" (fp32)")
        matrix = main.dim() == 2 and "embedding" not in name and "output_layer" not in name
        few += matrix
        assert torch.equal(found[name], rounded(main).float() if matrix else main.bfloat16().float()), name
    assert few == 16


@pytest.mark.parametrize(("release", "kind"), in_turn(RELEASES, some(["fully_reshardable", "dp_reshardable"], 1)))
def test_checkpoints_have_main_parameters(ranks, release, kind, tmp_path):
    """Saved with it, resumed without."""
    ranks(2, release).run(in_fp8, first_half, Layout(muon=RECIPE, **FP8), kind, str(tmp_path))
    found = ranks(4, release).run(second_half, Layout(), kind, str(tmp_path))[0]
    assert differing(found, ranks.alone(trained, Layout(), STEPS, megatron=release)) == []
