"""Saved under one layout and resumed under another: the run ends in the bits of the one that never stopped."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.support.combinations import in_turn, some
from tests.support.integers import differing
from tests.support.megatron_checkpoints import HALF, STEPS, first_half, load, second_half
from tests.support.megatron_model import Layout, build, full_masters, full_weights, optimizer_for, step, trained

RELEASES = ("0.16.1", "0.19.2")
FULLY = {
    "TP 2 x DP 2 to one": (4, Layout(tp=2), 1, Layout()),
    "one to TP 2 x DP 2": (1, Layout(), 4, Layout(tp=2)),
    "TP 2 x PP 2 to DP 4": (4, Layout(tp=2, pp=2), 4, Layout()),
    "DP 4 to TP 4": (4, Layout(), 4, Layout(tp=4)),
    "EP 2 x DP 2 to EP 4": (4, Layout("moe", ep=2), 4, Layout("moe", ep=4)),
    # From EP above 1 to EP 1 Megatron's AdamW cannot resume either: one has two optimizers, the other one.
    "EP 4 to TP 2 x EP 2": (4, Layout("moe", ep=4), 4, Layout("moe", tp=2, ep=2, etp=1)),
    "EP 2 to PP 2 x EP 2": (2, Layout("moe", ep=2), 4, Layout("moe", pp=2, ep=2)),
}
BY_DP = {
    "DP 2 to 4": (2, Layout(), 4, Layout()),
    "DP 4 to 1": (4, Layout(), 1, Layout()),
    "TP 2, DP 2 to 1": (4, Layout(tp=2), 2, Layout(tp=2)),
    "experts, the same layout": (4, Layout("moe", ep=2), 4, Layout("moe", ep=2)),
}
LEGACY = [case for case in BY_DP if "experts" not in case]
KINDS = ["fully_reshardable", "dp_reshardable", "legacy"]


def resume(ranks, release, kind: str, case: Any, folder: Path) -> None:
    world, before, after_world, after = case
    ranks(world, release).run(first_half, before, kind, str(folder))
    found = ranks(after_world, release).run(second_half, after, kind, str(folder))[0]
    straight = ranks.alone(trained, Layout(before.model), STEPS, megatron=release)
    assert differing(found, straight) == []


@pytest.mark.parametrize(("release", "case"), in_turn(RELEASES, some(FULLY, 2)))
def test_fully_reshardable_resumes_under_any_layout(ranks, release, case, tmp_path):
    """Megatron-Bridge #2307: checkpoints of the layer-wise optimizer resume at the DP size that saved them alone."""
    resume(ranks, release, "fully_reshardable", FULLY[case], tmp_path)


@pytest.mark.parametrize(("release", "case"), in_turn(RELEASES, some(BY_DP, 1)))
def test_dp_reshardable_resumes_at_another_dp(ranks, release, case, tmp_path):
    resume(ranks, release, "dp_reshardable", BY_DP[case], tmp_path)


@pytest.mark.parametrize(("release", "case"), in_turn(RELEASES, some(LEGACY, 2)))
def test_legacy_resumes_at_another_dp(ranks, release, case, tmp_path):
    resume(ranks, release, "legacy", BY_DP[case], tmp_path)


def from_adamw(rank: int, layout: Layout, kind: str, folder: str) -> Any:
    """Weights and state right after an AdamW checkpoint was loaded, and what was logged."""
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger("muon_plugin").addHandler(handler)
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout)
    with contextlib.redirect_stdout(logged):
        load(chunks, optimizer, kind, folder)
    states = [state for part in optimizer.chained_optimizers for state in part.optimizer.state.values()]
    momentum = sum(float(s["momentum_buffer"].abs().sum()) for s in states if "momentum_buffer" in s)
    rest = sum(float(s["exp_avg"].abs().sum()) for s in states if "exp_avg" in s)
    steps = {float(s["step"]) for s in states}
    weights = full_weights(chunks, layout) | full_masters(chunks, optimizer, layout)
    step(chunks, optimizer, layout, HALF)
    return weights, momentum, rest, steps, logged.getvalue()


@pytest.mark.parametrize(("release", "kind"), in_turn(RELEASES, some(KINDS, 2)))
def test_an_adamw_checkpoint_of_megatron_is_taken_over(ranks, release, kind, tmp_path):
    """Its weights and its half for the rest; the momentum of matrices starts from zero, and the log says so."""
    layout = Layout(tp=2)
    pool = ranks(4, release)
    saved = pool.run(first_half, layout, kind, str(tmp_path), optimizer="adam")[0]
    weights, momentum, rest, steps, logged = pool.run(from_adamw, layout, kind, str(tmp_path))[0]
    assert differing(weights, saved) == []
    assert (momentum, steps) == (0.0, {float(HALF)})
    assert rest > 0
    assert "AdamW" in logged
    assert "starts from zero" in logged


def queues(rank: int) -> tuple[bool, int]:
    """Whether both of Megatron's ways to ask for the queue of its writers give one, and how many processes it took."""
    import multiprocessing

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    get = getattr(filesystem_async, "get_write_results_queue", None) or filesystem_async._get_write_results_queue
    same = get() is get(mp_mode="fork")  # the second as megatron.training does with --async-save
    return same, sum("spawn" in type(child).__name__.lower() for child in multiprocessing.active_children())


def test_the_queue_of_megatrons_writers_is_forked_on_the_cpu(ranks, release):
    assert ranks(1, release).run(queues) == [(True, 0)]
