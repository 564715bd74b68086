"""``--use-precision-aware-optimizer`` without Transformer Engine: what is kept of the state between steps."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from muon_plugin.megatron.precision import joined, split
from tests.support.combinations import in_turn, some
from tests.support.fused_adam import fused_adam
from tests.support.integers import differing
from tests.support.megatron_checkpoints import STEPS, first_half, load, second_half
from tests.support.megatron_model import (
    Layout,
    build,
    config_for,
    full_masters,
    full_weights,
    named,
    optimizer_for,
    step,
    trained,
)

RELEASES = ("0.16.1", "0.19.2")
WHOLE = {"use_precision_aware_optimizer": True, "store_param_remainders": False}
BITS = {"use_precision_aware_optimizer": True}
OFFLOADED = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
PART = {**BITS, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.4}
BF16 = {**BITS, "exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}


def rounded(masters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that keep the upper bits of these main parameters."""
    found = {}
    for name, main in masters.items():
        weight = torch.empty_like(main, dtype=torch.bfloat16)
        split(main.contiguous(), weight)
        found[name.removesuffix(" (fp32)")] = weight.float()
    return found


def test_a_weight_and_the_bits_that_it_lacks_are_the_main_parameter():
    bits = torch.arange(-(2**16), 2**16, dtype=torch.int32) * 32749 + 7  # over all exponents, signs, and ties
    ties = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16 + 2**15
    main = torch.cat([bits, ties]).view(torch.float32)
    weight = torch.empty_like(main, dtype=torch.bfloat16)
    lower = split(main, weight)
    number = ~main.isnan()
    assert torch.equal(joined(weight, lower).view(torch.int32)[number], main.view(torch.int32)[number])
    assert weight.isnan().equal(main.isnan())
    halfway = lower == torch.iinfo(torch.int16).min
    assert torch.equal(weight[number & ~halfway], main.bfloat16()[number & ~halfway])
    assert (weight[number & halfway].abs().float() > main[number & halfway].abs()).all()


@pytest.mark.parametrize(("release", "settings"), in_turn(RELEASES, [WHOLE, BITS, PART, OFFLOADED]))
def test_in_fp32_no_bit_is_another_one(ranks, release, settings):
    """Main parameters are those of the run without it; so are the weights, of which ties are rounded otherwise."""
    found = ranks(2, release).run(trained, Layout(tp=2, muon=settings))[0]
    plain = ranks.alone(trained, Layout(), megatron=release)
    masters = {name: value for name, value in plain.items() if name.endswith("(fp32)")}
    assert len(masters) == len(plain) / 2
    assert differing({name: found[name] for name in masters}, masters) == []
    weights = (
        rounded(masters) if settings in (BITS, PART) else {name: plain[name] for name in plain.keys() - masters.keys()}
    )
    assert differing({name: found[name] for name in weights}, weights) == []


LAYOUTS = [
    (4, Layout(tp=2, grad_reduce_in_fp32=False, muon={**BF16, "main_grads_dtype": torch.bfloat16})),
    (3, Layout(muon=BF16)),
    (4, Layout("moe", ep=2, muon={**BF16, "muon_scalar_optimizer": "lion"})),
    (2, Layout(dtype="fp16", muon={**BF16, "muon_offload": True})),
    (2, Layout(dtype="fp32", muon=BF16)),
]


@pytest.mark.parametrize(("release", "case"), in_turn(RELEASES, some(LAYOUTS, 2)))
def test_layouts_change_no_bit(ranks, release, case):
    world, layout = case
    alone = Layout(layout.model, dtype=layout.dtype, grad_reduce_in_fp32=layout.grad_reduce_in_fp32, muon=layout.muon)
    assert differing(ranks(world, release).run(trained, layout)[0], ranks.alone(trained, alone, megatron=release)) == []


KINDS = ["fully_reshardable", "dp_reshardable", "legacy"]
FROM_TO = [(BITS, {}), ({}, PART), (BF16, BF16)]


@pytest.mark.parametrize(("release", "case"), in_turn(RELEASES, some(zip(KINDS, FROM_TO), 2)))
def test_resumed_with_and_without(ranks, release, case, tmp_path):
    """Checkpoints have fp32 throughout, so they do not depend on it."""
    kind, (before, after) = case
    ranks(2, release).run(first_half, Layout(muon=before), kind, str(tmp_path))
    found = ranks(4, release).run(second_half, Layout(muon=after), kind, str(tmp_path))[0]
    straight = ranks.alone(trained, Layout(muon=BF16 if before is BF16 else {}), STEPS, megatron=release)
    masters = {name for name in straight if name.endswith("(fp32)")}
    assert differing({name: found[name] for name in masters}, {name: straight[name] for name in masters}) == []


def loaded(rank: int, layout: Layout, kind: str, folder: str, stand_in: bool, **options: Any) -> Any:
    """The main parameters right after a checkpoint was loaded; then a step."""
    with fused_adam() if stand_in else nullcontext():
        chunks = build(layout)
        with torch.no_grad():
            for _, p, _ in named(chunks):
                p.zero_()
        optimizer = optimizer_for(chunks, layout, **options)
        if options:  # Megatron's own has no state before
            step(chunks, optimizer, layout, 0)
        load(chunks, optimizer, kind, folder)
        found = full_weights(chunks, layout) | _mains(chunks, optimizer, layout)
        step(chunks, optimizer, layout, 5)
    return found


def _mains(chunks: Any, optimizer: Any, layout: Layout) -> dict[str, Tensor]:
    """Also of Megatron's AdamW whose FusedAdam has int16 bits."""
    for part in optimizer.chained_optimizers:
        for p in part.optimizer.state:
            kept = part.optimizer.state[p].get("master_param")
            if kept is not None and kept.dtype == torch.int16:
                part.optimizer.state[p]["master_param"] = joined(p, kept)
    return full_masters(chunks, optimizer, layout)


def saved_by_fused_adam(rank: int, layout: Layout, kind: str, folder: str, **options: Any) -> Any:
    from tests.support.megatron_checkpoints import save

    with fused_adam():
        chunks = build(layout)
        optimizer = optimizer_for(chunks, layout, **options)
        for number in range(3):
            step(chunks, optimizer, layout, number)
        save(chunks, optimizer, kind, folder)
        return full_weights(chunks, layout) | _mains(chunks, optimizer, layout)


ADAM = {"optimizer": "adam"}


@pytest.mark.parametrize(
    ("release", "case"),
    in_turn(
        RELEASES,
        some(
            [
                ("fully_reshardable", {**ADAM, **BITS}, {}),
                ("dp_reshardable", {**ADAM, **BITS}, BITS),
                ("dp_reshardable", {**ADAM, **WHOLE}, BF16),
                ("fully_reshardable", BITS, {**ADAM, **WHOLE}),
            ],
            2,
        ),
    ),
)
@pytest.mark.parametrize("stand_in", some([True, False], 1))
def test_megatrons_precision_aware_adamw_and_muon_take_each_other_over(ranks, release, case, stand_in, tmp_path):
    """FusedAdam's checkpoints have the bits that weights lack in the place of main parameters: they are put together.

    With store_param_remainders Megatron's AdamW resumes from no checkpoint that has main parameters, its own included.
    """
    kind, before, after = case
    if "optimizer" in after and not stand_in:
        pytest.skip("Megatron's AdamW is precision-aware only with FusedAdam")
    pool = ranks(2, release)
    saved = pool.run(saved_by_fused_adam, Layout(muon=before), kind, str(tmp_path))[0]
    options = ADAM if "optimizer" in after else {}
    found = pool.run(loaded, Layout(muon=after), kind, str(tmp_path), stand_in, **options)[0]
    masters = {name: value for name, value in saved.items() if name.endswith("(fp32)")}
    assert differing({name: found[name] for name in masters}, masters) == []
    weights = rounded(masters) if after in (BITS, BF16) else {name: saved[name] for name in saved.keys() - masters}
    assert differing({name: found[name] for name in weights}, weights) == []


def held(rank: int, layout: Layout) -> Any:
    """Bytes between steps: of moments, of main parameters, of those what is kept elsewhere; elements of both halves."""
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout)
    step(chunks, optimizer, layout, 0)
    part = optimizer.chained_optimizers[0]
    inner = part.optimizer
    moments = sum(t.nbytes for state in inner.state.values() for name, t in state.items() if name != "step")
    mains = [main for group in part.shard_fp32_from_float16_groups for main in group]
    mains_bytes = sum(main.untyped_storage().nbytes() for main in mains) + inner.kept.nbytes
    matrices = sum(p.numel() for p in inner.halves.muon.tensors)
    return moments, mains_bytes, inner.kept.nbytes, matrices, sum(p.numel() for p in inner.halves.adamw.tensors)


@pytest.mark.parametrize(
    ("settings", "first", "second", "main"), [({}, 4, 4, 4), (BITS, 4, 4, 2), (BF16, 2, 2, 2), (OFFLOADED, 4, 4, 4)]
)
def test_bytes_between_steps(ranks, release, settings, first, second, main):
    moments, mains, freed, matrices, rest = ranks(1, release).run(held, Layout(muon=settings))[0]
    assert freed == (mains if settings else 0)
    assert moments == first * (matrices + rest) + second * rest
    assert mains == main * (matrices + rest)


def reloaded(rank: int, layout: Layout) -> Any:
    """Main parameters after the model got other weights, as when a checkpoint is loaded without the optimizer."""
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout)
    step(chunks, optimizer, layout, 0)
    with torch.no_grad():
        for _, p, _ in named(chunks):
            p.fill_(0.3)
    optimizer.reload_model_params()
    step_free = full_weights(chunks, layout), full_masters(chunks, optimizer, layout)
    step(chunks, optimizer, layout, 1)
    return step_free


def test_weights_that_are_loaded_without_the_optimizer_become_main_parameters(ranks, release):
    weights, masters = ranks(2, release).run(reloaded, Layout(muon=BITS))[0]
    assert all(torch.equal(masters[f"{name} (fp32)"], value) for name, value in weights.items())
    assert {float(value.min()) for value in weights.values()} == {float(torch.tensor(0.3).bfloat16())}


def config(rank: int, **options: Any) -> Any:
    import muon_plugin

    muon_plugin.register("megatron")
    made = config_for(Layout(), **BF16, **options)
    return made.use_precision_aware_optimizer, made.exp_avg_dtype, made.store_param_remainders


def test_megatrons_config_needs_no_transformer_engine_for_muon_and_does_for_adamw(ranks, release):
    from tests.support.ranks import RankError

    assert ranks(1, release).run(config)[0] == (True, torch.bfloat16, True)
    with pytest.raises(RankError, match=r"FusedAdam|NoneType"):  # 0.16.1 asks for the version of what is not there
        ranks(1, release).run(config, optimizer="adam")
