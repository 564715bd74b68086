"""Killed in the middle of a step or of a save, a run goes on from the last complete checkpoint, to the same bits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from integers import config, differing, trained
from ranks import ROOT
from survivor import STEPS

#: `KILLS=20 pytest tests/test_deepspeed_survival.py` for more; each start takes seconds.
KILLS = int(os.environ.get("KILLS", "2"))


def start(folder: Path, stage: int, number: int) -> list[subprocess.Popen]:
    for rank in (0, 1):
        (folder / f"ready{rank}").unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "STAGE": str(stage)}
    command = [sys.executable, str(ROOT / "tests" / "survivor.py")]
    arguments = [[str(rank), "2", str(folder), str(folder / f"store{number}")] for rank in (0, 1)]
    with open(folder / "log", "a") as log:
        return [subprocess.Popen([*command, *a], env=environment, stdout=log, stderr=log) for a in arguments]


def mark(folder: Path) -> int:
    """The step of the last complete checkpoint."""
    complete = folder / "complete"
    return int(complete.read_text().removeprefix("global_step")) if complete.exists() else 0


def finish(processes: list[subprocess.Popen], folder: Path) -> None:
    for process in processes:
        assert process.wait(timeout=300) == 0, (folder / "log").read_text()[-3000:]


@pytest.mark.parametrize("stage", [1, 3])
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
            process.wait()
        reached.append(mark(tmp_path))
    assert max(reached) > 0, reached
    assert min(reached) < STEPS, reached
    finish(start(tmp_path, stage, KILLS), tmp_path)
    whole = ranks(1).run(trained, config(1, "bf16"), STEPS)[0]
    assert differing(torch.load(tmp_path / "weights.pt", weights_only=True), whole) == [], reached
