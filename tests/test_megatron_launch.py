"""The launch scripts: every argument is Megatron's, and the plan is printed, without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from ranks import ROOT, release

SCRIPTS = ("gpt_dense", "llama3_8b", "mixtral_8x7b", "moonlight_16b_a3b")


def dry_run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = f"{release('0.19.2')}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        ["bash", str(ROOT / "examples" / "megatron" / "launch" / f"{script}.sh")],
        env=os.environ | {"PYTHONPATH": paths, "PYTHON": sys.executable, "DRY_RUN": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_checks_every_argument_and_prints_the_plan(script):
    done = dry_run(script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "as in the paper" in done.stdout
    balance = float(re.search(r"FLOP, ([\d.]+) of the bound", done.stdout)[1])
    assert 1.0 <= balance < 1.1
    assert re.search(r"state: at most .*B a rank \(AdamW", done.stdout)
    assert ("experts  " in done.stdout) == (script in ("mixtral_8x7b", "moonlight_16b_a3b"))


@pytest.mark.parametrize("stage", ["2a", "2b", "3"])
def test_moonlights_later_stages(stage):
    assert dry_run("moonlight_16b_a3b", STAGE=stage).returncode == 0


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ("--muon-speed 3", "--muon-speed"),
        ("--muon-ns-method quick", "--muon-ns-method"),
        ("--tensor-model-parallel-size 3", "divisible"),
        ("--optimizer adam", "--optimizer muon and --use-distributed-optimizer are both needed"),
    ],
)
def test_what_would_not_start_is_told(extra, told):
    done = dry_run("llama3_8b", EXTRA_ARGS=extra)
    assert done.returncode == 2
    assert told in done.stderr
