"""The optimizer on NVMe, which DeepSpeed's swappers read and write: the bits of a run in memory, and no resuming.

TEST_NVME=1 runs it, where libaio is installed: DeepSpeed compiles its async_io for minutes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support.ranks import RankError

pytestmark = pytest.mark.skipif(
    not os.environ.get("TEST_NVME"), reason="DeepSpeed compiles async_io for minutes, with libaio: TEST_NVME=1 runs it"
)

#: A rank swaps its half of such a matrix, 2 MiB: the least is 1. Biases, in sub-groups of their own, are in memory.
WIDTH = 1024
PIPELINES = [{"pipeline_read": read, "pipeline_write": write} for read in (False, True) for write in (False, True)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.float().square().mean()


def settings(kind: str, folder: Path | None, **swapper: Any) -> dict[str, Any]:
    """Of a run whose optimizer is on NVMe, or in CPU memory where there is no folder."""
    offload: dict[str, Any] = {"device": "cpu"}
    if folder is not None:
        offload = {"device": "nvme", "nvme_path": str(folder), "buffer_count": 12, **swapper}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": kind, "params": {"lr": 0.01}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_optimizer": offload, "sub_group_size": WIDTH**2 // 2},
        "aio": {"block_size": 2**20, "queue_depth": 8},
    }


def losses(rank: int, config: dict[str, Any], saved: Path | None = None, resumes: bool = False) -> list[float]:
    """Of four steps; with `saved` a checkpoint is saved there after two, or with `resumes` loaded."""
    import deepspeed

    import muon_plugin

    muon_plugin.register()
    engine, *_ = deepspeed.initialize(model=Model(), config=config)
    swapper = engine.optimizer.optimizer_swapper
    assert swapper is None or len(swapper.swap_params_info) == 4  # each matrix is
    if resumes:
        engine.load_checkpoint(str(saved), tag="two")
    generator = torch.Generator().manual_seed(rank)
    found = []
    for step in range(4):
        x = torch.randn(2, WIDTH, generator=generator).bfloat16()
        if resumes and step < 2:
            continue
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        found.append(float(loss.detach()))
        if saved is not None and not resumes and step == 1:
            engine.save_checkpoint(str(saved), tag="two")
    return found


def converted(rank: int, config: dict[str, Any], folder: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    losses(rank, config, folder)
    dist.barrier()  # both have saved
    get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="two")


@pytest.fixture(scope="module")
def in_memory(ranks):
    return ranks(2).run(losses, settings("Muon", None))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_on_nvme_the_losses_are_those_in_memory(ranks, tmp_path, in_memory, pipeline):
    assert ranks(2).run(losses, settings("Muon", tmp_path, **pipeline)) == in_memory
    assert len(set(in_memory[0])) == 4


def test_buffers_of_a_pipelined_swapper_are_not_saved_as_weights(ranks, tmp_path):
    with pytest.raises(RankError, match=r"numels out of \d+ - something is wrong"):
        ranks(2).run(converted, settings("Muon", tmp_path / "nvme", **PIPELINES[-1]), tmp_path / "saved")


@pytest.mark.parametrize("pipeline", PIPELINES[::3])
def test_a_run_on_nvme_cannot_be_resumed(ranks, tmp_path, pipeline):
    """DeepSpeed's AdamW goes on with another loss, in silence; with Muon it is an error."""
    adamw, muon = (settings(kind, tmp_path / kind, **pipeline) for kind in ("AdamW", "Muon"))
    whole = ranks(2).run(losses, adamw, tmp_path / "saved")
    resumed = ranks(2).run(losses, adamw, tmp_path / "saved", True)
    for one, other in zip(whole, resumed):
        assert other[0] != pytest.approx(one[2], rel=0.1)  # of the weights of the start
        assert other[1] != pytest.approx(one[3], rel=0.1)
    with pytest.raises(RankError, match=r"device='nvme' restores neither.*before deepspeed.initialize"):
        ranks(2).run(losses, muon, tmp_path / "saved", True)
