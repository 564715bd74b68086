"""What a client gives to DeepSpeed: an optimizer of its own, groups, schedules, models with little to train."""

from __future__ import annotations

import re
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.combinations import some
from tests.support.integers import STEPS, IntegerModel, build, config, differing, gathered, train, trained, weights
from tests.support.ranks import RankError


@pytest.mark.parametrize("stage", [0, 1])
def test_a_client_can_hand_over_the_optimizer(ranks, stage):
    """`deepspeed.initialize(optimizer=muon_plugin.Muon(...))` is the same as the JSON."""
    from_json = ranks(1).run(trained, config(stage, "bf16"))[0]
    for as_callable in (False, True):
        for found in ranks(2).run(client_optimizer, config(stage, "bf16"), as_callable):
            assert differing(found, from_json) == []


def client_optimizer(rank: int, settings: dict[str, Any], as_callable: bool) -> dict[str, torch.Tensor]:
    from muon_plugin import Muon

    params = settings.pop("optimizer")["params"]
    model = IntegerModel().bfloat16()

    def make(_: Any = None) -> Muon:
        return Muon(model.named_parameters(), model=model, **params)

    engine = build(rank, settings, model, optimizer=make if as_callable else make())
    train(engine, rank, STEPS)
    return weights(engine)


class Wrapper(nn.Module):
    """What a LightningModule, an adapter library or a module with the loss is around a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


OTHER_NAMES = [(how, stage) for how in ("wrapper", "without its model", "submodule") for stage in (0, 1, 3)]
OTHER_NAMES += [("compiled", 0), ("compiled", 1), ("zero.Init", 3)]  # DeepSpeed's ZeRO-3 takes no compiled module


@pytest.mark.parametrize(("how", "stage"), some(OTHER_NAMES, 6))
def test_the_optimizer_knows_parameters_by_object_not_by_name(ranks, how, stage):
    """A client's Muon calls them by other names than the module that the engine is given."""
    expected = ranks.alone(trained, config(stage))
    for rank, (found, printed) in enumerate(ranks(2).run(under_other_names, config(stage), how)):
        if how == "submodule":  # the rest of the model is in no optimizer
            found = {name: value for name, value in found.items() if name.startswith("wide.")}
            assert len(found) == 2
            assert differing(found, {name: expected[name] for name in found}) == []
        else:
            assert differing(found, expected) == []
        told = "require gradients but are not in the optimizer" in printed
        assert told is (how == "submodule" and rank == 0)


def under_other_names(rank: int, settings: dict[str, Any], how: str) -> tuple[dict[str, torch.Tensor], str]:
    """The weights after some steps, by the inner model's names; what rank 0 printed at start."""
    import deepspeed

    import muon_plugin

    muon_plugin.register()
    params = settings.pop("optimizer")["params"]
    with deepspeed.zero.Init(config_dict_or_path=settings) if how == "zero.Init" else nullcontext():
        inner = IntegerModel()
    held = inner.wide if how == "submodule" else inner
    known = None if how == "without its model" else held
    muon = muon_plugin.Muon(held.named_parameters(), model=known, **params)
    model = inner
    if how in ("wrapper", "without its model"):
        model = Wrapper(inner)
    if how == "compiled":
        model = torch.compile(inner, backend="eager")
    with redirect_stdout(StringIO()) as printed:
        engine = build(rank, settings, model, optimizer=muon)
    train(engine, rank, STEPS)
    if how == "submodule":  # DeepSpeed has masters of what is in the optimizer alone
        with gathered(inner):
            found = {name: p.detach().clone() for name, p in inner.named_parameters()}
    else:
        found = {re.sub(r"^(inner|_orig_mod)\.", "", name): value for name, value in weights(engine).items()}
    engine.destroy()
    return found, printed.getvalue()


def test_a_parameter_that_the_engines_model_does_not_have_is_refused(ranks):
    with pytest.raises(RankError, match=r"the optimizer holds weight \[4, 4\], which the model .* does not have"):
        ranks(1).run(holds_another_models)


def holds_another_models(rank: int) -> None:
    from muon_plugin import Muon

    settings = config(1)
    del settings["optimizer"]
    build(rank, settings, optimizer=Muon(nn.Linear(4, 4).named_parameters()))


def test_warmup_without_an_end_keeps_the_rate_of_each_half(ranks):
    """Since DeepSpeed #8171 it ends at each group's own rate; before, at the first's (test_releases.py)."""
    settings = config(1, params={"muon_lr": 0.02, "adam_lr": 0.003})
    settings["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}
    assert ranks(1).run(rates, settings) == [{True: 0.02, False: 0.003}]


def rates(rank: int, settings: dict[str, Any]) -> dict[bool, float]:
    engine = build(rank, settings)
    train(engine, rank, 3)
    return {group["use_muon"]: group["lr"] for group in engine.basic_optimizer.param_groups}


# DeepSpeed's ZeRO takes no model without trainable parameters, with any optimizer.
@pytest.mark.parametrize(("what", "stage"), [("nothing", 0), ("no matrix", 0), ("no matrix", 1), ("no matrix", 3)])
def test_a_model_without_matrices_runs_and_is_told(ranks, what, stage):
    """A reference model gets the trainer's JSON; prompt tuning trains an embedding, IA3 vectors."""
    for rank, (before, after, printed) in enumerate(ranks(2).run(without_matrices, config(stage), what)):
        moved = differing(before, after)
        assert moved == ([] if what == "nothing" else ["norm.weight", "norm.bias"])
        told = "nothing is trained" if what == "nothing" else "AdamW trains all of them"
        assert rank > 0 or told in printed


def without_matrices(rank: int, settings: dict[str, Any], what: str) -> tuple[Any, Any, str]:
    model = IntegerModel().requires_grad_(False)
    if what == "no matrix":
        model.norm.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with redirect_stdout(StringIO()) as printed:
        engine = build(rank, settings, model)
    if what == "no matrix":
        train(engine, rank, 2)
    with gathered(model):
        after = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.destroy()
    return before, after, printed.getvalue()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_rate_for_a_group_of_the_clients_by_position_is_no_rate_for_one_half(ranks, stage):
    """Each group that was given may have become two: positions that were meant for the client's are refused."""
    told = r"lr is 0 in param_groups\[0\] and 0\.01 in param_groups\[1\].*of 3"
    with pytest.raises(RankError, match=told) as caught:
        ranks(2).run(rate_by_position, config(stage), None)
    assert {kind for kind, _ in caught.value.errors} == {"RuntimeError"}
    with pytest.raises(RankError, match="Expected 3 lr_lambdas, but got 2"):
        ranks(2).run(rate_by_position, config(stage), [lambda_0, lambda_1])


def lambda_0(step: int) -> float:
    return 0.0


def lambda_1(step: int) -> float:
    return 1.0


def rate_by_position(rank: int, settings: dict[str, Any], lambdas: Any) -> None:
    from torch.optim.lr_scheduler import LambdaLR

    model = IntegerModel()
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": vectors}]
    schedule = None if lambdas is None else lambda optimizer: LambdaLR(optimizer, lambdas)
    engine = build(rank, settings, model, model_parameters=groups, lr_scheduler=schedule)
    train(engine, rank, 1)
    engine.optimizer.param_groups[0]["lr"] = 0.0
    train(engine, rank, 1, first=1)


def test_cut_parameters_are_not_stepped_without_their_engine(ranks):
    with pytest.raises(RankError, match=r"an engine has cut the parameters of this Muon"):
        ranks(1).run(stepped_without_engine)


def stepped_without_engine(rank: int) -> None:
    import deepspeed

    import muon_plugin

    muon_plugin.register()
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        model = IntegerModel()
    muon_plugin.Muon(model.named_parameters(), model=model).step()
