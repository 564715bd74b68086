"""The contract under Megatron: the same bits whatever TP, PP, DP, EP and the rest."""

from __future__ import annotations

import dataclasses

import pytest

from tests.support.combinations import covering, in_turn, some
from tests.support.integers import differing
from tests.support.megatron_model import Layout, trained

RELEASES = ("0.16.1", "0.19.2")


def check(ranks, release, world: int, layout: Layout) -> None:
    """Every rank ends in what one process ends in, by the model and what else is not layout."""
    same = Layout(layout.model, dtype=layout.dtype, tied=layout.tied, predicted=layout.predicted, muon=layout.muon)
    expected = ranks.alone(trained, same, megatron=release)
    for rank, found in enumerate(ranks(world, release).run(trained, layout)):
        assert differing(found, expected) == [], f"rank {rank}"


DENSE = {(1, 1, 2), (1, 1, 3), (2, 1, 1), (2, 1, 2), (1, 2, 1), (1, 2, 2), (4, 1, 1), (2, 2, 1)}  # tp, pp, dp


@pytest.mark.parametrize(
    ("release", "dtype", "tp", "pp", "dp"),
    some(covering(RELEASES, ("bf16", "fp32"), (1, 2, 4), (1, 2), (1, 2, 3), valid=lambda *case: case[2:] in DENSE), 6),
)
def test_dense(ranks, release, dtype, tp, pp, dp):
    check(ranks, release, tp * pp * dp, Layout(dtype=dtype, tp=tp, pp=pp))


MOE = [
    (2, {"ep": 1}),
    (2, {"ep": 2}),
    (4, {"ep": 2}),
    (4, {"ep": 4}),
    (2, {"tp": 2}),
    (4, {"tp": 2, "ep": 2, "etp": 1}),
    (4, {"tp": 2, "ep": 2}),
    (4, {"tp": 2, "ep": 2, "etp": 2}),
    (4, {"pp": 2, "ep": 2}),
    (4, {"ep": 2, "instances": 2}),
]


@pytest.mark.parametrize(("release", "case"), in_turn(RELEASES, some(MOE, 4)))
def test_experts(ranks, release, case):
    world, cut = case
    check(ranks, release, world, Layout("moe", **cut))


OTHERS = {
    "virtual stages": (2, Layout(pp=2, vp=2)),
    "two instances": (4, Layout(instances=2)),
    "context parallel": (4, Layout(tp=2, cp=2)),
    "two instances, TP": (4, Layout(tp=2, instances=2)),
    "overlaps": (4, Layout(tp=2, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=3000)),
    "small buckets": (3, Layout(bucket_size=500)),
    "bf16 gradients": (2, Layout(grad_reduce_in_fp32=False)),
    "fp16": (4, Layout(tp=2, dtype="fp16")),
    "tied embeddings over stages": (4, Layout(tp=2, pp=2, tied=True)),
    "tied embeddings of multi-token prediction": (2, Layout(pp=2, tied=True, predicted=1)),
    "more TP than query groups": (4, Layout("few_groups", tp=4)),
    "no gate, biases, positions": (4, Layout("gelu", tp=2)),
    "QKV whole": (4, Layout(tp=2, muon={"muon_split_qkv": False})),
    "QKV whole, more TP than groups": (4, Layout("few_groups", tp=4, muon={"muon_split_qkv": False})),
    "paper": (4, Layout(tp=2, muon={"muon_nesterov": True, "muon_coefficient_type": "simple",
                                    "muon_extra_scale_factor": 0.2})),
    "unit_rms_norm": (2, Layout(tp=2, muon={"muon_scale_mode": "unit_rms_norm"})),
}  # fmt: skip


@pytest.mark.parametrize(("release", "case"), in_turn(RELEASES, some(OTHERS, 6)))
def test_others(ranks, release, case):
    check(ranks, release, *OTHERS[case])


@pytest.mark.fast
def test_gated_attention(ranks, release):
    """Megatron #4731: gated attention's projection is query, gate, key and value of each group, four matrices."""
    check(ranks, release, 4, Layout("gated_attention", tp=2))


@pytest.mark.parametrize(("release", "nesterov"), in_turn(RELEASES, [False, True]))
def test_offload_changes_no_bit(ranks, release, nesterov):
    """Megatron #4691: no CPU offload of Muon's state. (On the CPU the momentum is copied to and from where it is.)"""
    layout = Layout(tp=2, muon={"muon_nesterov": nesterov})
    offloaded = dataclasses.replace(layout, muon={**layout.muon, "muon_offload": True})
    alone = ranks.alone(trained, Layout(muon=layout.muon), megatron=release)
    assert differing(ranks(4, release).run(trained, offloaded)[0], alone) == []
