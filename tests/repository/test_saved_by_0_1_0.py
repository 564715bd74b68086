"""Checkpoints that muon_plugin 0.1.0 saved (tests/data) are restored bit for bit: weights, momentum and AdamW's state.

The digests beside them are of the run that saved them, after three steps. (What further steps give depends on the
processor's bf16 products, so here only what is restored is compared.)
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.integers import build, config, weights

SAVED = Path(__file__).parent.parent / "data" / "saved_by_0.1.0"


def digest(tensor: Tensor) -> str:
    """Of its dtype and bits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(str(flat.dtype).encode() + flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def under_deepspeed(rank: int, folder: Path) -> dict[str, str]:
    engine = build(rank, config(1, "bf16"))
    engine.load_checkpoint(str(folder))
    found = {name: digest(tensor) for name, tensor in weights(engine).items()}
    for number, state in enumerate(engine.basic_optimizer.state.values()):
        found |= {f"state {number} {key}": digest(value) for key, value in state.items() if torch.is_tensor(value)}
    engine.destroy()
    return found


def under_megatron(rank: int, folder: Path) -> dict[str, str]:
    from tests.support.megatron_checkpoints import load
    from tests.support.megatron_model import Layout, full_masters, full_weights, named, optimizer_for
    from tests.support.megatron_model import build as build_megatron

    layout = Layout(tp=2)
    chunks = build_megatron(layout)
    with torch.no_grad():
        for _, p, _ in named(chunks):
            p.zero_()  # what is not restored shows
    optimizer = optimizer_for(chunks, layout)
    load(chunks, optimizer, "fully_reshardable", str(folder))
    whole = full_weights(chunks, layout) | full_masters(chunks, optimizer, layout)
    found = {name: digest(tensor) for name, tensor in whole.items()}
    for which, part in enumerate(optimizer.chained_optimizers):
        states = [part.optimizer.state[p] for group in part.optimizer.param_groups for p in group["params"]]
        for number, state in enumerate(states):
            found |= {f"state {which} {number} {key}": digest(value.float()) for key, value in state.items()}
    return found


@pytest.mark.parametrize(
    ("engine", "restore", "release"),
    [("deepspeed", under_deepspeed, None), ("megatron", under_megatron, "0.19.2")],
    ids=["DeepSpeed ZeRO-1", "Megatron torch_dist"],
)
def test_a_checkpoint_of_0_1_0_is_restored_bit_for_bit(ranks, tmp_path, engine, restore, release):
    folder = shutil.copytree(SAVED / engine, tmp_path / engine)  # engines may write beside what they load
    expected = json.loads((SAVED / f"{engine}.json").read_text())
    assert ranks(2, release).run(restore, folder) == expected
