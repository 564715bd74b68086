"""Layers that are frozen in training, under Megatron's distributed optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.combinations import in_turn
from tests.support.integers import differing
from tests.support.megatron_model import (
    Layout,
    build,
    full_masters,
    full_weights,
    named,
    optimizer_for,
    step,
)
from tests.support.ranks import RankError

#: Parts of names: matrices (gate and up in one), a norm, and what AdamW has of the embedding.
COMING_AND_GOING = ("layers.1.mlp.linear_fc1", "layers.2.input_layernorm", "word_embeddings")


def freeze(chunks: list, parts: tuple[str, ...], frozen: bool = True) -> None:
    for name, p, _ in named(chunks):
        if any(part in name for part in parts):
            p.requires_grad_(not frozen)


def come_and_go(rank: int, layout: Layout) -> tuple[dict[str, Tensor], list[str], int]:
    """Two steps, two with some parameters frozen, two more: the weights, what moved meanwhile, how many are frozen."""
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout)
    for number in range(2):
        step(chunks, optimizer, layout, number)
    before = full_masters(chunks, optimizer, layout)
    kept = states(chunks, optimizer)
    freeze(chunks, COMING_AND_GOING)
    for number in range(2, 4):
        step(chunks, optimizer, layout, number)
    after = full_masters(chunks, optimizer, layout)
    frozen = [name for name in before if any(part in name for part in COMING_AND_GOING)]
    moved = [name for name in frozen if not torch.equal(before[name], after[name])]
    moved += differing(kept, states(chunks, optimizer))
    freeze(chunks, COMING_AND_GOING, False)
    for number in range(4, 6):
        step(chunks, optimizer, layout, number)
    optimizer.state_dict()  # Megatron's wants the same count of steps in all states
    return full_weights(chunks, layout) | full_masters(chunks, optimizer, layout), moved, len(frozen)


def states(chunks: list, optimizer: object) -> dict[str, Tensor]:
    """Momentum and moments of the frozen parameters' shards on this rank."""
    names = {id(p): name for name, p, _ in named(chunks) if any(part in name for part in COMING_AND_GOING)}
    found = {}
    for part in optimizer.chained_optimizers:  # type: ignore[attr-defined]
        for model in part.model_param_group_index_map:
            if id(model) in names:
                for key, value in part._main_and_state(model)[1].items():
                    if key != "step":
                        found[f"{names[id(model)]} {key}"] = value.clone()
    return found


LAYOUTS = [(1, Layout()), (3, Layout(dtype="fp32")), (4, Layout(tp=2))]


@pytest.mark.parametrize(("release", "case"), in_turn(("0.16.1", "0.19.2"), LAYOUTS))
def test_what_is_frozen_stays_and_goes_on_afterwards_in_the_same_bits(ranks, release, case):
    world, layout = case
    alone = ranks.alone(come_and_go, Layout(dtype=layout.dtype), megatron=release)[0]
    for found, moved, frozen in ranks(world, release).run(come_and_go, layout):
        assert (moved, frozen) == ([], 3)
        assert differing(found, alone) == []


def unfrozen_late(rank: int) -> None:
    layout = Layout()
    chunks = build(layout, freeze="layers.1.mlp")
    optimizer = optimizer_for(chunks, layout)
    step(chunks, optimizer, layout, 0)
    freeze(chunks, ("layers.1.mlp.linear_fc2",), False)
    optimizer.step()


def test_unfreezing_what_has_no_gradient_buffer_is_an_error(ranks, release):
    with pytest.raises(RankError) as caught:
        ranks(2, release).run(unfrozen_late)
    for kind, message in caught.value.errors:
        assert kind == "RuntimeError"
        assert "layers.1.mlp.linear_fc2.weight requires gradients now, was frozen when the optimizer" in message
        assert "Unfreeze it before that, and freeze it again afterwards" in message


def left_out(rank: int, what: str) -> None:
    """A fault is put into the plan by hand: everywhere for a matrix, on one rank for a tensor of AdamW's."""
    layout = Layout()
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout)
    halves = optimizer.chained_optimizers[0].optimizer.halves
    if what == "a matrix":
        exchange = halves.muon.updates[0]._exchange
        exchange._rounds = [type(this)() for this in exchange._rounds]
    elif rank == 1:
        halves.adamw._tensors.popitem()
    step(chunks, optimizer, layout, 0)


@pytest.mark.parametrize("what", ["a matrix", "an AdamW tensor"])
def test_the_first_step_proves_that_nothing_was_left_out(ranks, release, what):
    with pytest.raises(RankError) as caught:
        ranks(2, release).run(left_out, what)
    assert [kind for kind, _ in caught.value.errors] == ["RuntimeError"] * 2
    assert len({message for _, message in caught.value.errors}) == 1
    assert "the first step left out parameter " in caught.value.errors[0][1]
