"""Sizes of updates, weights, momentum and gradients in Megatron's log, TensorBoard and W&B, over every layout."""

from __future__ import annotations

import contextlib
import gc
import io
import math
import re
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.combinations import some
from tests.support.integers import differing
from tests.support.megatron_model import Layout, build, full_masters, full_weights, optimizer_for, step, trained

STEPS, INTERVAL, LR, DECAY = 4, 2, 0.01, 0.1
SHARES = {"optimizer_share", "exchange_share"}


def label(name: str, p: Tensor) -> str:
    """Which sizes a parameter counts to, by Megatron's own rule for Muon."""
    matrix = p.dim() >= 2 and "embedding" not in name and "output_layer" not in name
    return ("muon" if matrix else "adamw") + ("_experts" if ".experts." in name else "")


def by_definition(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """RMS of the updates and of the weights after the step, from whole fp32 weights."""
    squares: dict[str, list[float]] = {}
    for name, p in before.items():
        decay = DECAY if p.dim() >= 2 else 0.0  # Megatron decays no vectors
        update = (p.double() * (1 - LR * decay) - after[name].double()) / LR
        sums = squares.setdefault(label(name, p), [0.0, 0.0, 0.0])
        for i, value in enumerate((update.square().sum(), after[name].double().square().sum(), p.numel())):
            sums[i] += float(value)
    found = {f"update_rms/{key}": math.sqrt(update / n) for key, (update, _, n) in squares.items()}
    return found | {f"weight_rms/{key}": math.sqrt(weight / n) for key, (_, weight, n) in squares.items()}


def watched(rank: int, layout: Layout, folder: str) -> Any:
    """Steps under Megatron's globals, as its training loop sets them: what was printed and written, the weights."""
    from megatron.training import global_vars
    from torch.utils.tensorboard import SummaryWriter

    last = rank == torch.distributed.get_world_size() - 1
    args = SimpleNamespace(iteration=0, curr_iteration=0, log_interval=INTERVAL, train_iters=STEPS)
    wandb: list[tuple[dict[str, float], int]] = []
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout)
    global_vars._GLOBAL_ARGS = args
    if last:
        global_vars._GLOBAL_TENSORBOARD_WRITER = SummaryWriter(folder)
        global_vars._GLOBAL_WANDB_WRITER = SimpleNamespace(log=lambda values, at: wandb.append((values, at)))
    printed, expected, norms = io.StringIO(), [], []
    try:
        with contextlib.redirect_stdout(printed):
            for args.curr_iteration in range(STEPS):
                before = full_masters(chunks, optimizer, layout)
                _, norm, _ = step(chunks, optimizer, layout, args.curr_iteration)
                if (args.curr_iteration + 1) % INTERVAL == 0:
                    expected.append(by_definition(before, full_masters(chunks, optimizer, layout)))
                    norms.append(norm)
    finally:
        if last:
            global_vars._GLOBAL_TENSORBOARD_WRITER.close()
        global_vars._GLOBAL_ARGS = global_vars._GLOBAL_TENSORBOARD_WRITER = global_vars._GLOBAL_WANDB_WRITER = None
    weights = full_weights(chunks, layout) | full_masters(chunks, optimizer, layout)
    return printed.getvalue(), wandb, expected, norms, weights


LAYOUTS = {
    "one process": (1, Layout()),
    "TP 2 x DP 2": (4, Layout(tp=2)),
    "biases, TP 2": (2, Layout("gelu", tp=2)),
    "PP 2, tied embeddings": (2, Layout(pp=2, tied=True)),
    "experts": (1, Layout("moe")),
    "experts, EP 2": (2, Layout("moe", ep=2)),
    "two instances": (4, Layout(instances=2)),
}


@pytest.mark.parametrize("name", some(LAYOUTS, 3))
def test_logged_sizes_are_those_of_the_whole_model_and_measuring_changes_no_bit(ranks, tmp_path, name):
    world, layout = LAYOUTS[name]
    *others, last = ranks(world, "0.19.2").run(watched, layout, str(tmp_path))
    printed, wandb, expected, norms, weights = last
    lines = re.findall(r"^ \[muon\] iteration +(\d+)/ +4 \| (.*)$", printed, re.M)
    assert [int(at) for at, _ in lines] == [2, 4]
    assert all("[muon]" not in other[0] for other in others), "only the last rank writes, as Megatron does"
    written = tensorboard(tmp_path)
    for number, (values, at) in enumerate(wandb):
        assert at == INTERVAL * (number + 1)
        assert written[at] == pytest.approx(values, rel=1e-6)
        sizes = {key.removeprefix("muon/"): value for key, value in values.items()}
        for key, value in expected[number].items():
            assert sizes[key] == pytest.approx(value, rel=1e-3), key
        assert sizes["gradient_norm"] == pytest.approx(float(norms[number]), rel=1e-6)
        assert all(f"{key} {value:.4g}" in lines[number][1] for key, value in sizes.items())
        assert 0 <= sizes["exchange_share"] < sizes["optimizer_share"] < 1
        one = alone(ranks, layout)[number]
        for key, value in one.items():
            assert sizes[key] == pytest.approx(value, rel=1e-4), key
    assert len(wandb) == 2
    assert differing(weights, ranks(world, "0.19.2").run(trained, layout, STEPS)[0]) == []


def stepped_by_a_loop_of_its_own(rank: int, layout: Layout) -> list[str]:
    """Steps with what a loop may leave out of Megatron's arguments: what went wrong."""
    from megatron.training import global_vars

    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout)
    wrong = []
    for known in ({}, {"log_interval": 1}, {"log_interval": 0, "iteration": 0}, {"log_interval": None, "iteration": 0}):
        global_vars._GLOBAL_ARGS = SimpleNamespace(**known)
        try:
            step(chunks, optimizer, layout, 0)
        except Exception as error:
            wrong.append(f"{known}: {type(error).__name__}: {error}")
        finally:
            global_vars._GLOBAL_ARGS = None
    global_vars._GLOBAL_ARGS = SimpleNamespace(log_interval=1, curr_iteration=0)  # of `train_step` alone
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        step(chunks, optimizer, layout, 0)
    global_vars._GLOBAL_ARGS = None
    return wrong if "[muon] iteration" in printed.getvalue() else [*wrong, "curr_iteration alone is not measured"]


def test_a_training_loop_of_the_users_own_need_not_have_megatrons_arguments(ranks):
    assert ranks(1, "0.19.2").run(stepped_by_a_loop_of_its_own, Layout()) == [[]]


def dropped(rank: int, layout: Layout) -> bool:
    """Whether an optimizer is freed with its last reference, without waiting for the garbage collector."""
    optimizer = optimizer_for(build(layout), layout)
    alive = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        return alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("version", ["0.16.1", "0.19.2"])
def test_monitoring_keeps_no_optimizer_alive(ranks, version):
    """Whoever builds another one would have the masters and the momentum of both in memory."""
    assert ranks(1, version).run(dropped, Layout()) == [True]


def alone(ranks: Any, layout: Layout) -> list[dict[str, float]]:
    """What one process writes for the same model, without the shares of time."""
    wandb = ranks.alone(watched_once, Layout(layout.model, tied=layout.tied), megatron="0.19.2")[1]
    return [
        {name.removeprefix("muon/"): v for name, v in values.items() if name.removeprefix("muon/") not in SHARES}
        for values, _ in wandb
    ]


def watched_once(rank: int, layout: Layout) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return watched(rank, layout, folder)


def tensorboard(folder: Path) -> dict[int, dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    found: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault(event.step, {})[tag] = event.value
    return found


def test_steps_that_are_not_logged_compute_nothing(ranks):
    assert ranks(1, "0.19.2").run(counted, Layout())[0] == [0, 1, 0, 1]


def counted(rank: int, layout: Layout) -> list[int]:
    """For each step, whether anything was measured."""
    from megatron.training import global_vars

    from muon_plugin.core.measure import Measure

    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout)
    args = SimpleNamespace(iteration=0, curr_iteration=0, log_interval=INTERVAL, train_iters=STEPS)
    global_vars._GLOBAL_ARGS = args
    original, calls = Measure._sum, []
    Measure._sum = lambda *given: (calls.append(1), original(*given))[1]  # type: ignore[method-assign, assignment]
    found = []
    try:
        for args.curr_iteration in range(STEPS):
            calls.clear()
            step(chunks, optimizer, layout, args.curr_iteration)
            found.append(int(bool(calls)))
    finally:
        Measure._sum, global_vars._GLOBAL_ARGS = original, None  # type: ignore[method-assign]
    return found
