"""QK-Clip under Megatron: the report's rule on the distributed optimizer's shards, the same bits on every layout."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.combinations import FULL, in_turn, some
from tests.support.integers import differing
from tests.support.megatron_model import (
    Layout,
    build,
    fill,
    full_masters,
    full_weights,
    optimizer_for,
    parallel,
    set_gradients,
    step,
)
from tests.support.ranks import RankError

RELEASES = ("0.16.1", "0.19.2")
THRESHOLD, ALPHA, STEPS, LAYERS, HEADS = 100.0, 0.3, 3, 4, 8


def logits(number: int) -> Tensor:
    """(layers, heads): the largest logits of a step; about half of them above the threshold."""
    return THRESHOLD * (0.2 + 1.6 * torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(number)))


def attentions(chunks: list[Any]) -> list[Any]:
    from megatron.core.transformer.attention import Attention

    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Attention)]


def switched_on(chunks: list[Any], on: bool = True) -> list[Any]:
    """As ``--qk-clip --qk-clip-threshold 100 --qk-clip-alpha 0.3`` set Megatron's config."""
    for config in {id(c.config): c.config for c in [*chunks, *attentions(chunks)]}.values():
        config.qk_clip, config.qk_clip_threshold, config.qk_clip_alpha = on, THRESHOLD, ALPHA
    return chunks


def hand_over(chunks: list[Any], layout: Layout, number: int) -> None:
    """As if attention had run: the largest logit of a head was seen on one rank of DP and CP, another for each head."""
    from megatron.core import parallel_state as mpu

    group, tp = mpu.get_data_parallel_group(with_context_parallel=True), mpu.get_tensor_model_parallel_rank()
    here = torch.arange(HEADS) % group.size() == group.rank()
    for module in attentions(chunks):
        whole = logits(number)[module.layer_number - 1]
        held = HEADS // layout.tp
        seen = torch.where(here, whole, whole - 300)[tp * held : (tp + 1) * held]
        module.core_attention.current_max_attn_logits = seen


def trained(rank: int, layout: Layout, steps: int = STEPS) -> dict[str, Tensor]:
    chunks = switched_on(build(layout))
    optimizer = optimizer_for(chunks, layout)
    for number in range(steps):
        hand_over(chunks, layout, number)
        step(chunks, optimizer, layout, number)
        assert all(module.core_attention.current_max_attn_logits is None for module in attentions(chunks))
    return full_weights(chunks, layout) | full_masters(chunks, optimizer, layout)


@torch.no_grad()
def clip(weights: dict[str, Tensor], groups: int, number: int) -> None:
    """The report's rule on whole weights, head by head: query heads, key and value of a query group, then the next."""
    shared, width = HEADS // groups, 6
    for layer in range(LAYERS):
        for leaf in ("weight", "bias"):
            p = weights.get(f"decoder.layers.{layer}.self_attention.linear_qkv.{leaf}")
            for group in range(groups if p is not None else 0):
                largest = float(logits(number)[layer, group * shared : (group + 1) * shared].max())
                if largest > THRESHOLD:
                    start, gamma = group * (shared + 2) * width, THRESHOLD / largest
                    p[start : start + shared * width] *= gamma**ALPHA
                    p[start + shared * width : start + (shared + 1) * width] *= gamma ** (1 - ALPHA)


def reference(rank: int, layout: Layout, steps: int = STEPS) -> dict[str, Tensor]:
    """One process in fp32, where weights and masters are the same: Muon without QK-Clip, then the rule."""
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout)
    named = {name.removeprefix("module.").removeprefix("module."): p for name, p in chunks[0].named_parameters()}
    for number in range(steps):
        step(chunks, optimizer, layout, number)
        clip(named, {"few_groups": 2, "gelu": 8}.get(layout.model, 4), number)
    return full_weights(chunks, layout) | full_masters(chunks, optimizer, layout)


def latent(rank: int, layout: Layout, clips: bool) -> dict[str, Tensor]:
    """Multi-head latent attention, by the plugin or by the rule written out."""
    model, config = real(layout, True)
    fill(model, layout)
    config.qk_clip, config.qk_clip_threshold, config.qk_clip_alpha = clips, THRESHOLD, ALPHA
    chunks = wrapped(model, config)
    optimizer = optimizer_for(chunks, layout)
    named = dict(model.named_parameters())
    for number in range(STEPS):
        for module in attentions(chunks):
            whole = logits(number)[module.layer_number - 1, :4]
            held, first = 4 // layout.tp, 4 // layout.tp * (dist.get_rank() % layout.tp)
            module.core_attention.current_max_attn_logits = whole[first : first + held] if clips else None
        step(chunks, optimizer, layout, number)
        for layer, head in [(layer, head) for layer in range(2) for head in range(4) if not clips]:
            gamma = min(1.0, THRESHOLD / float(logits(number)[layer, head]))
            at = f"decoder.layers.{layer}.self_attention.linear"
            with torch.no_grad():
                query = named[f"{at}_q_up_proj.weight"][10 * head : 10 * (head + 1)]
                query[:6] *= gamma**ALPHA
                query[6:] *= gamma
                named[f"{at}_kv_up_proj.weight"][11 * head : 11 * head + 6] *= gamma ** (1 - ALPHA)
    return full_weights(chunks, layout)


def test_latent_attention(ranks):
    """(0.16.1 builds none without Transformer Engine.)"""
    expected = ranks.alone(latent, Layout(dtype="fp32"), False, megatron="0.19.2")
    for found in ranks(4, "0.19.2").run(latent, Layout(dtype="fp32", tp=2), True):
        assert differing(found, expected) == []


CASES = {
    "one process": (1, Layout(dtype="fp32")),
    "TP 2 x DP 2": (4, Layout(dtype="fp32", tp=2)),
    "PP 2 x DP 2": (4, Layout(dtype="fp32", pp=2)),
    "virtual stages": (2, Layout(dtype="fp32", pp=2, vp=2)),
    "TP 4, more than query groups": (4, Layout("few_groups", dtype="fp32", tp=4)),
    "biases, TP 2": (4, Layout("gelu", dtype="fp32", tp=2)),
    "context parallel": (4, Layout(dtype="fp32", tp=2, cp=2)),
    "two instances": (4, Layout(dtype="fp32", instances=2)),
    "experts, EP 2": (2, Layout("moe", dtype="fp32", ep=2)),
}


@pytest.mark.parametrize(("release", "case"), in_turn(RELEASES, some(CASES, 3)))
def test_weights_after_clipping_are_the_plain_references(ranks, release, case):
    world, layout = CASES[case]
    expected = ranks.alone(reference, Layout(layout.model, dtype="fp32"), megatron=release)
    for rank, found in enumerate(ranks(world, release).run(trained, layout)):
        assert differing(found, expected) == [], f"rank {rank}"


@pytest.mark.parametrize(("release", "dtype"), in_turn(RELEASES, ["bf16", "fp16"]))
def test_masters_of_16_bit_weights_are_clipped_before_they_are_gathered(ranks, release, dtype):
    layout = Layout(dtype=dtype, tp=2, overlap_param_gather=True, overlap_grad_reduce=True)
    expected = ranks.alone(trained, Layout(dtype=dtype), megatron=release)
    for found in ranks(4, release).run(trained, layout):
        assert differing(found, expected) == []


def test_megatrons_own_clip_qk_is_replaced(ranks, release):
    """It returns the largest logit for Megatron's log; it changes nothing; unregister gives Megatron its own back."""
    for changed, returned, restored in ranks(2, release).run(replaced, Layout(dtype="fp32")):
        assert changed == []
        assert returned == pytest.approx(float(logits(0).max()))
        assert restored


def replaced(rank: int, layout: Layout) -> Any:
    import muon_plugin

    muon_plugin.unregister()
    from megatron.core.optimizer import qk_clip

    original = qk_clip.clip_qk
    chunks = switched_on(build(layout))
    optimizer = optimizer_for(chunks, layout)
    assert qk_clip.clip_qk is not original
    hand_over(chunks, layout, 0)
    step(chunks, optimizer, layout, 0)
    before = full_weights(chunks, layout)
    returned = qk_clip.clip_qk(chunks)
    changed = differing(before, full_weights(chunks, layout))
    muon_plugin.unregister()
    return changed, returned, qk_clip.clip_qk is original


def test_an_overflow_clips_nothing_and_its_logits_are_forgotten(ranks, release):
    for same, seen in ranks(2, release).run(overflowing, Layout(dtype="fp16")):
        assert same
        assert seen == pytest.approx([float(of_layer.max()) for of_layer in logits(0)])


def overflowing(rank: int, layout: Layout) -> Any:
    chunks = switched_on(build(layout))
    optimizer = optimizer_for(chunks, layout)
    before = full_weights(chunks, layout)
    hand_over(chunks, layout, 5)
    set_gradients(chunks, layout, 0, math.inf)
    assert not optimizer.step()[0]
    same = differing(before, full_weights(chunks, layout)) == []
    hand_over(chunks, layout, 0)
    step(chunks, optimizer, layout, 0)
    return same, [logit for _, logit, _ in optimizer._muon_clip.last]


def real(layout: Layout, multi_latent: bool = False, **options: Any) -> Any:
    """A small GPT whose forward pass runs, on Megatron's local attention."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    parallel(layout)
    sizes = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
    plain = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cpu_initialization": True}
    plain |= {"bias_dropout_fusion": False, "masked_softmax_fusion": False, "gradient_accumulation_fusion": False}
    plain |= {"tensor_model_parallel_size": layout.tp, "add_bias_linear": False}
    kind = TransformerConfig
    if multi_latent:
        kind = MLATransformerConfig
        sizes |= {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 5}
        sizes |= {"multi_latent_attention": True, "apply_rope_fusion": False, "rope_type": "rope"}
    else:
        sizes |= {"num_query_groups": 2}
    config = kind(**{**sizes, **plain, **options})
    torch.manual_seed(1)
    spec = get_gpt_layer_local_spec(multi_latent_attention=multi_latent)
    if multi_latent:
        spec.submodules.self_attention.submodules.core_attention = latent_core()
    return GPTModel(config, spec, 40, 16, position_embedding_type="rope"), config


def latent_core() -> Any:
    """Megatron's local attention for latent attention, which Megatron itself runs on Transformer Engine's alone."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class LatentCore(DotProductAttention):
        def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.hidden_size_per_partition = self.config.v_head_dim * self.num_attention_heads_per_partition

    return LatentCore


def wrapped(model: Any, config: Any) -> list[Any]:
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    ddp, extra = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True), {}
    if hasattr(DistributedOptimizer, "compute_full_param_layout"):
        size, own = mpu.get_data_parallel_group().size(), [p for p in model.parameters() if p.requires_grad]
        extra["full_param_layout"] = DistributedOptimizer.compute_full_param_layout(
            own, None, size, ddp, expert_data_parallel_world_size=mpu.get_expert_data_parallel_group().size()
        )
    return [DistributedDataParallel(config=config, ddp_config=ddp, module=model, **extra)]


def forward(model: Any, seed: int) -> Any:
    tokens = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(seed))
    positions, hidden = torch.arange(16).expand(2, 16), torch.ones(1, 1, 16, 16).triu(1).bool()
    return model(tokens, positions, hidden, labels=tokens).mean()


def grown(rank: int, layout: Layout, threshold: float, multi_latent: bool = False) -> list[float]:
    """The largest logit in each step of a real run whose attention is sharp and whose rate is too large."""
    model, config = real(layout, multi_latent)
    config.qk_clip, config.qk_clip_threshold = True, threshold
    scale, lr, steps = (63, 0.015, 24) if multi_latent else (37, 0.03, 20)
    with torch.no_grad():  # the logits of small weights would grow by more than half in a step
        for name, p in model.named_parameters():
            p.mul_(scale if "linear_q" in name or "kv_up" in name else 1)
    chunks = wrapped(model, config)
    options = {"lr": lr, "weight_decay": 0.0, "muon_extra_scale_factor": 0.2, "muon_momentum": 0.95}
    optimizer = optimizer_for(chunks, dataclasses.replace(layout, dtype="fp32"), **options)
    seen = []
    for _ in range(steps):
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        chunks[0].train()
        forward(chunks[0], dist.get_rank() // layout.tp).backward()
        chunks[0].finish_grad_sync()
        optimizer.step()
        seen.append(max(logit for _, logit, _ in optimizer._muon_clip.last))
        chunks[0].eval()
        with torch.no_grad():  # does not count
            forward(chunks[0], 7)
        assert model.decoder.layers[0].self_attention.core_attention.current_max_attn_logits is None
    return seen


GROWN = [("0.16.1", False), ("0.19.2", True), ("0.19.2", False)]  # 0.16.1 has no latent attention on the CPU


@pytest.mark.skipif(not FULL, reason="FULL=1; deepspeed/test_qk_clip.py has the run under DeepSpeed")
@pytest.mark.parametrize(("release", "multi_latent"), GROWN)
def test_logits_that_would_grow_past_100_stay_below(ranks, release, multi_latent):
    """A clipped head was above the threshold in one step, by no more than the logits grow in one.

    The largest of all steps differs between processors, whose sums are in another order; the mean does by less.
    """
    layout = Layout(tp=2)
    without, default, lower = (ranks(4, release).run(grown, layout, at, multi_latent) for at in (1e9, 100, 70))
    assert all(found == without[0] for found in without), "the maximum is that of all ranks"
    unclipped, clipped, clipped_lower = (statistics.mean(found[0][-10:]) for found in (without, default, lower))
    assert unclipped > 116, str(without[0])
    assert clipped < min(115, 0.9 * unclipped), f"{default[0]}, unclipped {without[0]}"
    assert 100 < max(default[0]) < max(without[0]), f"{default[0]}, unclipped {without[0]}"
    assert clipped_lower < 80, str(lower[0])


def test_the_local_attention_keeps_what_its_softmax_gets(ranks, release):
    for found, expected in ranks(1, release).run(compared, Layout()):
        torch.testing.assert_close(found, expected)


def compared(rank: int, layout: Layout) -> Any:
    model, config = real(layout, window_size=(4, 0), window_attn_skip_freq=2)
    config.qk_clip = True
    optimizer_for(wrapped(model, config), dataclasses.replace(layout, dtype="fp32"))
    cores = [layer.self_attention.core_attention for layer in model.decoder.layers]
    expected = []

    def seen(module: Any, args: Any, kwargs: Any) -> None:
        scores, hidden = args[:2]
        scores = scores.detach().clone()
        if module.window_size is not None:
            at, to = torch.arange(16)[:, None], torch.arange(16)[None]
            hidden = (to > at) | (to < at - module.window_size[0])
        expected.append(scores.masked_fill(hidden, -math.inf).amax((0, 2, 3)))

    for core in cores:
        core.scale_mask_softmax.register_forward_pre_hook(seen, with_kwargs=True)
    forward(model.train(), 0)
    return torch.stack([core.current_max_attn_logits for core in cores]), torch.stack(expected)


REFUSED = [
    ({"qk_clip_threshold": 0}, "--qk-clip-threshold 0 is not valid; allowed: a number above 0"),
    ({"qk_clip_alpha": -1}, "--qk-clip-alpha -1 is not valid; allowed: a number from 0 to 1"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED)
def test_wrong_settings_are_refused_on_every_rank(ranks, values, words):
    with pytest.raises(RankError) as raised:
        ranks(2, "0.19.2").run(refused, Layout(), values)
    assert all(error is not None and error[0] == "ValueError" and words in error[1] for error in raised.value.errors)


def refused(rank: int, layout: Layout, values: dict[str, Any]) -> None:
    chunks = switched_on(build(layout))
    for key, value in values.items():
        setattr(chunks[0].config, key, value)
    optimizer_for(chunks, layout)


@pytest.mark.parametrize("release", RELEASES)
def test_qk_norm_and_unknown_cores_are_refused(ranks, release):
    norm, core = ranks(1, release).run(unclippable, Layout())[0]
    assert "do not depend on the size of the weights" in norm
    assert "which does not keep its largest logits" in core


def unclippable(rank: int, layout: Layout) -> list[str]:
    words = []
    for change in ("norm", "core"):
        chunks = switched_on(build(layout))
        for module in attentions(chunks):
            if change == "norm":
                module.q_layernorm = torch.nn.LayerNorm(6)
            else:
                module.core_attention = torch.nn.Identity()
        try:
            optimizer_for(chunks, layout)
        except ValueError as error:
            words.append(str(error))
    return words


def test_the_log(ranks):
    lines = ranks(4, "0.19.2").run(logged, Layout(tp=2, pp=2))
    assert lines[:3] == [None] * 3
    found = lines[3]
    values = {name: value for name, value in found.items() if "max_logit" in name}
    expected = {f"muon/max_logit/decoder.layers.{n}": float(values.max()) for n, values in enumerate(logits(0))}
    assert values == pytest.approx(expected)
    groups = logits(0).view(LAYERS, 4, 2).amax(2)
    assert found["muon/clipped_heads"] == 2 * int((groups > THRESHOLD).sum())


def logged(rank: int, layout: Layout) -> Any:
    import io

    from megatron.training import global_vars

    chunks = switched_on(build(layout))
    optimizer = optimizer_for(chunks, layout)
    written: list[dict[str, float]] = []
    printed = io.StringIO()
    args = SimpleNamespace(iteration=0, curr_iteration=0, log_interval=1, train_iters=1)
    last = rank == dist.get_world_size() - 1
    global_vars._GLOBAL_ARGS = args
    if last:
        global_vars._GLOBAL_WANDB_WRITER = SimpleNamespace(log=lambda values, at: written.append(values))
    try:
        hand_over(chunks, layout, 0)
        with contextlib.redirect_stdout(printed):
            step(chunks, optimizer, layout, 0)
    finally:
        global_vars._GLOBAL_ARGS = global_vars._GLOBAL_WANDB_WRITER = None
    if last:
        assert re.search(r"clipped_heads \d+ \| max_logit 1\d\d", printed.getvalue()), printed.getvalue()
    return written[0] if last else None


@pytest.mark.parametrize("release", RELEASES)
def test_bits_without_qk_clip_are_those_of_a_threshold_that_is_never_reached(ranks, release):
    on, off = ranks(2, release).run(never, Layout())[0]
    assert differing(on, off) == []


def never(rank: int, layout: Layout) -> list[dict[str, Tensor]]:
    found = []
    for on in (True, False):
        chunks = switched_on(build(layout), on)
        chunks[0].config.qk_clip_threshold = 1e9
        optimizer = optimizer_for(chunks, layout)
        hand_over(chunks, layout, 0)
        step(chunks, optimizer, layout, 0)
        found.append(full_weights(chunks, layout))
    return found
