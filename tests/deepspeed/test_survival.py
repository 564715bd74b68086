"""Killed in the middle of a step or of a save, a run goes on from the last complete checkpoint, to the same bits."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch

from tests.support import SUPPORT
from tests.support.combinations import FULL
from tests.support.integers import config, differing, trained
from tests.support.jobs import Process, environment
from tests.support.survivor import STEPS

#: `KILLS=20 pytest tests/deepspeed/test_survival.py` for more; each start takes seconds.
KILLS = int(os.environ.get("KILLS", "2"))


def start(folder: Path, stage: int, number: int) -> list[Process]:
    for rank in (0, 1):
        (folder / f"ready{rank}").unlink(missing_ok=True)
    own = environment(STAGE=str(stage))
    script = str(SUPPORT / "survivor.py")
    each = [[script, str(rank), "2", str(folder), str(folder / f"store{number}")] for rank in (0, 1)]
    with open(folder / "log", "a") as log:
        return [Process(arguments, own, log) for arguments in each]


def mark(folder: Path) -> int:
    """The step of the last complete checkpoint."""
    complete = folder / "complete"
    return int(complete.read_text().removeprefix("global_step")) if complete.exists() else 0


def finish(processes: list[Process], folder: Path) -> None:
    for process in processes:
        assert process.wait(timeout=300) == 0, (folder / "log").read_text()[-3000:]


@pytest.mark.parametrize("stage", [1, 3] if FULL else [3])
def test_a_killed_run_ends_in_the_bits_of_the_undisturbed_one(ranks, tmp_path, stage):
    draw = random.Random(stage)
    reached = []
    for number in range(KILLS):
        processes = start(tmp_path, stage, number)
        while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
            assert all(process.poll() is None for process in processes), (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.01)
        while number and not mark(tmp_path):  # the first may be killed before any checkpoint, however slow the machine
            assert all(process.poll() is None for process in processes), (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.8))
        for process in draw.sample(processes, 2):
            process.kill()
            process.wait(timeout=60)
        reached.append(mark(tmp_path))
    assert max(reached) > 0, reached
    assert min(reached) < STEPS, reached
    finish(start(tmp_path, stage, KILLS), tmp_path)
    whole = ranks.alone(trained, config(1, "bf16"), STEPS)
    assert differing(torch.load(tmp_path / "weights.pt", weights_only=True), whole) == [], reached
