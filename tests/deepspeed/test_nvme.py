"""The optimizer on NVMe, which DeepSpeed's swappers read and write: the bits of a run in memory, resumed as well.

TEST_NVME=1 runs it, where libaio is installed: DeepSpeed compiles its async_io for minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.jobs import environment
from tests.support.ranks import RankError, Ranks

pytestmark = pytest.mark.skipif(
    not os.environ.get("TEST_NVME"), reason="DeepSpeed compiles async_io for minutes, with libaio: TEST_NVME=1 runs it"
)

#: A rank swaps its half of such a matrix, or embedding, 2 MiB: the least is 1. The biases' sub-groups are in memory.
WIDTH = 1024
PIPELINES = [{"pipeline_read": read, "pipeline_write": write} for read in (False, True) for write in (False, True)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.embed(torch.arange(len(x)))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.float().square().mean()


def settings(kind: str, folder: Path | None, **swapper: Any) -> dict[str, Any]:
    """Of a run whose optimizer is on NVMe, or in CPU memory where there is no folder."""
    offload: dict[str, Any] = {"device": "cpu"}
    if folder is not None:
        offload = {"device": "nvme", "nvme_path": str(folder), "buffer_count": 12, **swapper}
    few = {"ns_steps": 1} if kind == "Muon" else {}  # some CPUs take half a minute for the five of such a matrix
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": kind, "params": {"lr": 0.01, **few}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_optimizer": offload, "sub_group_size": WIDTH**2 // 2},
        "aio": {"block_size": 2**20, "queue_depth": 8},
    }


def engine_of(config: dict[str, Any]) -> Any:
    import deepspeed

    import muon_plugin

    muon_plugin.register()
    engine, *_ = deepspeed.initialize(model=Model(), config=config)
    swapper = engine.optimizer.optimizer_swapper
    if swapper is not None:  # each matrix is on NVMe, and the embedding, or all are smaller than a block
        assert len(swapper.swap_params_info) == (5 if config["aio"]["block_size"] == 2**20 else 0)
    return engine


def stepped(engine: Any, rank: int, steps: range) -> list[float]:
    found = []
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + rank)
        loss = engine(torch.randn(2, WIDTH, generator=generator).to(engine.get_data_types()[0]))
        engine.backward(loss)
        engine.step()
        found.append(float(loss.detach()))
    return found


def losses(rank: int, config: dict[str, Any], saved: Path | None = None, at: int = 2) -> list[float]:
    """Of four steps; with `saved` a checkpoint is saved there after `at` of them."""
    engine = engine_of(config)
    found = stepped(engine, rank, range(at))
    if saved is not None:
        engine.save_checkpoint(str(saved), tag="two")
    return found + stepped(engine, rank, range(at, 4))


def resumed(rank: int, config: dict[str, Any], saved: Path, at: int = 2) -> list[float]:
    engine = engine_of(config)
    assert engine.load_checkpoint(str(saved), tag="two")[0] is not None
    return stepped(engine, rank, range(at, 4))


def scales(rank: int, config: dict[str, Any], saved: Path, resumes: bool = False) -> list[float]:
    """The loss scale before each of four steps, or of the last two."""
    engine, found = engine_of(config), []
    if resumes:
        engine.load_checkpoint(str(saved), tag="two")
    for number in range(2 * resumes, 4):
        found.append(float(engine.optimizer.loss_scale))
        stepped(engine, rank, range(number, number + 1))
        if number == 1:
            engine.save_checkpoint(str(saved), tag="two")
    return found


def gone_back(rank: int, config: dict[str, Any], saved: Path) -> tuple[list[float], list[float]]:
    """The losses of two steps after a checkpoint, and again after it was loaded into the same engine."""
    engine = engine_of(config)
    assert engine.load_checkpoint(str(saved)) == (None, None)  # there is none yet
    stepped(engine, rank, range(2))
    engine.save_checkpoint(str(saved), tag="two")
    first = stepped(engine, rank, range(2, 4))
    engine.load_checkpoint(str(saved), tag="two")
    return first, stepped(engine, rank, range(2, 4))


def set_and_saved(rank: int, config: dict[str, Any], saved: Path) -> None:
    from deepspeed.utils import safe_set_full_fp32_param

    engine = engine_of(config)
    stepped(engine, rank, range(1))
    for number, p in enumerate(engine.module.parameters()):
        safe_set_full_fp32_param(p, torch.full(tuple(p.ds_shape), float(number)))
    engine.save_checkpoint(str(saved), tag="two")


def masters(rank: int, config: dict[str, Any], saved: Path) -> list[tuple[float, float]]:
    """The least and the largest element of each, after it is loaded."""
    from deepspeed.utils import safe_get_full_fp32_param

    engine = engine_of(config)
    engine.load_checkpoint(str(saved), tag="two")
    found = [safe_get_full_fp32_param(p) for p in engine.module.parameters()]
    return [(float(p.min()), float(p.max())) for p in found]


def of_adamw(rank: int, adamw: dict[str, Any], muon: dict[str, Any], saved: Path) -> None:
    engine = engine_of(adamw)
    engine.save_checkpoint(str(saved), tag="two")
    engine.destroy()
    resumed(rank, muon, saved)


def converted(rank: int, saved: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    get_fp32_state_dict_from_zero_checkpoint(str(saved), tag="two")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Before ranks wait for it, which give up after minutes, and leave a lock."""
    build = (
        "from deepspeed.ops import op_builder; op_builder.AsyncIOBuilder().load(); op_builder.CPUAdamBuilder().load()"
    )
    subprocess.run([sys.executable, "-c", build], check=True, env=environment())


@pytest.fixture(scope="module")
def in_memory(ranks):
    return ranks(2).run(losses, settings("Muon", None))


def anew(function: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
    """In processes of its own: DeepSpeed names files by the number of parameters that a process has made before."""
    pool = Ranks(world)
    try:
        return pool.run(function, *args)
    finally:
        pool.close()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_on_nvme_the_losses_are_those_in_memory(ranks, tmp_path, in_memory, pipeline):
    assert ranks(2).run(losses, settings("Muon", tmp_path, **pipeline)) == in_memory
    assert len(set(in_memory[0])) == 4


@pytest.mark.parametrize(("pipeline", "at"), [(PIPELINES[0], 2), (PIPELINES[3], 2), (PIPELINES[0], 0)])
def test_a_run_on_nvme_is_resumed_bit_for_bit(tmp_path, in_memory, pipeline, at):
    """What is in memory, too: the biases. Before the first step nothing has state."""
    nvme, saved = [tmp_path / "one", tmp_path / "other"], tmp_path / "saved"
    anew(losses, settings("Muon", nvme[0], **pipeline), saved, at)
    assert anew(resumed, settings("Muon", nvme[1], **pipeline), saved, at) == [each[at:] for each in in_memory]


def test_the_loss_scale_is_restored(tmp_path):
    """In fp16, whose first scale makes the first step overflow."""
    fp16 = {"bf16": {"enabled": False}, "fp16": {"enabled": True, "initial_scale_power": 31, "hysteresis": 1}}
    nvme, saved = [settings("Muon", tmp_path / name) | fp16 for name in ("one", "other")], tmp_path / "saved"
    whole = anew(scales, nvme[0], saved)
    assert whole[0][0] > whole[0][1]
    assert anew(scales, nvme[1], saved, True) == [each[2:] for each in whole]


def test_deepspeeds_adamw_goes_on_otherwise_without_a_word(tmp_path):
    """Without its state, and with the biases of the start."""
    nvme, saved = [tmp_path / "one", tmp_path / "other"], tmp_path / "saved"
    whole = anew(losses, settings("AdamW", nvme[0]), saved)
    for one, other in zip(whole, anew(resumed, settings("AdamW", nvme[1]), saved)):
        assert other[0] == pytest.approx(one[2], rel=1e-2)  # the weights that are on NVMe are restored
        assert other[0] != one[2]
        assert other[1] != one[3]


@pytest.mark.parametrize("pipeline", PIPELINES[::3])
def test_an_engine_goes_back_to_what_it_saved(tmp_path, in_memory, pipeline):
    for first, again in anew(gone_back, settings("Muon", tmp_path / "nvme", **pipeline), tmp_path / "saved"):
        assert first == again


@pytest.mark.parametrize("pipeline", PIPELINES[::3])
def test_masters_that_were_set_are_saved(tmp_path, pipeline):
    """And no buffers of the pipelined swapper with them, which would be converted as if they were weights."""
    nvme, saved = [tmp_path / "one", tmp_path / "other"], tmp_path / "saved"
    anew(set_and_saved, settings("Muon", nvme[0], **pipeline), saved)
    found = anew(masters, settings("Muon", nvme[1], **pipeline), saved)
    assert found == [[(float(number),) * 2 for number in range(9)]] * 2
    with pytest.raises(RankError, match=r"numels out of \d+ - something is wrong"):
        anew(converted, saved, world=1)


def test_what_cannot_be_loaded_is_an_error(ranks, tmp_path):
    on_nvme, on_cpu, saved = settings("Muon", tmp_path / "nvme"), settings("Muon", None), tmp_path / "saved"
    anew(losses, on_nvme, saved)
    with pytest.raises(RankError, match=r"saved with .*device='nvme', which this run has not"):
        anew(resumed, on_cpu, saved)
    pool = ranks(2)
    pool.run(losses, on_cpu, tmp_path / "in memory")
    with pytest.raises(RankError, match=r"saved without .*device='nvme', which this run has"):
        pool.run(resumed, on_nvme, tmp_path / "in memory")
    with pytest.raises(RankError, match=r"other sub-groups than this run"):
        anew(resumed, on_nvme | {"aio": {"block_size": 2**22}}, saved)  # with which all of them are in memory
    with pytest.raises(RankError, match=r"was saved by another optimizer than muon_plugin's Muon\. .* or load the we"):
        anew(of_adamw, settings("AdamW", tmp_path / "nvme"), on_nvme, tmp_path / "adamw")
    with pytest.raises(RankError, match=r"other sub-groups than this run.*in a new process"):
        pool.run(resumed, on_nvme, saved)  # which has made another model before
    next(saved.rglob("exp_avg-*.tensor.swp")).unlink()
    with pytest.raises(RankError, match=r"exp_avg-\d+_\d+\.tensor\.swp is missing"):
        anew(resumed, on_nvme, saved)
    with pytest.raises(RankError, match=r"over 1 ranks.* allowed: load the weights into the model before"):
        anew(resumed, on_nvme, saved, world=1)
