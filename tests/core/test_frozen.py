"""Parameters that are frozen and unfrozen, without an engine: as torch's optimizers do, and told in the table."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muon_plugin import Muon
from muon_plugin.core import proof
from muon_plugin.core.call import Call
from muon_plugin.core.layout import Matrix, Shard, Strided, check_once, merged
from tests.support.integers import differing
from tests.support.ranks import RankError
from tests.support.torch_releases import needs_muon

pytestmark = pytest.mark.fast


def layers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(16, 32), "neck": nn.Linear(32, 32), "lm_head": nn.Linear(32, 8)})


def freeze(model: nn.Module, *names: str, frozen: bool = True) -> None:
    for name in names:
        model.get_submodule(name).requires_grad_(not frozen)


def backward(model: Any, step: int) -> None:
    torch.manual_seed(step)
    x = torch.randn(4, 16)
    model["lm_head"](torch.tanh(model["neck"](torch.tanh(model["body"](x))))).square().sum().backward()


def bits(muon: Muon, p: Tensor) -> dict[str, Tensor]:
    return {"weight": p.detach().clone()} | {key: value.clone() for key, value in muon.state[p].items()}


def torchs(model: nn.Module) -> tuple[torch.optim.Optimizer, ...]:
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "lm_head" not in name]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return (
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95)),
    )


@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_is_frozen_in_training_keeps_every_bit(set_to_none):
    """Also where a gradient is left from the step before, or of zeros: momentum and decay would move the weights."""
    model = layers()
    muon = Muon(model.named_parameters(), lr=0.01)
    for step in range(2):
        backward(model, step)
        muon.step()
        muon.zero_grad(set_to_none=set_to_none)
    freeze(model, "neck")
    before = [bits(muon, p) for p in model["neck"].parameters()]
    for step in range(2, 5):
        backward(model, step)
        muon.step()
        muon.zero_grad(set_to_none=set_to_none)
    for p, was in zip(model["neck"].parameters(), before):
        assert differing(bits(muon, p), was) == []


@needs_muon
@pytest.mark.filterwarnings("ignore:muon_plugin.Muon. no parameter is a matrix")
@pytest.mark.parametrize("late", [("body",), ("body", "neck"), ("lm_head",)])
def test_what_is_unfrozen_late_is_trained_as_torch_trains_it(late):
    """("body", "neck"): the head alone at first, so that Muon has nothing to do; "lm_head": AdamW has only biases."""
    ours, theirs = layers(), layers()
    for model in (ours, theirs):
        freeze(model, *late)
    muon, others = Muon(ours.named_parameters(), lr=0.01, ns_method="standard"), torchs(theirs)
    start = copy.deepcopy(theirs)
    for step in range(5):
        for model in (ours, theirs):
            freeze(model, *late, frozen=step < 2)
            model.zero_grad()
            backward(model, step)
        for optimizer in (muon, *others):
            optimizer.step()
        if step == 1:
            assert not any(muon.state.get(p) for name in late for p in ours.get_submodule(name).parameters())
    for (name, a), b, c in zip(ours.named_parameters(), theirs.parameters(), start.parameters()):
        assert (a - b).norm() < 1e-5 * (b - c).norm(), name


def test_the_table_counts_what_is_trained_and_tells_what_is_frozen():
    model = layers()
    freeze(model, "body", "lm_head")
    muon = Muon(model.named_parameters())
    table = muon.summary()
    assert "Muon   1 parameters, 1 matrices, 1,024 elements" in table
    assert "AdamW  1 parameters, 32 elements" in table
    assert "4 parameters (808 elements) are frozen; once they are unfrozen, Muon trains 1 of them and AdamW 3" in table
    assert f"optimizer state on this rank: {(4 * 1024 + 8 * 32) / 1000:.2f} kB" in table
    freeze(model, "body", "lm_head", frozen=False)
    backward(model, 0)
    muon.step()
    assert "are frozen" not in muon.summary()
    assert "Muon   2 parameters, 2 matrices, 1,536 elements" in muon.summary()


def test_a_model_that_is_frozen_as_a_whole_cannot_be_unfrozen_in_silence():
    model = layers().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        muon = Muon(model.named_parameters())
    muon.step()
    freeze(model, "neck", frozen=False)
    with pytest.raises(RuntimeError, match=r"parameter neck.weight requires gradients now.*build a new Muon with it"):
        muon.step()


def test_a_quantized_base_is_no_concern():
    """Frozen integers, as in QLoRA: nothing can unfreeze them."""
    model = layers()
    model["body"].weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    muon = Muon(model.named_parameters())
    assert {muon.names[p] for group in muon.param_groups for p in group["params"]}.isdisjoint({"body.weight"})


@pytest.mark.parametrize("frozen_again", [True, False])
@pytest.mark.parametrize("unfrozen_before", [True, False])
def test_checkpoints_hold_what_was_unfrozen(unfrozen_before, frozen_again):
    """Saved before or after a layer is unfrozen; loaded into an optimizer that was built with it frozen, or not."""

    def run(model: nn.ModuleDict, muon: Muon, steps: range) -> None:
        for step in steps:
            freeze(model, "body", frozen=step < (2 if unfrozen_before else 4))
            backward(model, step)
            muon.step()
            muon.zero_grad()

    straight = layers()
    freeze(straight, "body")
    muon = Muon(straight.named_parameters(), lr=0.01)
    run(straight, muon, range(4))
    saved = copy.deepcopy((straight.state_dict(), muon.state_dict()))
    run(straight, muon, range(4, 6))
    resumed = layers()
    freeze(resumed, "body", frozen=frozen_again)
    again = Muon(resumed.named_parameters(), lr=0.01)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    if not frozen_again:  # it gets a state of its own
        assert "exp_avg_sq" in again.state[resumed["body"].bias]
    run(resumed, again, range(4, 6))
    assert differing(straight.state_dict(), resumed.state_dict()) == []


def test_a_checkpoint_without_frozen_parameters_is_restored():
    """0.1.0 had none in its groups: not those of `body`, nor the group in which AdamW has the embedding."""

    def model() -> nn.ModuleDict:
        made = layers()
        made["embed"] = nn.Embedding(5, 5)
        return made.requires_grad_(False)

    before, after = model(), model()
    optimizers = []
    for each, kept in ((before, False), (after, True)):
        each["neck"].weight.requires_grad_(True)
        named = [(name, p) for name, p in each.named_parameters() if kept or p.requires_grad]
        optimizers.append(Muon(named, lr=0.01))
    for step in range(2):
        backward(before, step)
        optimizers[0].step()
        optimizers[0].zero_grad()
    after.load_state_dict(before.state_dict())
    for _ in range(2):  # and what is saved then can be loaded too
        saved = copy.deepcopy(optimizers[0].state_dict())
        optimizers[1].load_state_dict(saved)
        assert len(optimizers[1].param_groups) == 2
        optimizers[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    weight = after["neck"].weight
    assert torch.equal(
        optimizers[1].state[weight]["momentum_buffer"], optimizers[0].state[before["neck"].weight]["momentum_buffer"]
    )
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    freeze(after, "body", frozen=False)
    backward(after, 2)
    optimizers[1].step()
    assert not torch.equal(after["body"].weight, before["body"].weight)


def test_a_checkpoint_that_0_1_0_merged_and_saved_without_frozen_parameters_is_restored():
    """Two equal groups of the client in one, without the frozen `lm_head.weight`, and without the group of `neck.bias`.

    That group takes over the rate of the matrices, with which it shares one.
    """
    before, after = layers(), layers()
    for model in (before, after):
        for frozen in (model["lm_head"].weight, model["neck"].bias):
            frozen.requires_grad_(False)
    trained = [(name, p) for name, p in before.named_parameters() if p.requires_grad]
    order = ("body.weight", "body.bias", "lm_head.bias", "neck.weight")
    saved = Muon(sorted(trained, key=lambda pair: order.index(pair[0])), lr=0.003)
    backward(before, 0)
    saved.step()
    named = dict(after.named_parameters())
    groups = [("body.weight", "body.bias", "lm_head.weight", "lm_head.bias"), ("neck.weight", "neck.bias")]
    muon = Muon([{"params": [(name, named[name]) for name in names]} for names in groups], lr=0.01)
    muon.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert [group["lr"] for group in muon.param_groups] == [0.003] * 4
    for name, p in trained:
        assert differing(dict(muon.state[named[name]]), dict(saved.state[p])) == []
    after.load_state_dict(before.state_dict())
    for model, optimizer in ((before, saved), (after, muon)):
        optimizer.zero_grad()
        backward(model, 1)
        optimizer.step()
    assert differing(after.state_dict(), before.state_dict()) == []
    freeze(after, "neck")
    freeze(after, "neck", frozen=False)
    backward(after, 2)
    muon.step()
    assert not torch.equal(after["neck"].bias, before["neck"].bias)


def test_frozen_parameters_of_a_group_that_is_added_later_are_trained_once_they_are_unfrozen():
    ours, theirs = layers(), layers()
    for model in (ours, theirs):
        freeze(model, "neck")
    late = [(name, p) for name, p in ours.named_parameters() if not name.startswith("body")]
    muon = Muon([(name, p) for name, p in ours.named_parameters() if name.startswith("body")], lr=0.01)
    muon.add_param_group({"params": late})
    reference = Muon(theirs.named_parameters(), lr=0.01)
    assert "2 parameters (1,056 elements) are frozen; once they are unfrozen, Muon trains 1 of them" in muon.summary()
    with pytest.raises(ValueError, match=r"neck.weight is in the optimizer already.*as soon as it is unfrozen"):
        muon.add_param_group({"params": [("neck.weight", ours["neck"].weight), ("new", nn.Parameter(torch.ones(2)))]})
    for step in range(4):
        for model, optimizer in ((ours, muon), (theirs, reference)):
            freeze(model, "neck", frozen=step < 2)
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    assert differing(ours.state_dict(), theirs.state_dict()) == []


def test_a_frozen_matrix_of_other_strides_is_no_concern_until_it_is_unfrozen():
    """AdamW takes any strides; Muon would refuse this one if it were to be trained."""
    model = layers()
    model["body"].weight = nn.Parameter(torch.zeros(16, 32).T, requires_grad=False)
    model["lm_head"].weight = nn.Parameter(torch.zeros(32, 8).T, requires_grad=False)
    muon = Muon(model.named_parameters())
    backward(model, 0)
    muon.step()
    freeze(model, "lm_head", frozen=False)
    backward(model, 1)
    muon.step()
    assert muon.state[model["lm_head"].weight]
    freeze(model, "body", frozen=False)
    with pytest.raises(RuntimeError, match=r"parameter body.weight requires gradients now"):
        muon.step()


def test_plain_ddp_unfreezes_on_every_rank(ranks):
    alone = ranks.alone(under_ddp, True)
    for found in ranks(2).run(under_ddp, True):
        assert differing(found, alone) == []
    with pytest.raises(RankError, match="DistributedDataParallel, which does not reduce what was frozen"):
        ranks(2).run(under_ddp, False)


def under_ddp(rank: int, wrap_again: bool) -> dict[str, Tensor]:
    from torch.nn.parallel import DistributedDataParallel

    model = layers()
    model.forward = lambda x: model["lm_head"](torch.tanh(model["neck"](torch.tanh(model["body"](x)))))
    freeze(model, "body")
    muon = Muon(model.named_parameters(), lr=0.01, model=model)
    wrapped = DistributedDataParallel(model)
    for step in range(4):
        if step == 2:
            freeze(model, "body", frozen=False)
            wrapped = DistributedDataParallel(model) if wrap_again else wrapped
        torch.manual_seed(step)
        x = torch.randn(4, 16)
        x = x if wrap_again else x + rank
        wrapped(x).square().sum().backward()
        muon.step()
        muon.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_an_engine_that_steps_only_some_groups_is_told():
    model = layers()
    muon = Muon(model.named_parameters())
    groups = muon.param_groups
    for _ in range(2):  # as ZeRO makes its calls, one for each group
        for group in groups:
            backward(model, 0)
            muon.param_groups = [group]
            muon.step()
    muon = Muon(model.named_parameters())
    muon.param_groups = [next(group for group in muon.param_groups if group["use_muon"])]
    backward(model, 0)
    muon.step()
    with pytest.raises(RuntimeError, match=r"left out parameter body.bias.*did not step its parameter group"):
        muon.step()


def test_a_tensor_that_is_taken_out_of_its_group_is_told():
    model = layers()
    muon = Muon(model.named_parameters())
    for group in muon.param_groups:
        group["params"] = [p for p in group["params"] if p is not model["neck"].bias]
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"left out parameter neck.bias.* 32 of the 32 elements"):
        muon.step()


def test_parts_make_up_a_whole_or_are_refused():
    check_once("w", 8, [Strided(4, 4), Strided(0, 4)])
    check_once("w", 8, [Strided(0, 2, 4, 2), Strided(2, 2, 4, 2)])
    for parts in ([Strided(0, 4)], [Strided(0, 4), Strided(2, 4)], [Strided(0, 2, 4, 2), Strided(1, 4)]):
        with pytest.raises(ValueError, match="of the 8 elements of w"):
            check_once("w", 8, parts)
    assert merged([Strided(4, 2), Strided(0, 2, 2, 2), Strided(8, 1)]) == (Strided(0, 6), Strided(8, 1))


def test_what_no_half_or_both_would_train_is_refused():
    whole = Matrix("w", "w", 2, 4, Strided(0, 8))
    proof.check_routing([whole], {"b"}, {"w": (2, 4), "b": (3,)})
    for matrices, rest in (([], set()), ([whole], {"w"}), ([Matrix("w", "w", 1, 4, Strided(0, 4))], set())):
        with pytest.raises(ValueError, match=r"parameter w is in both halves|hold 4 of the 8 elements of w"):
            proof.check_routing(matrices, rest, {"w": (2, 4)})
    for calls in ([], [{"w"}, {"w"}], [{"w", "other"}]):
        with pytest.raises(ValueError, match="Muon is to train parameter"):
            proof.check_calls("Muon", ["w"], calls, {"w": (2, 4), "other": (1,)})
    flat = torch.zeros(8)
    with pytest.raises(ValueError, match="a and b lie in the same elements"):
        Call(0, (flat,), (Shard.of_range("a", 0, 4, flat), Shard.of_range("b", 0, 4, flat, 3)))
    with pytest.raises(ValueError, match="a is in a tensor that the engine's optimizer does not step"):
        Call(0, (), (Shard.of_range("a", 0, 4, flat),))
    with pytest.raises(ValueError, match="hold 4 of the 8 elements of a"):
        proof.held(Call(0, (flat,), (Shard.of_range("a", 0, 4, flat),)), {"a": (8,)}, flat.device)
