"""Runs under DeepSpeed that are saved, resumed, converted or overflow: jobs for ranks, of integers.py's model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.integers import IntegerModel, build, differing, gathered, train, trained, weights
from tests.support.parallel_models import Experts, ReplacedExperts, build_replaced

OLD = "0.18.9"


def convert(folder: Path) -> None:
    """The documented command, in this process."""
    from muon_plugin.deepspeed import convert

    folders = ["--input_folder", str(folder / "tag"), "--output_folder", str(folder / "universal")]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["convert", *folders, *workers])
        convert.main()


def save(rank: int, settings: dict[str, Any], folder: Path, steps: int) -> None:
    engine = build(rank, settings)
    train(engine, rank, steps)
    engine.save_checkpoint(str(folder), tag="tag")
    if rank == 0:
        convert(folder)
    torch.distributed.barrier()
    engine.destroy()


def save_only(rank: int, settings: dict[str, Any], folder: Path, steps: int) -> dict[str, Tensor]:
    """Saves without converting; the weights, whole."""
    engine = build(rank, settings)
    train(engine, rank, steps)
    engine.save_checkpoint(str(folder), tag="tag")
    found = whole(engine)
    engine.destroy()
    return found


def resume(rank: int, settings: dict[str, Any], folder: Path, first: int, steps: int) -> dict[str, Tensor]:
    engine = build(rank, {**settings, "checkpoint": {"load_universal": True}})
    engine.load_checkpoint(str(folder))
    train(engine, rank, steps, first)
    found = weights(engine)
    engine.destroy()
    return found


def interrupted(rank: int, settings: dict[str, Any], folder: str) -> dict[str, Tensor]:
    engine = build(rank, settings)
    train(engine, rank, 3)
    engine.save_checkpoint(folder)
    engine = build(rank, settings)
    train(engine, rank, 1)  # something else than what is loaded
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    train(engine, rank, 3, first=3)
    return weights(engine)


def overflow(rank: int, settings: dict[str, Any], bad: str = "inf") -> tuple[bool, list[str], list[str]]:
    undisturbed = trained(rank, settings, 4)
    engine = build(rank, settings)
    train(engine, rank, 2)
    before = _bytes(engine)
    engine.backward(engine(2, 0, rank, dist.get_world_size(), 1) * (float(bad) if rank == 0 else 1.0))
    engine.step()
    assert engine.skipped_steps == 1
    same = differing(before, _bytes(engine)) == []
    train(engine, rank, 2, first=2)
    return same, differing(weights(engine), undisturbed), differing(weights(engine), before)


def _bytes(engine: Any) -> dict[str, Tensor]:
    """Weights, masters and optimizer state."""
    found = weights(engine)
    for number, state in enumerate(engine.basic_optimizer.state.values()):
        found |= {f"{number} {key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


def mended(rank: int, function: Callable[..., Any], *args: Any) -> Any:
    """`function` in a 0.18.9 that can do over gloo what it can do over NCCL, as later releases, with any optimizer.

    - Where it flattens ZeRO 1's and 2's parameters on the device, the flat buffer carries autograd's history, and gloo
      refuses to write into it (DeepSpeed #7948).
    - GatheredParameters waits for the last of its all-gathers only, which over gloo may end in any order: now and then
      a parameter is read before it has arrived.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as zero

    assert deepspeed.__version__ == OLD
    flatten, gather = zero.flatten_dense_tensors_aligned, Init._allgather_params_coalesced

    def one_by_one(self: Any, params: list[Any], *args: Any, **kwargs: Any) -> None:
        for p in params:
            gather(self, [p], *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "flatten_dense_tensors_aligned", lambda *a, **k: flatten(*a, **k).detach())
        patch.setattr(Init, "_allgather_params_coalesced", one_by_one)
        return function(rank, *args)


#: The arguments of `load_checkpoint` that ask for the weights alone.
WAYS_TO_LOAD_WEIGHTS = [{"load_module_only": True}, {"load_optimizer_states": False}]


def weights_alone(rank: int, settings: dict[str, Any], folder: Path, how: str = "dense") -> list[Any]:
    """The error of a load without arguments; then the weights that were saved, loaded, and there after one more step.

    The last three for each of `WAYS_TO_LOAD_WEIGHTS`.
    """

    def make(settings: dict[str, Any], shift: float) -> Any:
        model = {"dense": IntegerModel, "experts": lambda: Experts(2), "AutoEP": ReplacedExperts}[how]()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(shift)
        return build_replaced(rank, settings, 2, model) if how == "AutoEP" else build(rank, settings, model)

    def step(engine: Any, number: int) -> None:
        engine.backward(engine(number, 0, rank, dist.get_world_size(), 1) if how == "dense" else engine(number))
        engine.step()

    adamw = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}  # a new one: DeepSpeed removes torch_adam
    engine = make({**settings, "optimizer": adamw}, 0.0)
    step(engine, 0)
    engine.save_checkpoint(str(folder), tag="first")
    saved = whole(engine)
    step(engine, 1)
    engine.save_checkpoint(str(folder), tag="latest one")
    engine.destroy()
    found: list[Any] = []
    for way in [{}, *WAYS_TO_LOAD_WEIGHTS]:
        engine = make(settings, 1.0)
        try:
            engine.load_checkpoint(str(folder), tag="first", **way)
            loaded = whole(engine)
            step(engine, 0)
            found.append((saved, loaded, whole(engine)))
        except ValueError as error:
            found.append(str(error))
        engine.destroy()
    return found


def whole(engine: Any) -> dict[str, Tensor]:
    with gathered(engine.module):
        return {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}


def state_bytes(rank: int, settings: dict[str, Any]) -> tuple[int, int]:
    engine = build(rank, settings)
    train(engine, rank, 1)
    muon = engine.basic_optimizer
    found = {True: 0, False: 0}
    for group in muon.param_groups:
        for p in group["params"]:
            found[group["use_muon"]] += sum(
                value.nbytes for key, value in muon.state[p].items() if isinstance(value, Tensor) and key != "step"
            )
    return found[True], found[False]
