"""``--fp8-param-gather``: the engine quantizes main parameters into weights after the step, which is as it was.

Transformer Engine's types need a GPU (tests/gpu has those); here the weights are in bf16 and rounded to fp8's values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from muon_plugin.megatron.settings import Settings
from tests.support.combinations import in_turn, some
from tests.support.integers import differing
from tests.support.megatron_checkpoints import STEPS, first_half, second_half
from tests.support.megatron_model import VOCAB, Layout, trained

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


def is_vocabulary(p: Tensor) -> bool:
    return p.dtype == torch.bfloat16 and p.shape == (VOCAB, 24)


@contextmanager
def quantized(which: Callable[[Tensor], bool] = is_quantized) -> Iterator[None]:
    """While it lasts, Megatron takes these parameters for Transformer Engine's: parts of them are None."""
    from megatron.core.optimizer import distrib_optimizer

    import muon_plugin.megatron.optimizer
    import muon_plugin.megatron.shards

    new = {"is_float8tensor": which}
    with (
        patch.multiple(distrib_optimizer, quantize_param_shard=quantize, **new),
        patch.multiple(muon_plugin.megatron.optimizer, **new),
        patch.multiple(muon_plugin.megatron.shards, **new),
    ):
        yield


FP8 = {"ddp": {"fp8_param_gather": True}}
RECIPE = {"fp8_recipe": "tensorwise"}
BITS = {"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16}


def in_fp8(rank: int, job: Any, *args: Any, which: Callable[[Tensor], bool] = is_quantized) -> Any:
    with quantized(which):
        return job(rank, *args)


DELAYED = {**BITS, "fp8_recipe": "delayed"}  # under which main parameters of bf16 weights are kept as 16 bits
CASES = [
    (2, DELAYED, {}),
    (2, {}, {"tp": 2}),
    (3, {}, {}),
    (2, BITS, {}),
    (2, {**DELAYED, "optimizer_cpu_offload": True}, {"tp": 2}),
    (4, {"muon_scalar_optimizer": "lion"}, {"tp": 2}),
]


@pytest.mark.parametrize(("release", "case"), in_turn(RELEASES, some(CASES, 3)))
def test_main_parameters_are_those_of_the_run_without_it(ranks, release, case):
    world, settings, cut = case
    found = ranks(world, release).run(in_fp8, trained, Layout(muon={**RECIPE, **settings}, **cut, **FP8))[0]
    plain = {"store_param_remainders": False, **settings} if BITS.items() <= settings.items() else settings
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


def test_a_rank_without_fp8_weights_does_as_the_others(ranks, tmp_path):
    """The middle one of three holds neither the embedding's part nor the head's, and would have kept 16 bits."""
    job, layout = ranks(3, "0.19.2"), Layout(muon=DELAYED, **FP8)
    job.run(in_fp8, first_half, layout, "fully_reshardable", str(tmp_path), which=is_vocabulary)
    found = job.run(in_fp8, second_half, layout, "fully_reshardable", str(tmp_path), which=is_vocabulary)[0]
    plain = Layout(muon={**BITS, "store_param_remainders": False})
    expected = ranks.alone(trained, plain, STEPS, megatron="0.19.2")
    masters = {name: value for name, value in expected.items() if name.endswith("(fp32)")}
    assert differing({name: found[name] for name in masters}, masters) == []


@pytest.mark.parametrize("offload", [0.0, 0.5])
def test_the_table_says_what_stays(offload):
    config = SimpleNamespace(muon_paper=True, muon_split_qkv=True, bf16=True, **DELAYED)
    config.optimizer_cpu_offload, config.optimizer_offload_fraction = offload > 0, offload
    plain, quantized = Settings.from_config(config), Settings.from_config(config, fp8_weights=True)
    assert "the 16 bits that weights lack" in plain.describe()
    assert "16 bits" not in quantized.describe()
    assert (plain.frees, quantized.frees) == (True, False)
    assert quantized.copied_bytes(True)[0] < plain.copied_bytes(True)[0]
    assert ("of the moments in CPU memory" in quantized.describe()) == (offload > 0)


@pytest.mark.parametrize(("release", "kind"), in_turn(RELEASES, some(["fully_reshardable", "dp_reshardable"], 1)))
def test_checkpoints_have_main_parameters(ranks, release, kind, tmp_path):
    """Saved with it, resumed without."""
    ranks(2, release).run(in_fp8, first_half, Layout(muon=RECIPE, **FP8), kind, str(tmp_path))
    found = ranks(4, release).run(second_half, Layout(), kind, str(tmp_path))[0]
    assert differing(found, ranks.alone(trained, Layout(), STEPS, megatron=release)) == []
