"""Parameter groups of muon_plugin.Muon without an engine: added later, saved in another order, with two rates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muon_plugin import Muon
from tests.support.integers import IntegerModel, differing
from tests.support.ranks import RankError

pytestmark = pytest.mark.fast


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    sizes = {"up": (16, 24), "down": (24, 16), "adapter": (16, 4), "lm_head": (16, 30)}
    return nn.ModuleDict({"embed": nn.Embedding(30, 16), **{name: nn.Linear(*size) for name, size in sizes.items()}})


def named(of: nn.Module, *layers: str) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in of.named_parameters() if name.split(".")[0] in layers]


OLD, NEW = ("embed", "up", "down"), ("adapter", "lm_head")


def step(of: nn.Module, number: int, *optimizers: Any) -> None:
    for i, p in enumerate(of.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * number + i))
    for optimizer in optimizers:
        optimizer.step()


def test_a_group_that_is_added_later_is_trained_and_the_others_keep_their_state():
    ours, theirs = model(), model()
    muon = Muon(named(ours, *OLD), lr=0.02, model=ours)
    reference = [Muon(named(theirs, *OLD), lr=0.02)]
    for number in range(4):
        if number == 2:
            muon.add_param_group({"params": named(ours, *NEW), "lr": 0.005, "name": "late"})
            reference.append(Muon(named(theirs, *NEW), lr=0.005))
        step(ours, number, muon)
        step(theirs, number, *reference)
    assert differing(dict(ours.named_parameters()), dict(theirs.named_parameters())) == []
    assert [(group["name"], group["client_group"]) for group in muon.param_groups] == [
        ("muon", 0), ("adamw", 0), ("late-muon", 1), ("late-adamw", 1)
    ]  # fmt: skip
    assert "adapter.weight  4x16" in muon.summary()
    muon.param_groups[2]["lr"] = 0.1
    with pytest.raises(RuntimeError, match=r"lr is 0\.1 in param_groups\[2\] and 0\.005 in param_groups\[3\]"):
        step(ours, 4, muon)
    muon.param_groups[2]["lr"] = 0.005
    again = Muon([{"params": named(ours, *OLD)}, {"params": named(ours, *NEW), "name": "late"}])
    again.load_state_dict(copy.deepcopy(muon.state_dict()))
    assert [group["lr"] for group in again.param_groups] == [0.02, 0.02, 0.005, 0.005]


def test_an_added_group_is_routed_by_the_models_types_and_the_optimizers_patterns():
    layers = nn.ModuleDict({"up": nn.Linear(8, 8)})
    muon = Muon(layers.named_parameters(), model=layers, exclude=["up.bias"], split={"up.weight": 2})
    layers["table"] = nn.Embedding(9, 8)
    layers["side"] = nn.Linear(8, 6, bias=False)
    muon.add_param_group({"params": named(layers, "table", "side")})
    assert muon.routing.adamw["table.weight"] == "embedding"
    assert [m.name for m in muon.routing.matrices] == ["up.weight[0]", "up.weight[1]", "side.weight"]


def test_layers_that_are_unfrozen_can_be_added_to_a_model_with_nothing_to_train():
    layers = model().requires_grad_(False)
    with pytest.warns(UserWarning, match="nothing is trained"):
        muon = Muon(layers.named_parameters())
    layers["up"].requires_grad_(True)
    muon.add_param_group({"params": named(layers, "up")})
    before = layers["up"].weight.detach().clone()
    step(layers["up"], 0, muon)
    assert not torch.equal(before, layers["up"].weight)
    assert "nothing is trained" not in muon.summary()


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (lambda m: named(m, "up"), "up.weight is in the optimizer already"),
        (lambda m: [("up.weight", nn.Parameter(torch.zeros(3, 3)))], "another parameter of the name up.weight"),
        (lambda m: [nn.Parameter(torch.zeros(3, 3))], "without a name"),
        (lambda m: [("new", nn.Parameter(torch.zeros(3, 3), requires_grad=False))], "no parameter that requires grad"),
        (lambda m: [("new", nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64)))], "complex"),
    ],
)
def test_a_group_that_cannot_be_added_changes_nothing(params, match):
    layers = model()
    muon = Muon(layers.named_parameters())
    with pytest.raises(ValueError, match=match):
        muon.add_param_group({"params": params(layers)})
    assert len(muon.param_groups) == 2
    step(layers, 0, muon)


def test_ranks_add_a_group_together(ranks):
    alone = ranks.alone(added_later)
    for found in ranks(2).run(added_later):
        assert differing(found, alone) == []
    with pytest.raises(RankError) as caught:
        ranks(2).run(added_apart)
    for kind, message in caught.value.errors:
        assert kind == "ValueError"
        assert "disagree about the added parameters" in message


def added_later(rank: int) -> dict[str, Tensor]:
    import torch.distributed as dist

    layers = IntegerModel()
    first = [(name, p) for name, p in layers.named_parameters() if name.startswith(("embed", "qkv", "wide"))]
    muon = Muon(first, lr=0.01)
    for number in range(4):
        if number == 2:
            rest = [(name, p) for name, p in layers.named_parameters() if p not in muon.names]
            muon.add_param_group({"params": rest})
        layers(number, 0, rank, dist.get_world_size(), 1).backward()
        for p in layers.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        muon.step()
        muon.zero_grad()
        layers.zero_grad()
    return {name: p.detach().clone() for name, p in layers.named_parameters()}


def added_apart(rank: int) -> None:
    layers = model()
    Muon(named(layers, "up")).add_param_group({"params": named(layers, "down" if rank == 0 else "adapter")})


def test_keys_of_the_clients_own_are_kept_in_both_halves_and_told():
    """A schedule reads lr_scale (MAE, timm) or initial_lr; torch's optimizers keep what they do not know."""
    layers = model()
    muon = Muon([{"params": named(layers, *OLD), "lr_scale": 0.5, "initial_lr": 0.02}, {"params": named(layers, *NEW)}])
    assert [group.get("lr_scale") for group in muon.param_groups] == [0.5, 0.5, None, None]
    assert "note: parameter groups keep lr_scale, which Muon does not read" in muon.summary()
    torch.optim.lr_scheduler.LambdaLR(muon, lambda _: 1.0)
    muon.add_param_group({"params": [("late", nn.Parameter(torch.zeros(3, 3)))], "my_key": 1})
    assert "note: parameter groups keep my_key" in muon.summary()
    step(layers, 0, muon)


@pytest.mark.parametrize(
    "key", ["weigth_decay", "LR", "betta", "wd", "amsgrad", "fused", "use_muon", "exclude", "step", 1]
)
def test_keys_that_look_like_settings_are_refused(key):
    with pytest.raises(ValueError, match=rf"sets {key}=0; allowed there: .*, and keys of your own"):
        Muon([{"params": named(model(), *OLD), key: 0}])


def test_strides_are_for_matrices_to_be_contiguous():
    """torch's AdamW takes any; the error says how a model that is channels_last gets there."""
    layers = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 2), "table": nn.Embedding(6, 5), "up": nn.Linear(4, 8)})
    layers["table"].weight = nn.Parameter(torch.zeros(5, 6).T)
    layers.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"stem.weight is not contiguous .*torch\.contiguous_format"):
        Muon(layers.named_parameters(), model=layers)
    muon = Muon(layers.named_parameters(), model=layers, exclude=["stem"])
    step(layers, 0, muon)
    muon.load_state_dict(copy.deepcopy(muon.state_dict()))
    with pytest.raises(ValueError, match="not contiguous"):  # an engine reads its shards in order
        Muon(layers.named_parameters(), model=layers, exclude=["stem"]).hand_over(muon.host, muon.names)
    layers.to(memory_format=torch.contiguous_format)
    layers["table"].requires_grad_(False)
    step(layers, 0, Muon(layers.named_parameters(), model=layers))


FIRST, SECOND = ("embed", "up"), ("down", "lm_head")


def resumed(saved: Any, groups: list[dict[str, Any]], **settings: Any) -> Muon:
    muon = Muon(groups, **settings)
    muon.load_state_dict(copy.deepcopy(saved))
    return muon


def momenta(muon: Muon) -> dict[str, Tensor]:
    keys = ("momentum_buffer", "exp_avg")
    return {name: muon.state[p][key] for p, name in muon.names.items() for key in keys if key in muon.state[p]}


@pytest.mark.parametrize("how", ["in another order", "merged by 0.1.0"])
def test_saved_groups_are_found_by_their_parameters(how):
    """0.1.0 merged groups with equal options into one of matrices and one of the rest; it knew no client_group."""
    layers = model()
    first, second = {"params": named(layers, *FIRST)}, {"params": named(layers, *SECOND)}
    if how == "in another order":
        second["lr"], ours = 0.1, [{**second, "lr": 0.3}, first]
        muon = Muon([first, second], lr=0.02)
    else:
        ours = [first, second]
        muon = Muon([{"params": first["params"] + second["params"]}], lr=0.02)
    step(layers, 0, muon)
    saved = muon.state_dict()
    if how == "merged by 0.1.0":
        for group in saved["param_groups"]:
            del group["client_group"]
    again = resumed(saved, ours, lr=0.5)
    assert differing(momenta(again), momenta(muon)) == []
    assert [group["client_group"] for group in again.param_groups] == [0, 0, 1, 1]
    rates = [0.1, 0.1, 0.02, 0.02] if how == "in another order" else [0.02] * 4
    assert [group["lr"] for group in again.param_groups] == rates
    step(layers, 1, again)


def test_groups_that_the_checkpoint_does_not_have_are_named():
    layers = model()
    saved = Muon([{"params": named(layers, *FIRST)}]).state_dict()
    told = r"has 2 parameter groups, this run has 4\. .* lacks param_groups\[2\] \(muon: down\.weight\), "
    told += r"param_groups\[3\] \(adamw: down\.bias, lm_head\.weight and 1 more\), this run its groups none\."
    with pytest.raises(ValueError, match=told + ".*or load the weights alone"):
        resumed(saved, [{"params": named(layers, *FIRST)}, {"params": named(layers, *SECOND)}])


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_a_checkpoint_with_two_rates_for_one_group_is_told_and_the_remedies_work(key):
    layers = model()
    pairs = list(layers.named_parameters())
    muon = Muon(pairs, muon_lr=0.02, adam_lr=0.02)
    muon.param_groups[0][key] = 0.5
    saved = muon.state_dict()
    with pytest.raises(
        ValueError, match=rf"{key} 0\.5 in group 0 and 0\.\d+ in group 1.*one group in this run"
    ) as told:
        resumed(saved, [{"params": pairs}])
    values = [group[key] for group in muon.param_groups]
    matrices = [pair for pair in pairs if pair[0] not in muon.routing.adamw]
    own = [{"params": matrices}, {"params": [pair for pair in pairs if pair[0] in muon.routing.adamw]}]
    assert ("set muon_lr and adam_lr" in str(told.value)) is (key == "lr")
    remedies: list[tuple[Any, dict[str, float]]] = [(own, {})]
    remedies += [([{"params": pairs}], {"muon_lr": 0.1, "adam_lr": 0.1})] if key == "lr" else []
    for groups, settings in remedies:
        again = resumed(saved, groups, **settings)
        assert [group[key] for group in again.param_groups] == values
        step(layers, 0, again)
        again.param_groups[1][key] = 0.7  # and they may be driven apart from here
        step(layers, 1, again)


@pytest.mark.parametrize("schedule", ["OneCycleLR", "CyclicLR"])
def test_schedules_that_cycle_momentum_are_refused_by_torch_and_work_without(schedule):
    layers = model()
    muon = Muon(layers.named_parameters(), lr=0.02)
    made = {
        "OneCycleLR": lambda **more: torch.optim.lr_scheduler.OneCycleLR(muon, 0.1, total_steps=4, **more),
        "CyclicLR": lambda **more: torch.optim.lr_scheduler.CyclicLR(muon, 0.01, 0.1, **more),
    }[schedule]
    with pytest.raises(ValueError, match="cycle_momentum"):
        made()
    cycle = made(cycle_momentum=False)
    step(layers, 0, muon)
    cycle.step()
    assert len({group["lr"] for group in muon.param_groups}) == 1
    assert muon.param_groups[0]["momentum"] == 0.95
