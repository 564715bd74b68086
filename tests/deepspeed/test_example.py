"""`make train`, a few steps of it: both optimizers under DeepSpeed, the picture, the table, the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.combinations import FULL
from tests.support.jobs import environment

COMPARE = ROOT / "examples" / "llama" / "compare.py"


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(COMPARE), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.skipif(not FULL, reason="FULL=1; Slurm's tests train with the same script on two nodes")
def test_both_optimizers_train_and_are_compared(tmp_path):
    text = Path(sysconfig.get_paths()["stdlib"]) / "tkinter" / "__init__.py"
    found = compare("--steps", "3", "--nproc", "2", "--data", str(text), "--out", str(tmp_path))
    assert found.returncode == 0, found.stdout + found.stderr
    assert "Muon did not reach" in found.stdout or "Muon reached AdamW's final validation loss" in found.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert {run["steps"] for run in result["runs"].values()} == {3}
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    for name in ("AdamW", "Muon"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3]
        assert "val_loss" in lines[-1]
        assert list((tmp_path / name / "checkpoint").glob("*/*optim_states.pt"))
        assert list((tmp_path / name / "tensorboard").rglob("events.*"))
    assert "muon_plugin ---" in (tmp_path / "Muon" / "train.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--data", "nowhere"], "--data"),
        (["--nproc", "3"], "--nproc 3: must divide the train_batch_size"),
        (["--lr", "-1"], "--lr -1.0: must be above 0"),
    ],
)
def test_what_cannot_work_is_said_before_training(tmp_path, arguments, match):
    found = compare(*arguments, "--out", str(tmp_path))
    assert found.returncode == 1
    assert match in found.stderr
