"""``--muon-scalar-optimizer lion``: Lion for everything but the matrices, with Megatron's rule and its betas."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.combinations import in_turn, some
from tests.support.fused_adam import fused_adam
from tests.support.integers import differing
from tests.support.megatron_checkpoints import STEPS, first_half, load, second_half
from tests.support.megatron_model import Layout, build, full_weights, named, optimizer_for, set_gradients, step, trained

RELEASES = ("0.16.1", "0.19.2")
LION = {"muon_scalar_optimizer": "lion"}
EMERGING = Path(__file__).parents[2] / ".venv/megatron-core/emerging-optimizers-0.3.0"


def against_megatrons(rank: int, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is no matrix after some steps here, and with the Lion that Megatron takes from emerging-optimizers."""
    sys.path.append(str(EMERGING))
    torch._dynamo.config.disable = True
    from emerging_optimizers.scalar_optimizers import Lion

    layout = Layout(dtype="fp32", muon={**LION, "lion_beta1": 0.9, "lion_beta2": 0.97})
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout)
    halves = optimizer.chained_optimizers[0].optimizer.halves
    theirs = {p: p.detach().clone().requires_grad_() for p in halves.adamw.tensors}
    groups = optimizer.chained_optimizers[0].optimizer.param_groups
    lion = Lion(
        [
            {
                "params": [theirs[p] for p in g["params"] if p in theirs],
                "weight_decay": g["weight_decay"] * g["wd_mult"],
            }
            for g in groups
        ],
        lr=0.01,
        betas=(0.9, 0.97),
    )
    for group in groups:
        group["weight_decay"] *= group["wd_mult"]  # as Megatron's scheduler does
    for number in range(steps):
        set_gradients(chunks, layout, number)
        optimizer.prepare_grads()
        for p, q in theirs.items():
            q.grad = p.grad.clone()
        optimizer.step_with_ready_grads()
        lion.step()
    pairs = list(enumerate(theirs.items()))
    return {str(i): p.detach().clone() for i, (p, _) in pairs}, {str(i): q.detach() for i, (_, q) in pairs}


def test_the_same_bits_as_megatrons_lion(ranks):
    if not EMERGING.is_dir():
        pytest.skip("emerging-optimizers is not installed")
    ours, theirs = ranks(1, "0.19.2").run(against_megatrons, 5)[0]
    assert len(ours) > 8
    assert differing(ours, theirs) == []


@pytest.mark.parametrize(
    ("release", "case"),
    in_turn(RELEASES, [(4, Layout(tp=2, muon=LION)), (3, Layout(muon=LION)), (4, Layout("moe", ep=2, muon=LION))]),
)
def test_layouts_change_no_bit(ranks, release, case):
    world, layout = case
    alone = ranks.alone(trained, Layout(layout.model, muon=LION), megatron=release)
    adamw = ranks.alone(trained, Layout(layout.model), megatron=release)
    assert differing(ranks(world, release).run(trained, layout)[0], alone) == []
    assert {name for name in alone if "layernorm" in name or "embedding" in name} <= set(differing(adamw, alone))


KINDS = ["fully_reshardable", "dp_reshardable", "legacy"]


@pytest.mark.parametrize(("release", "kind"), in_turn(RELEASES, some(KINDS, 1)))
def test_resumed_under_another_layout(ranks, release, kind, tmp_path):
    before, after = Layout(muon=LION), Layout(tp=2 if kind == "fully_reshardable" else 1, muon=LION)
    ranks(2, release).run(first_half, before, kind, str(tmp_path))
    found = ranks(4, release).run(second_half, after, kind, str(tmp_path))[0]
    assert differing(found, ranks.alone(trained, before, STEPS, megatron=release)) == []


def taken_over(rank: int, layout: Layout, kind: str, folder: str, **options: Any) -> Any:
    """Weights right after another rule's checkpoint was loaded, how many moments are not zero; then a step.

    Megatron's own AdamW resumes with FusedAdam: its checkpoints of torch's AdamW cannot be loaded (0.16.1).
    """
    with fused_adam() if options.get("optimizer") == "adam" else nullcontext():
        return _taken_over(layout, kind, folder, **options)


def _taken_over(layout: Layout, kind: str, folder: str, **options: Any) -> Any:
    chunks = build(layout)
    with torch.no_grad():
        for _, p, _ in named(chunks):
            p.zero_()
    optimizer = optimizer_for(chunks, layout, **options)
    if options.get("optimizer") == "adam":  # it has no state to load into before
        step(chunks, optimizer, layout, 0)
    load(chunks, optimizer, kind, folder)
    states = [state for part in optimizer.chained_optimizers for state in part.optimizer.state.values()]
    moments = [name for state in states for name in ("exp_avg", "exp_avg_sq") if name in state and state[name].any()]
    loaded = full_weights(chunks, layout)
    step(chunks, optimizer, layout, 5)
    return loaded, moments.count("exp_avg"), moments.count("exp_avg_sq"), full_weights(chunks, layout)


@pytest.mark.parametrize(
    ("release", "case"),
    in_turn(RELEASES, some(zip(["lion", "lion", "adam", "Megatron's AdamW"], [*KINDS, KINDS[0]]), 2)),
)
def test_lion_and_adamw_take_each_other_over(ranks, release, case, tmp_path):
    """The first moment is kept; the second one of Lion's checkpoint is its square, so AdamW's first step is small."""
    saved, kind = case
    pool, layout = ranks(2, release), Layout()
    first = {"optimizer": "adam"} if saved == "Megatron's AdamW" else {"muon_scalar_optimizer": saved}
    before = pool.run(first_half, layout, kind, str(tmp_path), **first)[0]
    for then in [{"muon_scalar_optimizer": "adam" if saved == "lion" else "lion"}, {"optimizer": "adam"}]:
        if then == first:
            continue
        loaded, one, two, after = pool.run(taken_over, layout, kind, str(tmp_path), **then)[0]
        assert differing(loaded, {name: before[name] for name in loaded}) == []
        assert one > 0
        assert (two > 0) is ("lion" not in then.values())
        for name in loaded if "optimizer" in then else ["embedding.word_embeddings.weight"]:
            assert 0 < (after[name] - loaded[name]).abs().max() < 0.1, name


def state_and_table(rank: int, layout: Layout) -> Any:
    import contextlib
    import io

    printed = io.StringIO()
    chunks = build(layout)
    with contextlib.redirect_stdout(printed):
        optimizer = optimizer_for(chunks, layout)
    inner = optimizer.chained_optimizers[0].optimizer
    held = [t for state in inner.state.values() for name, t in state.items() if name != "step"]
    return sum(t.nbytes for t in held), sum(p.numel() for p in inner.state), printed.getvalue()


def test_four_bytes_of_state_an_element(ranks, release):
    nbytes, elements, table = ranks(1, release).run(state_and_table, Layout(muon=LION))[0]
    assert nbytes == 4 * elements
    assert "Lion  " in table
    assert "the rest by Lion (0.95, 0.98)" in table
    assert f"optimizer state on this rank: {nbytes / 1e3:.2f} kB" in table


def monitored(rank: int, layout: Layout) -> Any:
    """What is measured of a step, and how much of what Lion trains has moved by the learning rate."""
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout, weight_decay=0.0)
    tensors = list(optimizer.chained_optimizers[0].optimizer.halves.adamw.tensors)
    set_gradients(chunks, layout, 0)
    before = [p.detach().clone() for p in tensors]
    _, found = optimizer._muon_monitor._monitor.step(super(type(optimizer), optimizer).step)
    moved = [p != q for p, q in zip(tensors, before)]
    return found, sum(int(m.sum()) for m in moved), sum(m.numel() for m in moved)


def test_the_update_of_lion_is_a_sign(ranks, release):
    found, moved, elements = ranks(1, release).run(monitored, Layout(dtype="fp32", muon=LION))[0]
    assert 0 < moved < elements  # the gradients are integers, some of them 0
    assert found["update_rms/lion"] == pytest.approx((moved / elements) ** 0.5)
    assert found["momentum_norm/lion"] > 0
    assert "update_rms/adamw" not in found
