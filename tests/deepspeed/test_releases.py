"""The oldest DeepSpeed that is supported ends in the bits of the newest."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.combinations import covering, some
from tests.support.deepspeed_runs import OLD, interrupted, mended, overflow
from tests.support.frozen_runs import come_and_go, unfrozen_late
from tests.support.integers import build, config, differing, trained
from tests.support.monitored import check_sizes, watched, written
from tests.support.ranks import RankError

DTYPES = ("fp32", "bf16", "fp16")


@pytest.fixture
def reference(ranks):
    """The newest release, one process, stage 0: by dtype."""
    return {dtype: ranks.alone(trained, config(0, dtype)) for dtype in DTYPES}


@pytest.mark.parametrize(("dtype", "stage", "world"), some(covering(DTYPES, (0, 1, 2, 3), (1, 2, 3)), 5))
def test_layouts_end_in_the_same_bits(ranks, reference, dtype, stage, world):
    for rank, found in enumerate(ranks(world, deepspeed=OLD).run(mended, trained, config(stage, dtype, gas=2))):
        assert differing(found, reference[dtype]) == [], f"rank {rank}"


OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "overlap_comm": (2, {"zero_optimization": {"overlap_comm": True}}),
    "round_robin_gradients": (1, {"zero_optimization": {"round_robin_gradients": True}}),
    "small buckets": (2, {"zero_optimization": {"reduce_bucket_size": 500, "allgather_bucket_size": 500}}),
    "fp32 gradients, stage 1": (
        1,
        {"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"immediate_grad_update": True}},
    ),
    "fp32 gradients, stage 2": (2, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "offload, stage 1": (1, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    "offload, stage 3": (3, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    "sub-groups": (3, {"zero_optimization": {"sub_group_size": 300}}),
    "no parameter persists": (3, {"zero_optimization": {"stage3_param_persistence_threshold": 0}}),
}


@pytest.mark.parametrize("option", some(OPTIONS, 2))
def test_zero_options_change_no_bit(ranks, reference, option):
    stage, sections = OPTIONS[option]
    found = ranks(2, deepspeed=OLD).run(mended, trained, config(stage, "bf16", gas=2, **sections))[0]
    assert differing(found, {name: reference["bf16"][name] for name in found}) == []


MASTERS = {
    "bf16": (3, {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}),
    "fp16": (
        1,
        {
            "fp16": {"fp16_master_weights_and_grads": True},
            "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
        },
    ),
}


@pytest.mark.parametrize("dtype", MASTERS)
def test_masters_of_16_bits_end_in_the_bits_of_the_newest(ranks, dtype):
    stage, sections = MASTERS[dtype]
    newest = ranks.alone(trained, config(stage, dtype, **sections), 4)
    found = ranks(2, deepspeed=OLD).run(mended, trained, config(stage, dtype, **sections), 4)[0]
    assert differing(found, newest) == []


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_monitor_shows_the_same_sizes(ranks, tmp_path, stage):
    ranks(2, deepspeed=OLD).run(mended, watched, config(stage, "fp32"), tmp_path)
    check_sizes(written(tmp_path))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_resuming_is_bit_exact(ranks, tmp_path, stage):
    straight = ranks(2, deepspeed=OLD).run(mended, trained, config(stage, "bf16"), 6)
    resumed = ranks(2, deepspeed=OLD).run(mended, interrupted, config(stage, "bf16"), str(tmp_path))
    for a, b in zip(straight, resumed):
        assert differing(a, b) == []


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_leaves_every_byte_alone(ranks, stage):
    for same, differs, moved in ranks(2, deepspeed=OLD).run(mended, overflow, config(stage, "fp16")):
        assert (same, differs, bool(moved)) == (True, [], True)


@pytest.mark.parametrize("stage", [1, 3])
def test_what_is_frozen_stays(ranks, stage):
    reference, *_ = ranks.alone(come_and_go, config(0))
    for found, moved, still in ranks(2, deepspeed=OLD).run(mended, come_and_go, config(stage)):
        assert (moved, still, differing(found, reference)) == ([], [], [])


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (3, "fp32")])
def test_unfreezing_what_was_left_out_is_an_error(ranks, stage, dtype):
    """Its wrapper of stage 0 would train what was frozen, and give all of it an fp32 copy; later ones do not."""
    with pytest.raises(RankError, match=r"parameter frozen\.weight requires gradients now"):
        ranks(2, deepspeed=OLD).run(mended, unfrozen_late, config(stage, dtype))


REFUSED = [
    (config(3, zero_optimization={"mics_shard_size": 1}), "mics_shard_size=1 is not supported"),
    # DeepSpeed #7985: each rank's last micro-batch would stay out of the average, with any optimizer.
    (config(1, "bf16", data_types={"grad_accum_dtype": "fp32"}), "with stage 1='fp32' is not supported"),
]


@pytest.mark.parametrize(("settings", "match"), REFUSED, ids=["MiCS", "BF16_Optimizer"])
def test_what_it_cannot_do_is_refused(ranks, settings, match):
    with pytest.raises(RankError) as caught:
        ranks(2, deepspeed=OLD).run(build, settings)
    for kind, message in caught.value.errors:
        assert (kind, match in message) == ("ValueError", True), message


@pytest.mark.parametrize("name", ["Muon", "AdamW"])
def test_over_gloo_its_stages_1_and_2_need_one_rank_with_any_optimizer(ranks, name):
    """What `mended` mends, so that it does not outlive its reason."""
    settings = config(1)
    if name == "AdamW":
        settings["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    with pytest.raises(RankError, match="is a view and is being modified inplace"):
        ranks(2, deepspeed=OLD).run(trained, settings, 1)


def test_warmup_without_an_end_is_refused_with_two_rates(ranks):
    """Before DeepSpeed #8171 it ends at the rate of the first group."""
    settings = config(1, params={"muon_lr": 0.02, "adam_lr": 0.003})
    settings["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}
    with pytest.raises(RankError, match=r"muon_lr=0\.02 is not supported.*WarmupLR, which sets one rate for all"):
        ranks(2, deepspeed=OLD).run(build, settings)
