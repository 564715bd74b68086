"""Layers that are frozen and unfrozen in training, under every stage of ZeRO."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.frozen_runs import LATE, come_and_go, freeze, unfrozen_late
from tests.support.integers import IntegerModel, build, config, differing, train, weights
from tests.support.ranks import RankError

OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
WIDE = {"data_types": {"grad_accum_dtype": "fp32"}}


CASES: dict[str, tuple[int, str, int, dict[str, Any]]] = {
    "stage 0": (2, "fp32", 0, {}),
    "stage 1": (3, "fp32", 1, {}),
    "stage 2": (2, "fp32", 2, {}),
    "stage 3": (3, "fp32", 3, {}),
    "stage 0, bf16": (2, "bf16", 0, {}),
    "stage 1, bf16, round_robin_gradients": (2, "bf16", 1, {"zero_optimization": {"round_robin_gradients": True}}),
    "stage 1, bf16, fp32 gradients": (2, "bf16", 1, WIDE),
    "stage 2, bf16, offload": (2, "bf16", 2, OFFLOAD),
    "stage 3, bf16, offload, sub-groups": (
        2,
        "bf16",
        3,
        {"zero_optimization": {**OFFLOAD["zero_optimization"], "sub_group_size": 300}},
    ),
    "stage 1, momentum offloaded": (2, "fp32", 1, {"params": {"offload": True}}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_frozen_stays_and_goes_on_afterwards_in_the_same_bits(ranks, case):
    world, dtype, stage, sections = CASES[case]
    reference, moved, still = ranks.alone(come_and_go, config(0, dtype))
    assert (moved, still) == ([], [])
    for found, moved, still in ranks(world).run(come_and_go, config(stage, dtype, **sections)):
        assert (moved, still) == ([], [])
        assert differing(found, {name: reference[name] for name in found}) == []


def from_the_start(rank: int) -> dict[str, Tensor]:
    """What `unfrozen_late` should end in: the layer is in the plan from the start, and gets no gradient at first."""
    from muon_plugin import Muon

    model = IntegerModel()
    freeze_model = {name: p.requires_grad_(True) for name, p in model.named_parameters()}
    muon = Muon(model.named_parameters(), model=model, lr=0.01, weight_decay=0.1)
    for step in range(6):
        model(step, 0, 0, 1, 1).backward()
        for name, p in freeze_model.items():
            if "unused" in name:
                p.grad = torch.zeros_like(p)  # as the engine does
            elif name in LATE and step < 2:
                p.grad = None
        muon.step()
        muon.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_what_is_unfrozen_late_is_trained_where_the_engine_trains_it(ranks, tmp_path):
    reference = ranks.alone(from_the_start)
    for world, folder in ((1, ""), (2, ""), (2, str(tmp_path))):
        for found in ranks(world).run(unfrozen_late, config(0), folder):
            assert differing({name: found[name] for name in reference}, reference) == []


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")])
def test_unfreezing_what_the_engine_has_left_out_is_an_error(ranks, stage, dtype):
    with pytest.raises(RankError) as caught:
        ranks(2).run(unfrozen_late, config(stage, dtype))
    for kind, message in caught.value.errors:
        assert kind == "RuntimeError"
        assert "parameter frozen.weight requires gradients now, was frozen when the optimizer was built" in message
        assert "Unfreeze it before deepspeed.initialize, and freeze it again afterwards" in message


def unfrozen_for_initialize(rank: int, settings: dict[str, Any]) -> bool:
    """What the error says: unfrozen when the engine is built, frozen for the first steps."""
    model = IntegerModel().requires_grad_(True)
    engine = build(rank, settings, model)
    freeze(engine, LATE)
    before = weights(engine)["frozen.weight"]
    train(engine, rank, 2)
    at = weights(engine)["frozen.weight"]
    freeze(engine, LATE, False)
    train(engine, rank, 1)
    return torch.equal(before, at) and not torch.equal(at, weights(engine)["frozen.weight"])


@pytest.mark.parametrize("stage", [1, 3])
def test_the_advice_of_that_error_is_true(ranks, stage):
    assert ranks(2).run(unfrozen_for_initialize, config(stage)) == [True, True]


def own_optimizer(rank: int, settings: dict[str, Any], schedule: bool = False) -> list[str]:
    """A client's own Muon, whose first group is frozen but for a bias: what has moved when it is unfrozen later."""
    import muon_plugin

    muon_plugin.register()
    torch.manual_seed(0)
    model = IntegerModel()
    freeze_model = {"qkv.weight", "norm.weight", "norm.bias"}
    for name, p in model.named_parameters():
        p.requires_grad_(name not in freeze_model)
    named = list(model.named_parameters())
    first = [pair for pair in named if pair[0].startswith(("qkv", "norm"))]
    rest = [pair for pair in named if not pair[0].startswith(("qkv", "norm"))]
    muon = muon_plugin.Muon([{"params": first}, {"params": rest}], model=model, lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(muon, lambda step: 1.0) if schedule else None
    settings = {key: value for key, value in settings.items() if key != "optimizer"}
    engine = build(rank, settings, model, optimizer=muon, lr_scheduler=scheduler)
    train(engine, rank, 1)
    before = weights(engine)
    freeze(engine, tuple(freeze_model), False)
    train(engine, rank, 2, first=1)
    after = weights(engine)
    return [name for name in (*freeze_model, "qkv.bias") if not torch.equal(before[name], after[name])]


def test_a_clients_own_optimizer_trains_what_is_unfrozen_where_the_engine_does(ranks):
    assert [len(moved) for moved in ranks(2).run(own_optimizer, config(0))] == [4, 4]
    with pytest.raises(RankError, match=r"parameter qkv\.weight requires gradients now"):
        ranks(2).run(own_optimizer, config(1))


def test_a_scheduler_whose_groups_the_engine_leaves_out_is_an_error(ranks):
    """Its rates are lists by position: ZeRO would drop the group of the frozen matrix, and all others would move up."""
    with pytest.raises(
        RankError, match=r"param_groups\[0\] holds frozen parameters alone, which the engine leaves out"
    ):
        ranks(2).run(own_optimizer, config(1), True)


def given_to_no_optimizer(rank: int) -> list[str]:
    model = IntegerModel()
    engine = build(rank, config(1), model, model_parameters=[p for p in model.parameters() if p.requires_grad])
    freeze(engine, LATE, False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(engine, rank, 2)
    return [str(warning.message) for warning in caught if "given to no optimizer" in str(warning.message)]


def test_what_is_unfrozen_but_was_given_to_no_optimizer_is_told(ranks):
    for told in ranks(2).run(given_to_no_optimizer):
        assert told == [
            "2 parameters require gradients now, were given to no optimizer and are not trained: frozen.weight, "
            "frozen.bias"
        ]


def left_out_of_the_plan(rank: int, settings: dict[str, Any], what: str) -> None:
    """A fault is put into the plan by hand."""
    engine = build(rank, settings)
    muon = engine.basic_optimizer
    if what == "a matrix":
        (update,) = muon.halves.muon.updates
        number = next(i for i, matrix in enumerate(update.matrices) if matrix.name == "down.weight")
        exchange = update._exchange
        for i, this in enumerate(exchange._rounds):
            local = (tuple(i for i in batch if i != number) for batch in this.local)
            written = (tuple(run for run in runs if run.matrix != number) for runs in this.written)
            exchange._rounds[i] = replace(this, local=tuple(filter(None, local)), written=tuple(written))
        exchange.held[number] = []
        exchange._found.clear()
    elif rank == 1:  # on one rank alone
        half = muon.halves.adamw
        half._tensors.pop(next(p for p in half.tensors if p.numel()))
    train(engine, rank, 1)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize(("what", "named"), [("a matrix", "down.weight"), ("an AdamW tensor", None)])
def test_the_first_step_proves_that_nothing_was_left_out(ranks, stage, what, named):
    with pytest.raises(RankError) as caught:
        ranks(2).run(left_out_of_the_plan, config(stage), what)
    kinds, messages = zip(*caught.value.errors)
    assert kinds == ("RuntimeError",) * 2
    assert len(set(messages)) == 1, "every rank says the same"
    assert messages[0].startswith(f"the first step left out parameter {named or ''}")
