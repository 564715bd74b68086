"""What a user watches under DeepSpeed: written by its own monitor, over all ranks, and its wall clock breakdown."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.integers import build, config, differing, train, trained
from tests.support.monitored import STEPS, check_sizes, watched, written


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (0, 2), (1, 2), (2, 2), (3, 2)])
def test_sizes_are_those_of_the_whole_model_and_measuring_changes_no_bit(ranks, tmp_path, stage, world):
    after = ranks(world).run(watched, config(stage, "fp32"), tmp_path)[0]
    check_sizes(written(tmp_path))
    assert differing(after, ranks(world).run(trained, config(stage, "fp32"), STEPS)[0]) == []


def test_a_skipped_step_is_not_measured(ranks, tmp_path):
    ranks(2).run(overflowing, config(1, "fp16"), tmp_path)
    found = written(tmp_path)
    assert len(found["update_rms_muon"]) == 1


def overflowing(rank: int, settings: dict[str, Any], folder: Path) -> None:
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "run"}
    engine = build(rank, {**settings, "steps_per_print": 1, "csv_monitor": monitor})
    for step in range(2):
        loss = engine(step, 0, rank, 2, 1)
        engine.backward(loss * (math.inf if step == 0 else 1))
        engine.step()
    assert engine.skipped_steps == 1
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_deepspeeds_log_has_the_momentum_of_matrices_and_the_betas_of_the_rest(ranks, stage):
    """DeepSpeed looks for betas in every group, and reports 0.0 for groups that have none."""
    params = {"momentum": 0.9, "betas": [0.8, 0.99], "muon_lr": 0.02, "adam_lr": 0.003}
    momenta, rates, logged = ranks(1).run(own_log, config(stage, params=params))[0]
    assert momenta == [0.9, [0.8, 0.99]]
    assert rates == [0.02, 0.003]
    assert "lr=[0.02, 0.003], mom=[0.9, [0.8, 0.99]]" in logged


def own_log(rank: int, settings: dict[str, Any]) -> Any:
    from deepspeed.utils import logger

    engine = build(rank, {**settings, "steps_per_print": 1})
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel("INFO")
    train(engine, rank, 1)
    logger.removeHandler(handler)
    logger.setLevel("ERROR")
    found = engine.get_mom(), engine.get_lr(), "\n".join(lines)
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_wall_clock_breakdown_shows_the_parts(ranks, stage):
    for lines in ranks(2).run(breakdown, config(stage, "bf16"))[:1]:
        parts = [line for line in lines.splitlines() if "muon_orthogonalize" in line]
        assert len(parts) == 2  # one a step
        for name in ("momentum", "exchange", "orthogonalize", "apply", "adamw"):
            assert f"muon_{name}: " in parts[0]


def breakdown(rank: int, settings: dict[str, Any]) -> str:
    import contextlib
    import io

    engine = build(rank, {**settings, "wall_clock_breakdown": True})
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(engine, rank, 2)
    engine.destroy()
    return printed.getvalue()
