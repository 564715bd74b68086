"""A momentum in bf16: the same bits on every layout, half of the memory, checkpoints of both kinds."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from tests.support.combinations import covering, in_turn, some
from tests.support.deepspeed_runs import interrupted, resume, save, state_bytes
from tests.support.integers import build, config, differing, train, trained
from tests.support.ranks import RankError

BF16 = {"momentum_dtype": "bf16"}
PLACES = ("here", "in CPU memory", "with the masters on the CPU")


def reference(stage: int, dtype: str) -> int:
    """The stage of one process to compare with: without ZeRO, gradients in fp16 are smaller by the loss scale here."""
    return min(stage, 1) if dtype == "fp16" else 0


@pytest.mark.parametrize(
    ("dtype", "stage", "world", "nesterov", "place"),
    some(
        covering(
            ("fp32", "bf16", "fp16"),
            (0, 1, 2, 3),
            (1, 2, 3),
            (True, False),
            PLACES,
            valid=lambda _, stage, __, ___, place: stage > 0 or place != PLACES[2],
        ),
        7,
    ),
)
def test_the_same_bits_on_every_layout(ranks, dtype, stage, world, nesterov, place):
    params = BF16 | {"nesterov": nesterov}
    alone = ranks.alone(trained, config(reference(stage, dtype), dtype, params=params))
    assert differing(ranks.alone(trained, config(0, dtype, params={"nesterov": nesterov})), alone) != []
    zero = {"offload_optimizer": {"device": "cpu"}} if place == PLACES[2] else {}
    settings = config(stage, dtype, params=params | {"offload": place == PLACES[1]}, zero_optimization=zero)
    for found in ranks(world).run(trained, settings):
        assert differing(found, alone) == []


@pytest.mark.parametrize(("dtype", "stage"), in_turn(("fp32", "bf16", "fp16"), (0, 1, 2, 3)))
def test_resuming_is_bit_exact(ranks, tmp_path, dtype, stage):
    """The count of the steps, on which the rounding depends, is in the checkpoint."""
    straight = ranks.alone(trained, config(reference(stage, dtype), dtype, params=BF16), 6)
    for found in ranks(2).run(interrupted, config(stage, dtype, params=BF16), str(tmp_path)):
        assert differing(found, straight) == []


@pytest.mark.parametrize(("stage", "world", "other", "other_world"), [(1, 2, 3, 3), (2, 3, 1, 1), (3, 2, 2, 2)])
def test_resumed_at_another_stage_and_world(ranks, tmp_path, stage, world, other, other_world):
    """Universal checkpoints have the count of the steps beside each parameter, or once for all."""
    ranks(world).run(save, config(stage, "bf16", params=BF16), tmp_path, 3)
    whole = ranks.alone(trained, config(1, "bf16", params=BF16), 5)
    for found in ranks(other_world).run(resume, config(other, "bf16", params=BF16), tmp_path, 3, 2):
        assert differing(found, whole) == []


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_of_the_other_kind_is_taken_over(ranks, tmp_path, stage):
    """From bf16 to fp32 the momentum keeps its values, from fp32 to bf16 it is rounded to the nearest."""
    for before, after in (({}, BF16), (BF16, {})):
        found = ranks(2).run(taken_over, config(stage, params=before), config(stage, params=after), str(tmp_path))
        for saved, loaded in found:
            assert [momentum.dtype for momentum in loaded] == [torch.bfloat16 if after else torch.float32] * len(loaded)
            assert all(torch.equal(a.bfloat16(), b.bfloat16()) for a, b in zip(saved, loaded))
            assert any(momentum.any() for momentum in loaded)


def taken_over(rank: int, before: dict[str, Any], after: dict[str, Any], folder: str) -> Any:
    engine = build(rank, before)
    train(engine, rank, 3)
    engine.save_checkpoint(folder, tag="tag")
    saved = momenta(engine)
    engine = build(rank, after)
    engine.load_checkpoint(folder, tag="tag")
    loaded = momenta(engine)
    train(engine, rank, 1, first=3)
    return saved, loaded


def momenta(engine: Any) -> list[torch.Tensor]:
    muon = engine.basic_optimizer
    held = [p for call in muon.calls if muon.param_groups[call.group]["use_muon"] for p in call.tensors]
    return [muon.state[p]["exp_avg"].clone() for p in held if "exp_avg" in muon.state[p]]  # not of what is frozen


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 2), (2, 3)])
def test_state_is_two_bytes_a_matrix_element_and_eight_for_the_rest(ranks, stage, world):
    shares = ranks(world).run(state_bytes, config(stage, "bf16", params=BF16))
    each = world if stage == 0 else 1
    muon, adamw = (sum(share[i] for share in shares) for i in (0, 1))
    assert 0 <= muon - 2 * 8025 * each <= 2 * 2 * world
    assert 0 <= adamw - 8 * 1053 * each <= 8 * 2 * world


def test_offload_to_nvme_is_refused(ranks, tmp_path):
    nvme = {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    with pytest.raises(RankError, match=r"momentum_dtype with offload to NVMe='bf16' is not supported.*fp32"):
        ranks(2).run(build_without_libaio, config(3, params=BF16, zero_optimization=nvme))


def build_without_libaio(rank: int, settings: dict[str, Any]) -> None:
    """What no machine can do is refused before what this one lacks."""
    with mock.patch.object(AsyncIOBuilder, "is_compatible", return_value=False):
        build(rank, settings)
