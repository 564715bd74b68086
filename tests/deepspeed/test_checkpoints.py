"""Checkpoints under DeepSpeed: resumed at another stage and world size, converted, taken over from AdamW."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.combinations import covering
from tests.support.deepspeed_runs import convert, resume, save
from tests.support.integers import IntegerModel, build, config, differing, train, trained, weights
from tests.support.parallel_models import Block
from tests.support.ranks import RankError

STAGES, WORLDS = (1, 2, 3), (1, 2, 4)


@pytest.mark.parametrize(("stage", "world", "other_stage", "other_world"), covering(STAGES, WORLDS, STAGES, WORLDS))
def test_resumed_at_every_other_stage_and_world(ranks, tmp_path, stage, world, other_stage, other_world):
    """DeepSpeed #8608: the built-in's checkpoints cannot be converted (KeyError: 'exp_avg')."""
    settings = config(stage, "bf16", zero_optimization={"round_robin_gradients": stage == 2})
    ranks(world).run(save, settings, tmp_path, 3)
    whole = ranks.alone(trained, config(1, "bf16"), 5)
    found = ranks(other_world).run(resume, config(other_stage, "bf16"), tmp_path, 3, 2)[0]
    assert differing(found, whole) == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_adamw_is_taken_over(ranks, tmp_path, stage):
    """Weights and AdamW's own half go on, the momentum of matrices starts from zero, and the log says so."""
    adamw = {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}}
    ranks(2).run(save, {**config(stage, "bf16"), "optimizer": adamw}, tmp_path, 3)
    before, moments, logged = ranks(2).run(taken_over, config(stage, "bf16"), tmp_path, 0)[0]
    assert differing(before, ranks.alone(trained_by_adamw, {**config(1, "bf16"), "optimizer": adamw}, 3)) == []
    assert moments["embed.weight"] > 0
    assert moments["down.weight"] == 0
    assert "starts from zero for 7 parameters" in logged


@pytest.mark.parametrize("stage", STAGES)
def test_another_optimizers_checkpoint_is_refused_with_the_way_to_take_it_over(ranks, tmp_path, stage):
    adamw = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    ranks(2).run(save, {**config(stage, "bf16"), "optimizer": adamw}, tmp_path / "adamw", 1)
    ranks(2).run(save, config(stage, "bf16", params={"exclude": ["down"]}), tmp_path / "routed", 1)
    for who, words in (("adamw", "another optimizer than muon_plugin's"), ("routed", "exclude")):
        with pytest.raises(RankError) as caught:
            ranks(2).run(load_as_it_is, config(stage, "bf16"), tmp_path / who)
        for kind, message in caught.value.errors:
            assert kind == "ValueError"
            assert words in message
            assert "python -m muon_plugin.deepspeed.convert" in message
            assert '"checkpoint": {"load_universal": true}' in message
        ranks(2).run(resume, config(stage, "bf16"), tmp_path / who, 1, 1)  # as it says; test_weights_only.py: the rest


def load_as_it_is(rank: int, settings: dict[str, Any], folder: Path) -> None:
    engine = build(rank, settings)
    engine.load_checkpoint(str(folder), tag="tag")


MATRICES = ("up.weight", "down.weight", "qkv.weight", "router.weight")


@pytest.mark.parametrize(
    ("stage", "dtype", "world", "offload"),
    [(1, "fp32", 3, False), (2, "bf16", 2, False), (2, "fp32", 2, True), (3, "bf16", 2, False), (1, "fp16", 2, True)],
)
def test_a_checkpoint_of_the_built_in_muon_is_taken_over(ranks, tmp_path, stage, dtype, world, offload):
    """Weights, and its momentum where it means the same; DeepSpeed's own converter alone raises KeyError: 'exp_avg'."""
    zero = {"reduce_scatter": stage < 3} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    before = ranks(world).run(save_built_in, config(stage, dtype, zero_optimization=zero), tmp_path)[0]
    for other, other_world in ((1, 2), (3, 1)):
        after, moments, logged = ranks(other_world).run(taken_over, config(other, "fp32"), tmp_path, 0)[0]
        assert differing(before, {name: after[name] for name in before}) == []
        mine = ranks.alone(momentum_after, 3)
        for name in MATRICES:
            if dtype == "fp16":  # under a loss scale
                assert moments[name] == 0
                assert "starts from zero for 4 parameters" in logged
            else:
                assert moments[name] == pytest.approx(mine[name], rel=1e-6 if dtype == "fp32" else 1e-2)
        assert moments["embed.weight"] > 0


def test_files_of_the_old_serialization_are_converted(ranks, tmp_path):
    ranks(2).run(save, config(1, "bf16", checkpoint={"checkpoint_serialization": False}), tmp_path, 2)
    whole = ranks.alone(trained, config(1, "bf16"), 4)
    assert differing(ranks(1).run(resume, config(1, "bf16"), tmp_path, 2, 2)[0], whole) == []


def save_built_in(rank: int, settings: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Three steps of DeepSpeed's own Muon; the fp32 weights they end in."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    import muon_plugin

    muon_plugin.unregister()
    torch.compiler.set_stance("force_eager")
    model = Block()
    settings["optimizer"]["params"]["torch_adam"] = True  # its own AdamW would have to be compiled
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=model.parameters())
    for p in model.parameters() if settings["zero_optimization"]["stage"] == 3 else ():
        deepspeed.zero.register_external_parameter(model, p)
    train(engine, rank, 3)
    found = {f"{name} (fp32)": safe_get_full_fp32_param(p).clone() for name, p in model.named_parameters()}
    engine.save_checkpoint(str(folder), tag="tag")
    if rank == 0:
        convert(folder)
        (folder / "who").write_text("built-in")
    torch.distributed.barrier()
    engine.destroy()
    muon_plugin.register()
    return found


def momentum_after(rank: int, steps: int) -> dict[str, float]:
    """The sums of this Muon's momenta; the gradients depend on the step alone."""

    from muon_plugin import Muon

    model = Block()
    muon = Muon(model.named_parameters(), model=model)
    for step in range(steps):
        model(step, 0, 0, 1, 1).backward()
        muon.step()
        model.zero_grad()
    named = dict(model.named_parameters())
    return {name: float(muon.state[named[name]]["momentum_buffer"].abs().sum()) for name in MATRICES}


def trained_by_adamw(rank: int, settings: dict[str, Any], steps: int) -> dict[str, Tensor]:
    return trained(rank, settings, steps)


def taken_over(rank: int, settings: dict[str, Any], folder: Path, steps: int) -> Any:
    """Weights, the size of the first moments, and what was logged."""
    import logging

    from deepspeed.utils import logger

    built_in = "built-in" in (folder / "who").read_text() if (folder / "who").exists() else False
    engine = build(rank, {**settings, "checkpoint": {"load_universal": True}}, Block() if built_in else None)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel("INFO")
    engine.load_checkpoint(str(folder))
    logger.removeHandler(handler)
    logger.setLevel("ERROR")
    found = weights(engine)
    state = engine.basic_optimizer.state
    moments = {}
    for call in engine.basic_optimizer.calls:
        for shard in call.shards:
            part = shard.local.view(state[shard.tensor]["exp_avg"].view(-1))
            moments[shard.parameter] = moments.get(shard.parameter, 0.0) + float(part.abs().sum())
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, moments)
    moments = {name: sum(m.get(name, 0.0) for m in everyone) for name in found if "fp32" not in name}
    train(engine, rank, 2, first=3)
    engine.destroy()
    return found, moments, "\n".join(lines)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_saved_is_plain(ranks, tmp_path, stage):
    """Tensors, plain Python, and DeepSpeed's own objects by name; `zero_to_fp32` reads it; no second moments."""
    ranks(2).run(save, config(stage, "bf16"), tmp_path, 2)
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    files = sorted((tmp_path / "tag").glob("*optim_states.pt"))
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        states = [torch.load(file, weights_only=True, map_location="cpu") for file in files]
    moments = [moment for state in second_moments(states[0]["optimizer_state_dict"]) for moment in state]
    assert {bool((moment < 0).all()) for moment in moments} == {True, False}
    assert all(moment.untyped_storage().nbytes() == 4 for moment in moments if (moment < 0).all())
    whole = ranks.alone(trained, config(1, "bf16"), 2)
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag="tag")
    for name in ("qkv.weight", "embed.weight", "conv.weight"):
        assert torch.equal(found[name].float(), whole[f"{name} (fp32)"])


def second_moments(state: dict[str, Any]) -> list[list[Tensor]]:
    base = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    return [[s["exp_avg_sq"]] for s in base["state"].values()]


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.folder), 0o777, True)


def test_a_state_that_would_run_code_is_refused_on_every_rank(ranks, tmp_path):
    ranks(2).run(save, config(1, "bf16"), tmp_path, 1)
    file = tmp_path / "universal" / "zero" / "down.weight" / "exp_avg.pt"
    torch.save(torch.load(file, weights_only=True) | {"other": Harmful(tmp_path / "made")}, file)
    with pytest.raises(RankError) as caught:
        ranks(2).run(resume, config(1, "bf16"), tmp_path, 1, 1)
    assert len(caught.value.errors) == 2
    for kind, message in caught.value.errors:
        assert kind == "ValueError"
        assert f"{file} holds more than tensors" in message
        assert "python -m muon_plugin.deepspeed.convert" in message
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_optimizer_of_the_clients_saves_and_resumes(ranks, tmp_path, stage):
    settings = config(stage, "bf16")
    whole = ranks.alone(trained, config(1, "bf16"), 4)
    for found in ranks(2).run(saved_and_resumed_by_client, settings, tmp_path):
        assert differing({name: whole[name] for name in found}, found) == []


def saved_and_resumed_by_client(rank: int, settings: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    from muon_plugin import Muon

    params = settings.pop("optimizer")["params"]

    def make() -> Any:
        model = IntegerModel().bfloat16()
        return build(rank, settings, model, optimizer=Muon(model.named_parameters(), model=model, **params))

    engine = make()
    train(engine, rank, 2)
    engine.save_checkpoint(str(folder), tag="tag")
    engine.destroy()
    engine = make()
    engine.load_checkpoint(str(folder), tag="tag")
    train(engine, rank, 2, first=2)
    return weights(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_states_can_be_moved_away_and_back(ranks, stage):
    """`offload_states()` knows Adam's names: so does the momentum."""
    assert ranks(2).run(moved, config(stage, "bf16")) == [[]] * 2


def moved(rank: int, settings: dict[str, Any]) -> list[str]:
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

    def run(move: bool) -> dict[str, Tensor]:
        engine = build(rank, settings)
        train(engine, rank, 2)
        if move:
            muon = engine.basic_optimizer
            engine.optimizer.offload_states(include=[OffloadStateTypeEnum.optim_states], pin_memory=False)
            assert all("_offload_buffer" in "".join(state) or "exp_avg" in state for state in muon.state.values())
            engine.optimizer.reload_states()
        train(engine, rank, 2, first=2)
        found = weights(engine)
        engine.destroy()
        return found

    return differing(run(True), run(False))
