"""What breaks elsewhere and must not here: each test is named after the symptom, with the report it comes from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from muon_plugin.core import holders
from muon_plugin.core.exchange import ended
from tests.support.combinations import covering, in_turn
from tests.support.counted import bytes_sent
from tests.support.deepspeed_runs import interrupted, overflow, state_bytes
from tests.support.integers import STEPS, IntegerModel, build, config, differing, train, trained
from tests.support.ranks import RankError


def changes(rank: int, settings: dict[str, Any], steps: int = 1) -> dict[str, Tensor]:
    """How far each matrix moved."""
    before = {name: p.detach().clone() for name, p in IntegerModel().named_parameters()}
    found = trained(rank, settings, steps)
    return {name: found[name].float() - before[name] for name in before if "(fp32)" not in name}


def spectral(change: Tensor) -> float:
    return torch.linalg.matrix_norm(change.double(), ord=2).item()


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_gradient_clipping_does_not_shrink_the_update(ranks, stage, world):
    """DeepSpeed #8439: clipping divided the orthogonalized update by its own norm (0.0321 -> 0.0030 on a toy model)."""
    free = ranks.alone(changes, config(0, params={"weight_decay": 0.0}))
    clipped = config(stage, params={"weight_decay": 0.0}, gradient_clipping=1.0)
    found = ranks(world).run(changes, clipped)[0]
    for name in ("down.weight", "wide.weight"):
        assert spectral(found[name]) == pytest.approx(spectral(free[name]), rel=0.02), name
    everywhere = ranks.alone(changes, config(0, params={"weight_decay": 0.0}, gradient_clipping=1.0), STEPS)
    found = ranks(world).run(changes, clipped, STEPS)[0]
    for name in ("down.weight", "wide.weight", "qkv.weight"):  # the clip factor is a sum over shards: it may round
        assert (found[name] - everywhere[name]).norm() < 2**-8 * everywhere[name].norm(), name


def test_stage_0_is_not_plain_sgd(ranks):
    """DeepSpeed #8441: stage 0, the default, trained with SGD. One step here has the singular values of Muon's."""
    settings = config(0, params={"weight_decay": 0.0, "lr": 1.0})
    del settings["zero_optimization"]
    change = ranks(1).run(changes, settings)[0]["down.weight"]
    values = torch.linalg.svdvals(change.double()) / (0.2 * 40**0.5)
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize(("dtype", "stage", "bad"), covering(("fp16", "bf16"), (0, 1, 2, 3), ("inf", "nan")))
def test_an_overflow_does_not_poison_the_momentum(ranks, dtype, stage, bad):
    """DeepSpeed #8432: under fp16 the first overflow poisoned the momentum. A skipped step leaves every byte alone."""
    for same, differs, moved in ranks(2).run(overflow, config(stage, dtype), bad):
        assert same
        assert moved
        # Without ZeRO, DeepSpeed 0.19.8 itself (AdamW too) hands over doubled gradients after the scale was halved.
        assert (stage, dtype) == (0, "fp16") or differs == []


@pytest.mark.parametrize(("dtype", "layout"), in_turn(["bf16", "fp16", "fp32"], [(0, 2), (1, 2), (2, 3)]))
def test_resuming_is_bit_exact(ranks, tmp_path, dtype, layout):
    """DeepSpeed #7746, #8433: resuming in bf16 failed on the momentum's dtype."""
    stage, world = layout
    straight = ranks(world).run(trained, config(stage, dtype), 6)
    resumed = ranks(world).run(interrupted, config(stage, dtype), str(tmp_path))
    for a, b in zip(straight, resumed):
        assert differing(a, b) == []


@pytest.mark.parametrize("stage", [1, 2])
def test_a_matrix_that_crosses_a_boundary_gets_the_right_update(ranks, stage):
    """DeepSpeed #7807, #8090: with reduce_scatter, the default, such matrices got wrong, rank-dependent updates."""
    alone, _ = ranks.alone(crossing, config(0))
    for found, lies_on in ranks(3).run(crossing, config(stage)):
        assert lies_on == 3
        assert torch.equal(found, alone)


def crossing(rank: int, settings: dict[str, Any]) -> tuple[Tensor, int]:
    """One matrix that all ranks hold a part of: its weights after 3 steps, and how many ranks it lies on."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(32, 48, bias=False))
    model.forward = IntegerModel.forward.__get__(model)
    engine = build(rank, settings, model)
    train(engine, rank, 3)
    (plan,) = engine.basic_optimizer.plans
    return model[0].weight.detach().clone(), len(plan.routes[0].holders)


@pytest.mark.parametrize(("stage", "world"), [(0, 3), (1, 2), (1, 4), (2, 3)])
def test_nothing_is_computed_twice(ranks, stage, world):
    """The Newton-Schulz FLOPs that really ran, over all ranks, are those of one process, and those of the plan."""
    alone, _ = ranks.alone(counted_flops, config(0))
    found = ranks(world).run(counted_flops, config(stage))
    assert sum(ran for ran, _ in found) == alone
    assert [ran for ran, _ in found] == list(found[0][1])


def counted_flops(rank: int, settings: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
    engine = build(rank, settings)
    engine.backward(engine(0, 0, rank, dist.get_world_size(), 1))
    with FlopCounterMode(display=False) as counter:
        engine.step()
    (plan,) = engine.basic_optimizer.plans
    return counter.get_total_flops(), plan.flops


@pytest.mark.parametrize("fn", ["match_rms_adamw", "update_norm"])
@pytest.mark.parametrize(("stage", "world"), [(0, 1), (0, 3), (1, 2), (1, 4), (2, 3)])
def test_only_what_must_move_moves(ranks, stage, world, fn):
    """Bytes counted at the collectives that really ran: those of the plan; 4 an element of what is cut, 0 else."""
    found = ranks(world).run(counted_bytes, config(stage, params={"adjust_lr_fn": fn}))
    planned, cut, scalars = found[0][1:]
    assert [sent for sent, *_ in found] == list(planned)
    total = sum(sent for sent, *_ in found)
    if stage == 0:  # every matrix's update to the others, 2 bytes an element
        assert total == 2 * (world - 1) * (8025 + scalars)
    else:
        assert 0 < total <= 4 * cut + 2 * (world - 1) * scalars


def counted_bytes(rank: int, settings: dict[str, Any]) -> tuple[int, tuple[int, ...], int, int]:
    """(bytes this rank sent, the plan's, elements of matrices not whole on their owner, bf16 scalars a matrix)."""
    engine = build(rank, settings)
    muon = engine.basic_optimizer
    engine.backward(engine(0, 0, rank, dist.get_world_size(), 1))
    with bytes_sent() as sent:
        for exchange in (update._exchange for update in muon.halves.muon.updates):
            ended(exchange.run(lambda *_: None, lambda *_: None))
    (plan,) = muon.plans
    matrices = muon.halves.muon.updates[0].matrices
    cut = sum(m.numel for m, r in zip(matrices, plan.routes) if any(rank != r.owner for rank, _ in r.holders))
    scalars = 2 * len(matrices) if settings["optimizer"]["params"]["adjust_lr_fn"] == "update_norm" else 0
    return sum(sent.values()), plan.bytes_sent, cut, scalars


def test_parts_that_a_rule_tells_are_not_listed(ranks):
    """Every rank has a part of everything in ZeRO-3, and all of it in stage 0: lists would be gigabytes at scale."""
    for stage in (0, 1, 3):
        listed = ranks(3).run(rows_listed, config(stage))
        assert (sum(listed) > 0) is (stage == 1), (stage, listed)


def rows_listed(rank: int, settings: dict[str, Any]) -> int:
    """How many this rank lists when the engine is built."""
    rows, gather = [0], holders.gather_rows

    def counted(mine: Tensor, group: Any) -> list[Tensor]:
        rows.append(len(mine))
        return gather(mine, group)

    holders.gather_rows = counted
    try:
        build(rank, settings)
    finally:
        holders.gather_rows = gather
    return sum(rows)


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 2), (1, 3), (2, 4)])
def test_state_is_four_bytes_a_matrix_element_and_eight_for_the_rest(ranks, stage, world):
    """Nothing is held twice at boundaries; alignment pads each of the two groups by less than 2 elements a rank."""
    shares = ranks(world).run(state_bytes, config(stage, "bf16"))
    each = world if stage == 0 else 1  # without ZeRO every rank holds all
    muon, adamw = (sum(share[i] for share in shares) for i in (0, 1))
    assert 0 <= muon - 4 * 8025 * each <= 4 * 2 * world
    assert 0 <= adamw - 8 * 1053 * each <= 8 * 2 * world


def test_state_exists_before_the_first_step(ranks):
    """Dion's state is made lazily: the ranks' key sets differ, and checkpoints hang."""
    for keys in ranks(2).run(state_keys, config(1)):
        assert keys == [["exp_avg"], ["exp_avg", "exp_avg_sq", "step"]]


def state_keys(rank: int, settings: dict[str, Any]) -> list[list[str]]:
    muon = build(rank, settings).basic_optimizer
    return [sorted(muon.state[p]) for group in muon.param_groups for p in group["params"]]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_checkpoint_of_another_routing_does_not_load(ranks, tmp_path, stage):
    """ZeRO keeps a group as one flat tensor: without a check, `a` would get what was saved of `b`."""
    told = r"the checkpoint's optimizer has 2 parameter groups, this run has 2\. .* lacks param_groups\[0\] \(muon: "
    with pytest.raises(RankError, match=told):
        ranks(2).run(rerouted, config(stage, "bf16"), str(tmp_path))


def rerouted(rank: int, settings: dict[str, Any], folder: str) -> None:
    for name in ("a", "b"):
        settings["optimizer"]["params"]["exclude"] = [f"{name}.weight"]
        model = nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in "abc"})
        engine = build(rank, settings, model)
        if name == "a":
            engine.save_checkpoint(folder)
        else:
            engine.load_checkpoint(folder)
