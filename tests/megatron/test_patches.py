"""Each patch, applied to the release it names, does what the hook does."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from tests.support import ROOT
from tests.support.combinations import FULL
from tests.support.integers import differing
from tests.support.megatron_model import Layout, build, config_for, full_masters, full_weights, step, trained
from tests.support.ranks import release

RELEASES = ("0.16.1", "0.19.2")


@pytest.fixture(scope="module", params=RELEASES if FULL else RELEASES[-1:])
def patched(request, tmp_path_factory):
    """(release, a patched copy of it)."""
    folder = tmp_path_factory.mktemp("patched")
    shutil.copytree(release(request.param) / "megatron", folder / "megatron")
    diff = ROOT / "patches" / f"megatron-core-{request.param}.patch"
    subprocess.run(["patch", "-p1", "--forward", "-i", str(diff)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return request.param, folder


def without_hooks(rank: int, layout: Layout, steps: int) -> dict:
    """As `trained`, in a Megatron of one's own that is patched."""
    import muon_plugin

    muon_plugin.unregister()
    from megatron.core.optimizer import get_megatron_optimizer

    assert get_megatron_optimizer.__module__ == "megatron.core.optimizer"
    chunks = build(layout)
    optimizer = get_megatron_optimizer(config_for(layout), chunks)
    for number in range(steps):
        step(chunks, optimizer, layout, number)
    return full_weights(chunks, layout) | full_masters(chunks, optimizer, layout)


def test_a_patched_tree_ends_in_the_same_bits(ranks, patched):
    version, folder = patched
    hooked = ranks.alone(trained, Layout(), 5, megatron=version)
    found = ranks(4, str(folder)).run(without_hooks, Layout(tp=2), 5)[0]
    assert differing(found, hooked) == []


def test_muon_is_precision_aware_in_a_patched_tree_too(ranks, patched):
    """Its OptimizerConfig, which wants Transformer Engine for AdamW, is not wrapped."""
    version, folder = patched
    layout = Layout(muon={"use_precision_aware_optimizer": True})
    hooked = ranks.alone(trained, layout, 3, megatron=version)
    assert differing(ranks(2, str(folder)).run(without_hooks, layout, 3)[0], hooked) == []


def clipped(rank: int, layout: Layout) -> float:
    """What Megatron's `clip_qk` returns after a step with QK-Clip, which Megatron itself would refuse to make."""
    import muon_plugin

    muon_plugin.unregister()
    from megatron.core.optimizer import get_megatron_optimizer, qk_clip
    from megatron.core.transformer.attention import Attention

    assert not hasattr(qk_clip.clip_qk, "__wrapped__")
    chunks = build(layout)
    chunks[0].config.qk_clip = True
    optimizer = get_megatron_optimizer(config_for(layout), chunks)
    for module in chunks[0].modules():
        if isinstance(module, Attention):
            module.core_attention.current_max_attn_logits = torch.full((8,), 150.0)
    step(chunks, optimizer, layout, 0)
    return qk_clip.clip_qk(chunks)


def test_a_patched_clip_qk_leaves_the_weights_to_muon(ranks, patched):
    _, folder = patched
    assert ranks(2, str(folder)).run(clipped, Layout()) == [150.0, 150.0]


@pytest.mark.skipif(not FULL, reason="FULL=1; test_pretrain.py goes through the same parser with our hooks")
def test_the_patched_command_line(patched):
    """0.19.2's wheel has the training code: its parser gets the plugin's flags, its checks let Muon through."""
    version, folder = patched
    if version == "0.16.1":
        pytest.skip("0.16.1's wheel has no megatron.training")
    checked = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMAND_LINE],
        env={"PYTHONPATH": f"{folder}:{ROOT}"} | {"RANK": "0", "WORLD_SIZE": "4", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert "muon True 0.95 simple" in checked.stdout, checked.stderr


COMMAND_LINE = """
import sys
from muon_plugin.megatron import on_cpu
on_cpu.install()
from megatron.training.arguments import parse_args, validate_args
sys.argv = ("pretrain_gpt.py --num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 "
    "--max-position-embeddings 8 --micro-batch-size 1 --train-iters 1 --lr 0.1 --tokenizer-type NullTokenizer "
    "--vocab-size 8 --optimizer muon --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
    "--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --muon-paper --bf16").split()
args = parse_args()
validate_args(args)
print(args.optimizer, args.use_distributed_optimizer, args.muon_momentum, args.muon_coefficient_type)
"""
