"""The launch scripts: every argument is Megatron's, and the plan is printed, without a GPU."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.support import ROOT
from tests.support.combinations import FULL, some
from tests.support.commands import command
from tests.support.jobs import environment

SCRIPTS = ("gpt_dense", "llama3_8b", "mixtral_8x7b", "moonlight_16b_a3b")


@pytest.fixture
def dry_run(ranks, tmp_path):
    """`dry_run(script, **variables)`: the command that the script runs, in a process that has imported Megatron."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > {tmp_path}/arguments\n')
    python.chmod(0o755)

    def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        own = environment(PYTHON=str(python), DRY_RUN="1", **variables)
        subprocess.run(["bash", str(ROOT / "examples" / "megatron" / "launch" / f"{script}.sh")], env=own, check=True)
        *start, module, arguments = (tmp_path / "arguments").read_text().partition("muon_plugin.planner\0")
        assert (start, module) == (["-W\0ignore\0-m\0"], "muon_plugin.planner\0")
        return ranks.forked(command, "muon_plugin.planner", arguments.split("\0")[:-1], megatron="0.19.2")

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_checks_every_argument_and_prints_the_plan(dry_run, script):
    done = dry_run(script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "as in the paper" in done.stdout
    balance = float(re.search(r"FLOP, ([\d.]+) of the bound", done.stdout)[1])
    assert 1.0 <= balance < 1.1
    assert re.search(r"state: at most .*B a rank \(AdamW", done.stdout)
    assert ("experts  " in done.stdout) == (script in ("mixtral_8x7b", "moonlight_16b_a3b"))


@pytest.mark.parametrize("stage", some(["2b", "2a", "3"], 1))
def test_moonlights_later_stages(dry_run, stage):
    assert dry_run("moonlight_16b_a3b", STAGE=stage).returncode == 0


@pytest.mark.parametrize("script", ["kimi_k2", "moonlight_16b_a3b"] if FULL else ["kimi_k2"])
def test_muonclip(dry_run, script):
    """QK-Clip is Megatron's own flag, which asks for Transformer Engine: a plan is made without it."""
    done = dry_run(script, MUONCLIP="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"QK-\s*Clip at 100", done.stdout)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ("--muon-speed 3", "--muon-speed"),
        ("--no-such-flag 3", "unrecognized arguments: --no-such-flag 3"),
        ("--muon-ns-method quick", "--muon-ns-method"),
        ("--tensor-model-parallel-size 3", "divisible"),
        ("--optimizer adam", "--optimizer muon and --use-distributed-optimizer are both needed"),
    ],
)
def test_what_would_not_start_is_told(dry_run, extra, told):
    done = dry_run("llama3_8b", EXTRA_ARGS=extra)
    assert done.returncode == 2
    assert told in done.stderr
