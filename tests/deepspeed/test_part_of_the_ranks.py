"""Engines on a part of the world, while other ranks do something else or train another model.

An `mpu` tells DeepSpeed which ranks an engine has; the plugin must ask, wait for and print on these alone, and train
with the bits that they would reach as the whole world. DeepSpeed itself, with any optimizer, compares the order of
modules over the world in stage 3, which therefore is for parts that train like models at once; and it waits for the
world at two barriers when it saves a checkpoint.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.combinations import FULL
from tests.support.deepspeed_runs import convert
from tests.support.integers import IntegerModel, build, config, differing, weights
from tests.support.monitored import STEPS, check_sizes, written
from tests.support.parallel_models import Grid, Marked
from tests.support.ranks import RankError

TITLE = "muon_plugin ---"  # of the start-up table


class Wider(IntegerModel):
    """Another model of the same modules, for the other half of the world."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(17, 29)


def train(engine: Any, dp: Any, steps: int, first: int = 0) -> None:
    rank, world = (dist.get_rank(dp), dist.get_world_size(dp)) if dp else (0, 1)
    for step in range(first, first + steps):
        engine.backward(engine(step, 0, rank, world, 1))
        engine.step()


def alone(rank: int, settings: dict[str, Any], model: type[nn.Module], steps: int) -> dict[str, Tensor]:
    engine = build(rank, settings, model())
    train(engine, None, steps)
    return weights(engine)


def in_parts(
    rank: int, settings: dict[str, Any], parts: Sequence[Sequence[int]], steps: int = 3
) -> tuple[dict[str, Tensor], str] | None:
    """An engine on each part of the world: its weights, and what this rank printed. None on all other ranks."""
    mpu = Grid(1, parts)
    if mpu.dp is None:
        return None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        engine = build(rank, settings, Wider() if rank in parts[-1] and len(parts) > 1 else IntegerModel(), mpu=mpu)
    train(engine, mpu.dp, steps)
    return weights(engine), printed.getvalue()


@pytest.mark.parametrize("stage", [0, 1])
def test_an_engine_on_some_ranks_waits_for_no_other_and_ends_in_the_bits_of_a_world_of_its_own(ranks, stage):
    expected = ranks.alone(alone, config(1), IntegerModel, 3, apart="part")
    other, *found = ranks(3, apart="part").run(in_parts, config(stage), [[1, 2]])
    assert other is None
    for reached, _ in found:
        assert differing(reached, expected) == []
    assert [TITLE in printed for _, printed in found] == [True, False]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_two_models_are_trained_on_two_halves_at_once(ranks, stage):
    models = [IntegerModel, IntegerModel, Wider, Wider]
    found = ranks(4, apart="part").run(in_parts, config(stage, "bf16"), [[0, 1], [2, 3]])
    for model, (reached, _) in zip(models, found, strict=True):
        assert differing(reached, ranks.alone(alone, config(stage, "bf16"), model, 3, apart="part")) == []
    assert [TITLE in printed for _, printed in found] == [True, False, True, False]


@pytest.mark.parametrize("who", ["an invalid setting", "another model"])
def test_an_error_on_one_rank_is_an_error_on_all_ranks_of_the_engine_and_on_no_other(ranks, who):
    told = {
        "an invalid setting": "rank 2 of 3 failed: lr=-1",
        "another model": "rank 1 has 0.weight [8, 8] torch.float32, rank 2 has 0.weight [9, 8] torch.float32",
    }[who]
    with pytest.raises(RankError) as caught:
        ranks(3, apart="part").run(wrong_on_rank_2, who)
    other, *errors = caught.value.errors
    assert other is None
    assert [kind for kind, _ in errors] == ["ValueError"] * 2
    assert told in errors[0][1]


def wrong_on_rank_2(rank: int, who: str) -> None:
    mpu = Grid(1, [[1, 2]])
    if mpu.dp is not None:
        bad = rank == 2
        model = nn.Linear(8, 8 + (bad and who == "another model"))
        build(rank, config(1, params={"lr": -1 if bad and "setting" in who else 0.01}), nn.Sequential(model), mpu=mpu)


def test_tensor_parallel_on_some_ranks_shares_matrices_over_a_group_of_these(ranks):
    """The ranks of DP x TP have no group yet, and not all have made the same number of groups."""
    world = ranks(5, apart="part")
    whole = world.run(with_tp, config(1, "bf16"), 1, [[0]])[0][1]
    other, *found = world.run(with_tp, config(1, "bf16"), 2, [[1, 2, 3, 4]])
    assert other is None
    for rank, reached in found:
        cut = Marked(rank, 2)
        parts = {name: cut.part(tensor, cut.CUTS[name.split(".")[0]]) for name, tensor in whole.items()}
        assert differing(reached, parts) == []
    with pytest.raises(RankError) as caught:
        world.run(with_tp, config(1, "bf16"), 2, [[1, 2, 3, 4]], unmarked=(3, 4))
    other, *errors = caught.value.errors
    assert other is None
    for kind, message in errors:
        assert kind == "ValueError"
        assert "disagree about the model or the settings of Muon: rank 1 has" in message
        assert ", rank 3 has" in message


def with_tp(
    rank: int, settings: dict[str, Any], tp: int, parts: Sequence[Sequence[int]], unmarked: Sequence[int] = ()
) -> tuple[int, dict[str, Tensor]] | None:
    """Three steps: this rank in TP, its parts of the weights."""
    mpu = Grid(tp, parts)
    if mpu.dp is None:
        return None
    if rank == 2:
        dist.new_group([rank], use_local_synchronization=True)
    model = Marked(dist.get_rank(mpu.tp), tp, rank not in unmarked)
    engine = build(rank, settings, model, mpu=mpu)
    for step in range(3):
        engine.backward(engine(step, dist.get_rank(mpu.dp), dist.get_world_size(mpu.dp)))
        engine.step()
    return model.rank, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_checkpoints_of_some_ranks_resume_there(ranks, tmp_path):
    """DeepSpeed's own, and a universal one at another stage."""
    expected = ranks.alone(alone, config(1), IntegerModel, 3, apart="part")
    other, *found = ranks(3, apart="part").run(resumed, tmp_path)
    assert other is None
    for reached in (each for of_rank in found for each in of_rank):
        assert differing(reached, expected) == []


def resumed(rank: int, folder: Path) -> list[dict[str, Tensor]] | None:
    mpu = Grid(1, [[1, 2]])
    settings = config(1, checkpoint={"tag_validation": "Ignore"})
    universal = config(2, checkpoint={"load_universal": True})
    if mpu.dp is None:
        dist.barrier()
        dist.barrier()  # DeepSpeed's own, before and after it saves
        return None
    engine = build(rank, settings, mpu=mpu)
    train(engine, mpu.dp, 2)
    engine.save_checkpoint(str(folder), tag="tag")
    if rank == 1:
        convert(folder)
    dist.barrier(mpu.dp)
    found = []
    for tag, how in (("tag", settings), ("universal", universal)):
        engine = build(rank, how, mpu=mpu)
        assert engine.load_checkpoint(str(folder), tag=tag)[0] is not None
        train(engine, mpu.dp, 1, first=2)
        found.append(weights(engine))
    return found


def test_the_monitor_measures_the_engines_ranks(ranks, tmp_path):
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    settings = {**config(1), "steps_per_print": 2, "csv_monitor": monitor}
    ranks(3, apart="part").run(in_parts, settings, [[0, 1]], STEPS)
    check_sizes(written(tmp_path))


@pytest.mark.skipif(not FULL, reason="FULL=1; test_releases.py has this release on all ranks")
def test_the_oldest_release_has_these_ranks_too(ranks):
    release = {"deepspeed": "0.18.9", "apart": "part"}
    expected = ranks.alone(alone, config(0), IntegerModel, 3, **release)
    other, *found = ranks(3, **release).run(in_parts, config(0), [[1, 2]])
    assert other is None
    assert [differing(reached, expected) for reached, _ in found] == [[], []]
